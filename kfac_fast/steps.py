"""What a step does with the blocks of all layers at once: refresh, precondition, predict."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfac_fast.blocks import Block, left_out
from kfac_fast.eigenbases import apply_eigenbases, quadratic_form, refresh_eigenbases
from kfac_fast.factors import multiply_sides
from kfac_fast.grafting import AdamNorm
from kfac_fast.host_copy import HostCopy
from kfac_fast.inverses import apply_inverses, refresh_inverses
from kfac_fast.options import DampingMode


class StepReport(NamedTuple):
    """What a step did, for a callback. Reading a tensor makes the host wait for the device.

    Attributes:
        step: Number of the step, from 0.
        damping: Damping of the layers without one of their own.
        updated: Whether the factors were updated.
        refreshed: Whether the inverses or eigenbases were refreshed.
        clip_scale: What ``kl_clip`` scaled the step by, a scalar tensor; None without a clip.
        inner_product: Sum of the gradients' inner products with the preconditioned ones, a scalar
            tensor; None if no layer was preconditioned.
        skipped: Batches that were left out so far, one count a factor, a scalar tensor.
        failed: Matrices that could not be inverted so far, a scalar tensor.
    """

    step: int
    damping: float
    updated: bool
    refreshed: bool
    clip_scale: Tensor | None
    inner_product: Tensor | None
    skipped: Tensor
    failed: Tensor


class Refreshes:
    """What the host gets to know of past refreshes without waiting for the device."""

    def __init__(self) -> None:
        self._failed = HostCopy()
        self._warned = False
        self._unseen = HostCopy()
        self._unseen_since = HostCopy()

    def count(self, blocks: Sequence[Block]) -> None:
        """Count what has failed in a refresh of these blocks, and what is still to come."""
        self._failed.send(left_out(blocks)[1])
        self._unseen.send(_unseen(blocks))
        self._unseen_since = HostCopy()

    def came_too_early(self, blocks: Sequence[Block]) -> bool:
        """Whether the last one is known to have been before some factors' first finite batch.

        A device's counts arrive later: they are looked at in the next update of the factors.

        Args:
            blocks: Those with factors, which were updated.

        Returns:
            Whether these factors have had one since.
        """
        then = self._unseen.read()
        if not then:
            return False
        before = self._unseen_since.read()
        self._unseen_since.send(_unseen(blocks))
        now = self._unseen_since.read()
        known = before if now is None else now
        return known is not None and known < then

    def warn(self) -> None:
        """Warn of failures once, a refresh later: by then their count has come."""
        failed = self._failed.read()
        if failed and not self._warned:
            self._warned = True
            warnings.warn(
                f"KFAC: {failed} matrices could not be inverted; their layers keep what they had, "
                "and their damping is raised until it suffices; summary() says which",
                RuntimeWarning,
                stacklevel=5,
            )


def _unseen(blocks: Sequence[Block]) -> Tensor:
    """Number of factors that have seen no finite batch."""
    weights = [factor.weight for block in blocks for factor in block.factors]
    if not weights:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    return (torch.stack(weights) == 0).sum()


def refresh(blocks: Sequence[Block], damping: Sequence[float], mode: DampingMode) -> None:
    """Refresh the inverses, or under exact damping the eigenbases, of blocks with factors.

    Args:
        blocks: The blocks.
        damping: That of each block.
        mode: How the damping enters.
    """
    if mode != "exact":
        layers = [(block.factors, block.inverses) for block in blocks]
        refresh_inverses(layers, damping, mode)
        return
    refresh_eigenbases([(block.factors, block.bases) for block in blocks])
    for block in blocks:
        block.restart_correction()


def precondition(
    blocks: Sequence[Block], grads: Sequence[Tensor], damping: Sequence[float], mode: DampingMode
) -> tuple[list[Tensor], Tensor]:
    """Precondition the gradients of blocks with factors.

    Args:
        blocks: The blocks.
        grads: The gradient matrix of each.
        damping: That of each block, which acts only under exact damping; inverses have it in them.
        mode: How the damping enters.

    Returns:
        The preconditioned gradients, and the sum of their inner products with the gradients.
    """
    if mode != "exact":
        return apply_inverses(grads, [block.inverses for block in blocks])
    corrections = [block.correction for block in blocks]
    return apply_eigenbases(grads, [block.bases for block in blocks], corrections, damping)


def clip_scale(inner_product: Tensor, kl_clip: float, learning_rate: float) -> Tensor:
    r"""Scale of a step that bounds its squared length in the Fisher metric.

    .. math:: \nu = \min\Big(1, \sqrt{\frac{\kappa}{\eta^2 \sum \langle V, P \rangle}}\Big)

    Args:
        inner_product: :math:`\sum \langle V, P \rangle` of the gradients and the preconditioned
            ones, a scalar tensor.
        kl_clip: :math:`\kappa`.
        learning_rate: :math:`\eta`.

    Returns:
        :math:`\nu` as a scalar tensor; 1 where there is no step.
    """
    bound = kl_clip / learning_rate**2
    return (bound / inner_product.clamp(min=0)).sqrt().nan_to_num(nan=1.0).clamp(max=1)


def graft(block: Block, grad: Tensor, direction: Tensor) -> Tensor:
    """A direction, scaled in place to the length of Adam's step on the block's raw gradient.

    Args:
        block: The block, which keeps Adam's second moment.
        grad: Its raw gradient.
        direction: Its preconditioned gradient.

    Returns:
        The direction.
    """
    if block.norm is None:
        block.norm = AdamNorm(grad)
    length = torch.linalg.vector_norm(direction)
    return direction.mul_(block.norm.update(grad) / torch.where(length > 0, length, 1))


def write(
    blocks: Sequence[Block],
    directions: Sequence[Tensor],
    gradients: Mapping[Block, Sequence[Tensor | None]],
) -> None:
    """Write directions over the gradients that they were made of, all in one call.

    Args:
        blocks: The blocks.
        directions: The direction of each, as a matrix.
        gradients: The ``.grad`` of each parameter of a block.
    """
    pairs = [
        pair
        for block, direction in zip(blocks, directions, strict=True)
        for pair in block.layer.parts(gradients[block], direction)
    ]
    torch._foreach_copy_([own for own, _ in pairs], [entries for _, entries in pairs])


def gradient_divisor(loss_reduction: str, accumulation_steps: int) -> int:
    """What an accumulated loss divides ``.grad`` by but not the factors."""
    return accumulation_steps if loss_reduction == "sum" else 1


def predicted_change(
    blocks: Sequence[Block],
    gradients: Mapping[nn.Parameter, Tensor],
    steps: Mapping[nn.Parameter, Tensor],
    damping: Sequence[float],
    divisor: int,
) -> Tensor:
    """See :meth:`kfac_fast.KFAC.predicted_change`.

    Args:
        blocks: Blocks with factors.
        gradients: Gradients of the loss.
        steps: What was added to the parameters.
        damping: That of each block.
        divisor: That of the loss which the factors and the damping do not know of.

    Returns:
        Scalar tensor.
    """
    grads, deltas = (
        [
            block.layer.matrix([of[p] for p in block.layer.parameters()], block.dtype)
            for block in blocks
        ]
        for of in (gradients, steps)
    )
    corrections = [block.correction for block in blocks]
    if any(correction is not None for correction in corrections):
        change = quadratic_form(deltas, [block.bases for block in blocks], corrections)
    else:
        right = [block.factors[0].mean for block in blocks]
        left = [block.factors[1].mean if len(block.factors) > 1 else None for block in blocks]
        change = multiply_sides(deltas, right, left)[1]
    change = change / (2 * divisor)
    for grad, delta, own in zip(grads, deltas, damping, strict=True):
        change = change + ((grad + own / (2 * divisor) * delta) * delta).sum()
    return change
