"""The Triton kernel of preconditioning on CPU tensors; run by test_interpreted.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import assert_within_budget, bits, poisoned, spread
from steps import Lists, assert_steps_within_budget, layers
from torch import Tensor
from triton_kernels import rounded

import kfac_fast
from kfac_fast import ops
from kfac_fast.kernels.precondition import has_chunks, precondition
from kfac_fast.kernels.product import PRODUCTS

# Tiles with and without an end, sums longer than a chain, stacks, layers without an entry.
SHAPES: list[tuple[int, ...]] = [
    (64, 64), (65, 130), (1, 1), (2, 3, 3, 2), (0, 4), (5, 0), (0, 2, 2), (7, 520),
]  # fmt: skip
IN_CHUNKS: list[tuple[int, ...]] = [(64, 64), (8, 132), (3, 4, 8), (8, 520)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _run(lists: Lists, precision: str = "highest") -> ops.Preconditioned:
    out, inner = [poisoned(*v.shape) for v in lists[0]], poisoned()
    precondition(*lists, out, inner, precision)
    return ops.Preconditioned(out, inner)


@pytest.mark.parametrize("shapes", [SHAPES, IN_CHUNKS, SHAPES[:1], []], ids=str)
def test_lists(shapes: list[tuple[int, ...]]) -> None:
    lists = layers(shapes)
    assert_steps_within_budget(_run(lists), lists)


def test_only_what_is_aligned_is_read_in_chunks() -> None:
    x = torch.randn(3, 8, 12)
    assert has_chunks(x) and has_chunks(x[:1])
    for view in (x.mT, x[:, :, 1:9], x[:, :, :10], x[:, :7], torch.randn(3, 8, 13)[:, :, :12]):
        assert not has_chunks(view)


@pytest.mark.parametrize(
    "layout", [spread, lambda x: x.mT.contiguous().mT, lambda x: x[:1].expand(x.shape)]
)
@pytest.mark.parametrize("shapes", [SHAPES[1:4], IN_CHUNKS[1:3]], ids=str)
def test_strides(layout: Callable[[Tensor], Tensor], shapes: list[tuple[int, ...]]) -> None:
    lists = [[layout(x) for x in tensors] for tensors in layers(shapes)]
    expected = _run([[x.contiguous() for x in tensors] for tensors in lists])
    found = _run(lists)
    assert_steps_within_budget(found, lists)
    if shapes[0][0] == 65:  # as the others are read in other steps
        for mine, theirs in zip(found.grads, expected.grads, strict=True):
            assert torch.equal(bits(mine), bits(theirs))


@pytest.mark.parametrize("precision", PRODUCTS)
def test_precisions(precision: str) -> None:
    grads, right, left = layers([(40, 56)])
    found = _run([grads, right, left], precision)
    exact = left[0].double() @ grads[0].double() @ right[0].double()
    half = rounded(left[0], precision) @ rounded(grads[0], precision)
    theirs = rounded(half, precision) @ rounded(right[0], precision)
    assert_within_budget(found.grads[0], theirs, exact)


def test_the_public_function_serves_it() -> None:
    lists = layers([(20, 30), (7, 5)])
    with kfac_fast.use("triton"):
        assert_steps_within_budget(ops.precondition(*lists), lists)
        doubles = [[x.double() for x in tensors] for tensors in lists]
        with pytest.raises(RuntimeError, match="float64"):
            ops.precondition(*doubles)
        assert ops.precondition([], [], []).inner_product == 0
