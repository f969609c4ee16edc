"""Gradients to precondition, their exact steps, and the bound on the errors of a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from oracle import assert_within_budget
from torch import Tensor

import kfac_fast
from kfac_fast import ops

Precondition = Callable[..., ops.Preconditioned]
Lists = Sequence[Sequence[Tensor]]  # gradients, input sides, gradient sides


def layers(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[list[Tensor]]:
    """Random gradients and sides that are not symmetric, so that a transposed one shows."""
    inputs = [(*shape[:-2], shape[-1], shape[-1]) for shape in shapes]
    outputs = [(*shape[:-1], shape[-2]) for shape in shapes]
    return [
        [torch.randn(shape, dtype=dtype, device=device) for shape in each]
        for each in (shapes, inputs, outputs)
    ]


def exact_steps(op: Precondition, *lists: Sequence[Tensor]) -> list[Tensor]:
    """In float64; those in float64 are formed, or solved for once more, in extended precision."""
    doubles = [[x.double() for x in tensors] for tensors in lists]
    with kfac_fast.use("reference"):
        steps = op(*doubles).grads
        if not lists[0] or lists[0][0].dtype == torch.float32:
            return steps
        wide = []
        for step, *layer in zip(steps, *doubles, strict=True):
            p, v, a, g = (x.cpu().numpy().astype(np.longdouble) for x in (step, *layer))
            if op is ops.precondition:
                residual = g @ v @ a - p
            else:
                a, g = (np.tril(x) @ np.tril(x).swapaxes(-1, -2) for x in (a, g))
                residual = v - g @ p @ a
            wide.append(torch.from_numpy(residual.astype(np.float64)).to(step))
        errors = wide if op is ops.precondition else op(wide, *doubles[1:]).grads
    return [step + error for step, error in zip(steps, errors, strict=True)]


def assert_steps_within_budget(
    result: ops.Preconditioned, lists: Lists, op: Precondition = ops.precondition
) -> None:
    """Check each step against float64, and the inner product by what may cancel in it.

    Args:
        result: The steps under test and their inner product.
        lists: The arguments of ``op``.
        op: :func:`kfac_fast.ops.precondition` or :func:`kfac_fast.ops.cholesky_precondition`.
    """
    with kfac_fast.use("reference"):
        theirs = op(*lists)
    exact = exact_steps(op, *lists)
    for step, torch_result, ref64 in zip(result.grads, theirs.grads, exact, strict=True):
        assert_within_budget(step, torch_result, ref64)
    products = [v.double() * p for v, p in zip(lists[0], exact, strict=True)]
    scale = sum(product.abs().sum() for product in products)
    inner = sum(product.sum() for product in products)
    eps = torch.finfo(result.inner_product.dtype).eps
    assert (result.inner_product - inner).abs() <= 8 * eps * scale
