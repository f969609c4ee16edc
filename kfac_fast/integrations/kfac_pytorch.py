"""kfac-pytorch's factors and inverses, computed by kfac_fast.

Train inside of a ``with`` block::

    preconditioner = kfac.preconditioner.KFACPreconditioner(model, compute_method="inverse")
    with kfac_fast.integrations.kfac_pytorch.enabled(preconditioner):
        train(model, preconditioner)

It serves linear layers and convolutions in two dimensions, and the layers that precondition with
inverses; eigendecompositions are kfac-pytorch's own. Results are those of kfac-pytorch to rounding.
Where they are not those of the Fisher, they are so here, unless ``correct`` is given: gradients
keep the unit of a mean loss and are averaged over the rows; patches, their bias entries and the
gradients of a convolution are divided by the number ``T`` of its output positions before their
outer products are averaged over them, so that both factors are divided by ``T**2`` too often; and
patches are taken without the dilation and padded with zeros under every ``padding_mode``. Always,
patches are taken over all groups of channels, so that a grouped convolution's factors fit no
weight; and a running average takes in each call of a tied module as if it were a step, unless
kfac-pytorch is told ``update_factors_in_hook=False``, and then their mean. Other is how they are
computed: patches are never written out, one triangle of a factor is enough, and all inverses of a
rank are one call.

kfac-pytorch is on no package index, so nothing of it is imported, and a copy without metadata is
taken as it is: this is written for what the layers of version 0.4.2 at commit 869cf11 look like
(``module``, ``a_factor``, ``a_inv``, ``compute_a_inv``, and the same of ``g``), and tested with a
double of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.conv import ConvGeometry
from kfac_fast.integrations.convolutions import geometry_of
from kfac_fast.integrations.dampings import shift_of
from kfac_fast.integrations.replacing import replaced
from kfac_fast.integrations.versions import require

require("kfac-pytorch", "0.4.2", may_be_missing=True)


def get_a_factor(helper: Any, a: Tensor, *, correct: bool = False) -> Tensor:
    """Input factor of a batch; see kfac-pytorch's ``ModuleHelper.get_a_factor``.

    Args:
        helper: The layer's ``ModuleHelper``.
        a: Input of its module.
        correct: Whether a convolution's is that of the Fisher.

    Returns:
        Symmetric ``[in (+ 1), in (+ 1)]``, in the dtype of the input.
    """
    module, bias = helper.module, helper.has_bias()
    if isinstance(module, nn.Linear):
        return ops.gram(a, bias=bias, alpha=1 / a.shape[:-1].numel()).to(a.dtype)
    options: dict[str, Any] = {"stride": module.stride, "padding": module.padding}
    if correct:
        options = geometry_of(module, correct=True)
    geometry = ConvGeometry.normalize("kfac-pytorch", 2, module.kernel_size, **options)
    positions = math.prod(geometry.output_size(a.shape[2:]))
    scale = 1 / (len(a) * (positions if correct else positions**3))
    total = ops.conv_expand_gram(a, module.kernel_size, bias=bias, alpha=scale, **options)
    return total.to(a.dtype)


def get_g_factor(helper: Any, g: Tensor, *, correct: bool = False) -> Tensor:
    """Gradient factor of a batch; see kfac-pytorch's ``ModuleHelper.get_g_factor``.

    Args:
        helper: The layer's ``ModuleHelper``.
        g: Gradient with respect to the output of its module.
        correct: Whether it is that of the Fisher, of a loss that is a mean over the examples.

    Returns:
        Symmetric ``[out, out]``, in the dtype of the gradient.
    """
    is_linear = isinstance(helper.module, nn.Linear)
    rows, positions = (g, 1) if is_linear else (g.movedim(1, -1), g.shape[2:].numel())
    scale = len(g) if correct else 1 / (rows.shape[:-1].numel() * positions**2)
    return ops.gram(rows, alpha=scale).to(g.dtype)


class _Inverse(NamedTuple):
    """An inverse, and what of; None if the factor is not positive definite."""

    factor: Tensor
    version: int
    damping: float
    inverse: Tensor | None

    def is_of(self, factor: Tensor, damping: float) -> bool:
        """Whether this is the inverse of a factor as it is now."""
        now = factor._version, damping
        return self.factor is factor and (self.version, self.damping) == now


class _Inverses:
    """All inverses of this rank, computed when the first of them is asked for."""

    def __init__(self, preconditioner: Any) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        worker = preconditioner._assignment.inv_worker
        self._sides = [
            (layer, side)
            for name, layer in preconditioner._layers.values()
            for side in ("a", "g")
            if _is_served(layer) and worker(name, side.upper()) == rank
        ]
        self._ready: dict[tuple[int, str], _Inverse] = {}

    def compute(
        self, layer: Any, side: str, own: Callable[..., None], damping: float = 0.001
    ) -> None:
        """As a layer's ``compute_a_inv`` and ``compute_g_inv``, of which ``own`` is one."""
        factor = getattr(layer, f"{side}_factor")
        if factor is None:
            own(damping=damping)
            return
        key = id(layer), side
        if key not in self._ready or not self._ready[key].is_of(factor, damping):
            self._invert_all(damping)
        known = self._ready.pop(key, None)
        if known is None or known.inverse is None:
            own(damping=damping)
        else:
            setattr(layer, f"{side}_inv", known.inverse.to(layer.inv_dtype))

    def _invert_all(self, damping: float) -> None:
        sides = [s for s in self._sides if getattr(s[0], f"{s[1]}_factor") is not None]
        if not sides:
            return
        factors = [getattr(layer, f"{side}_factor") for layer, side in sides]
        inverses, info, _ = ops.damped_inverse(
            [factor.float() for factor in factors], shift_of(damping)
        )
        for (layer, side), factor, inverse, failed in zip(
            sides, factors, inverses, info.tolist(), strict=True
        ):
            found = None if failed else inverse
            self._ready[id(layer), side] = _Inverse(factor, factor._version, damping, found)


def _is_served(layer: Any) -> bool:
    """Whether a layer has inverses, rather than eigendecompositions, of symmetric factors."""
    return hasattr(layer, "a_inv") and layer.module.has_symmetric_factors()


@contextmanager
def enabled(preconditioner: Any, *, correct: bool = False) -> Iterator[None]:
    """Have a preconditioner's factors and inverses computed here inside of a ``with`` block.

    Args:
        preconditioner: A ``KFACPreconditioner``, or another ``BaseKFACPreconditioner``.
        correct: Whether factors are those of the Fisher, of a loss that is a mean over the
            examples.

    Yields:
        Nothing.
    """
    inverses = _Inverses(preconditioner)
    replacements: list[tuple[Any, str, Any]] = []
    for _, layer in preconditioner._layers.values():
        if isinstance(layer.module.module, nn.Linear | nn.Conv2d):
            helper = layer.module
            for function in (get_a_factor, get_g_factor):
                factor = partial(function, helper, correct=correct)
                replacements.append((helper, function.__name__, factor))
        if _is_served(layer):
            for side in ("a", "g"):
                name = f"compute_{side}_inv"
                own = getattr(layer, name)
                replacements.append((layer, name, partial(inverses.compute, layer, side, own)))
    with replaced(replacements):
        yield
