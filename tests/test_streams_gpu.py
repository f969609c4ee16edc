"""What every kernel owes to whoever calls it on a CUDA device, whatever it computes.

It runs on the current stream, the host does not wait for it, it reads no memory that nobody wrote,
and the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from host import waits_refused
from oracle import bits
from torch import Tensor

import kfac_fast
from kfac_fast.backends import TABLE

Call = Callable[[], list[Tensor]]

CYCLES = 10**8  # tens of milliseconds: whatever does not wait for them comes too early


def _of(op: str, *inputs: Any, **options: Any) -> tuple[list[Tensor], Call]:
    """The tensors that a call reads, and the call."""
    lists = [x if isinstance(x, list) else [x] for x in inputs]
    tensors = [x for each in lists for x in each if isinstance(x, Tensor)]

    def call() -> list[Tensor]:
        result = getattr(kfac_fast, op)(*inputs, **options)
        if isinstance(result, Tensor):
            return [result]
        return [*result[0], *(x for x in result[1:] if x is not None)]

    return tensors, call


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def _masked_gram() -> tuple[list[Tensor], Call]:
    mask = torch.rand(3000, device="cuda") < 0.5
    return _of("gram", _normal(3000, 130), bias=True, mask=mask, groups=2)


def _segments() -> tuple[list[Tensor], Call]:
    graphs = torch.randint(50, (3000,), device="cuda")
    options = {"segments": graphs, "num_segments": 50, "bias": True}
    return _of("shared_gram", _normal(3000, 65), **options)


def _convolution(op: str, **options: Any) -> tuple[list[Tensor], Call]:
    options = {"kernel_size": 3, "padding": 1, "bias": True, **options}
    return _of(op, _normal(8, 32, 28, 28), **options)


def _damped_inverse() -> tuple[list[Tensor], Call]:
    rows = [_normal(2 * size, size) for size in (1, 30, 100, 129, 700)]
    matrices = [x.mT @ x / len(x) for x in rows]
    return _of("damped_inverse", matrices, torch.tensor(1.0, device="cuda"), logdet=True)


def _precondition() -> tuple[list[Tensor], Call]:
    shapes = [(9, 33), (130, 70), (3, 3)]
    grads = [_normal(*shape) for shape in shapes]
    sides = [[_normal(shape[i], shape[i]) for shape in shapes] for i in (1, 0)]
    return _of("precondition", grads, *sides)


CALLS: dict[str, tuple[str, Callable[[], tuple[list[Tensor], Call]]]] = {
    "gram": ("gram", lambda: _of("gram", _normal(5000, 300), bias=True)),
    "masked gram": ("gram", _masked_gram),
    "shared_gram": ("shared_gram", lambda: _of("shared_gram", _normal(64, 50, 96), bias=True)),
    "segments": ("shared_gram", _segments),
    "conv_expand_gram": ("conv_expand_gram", lambda: _convolution("conv_expand_gram")),
    "strided": ("conv_expand_gram", lambda: _convolution("conv_expand_gram", stride=2)),
    "grouped": ("conv_expand_gram", lambda: _convolution("conv_expand_gram", groups=8)),
    "conv_reduce_gram": ("conv_reduce_gram", lambda: _convolution("conv_reduce_gram")),
    "conv_window_sum": ("conv_window_sum", lambda: _convolution("conv_window_sum")),
    "damped_inverse": ("damped_inverse", _damped_inverse),
    "precondition": ("precondition", _precondition),
}
"""By name an operator, and what draws a call of it."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize(
        ("call", "name"),
        [
            pytest.param(call, i.name, id=f"{call}-{i.name}")
            for call, (op, _) in CALLS.items()
            for i in TABLE[op, "cuda"]
            if i.name != "reference"
        ],
    ),
]


@pytest.fixture
def drawn(call: str, name: str) -> Iterator[tuple[list[Tensor], Call]]:
    """A call and what it reads, with its implementation in use; its tables are made."""
    op, draw = CALLS[call]
    (implementation,) = (i for i in TABLE[op, "cuda"] if i.name == name)
    if implementation.missing is not None:
        pytest.skip(implementation.missing)
    torch.manual_seed(0)
    tensors, run = draw()
    with kfac_fast.use(name):
        run()
        torch.cuda.synchronize()
        yield tensors, run


def _assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(bits(one), bits(other))


def test_the_current_stream(drawn: tuple[list[Tensor], Call]) -> None:
    tensors, run = drawn
    expected, values = run(), [x.clone() for x in tensors]
    for x in tensors:
        x.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        for x, value in zip(tensors, values, strict=True):
            x.copy_(value)
        found = run()
        for x in tensors:
            x.zero_()
    torch.cuda.current_stream().wait_stream(stream)
    _assert_same_bits(found, expected)


def test_the_host_does_not_wait(drawn: tuple[list[Tensor], Call]) -> None:
    _, run = drawn
    before, after = (torch.cuda.Event() for _ in range(2))
    torch.cuda._sleep(CYCLES)
    before.record()
    with waits_refused():
        run()
    after.record()
    assert not before.query() and not after.query()


def test_every_call_gives_the_same_bits(drawn: tuple[list[Tensor], Call]) -> None:
    _, run = drawn
    expected = run()
    for _ in range(20):
        _assert_same_bits(run(), expected)


def test_no_workspace_is_read_before_it_is_written(drawn: tuple[list[Tensor], Call]) -> None:
    _, run = drawn
    expected = run()
    # Then new memory is full of NaN, or of the largest integers.
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        found = run()
    finally:
        torch.use_deterministic_algorithms(False)
    _assert_same_bits(found, expected)
