"""laplace-torch's Kronecker-factored curvature, computed by kfac_fast.

Pass a class of this module for the backend::

    la = Laplace(model, "classification", hessian_structure="kron",
                 backend=kfac_fast.integrations.laplace.KFACGGN)
    la.fit(data)

It serves all weights and the last layer, and the marginal likelihood on top of them. The factors
are those of laplace-torch's own curvlinops backend to rounding, or with
``backend_kwargs={"correct": True}`` the Fisher's, as far as
:mod:`kfac_fast.integrations.curvlinops` says; other structures than ``"kron"`` are that backend's.
The factor 1/2 of the regression's loss is split into its roots. The loss is that of the pass which
the factors are computed in, where laplace-torch runs another one. The posterior's factors are added
up in place, and decomposed at the same time; a matrix that is not finite is a ``ValueError``, where
laplace-torch ends the process.

Tested with laplace-torch 0.3 and curvlinops-for-pytorch 3.0.1.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from kfac_fast.eigenbases import eigendecompositions
from kfac_fast.integrations.curvlinops import KFACLinearOperator
from kfac_fast.integrations.versions import require

require("laplace-torch", "0.3")

from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN  # noqa: E402  # isort: skip
from laplace.utils.matrix import Kron, KronDecomposed  # noqa: E402  # isort: skip


class Factors(Kron):  # type: ignore[misc]
    """laplace-torch's Kronecker factors, which the sum of a data set is formed in."""

    def __add__(self, other: Kron) -> Factors:
        """The sum, in new memory."""
        return Factors(super().__add__(other).kfacs)

    __radd__ = __add__  # asked before the addition of laplace-torch's zeros

    def __iadd__(self, other: Kron) -> Factors:
        """Add another's matrices to these."""
        for own, block in zip(self.kfacs, other.kfacs, strict=True):
            for total, matrix in zip(own, block, strict=True):
                total += matrix
        return self

    def decompose(self, damping: bool = False) -> KronDecomposed:
        """Eigendecompositions of all matrices; see laplace-torch's ``Kron``.

        Args:
            damping: As there.

        Returns:
            Eigenvectors and eigenvalues.

        Raises:
            ValueError: If a matrix is not finite.
        """
        solved = eigendecompositions([matrix for block in self.kfacs for matrix in block])
        if not all(bool(found.valid) for found in solved):
            raise ValueError("Factors: the matrices must be finite, got one that is not")
        each = iter(solved)
        blocks = [[next(each) for _ in block] for block in self.kfacs]
        vectors = [[found.vectors for found in block] for block in blocks]
        values = [[found.values.clamp(min=0) for found in block] for block in blocks]
        return KronDecomposed(vectors, values, damping=damping)


class _Operator(KFACLinearOperator):
    """Keeps the loss of its pass."""

    loss: Tensor

    def _compute_loss_and_backward(self, output: Tensor, y: Tensor) -> None:
        self.loss = self._loss_func(output.detach(), y)
        super()._compute_loss_and_backward(output, y)


class _Kron:
    """What both backends have in common."""

    def __init__(self, *arguments: Any, correct: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.correct = correct

    def kron(self, x: Any, y: Tensor, N: int, **options: Any) -> tuple[Tensor, Any]:  # noqa: N803
        """Loss and Kronecker factors of a batch; see laplace-torch's ``CurvatureInterface``."""
        library: Any = self
        if isinstance(x, MutableMapping):
            options["batch_size_fn"] = lambda inputs: len(inputs[library.dict_key_x])
        operator = _Operator(
            library.model,
            library.lossfunc,
            library.params,
            [(x, y)],
            fisher_type=library._kron_fisher_type,
            separate_weight_and_bias=True,
            check_deterministic=False,
            correct=self.correct,
            **options,
        )
        operator.compute_kronecker_factors()
        factors = library._get_kron_factors(operator)
        factors = library._rescale_kron_factors(factors, len(y), N)
        if library.factor == 1:  # a bias' block has the very matrix of its weight's
            kfacs = [block if len(block) > 1 else [block[0].clone()] for block in factors.kfacs]
        else:
            kfacs = (factors * library.factor).kfacs
        return library.factor * operator.loss, Factors(kfacs)


class KFACGGN(_Kron, CurvlinopsGGN):  # type: ignore[misc]
    """The generalised Gauss-Newton matrix: type-2, or Monte-Carlo with ``stochastic=True``.

    Args:
        arguments: Of laplace-torch's ``CurvlinopsGGN``.
        correct: That of :class:`kfac_fast.integrations.curvlinops.KFACLinearOperator`.
        options: Of ``CurvlinopsGGN``.
    """


class KFACEF(_Kron, CurvlinopsEF):  # type: ignore[misc]
    """The empirical Fisher.

    Args:
        arguments: Of laplace-torch's ``CurvlinopsEF``.
        correct: That of :class:`kfac_fast.integrations.curvlinops.KFACLinearOperator`.
        options: Of ``CurvlinopsEF``.
    """
