"""The curvature as a matrix of its own: eigenvalues, what follows from them, and powers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from kfac_fast.checks import refused
from kfac_fast.eigenbases import Eigenbasis, eigenvalues, refresh_eigenbases, scale_in_eigenbases
from kfac_fast.factors import RunningAverage
from kfac_fast.precision import in_own_precision
from kfac_fast.preconditioner import KFAC
from kfac_fast.steps import write


class Decomposition:
    r"""Eigendecomposition of a preconditioner's curvature, for Laplace and influence functions.

    .. math:: F_l = G_l \otimes A_l = Q_l \operatorname{diag}(\Lambda_l) \, Q_l^\top, \qquad
        Q_l = Q_{G,l} \otimes Q_{A,l}, \quad \Lambda_l = s_{G,l} s_{A,l}^\top

    Equivalent to::

        F = torch.block_diag(*[torch.kron(g, a) for g, a in factors])  # never formed
        values, vectors = torch.linalg.eigh(F)

    over the layers and groups, and the units of normalisations, each with its bias as the last
    input. It is a snapshot of the running averages as of the preconditioner's last step, which
    later steps leave alone, in the scale of its ``loss_reduction``, without any damping of its
    own: :math:`\lambda` is an argument of each method, and exact, as :meth:`kfac_fast.KFAC.step`
    has it under ``damping_mode="exact"``. Corrected eigenvalues (EKFAC) take the place of
    :math:`\Lambda_l`, in the basis that they are of. Eigenvectors have the factors' dtype; all
    that is made of eigenvalues is in float64, where the device has it.

    Args:
        kfac: The preconditioner.

    Attributes:
        device: Where the layers are.

    Raises:
        RuntimeError: If a layer has seen no finite batch yet, or an eigendecomposition fails.

    Source: Ritter et al. (2018); George et al. (2018), section 3.
    """

    @torch.no_grad()
    def __init__(self, kfac: KFAC) -> None:
        self.device = kfac.device
        self._blocks = list(kfac._blocks)
        unseen = [block.layer.name for block in self._blocks if not _seen(block.factors)]
        if unseen:
            raise RuntimeError(
                "Decomposition: kfac must have averaged in a finite batch for every layer, got "
                f"none for {unseen}; call kfac.step() first, or skip layers that are not used"
            )
        # Corrected eigenvalues are of the bases of the last refresh, the others of these factors.
        self._corrections = [
            copy.deepcopy(block.correction) if _seen([block.correction]) else None
            for block in self._blocks
        ]
        self._bases = [
            tuple(Eigenbasis(factor.mean) for factor in block.factors)
            if correction is None
            else copy.deepcopy(block.bases)
            for block, correction in zip(self._blocks, self._corrections, strict=True)
        ]
        self._refresh()

    def _refresh(self) -> None:
        """Decompose the factors of the blocks that are not corrected."""
        every = zip(self._blocks, self._bases, self._corrections, strict=True)
        fresh = [(block, bases) for block, bases, correction in every if correction is None]
        refresh_eigenbases([(block.factors, bases) for block, bases in fresh])
        failed = [b.layer.name for b, bases in fresh if any(int(own.failed) for own in bases)]
        if failed:
            raise RuntimeError(
                f"Decomposition: factors must have eigendecompositions, got none for {failed}"
            )

    def eigenvalues(self) -> dict[str, Tensor]:
        r"""All eigenvalues, in no order.

        Returns:
            :math:`\Lambda_l` by layer, ``[(groups,) out, in (+ 1)]``, none of them negative.
        """
        names = [block.layer.name for block in self._blocks]
        return dict(zip(names, self._damped("eigenvalues", 0), strict=True))

    def trace(self, damping: float = 0.0) -> Tensor:
        r"""Sum of the eigenvalues, :math:`\operatorname{tr}(F + \lambda I)`.

        Args:
            damping: :math:`\lambda`, at least 0.

        Returns:
            Scalar tensor.
        """
        return torch.stack([values.sum() for values in self._damped("trace", damping)]).sum()

    def frobenius_norm(self, damping: float = 0.0) -> Tensor:
        r"""Root of the sum of squared eigenvalues, :math:`\|F + \lambda I\|_F`.

        Args:
            damping: :math:`\lambda`, at least 0.

        Returns:
            Scalar tensor.
        """
        squares = [v.square().sum() for v in self._damped("frobenius_norm", damping)]
        return torch.stack(squares).sum().sqrt()

    def logdet(self, damping: float = 0.0) -> Tensor:
        r"""Sum of the eigenvalues' logarithms, :math:`\log \det (F + \lambda I)`.

        Args:
            damping: :math:`\lambda`, at least 0.

        Returns:
            Scalar tensor.

        Raises:
            ValueError: If the damping is zero, and an eigenvalue, too, up to rounding.
        """
        logs = [values.log().sum() for values in self._damped("logdet", damping, positive=True)]
        return torch.stack(logs).sum()

    @torch.no_grad()
    @in_own_precision
    def multiply(
        self,
        vectors: Mapping[nn.Parameter, Tensor],
        exponent: float = 1.0,
        damping: float = 0.0,
    ) -> dict[nn.Parameter, Tensor]:
        r"""Product of a vector with a power of the damped curvature.

        .. math:: u = (F + \lambda I)^p \, v

        An exponent of 1 is the curvature itself, -1 its damped inverse; -1/2 makes samples of
        :math:`\mathcal N(0, (F + \lambda I)^{-1})` from standard normal ones.

        Args:
            vectors: :math:`v`, a tensor of the parameter's shape for each of
                ``kfac.parameters()``; other parameters are left out.
            exponent: :math:`p`, any number.
            damping: :math:`\lambda`, at least 0.

        Returns:
            :math:`u` by parameter, in the vectors' dtypes. A part of a parameter that is not
            preconditioned stays as it is, as in :meth:`kfac_fast.KFAC.step`.

        Raises:
            ValueError: If a parameter's tensor is missing or of another shape, or if the exponent
                is negative, the damping zero, and an eigenvalue, too, up to rounding.
        """
        held = {block: block.layer.parameters() for block in self._blocks}
        products = {p: _vector_of(p, vectors).clone() for own in held.values() for p in own}
        tensors = {block: [products[p] for p in own] for block, own in held.items()}
        matrices = [block.layer.matrix(own, block.dtype) for block, own in tensors.items()]
        damped = self._damped("multiply", damping, positive=exponent < 0)
        scaled = scale_in_eigenbases(matrices, self._bases, (v**exponent for v in damped))
        write(self._blocks, scaled, tensors)
        return products

    def _damped(self, method: str, damping: float, positive: bool = False) -> Iterator[Tensor]:
        """The damped eigenvalues of one block after the other, checked."""
        if not 0 <= damping < math.inf:
            raise refused(f"Decomposition.{method}", "damping", "a number from 0", damping)
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        every = zip(self._blocks, self._bases, self._corrections, strict=True)
        for block, bases, correction in every:
            if positive and damping == 0 and not _positive_definite(bases, correction):
                expected = f"positive, for layer {block.layer.name!r} has eigenvalues of zero"
                raise refused(f"Decomposition.{method}", "damping", expected, damping)
            yield eigenvalues(bases, correction, wide) + damping


def _seen(averages: Sequence[RunningAverage | None]) -> bool:
    """Whether there are averages, and each of a finite batch."""
    return bool(averages) and all(a is not None and bool(a.weight > 0) for a in averages)


def _positive_definite(bases: Sequence[Eigenbasis], correction: RunningAverage | None) -> bool:
    """Whether no eigenvalue is zero up to the rounding of its factor."""
    if correction is not None:
        return bool((correction.mean > 0).all())
    for basis in bases:
        size, values = basis.vectors.shape[-1], basis.values
        rounding = size * torch.finfo(values.dtype).eps if basis.vectors.dim() > 1 else 0
        if not bool((values.amin(-1) > rounding * values.amax(-1)).all()):
            return False
    return True


def _vector_of(parameter: nn.Parameter, vectors: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """A parameter's tensor, checked."""
    vector = vectors.get(parameter)
    if vector is None or vector.shape != parameter.shape:
        shape = list(parameter.shape)
        expected = f"a mapping from each of kfac.parameters() to a tensor, here of shape {shape}"
        got = "none" if vector is None else list(vector.shape)
        raise refused("Decomposition.multiply", "vectors", expected, got)
    return vector
