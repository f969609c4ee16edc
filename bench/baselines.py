"""The ways to compute each operator's result in plain PyTorch; the fastest is the baseline.

Each function returns ways by name. A way takes the preallocated result and returns the result, that
one or another: no way copies, mirrors or checks what its user would not need. ``reference`` is the
library's own pure-PyTorch version, called without the dispatcher.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fast import reference

Ways = dict[str, Callable[[Any], Any]]


def by_reference(function: Callable[..., None], *arguments: Any) -> Ways:
    """The library's own way; ``arguments`` are the dispatcher's before ``out``."""

    def run(out: Tensor) -> Tensor:
        function(*arguments, out)
        return out

    return {"reference": run}


# Gram matrices of rows


def gram(x: Tensor, *, bias: bool, alpha: float, beta: float) -> Ways:
    """Ways to ``out <- beta out + alpha sum x~ x~^T``."""

    def rows() -> Tensor:
        flat = x.flatten(0, -2).float()
        return F.pad(flat, (0, 1), value=1.0) if bias else flat

    def addmm(out: Tensor) -> Tensor:
        r = rows()
        return out.addmm_(r.T, r, beta=beta, alpha=alpha)

    def matmul(out: Tensor) -> Tensor:
        r = rows()
        return r.T @ r

    def mm_and_sums(out: Tensor) -> Tensor:
        r = x.flatten(0, -2).float()
        torch.mm(r.T, r, out=out[:-1, :-1])
        torch.sum(r, 0, out=out[-1, :-1])
        out[:-1, -1] = out[-1, :-1]
        out[-1, -1] = len(r)
        return out

    def mm_to_float32(out: Tensor) -> Tensor:
        r = x.flatten(0, -2)
        return torch.mm(r.T, r, out_dtype=torch.float32)

    ways: Ways = {
        "addmm_": addmm,
        **by_reference(reference.gram, x, None, 1, bias, alpha, beta),
    }
    if beta == 0 and alpha == 1:
        ways["x.T @ x"] = matmul
        if bias:
            ways["mm + sums"] = mm_and_sums
        elif x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            ways["mm to float32"] = mm_to_float32
    return ways


def shared_gram(
    x: Tensor, *, reduction: str, bias: bool, segments: Tensor | None, num_segments: int
) -> Ways:
    """Ways to the Gram of sums or means over shared positions; a bias goes with a mean only."""

    def from_reduced(reduced: Tensor, out: Tensor) -> Tensor:
        rows = F.pad(reduced, (0, 1), value=1.0) if bias else reduced
        return torch.mm(rows.T, rows, out=out)

    def reduce(out: Tensor) -> Tensor:
        flat = x.flatten(1, -2)
        return from_reduced(flat.mean(1) if reduction == "mean" else flat.sum(1), out)

    def product_with_ones(out: Tensor) -> Tensor:
        flat = x.flatten(1, -2)
        weight = 1 / flat.shape[1] if reduction == "mean" else 1.0
        ones = x.new_full((len(x), 1, flat.shape[1]), weight)
        return from_reduced(torch.bmm(ones, flat)[:, 0], out)

    def index_add(out: Tensor) -> Tensor:
        total = x.new_zeros(num_segments, x.shape[-1]).index_add_(0, segments, x)
        count = torch.bincount(segments, minlength=num_segments).clamp_(min=1)
        return from_reduced(total / count[:, None], out)

    arguments = (x, None, segments, num_segments, reduction, 1, bias, 1.0, 0.0)
    ways = by_reference(reference.shared_gram, *arguments)
    if segments is not None:
        return {"index_add_ + mm": index_add, **ways}
    return {f"{reduction} + mm": reduce, "product with ones + mm": product_with_ones, **ways}


# Lists of matrices of mixed sizes


def _damped(matrix: Tensor, damping: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping)
    return shifted


def _grouped(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors of each shape."""
    groups = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.shape].append(index)
    return list(groups.values())


def _one_by_one(
    function: Callable[..., Tensor], matrices: Sequence[Tensor], damping: float
) -> Callable[[Any], Any]:
    def run(out: Sequence[Tensor]) -> Sequence[Tensor]:
        for matrix, result in zip(matrices, out, strict=True):
            function(_damped(matrix, damping), out=result)
        return out

    return run


def _damped_ways(
    op: str, function: Callable[..., Tensor], matrices: Sequence[Tensor], damping: float
) -> Ways:
    """Ways to ``function`` of every ``M + damping I``, by Cholesky."""
    like = matrices[0]
    dampings = [like.new_tensor(damping)] * len(matrices)
    info = torch.empty(len(matrices), dtype=torch.int32, device=like.device)

    def by_size(out: Sequence[Tensor]) -> Sequence[Tensor]:
        results = list(out)
        for indices in _grouped(matrices):
            stacked = torch.stack([matrices[i] for i in indices])
            stacked.diagonal(dim1=-2, dim2=-1).add_(damping)
            for i, result in zip(indices, function(stacked), strict=True):
                results[i] = result
        return results

    def run_reference(out: Sequence[Tensor]) -> Sequence[Tensor]:
        getattr(reference, op)(matrices, dampings, out, info, None)
        return out

    return {
        "cholesky, one by one": _one_by_one(function, matrices, damping),
        "cholesky, grouped by size": by_size,
        "reference": run_reference,
    }


def damped_inverse(matrices: Sequence[Tensor], damping: float) -> Ways:
    """Ways to the inverses of ``M + damping I``."""

    def by_cholesky(damped: Tensor, **out: Tensor) -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(damped), **out)

    ways = _damped_ways("damped_inverse", by_cholesky, matrices, damping)
    return {**ways, "linalg.inv, one by one": _one_by_one(torch.linalg.inv, matrices, damping)}


def damped_cholesky(matrices: Sequence[Tensor], damping: float) -> Ways:
    """Ways to the Cholesky factors of ``M + damping I``."""
    return _damped_ways("damped_cholesky", torch.linalg.cholesky, matrices, damping)


def eigh(matrices: Sequence[Tensor]) -> Ways:
    """Ways to the eigenvalues and eigenvectors of ``M``."""
    info = torch.empty(len(matrices), dtype=torch.int32, device=matrices[0].device)

    def one_by_one(out: Any) -> Any:
        return tuple(zip(*map(torch.linalg.eigh, matrices), strict=True))

    def by_size(out: Any) -> Any:
        values, vectors = map(list, out)
        for indices in _grouped(matrices):
            found = torch.linalg.eigh(torch.stack([matrices[i] for i in indices]))
            for i, *values_and_vectors in zip(indices, *found, strict=True):
                values[i], vectors[i] = values_and_vectors
        return values, vectors

    def run_reference(out: Any) -> Any:
        reference.eigh(matrices, *out, info)
        return out

    ways = {"eigh, one by one": one_by_one, "eigh, grouped by size": by_size}
    return {**ways, "reference": run_reference}


def _precondition_ways(
    op: str,
    names: tuple[str, str],
    single: Callable[..., Tensor],
    batched: Callable[..., Tensor],
    lists: tuple[Sequence[Tensor], ...],
) -> Ways:
    """Ways to every layer's result and the sum of the inner products with the gradients.

    ``single`` takes a layer's left side, gradient, right side and ``out``; ``batched`` the first
    three of a stack of layers.
    """
    grads, rights, lefts = lists
    groups = _grouped(grads)
    # Whoever groups layers by shape can keep the sides stacked; only gradients come one by one.
    stacked = [
        [torch.stack([side[i] for i in indices]) for side in (lefts, rights)] for indices in groups
    ]

    def loop(out: Sequence[Tensor]) -> list[Tensor]:
        inner = grads[0].new_zeros(())
        results = []
        for grad, right, left, target in zip(*lists, out, strict=True):
            result = single(left, grad, right, target)
            inner += torch.dot(grad.flatten(), result.flatten())
            results.append(result)
        return [*results, inner]

    def by_shape(out: Sequence[Tensor]) -> list[Tensor]:
        results = list(out)
        inner = grads[0].new_zeros(())
        for indices, (left, right) in zip(groups, stacked, strict=True):
            gradients = torch.stack([grads[i] for i in indices])
            products = batched(left, gradients, right)
            inner += torch.dot(gradients.flatten(), products.flatten())
            for i, result in zip(indices, products, strict=True):
                results[i] = result
        return [*results, inner]

    by_shape.inputs = grads, stacked  # type: ignore[attr-defined]

    def run_reference(out: Sequence[Tensor]) -> list[Tensor]:
        inner = grads[0].new_zeros(())
        getattr(reference, op)(*lists, out, inner)
        return [*out, inner]

    return dict(zip((*names, "reference"), (loop, by_shape, run_reference), strict=True))


def precondition(*lists: Sequence[Tensor]) -> Ways:
    """Ways to ``G^-1 V A^-1`` of every layer, from gradients and inverses."""

    def single(left: Tensor, grad: Tensor, right: Tensor, out: Tensor) -> Tensor:
        return torch.mm(left @ grad, right, out=out)

    def batched(left: Tensor, grad: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(left, grad), right)

    names = "mm, one by one", "bmm, grouped by shape"
    return _precondition_ways("precondition", names, single, batched, lists)


def cholesky_precondition(*lists: Sequence[Tensor]) -> Ways:
    """The same from Cholesky factors."""

    def solve(left: Tensor, grad: Tensor, right: Tensor, *_: Tensor) -> Tensor:
        half = torch.cholesky_solve(grad, left)
        return torch.cholesky_solve(half.mT, right).mT

    names = "cholesky_solve, one by one", "cholesky_solve, grouped by shape"
    return _precondition_ways("cholesky_precondition", names, solve, solve, lists)
