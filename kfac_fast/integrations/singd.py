"""singd's optimizer with the curvature of its dense structures computed by kfac_fast.

Use the class of this module in place of singd's own, which it is a subclass of::

    optimizer = kfac_fast.integrations.singd.SINGD(model, structures=("dense", "dense"))

or have optimizers that are made for a while be of it with :func:`enabled`. It serves layers whose
two structures are dense; others are singd's own. The terms ``H_K`` and ``H_C`` are those of singd
to rounding, with its scales. Where they are not those of the Fisher, they are so here, unless
``correct`` is given: patches are padded with zeros under every ``padding_mode``. Always, patches
are averaged over the groups of channels, though each group has a block of its own, which one
structure has no room for; and the terms of a layer's calls are added up on both sides. Other is how
they are computed, of a side with many rows: its covariance is formed first, without ever writing
patches out, and then rotated. Of products with a transpose, one triangle is enough, and terms of
few rows are added to the structures without being formed.

Tested with singd 0.0.5.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.integrations.convolutions import are_patches_exact, output_positions, patches_gram
from kfac_fast.integrations.replacing import replaced
from kfac_fast.integrations.versions import require
from kfac_fast.schema import result_dtype

require("singd", "0.0.5")

import singd.optim.optimizer as library  # noqa: E402  # isort: skip
from singd.optim.utils import process_grad_output, process_input  # noqa: E402  # isort: skip
from singd.structures.base import StructuredMatrix  # noqa: E402  # isort: skip
from singd.structures.dense import DenseMatrix  # noqa: E402  # isort: skip


class Dense(DenseMatrix):  # type: ignore[misc]
    """singd's ``DenseMatrix``, of whose products with transposes one triangle is computed.

    It is saved as singd's own.
    """

    @classmethod
    def from_mat_inner(cls, X: Tensor) -> Dense:  # noqa: N803
        """``X X^T``."""
        return Product(X) if X.shape[1] < X.shape[0] else Dense(_square(X))

    def add_(self, other: DenseMatrix, alpha: float | Tensor = 1.0) -> Dense:
        """Add a multiple of another one in place."""
        if isinstance(other, Product) and other.root is not None:
            mat = self.to_dense()
            if mat.dtype == result_dtype(other.root.dtype):
                ops.gram(other.root.T, alpha=float(alpha), beta=1, out=mat)
                return self
        super().add_(other, alpha=alpha)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Dense:
        """Another of this class."""
        return Dense(copy.deepcopy(self.to_dense(), memo))

    def __reduce__(self) -> tuple[type, tuple[Tensor]]:
        """What makes singd's own of it."""
        return DenseMatrix, (self.to_dense(),)


class Product(Dense):
    """``X X^T``, of which ``X`` alone is kept, smaller than it, until its entries are read.

    So the terms of a whole model need not be there between its backward pass and its step, which
    adds them to other matrices one by one.

    Attributes:
        root: ``X``, or None once the product is formed.
    """

    def __init__(self, root: Tensor) -> None:
        StructuredMatrix.__init__(self)
        self._tensor_names.append("_mat")
        self.root: Tensor | None = root

    @cached_property
    def _mat(self) -> Tensor:
        assert self.root is not None
        root, self.root = self.root, None
        return _square(root)

    @classmethod
    def from_dense(cls, sym_mat: Tensor) -> Dense:
        """One of known entries."""
        return Dense(sym_mat)

    def average_trace(self) -> Tensor:
        """Mean of the diagonal."""
        trace: Tensor
        if self.root is None:
            trace = super().average_trace()
        else:
            trace = self.root.square().sum() / len(self.root)
        return trace


def _square(x: Tensor) -> Tensor:
    square: Tensor = ops.gram(x.T)
    return square.to(x.dtype)


# Rotating a covariance takes two products of its own size, which rotating few rows does not.
ROWS_PER_FEATURE = 2


class SINGD(library.SINGD):  # type: ignore[misc]
    """:class:`singd.optim.optimizer.SINGD`, its curvature formed by kfac_fast.

    Takes the same arguments, and ``correct``. Source: Lin et al. (2024), section 3.

    Args:
        arguments: Of singd's own class.
        correct: Whether padding modes of layers whose structures are dense are honoured.
        options: Of singd's own class.
    """

    SUPPORTED_STRUCTURES = library.SINGD.SUPPORTED_STRUCTURES | {"dense": Dense}
    correct = False

    def __init__(self, *arguments: Any, correct: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.correct = correct

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, whether it is singd's or of this class."""
        super().load_state_dict(state_dict)
        for matrices in (self.Ks, self.Cs, self.m_Ks, self.m_Cs, self.H_Ks, self.H_Cs):
            for name, matrix in matrices.items():
                if type(matrix) is DenseMatrix:
                    matrices[name] = Dense(matrix.to_dense())

    def _accumulate_H_terms(  # noqa: N802
        self, module: nn.Module, inputs: tuple[Tensor, ...], grad_output: Tensor
    ) -> None:
        name = self.module_names[module]
        sides = (self.Ks[name], self.H_Ks), (self.Cs[name], self.H_Cs)
        if not all(isinstance(matrix, DenseMatrix) for matrix, _ in sides):
            super()._accumulate_H_terms(module, inputs, grad_output)
            return
        average, approx = (
            self._get_param_group_entry(module, entry) for entry in ("loss_average", "kfac_approx")
        )
        dtypes, _ = self._get_preconditioner_dtypes_and_device(module)
        x, g = inputs[0].detach().to(dtypes[0]), grad_output.detach().to(dtypes[1])
        scale = 1 / self._get_grad_scale(self.steps - 1)
        terms = (
            _input_term(self.Ks[name], x, module, approx, self.correct),
            _gradient_term(self.Cs[name], g, module, average, approx, scale),
        )
        for (_, known), term in zip(sides, terms, strict=True):
            if dist.is_initialized():
                term.all_reduce(op=dist.ReduceOp.AVG if average else dist.ReduceOp.SUM)
            known[name] = known[name].add_(term) if name in known else term


def _input_term(
    k: DenseMatrix, x: Tensor, module: Any, approx: str, correct: bool = False
) -> DenseMatrix:
    """``K^T A K`` for the covariance ``A`` of the inputs."""
    is_convolution, expand = isinstance(module, nn.Conv2d), approx == "expand"
    if is_convolution:
        positions = output_positions(module, x) if expand else 1
    else:
        positions = x.shape[1:-1].numel() if expand else 1
    rows = len(x) * positions
    few = 1 if is_convolution else ROWS_PER_FEATURE  # patches would have to be written out
    mends = are_patches_exact(module, correct=correct) and not are_patches_exact(module)
    if rows <= few * len(k.to_dense()) and not mends:
        return k.from_inner(X=process_input(x, module, approx).T)
    options: dict[str, Any] = {"bias": module.bias is not None, "alpha": 1 / rows}
    if is_convolution:
        covariance = patches_gram(module, x, expand=expand, correct=correct, **options)
    elif expand or x.dim() == 2:
        covariance = ops.gram(x, **options)
    else:
        covariance = ops.shared_gram(x, reduction="mean", **options)
    return _rotated(k, covariance, x.dtype)


def _rotated(k: DenseMatrix, covariance: Tensor, dtype: torch.dtype) -> DenseMatrix:
    """``K^T C K``, rounded to half precision at the end: the covariance may be beyond its range."""
    if covariance.dtype == dtype:
        return k.from_inner2(covariance)
    basis = k.to_dense().to(covariance.dtype)
    return type(k)((basis.T @ covariance @ basis).to(dtype))


def _gradient_term(
    c: DenseMatrix, g: Tensor, module: Any, average: str | None, approx: str, scale: float
) -> DenseMatrix:
    """``C^T G C`` for the covariance ``G`` of the gradients, whose unit is that of the loss."""
    rows = g.movedim(1, -1) if isinstance(module, nn.Conv2d) else g
    expand = approx == "expand" or g.dim() == 2
    number = rows.shape[:-1].numel() if expand else len(g)
    if number <= ROWS_PER_FEATURE * len(c.to_dense()):
        inner = process_grad_output(g, module, average, approx) * sqrt(scale)
        return c.from_inner(X=inner.T)
    terms = {None: 1, "batch": len(g), "batch+sequence": rows.shape[:-1].numel()}[average]
    form = ops.gram if expand else ops.shared_gram
    options: dict[str, Any] = {} if expand else {"reduction": "sum"}
    return _rotated(c, form(rows, alpha=terms * scale, **options), g.dtype)


_library_makes = library.SINGD.__init__


@contextmanager
def enabled(*, correct: bool = False) -> Iterator[None]:
    """Have optimizers that are made inside of a ``with`` block be of this module's class.

    Args:
        correct: That of :class:`SINGD`.

    Yields:
        Nothing.
    """

    def make(self: Any, *args: Any, **options: Any) -> None:
        if type(self) is library.SINGD:
            self.__class__ = SINGD
            self.correct = correct
        _library_makes(self, *args, **options)

    with replaced([(library.SINGD, "__init__", make)]):
        yield
