"""Convolutions and shared positions on a CUDA device: every implementation against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CONVOLUTIONS, FLOATING, SHARED_SHAPES, Convolution
from oracle import (
    assert_same,
    assert_symmetric,
    assert_within_budget,
    lower_only,
    spread,
    whole_numbers,
)
from torch import Tensor

import kfac_fast
from kfac_fast.backends import TABLE
from kfac_fast.schema import result_dtype

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

CONV_OPS = ("conv_expand_gram", "conv_reduce_gram", "conv_window_sum")
convolutions = pytest.mark.parametrize(
    ("op", "name"), [(op, i.name) for op in CONV_OPS for i in TABLE[op, "cuda"]]
)
shared = pytest.mark.parametrize("name", [i.name for i in TABLE["shared_gram", "cuda"]])
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=str)

LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "stem": ((8, 3, 224, 224), {"kernel_size": 7, "stride": 2, "padding": 3}),
    "patches": ((8, 3, 224, 224), {"kernel_size": 16, "stride": 16}),
    "early": ((16, 64, 56, 56), {"kernel_size": 3, "padding": 1}),
    "downsampling": ((16, 128, 28, 28), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "valid": ((16, 96, 14, 14), {"kernel_size": 3}),
    "late": ((32, 256, 7, 7), {"kernel_size": 3, "padding": 1}),
    "pointwise": ((16, 256, 14, 14), {"kernel_size": 1}),
    "depthwise": ((16, 96, 28, 28), {"kernel_size": 7, "padding": 3, "groups": 96}),
    "grouped": ((16, 64, 28, 28), {"kernel_size": 3, "padding": 1, "groups": 4}),
    "uneven": ((16, 30, 19, 23), {"kernel_size": (3, 5), "padding": (1, 2), "dilation": 2}),
    "transposed": (
        (8, 64, 14, 14),
        {"kernel_size": 4, "stride": 2, "padding": 1, "transposed": True},
    ),
    "signal": ((16, 64, 4000), {"kernel_size": 9, "stride": 2, "padding": 4}),
    "volume": ((4, 16, 16, 20, 24), {"kernel_size": 3, "padding": 1}),
}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers; whole ones in float64, where PyTorch's own long sums of others err most."""
    if dtype == torch.float64:
        return whole_numbers(*shape).cuda()
    return torch.randn(shape, device="cuda").to(dtype)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def run(op: str, name: str, x: Tensor, **options: Any) -> Tensor:
    """The result of one implementation; skips the test where it refuses the call."""
    function: Callable[..., Tensor] = getattr(kfac_fast, op)
    with kfac_fast.use(name):
        # Without out, for which explain would not have a beta.
        call = {k: v for k, v in options.items() if k not in ("alpha", "beta", "out")}
        explanation = kfac_fast.explain(op, x, **call)
        if "refuses" in explanation:
            pytest.skip(explanation)
        return function(x, **options)


def check(
    op: str, name: str, x: Tensor, alpha: float = 1.0, beta: float = 0.0, **options: Any
) -> None:
    """Check a result against the budget; what the call may not read is NaN."""
    symmetric = op != "conv_window_sum"
    plain = run(op, "reference", x.double(), **options)
    old = torch.randn_like(plain)
    if symmetric:
        old = old + old.mT
    old = old.to(result_dtype(x.dtype))
    out = old.clone()
    if not beta:
        out.fill_(torch.nan)
    elif symmetric:
        out = lower_only(out)
    scales = {"alpha": alpha, "beta": beta}
    torch_result = run(op, "reference", x, out=old.clone(), **scales, **options)
    result = run(op, name, x, out=out, **scales, **options)
    if symmetric:
        assert_symmetric(result)
    expected = alpha * plain + beta * old.double()
    if x.dtype == torch.float64:
        assert_same(result, expected)
    else:
        assert_within_budget(result, torch_result, expected)


@convolutions
@dtypes
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_small(op: str, name: str, case: Convolution, dtype: torch.dtype) -> None:
    x = random((3, case.channels, *case.size), dtype)
    for layout in (torch.clone, channels_last):
        check(op, name, layout(x), bias=True, **case.options)


@convolutions
@dtypes
@pytest.mark.parametrize("layout", [torch.clone, channels_last])
@pytest.mark.parametrize(("shape", "options"), LAYERS.values(), ids=LAYERS)
def test_layers(
    op: str,
    name: str,
    shape: tuple[int, ...],
    options: dict[str, Any],
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    check(op, name, layout(random(shape, dtype)), bias=True, **options)


@convolutions
@dtypes
@pytest.mark.parametrize(
    "layout",
    [
        spread,
        lambda x: x[..., 1:-1, 1:-1],
        lambda x: channels_last(x)[:, 1:],
        lambda x: x[:1].expand_as(x),
        lambda x: x.mT.contiguous().mT,
    ],
    ids=("spread", "cropped", "cropped channels", "expanded", "transposed"),
)
def test_strides(
    op: str, name: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = layout(random((4, 33, 18, 22), dtype))
    check(op, name, x, bias=True, kernel_size=3, padding=1)


@convolutions
@dtypes
@pytest.mark.parametrize("groups", (1, 4))
def test_accumulates(op: str, name: str, groups: int, dtype: torch.dtype) -> None:
    x = random((8, 32, 14, 14), dtype)
    for bias in (False, True):
        scales = {"alpha": 0.3, "beta": 0.9}
        check(op, name, x, **scales, bias=bias, groups=groups, kernel_size=3, padding=1)


@convolutions
def test_no_examples(op: str, name: str) -> None:
    check(op, name, random((0, 4, 5, 6), torch.float32), bias=True, kernel_size=3)
    if op != "conv_window_sum":
        x = random((0, 4, 5, 6), torch.float32)
        check(op, name, x, alpha=0.5, beta=2.0, bias=True, kernel_size=3)


@pytest.mark.large
@convolutions
def test_more_elements_than_int32_counts(op: str, name: str) -> None:
    if name == "reference":
        pytest.skip("unfolds more than a device holds")
    x = torch.zeros(65, 32, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1] = whole_numbers(32, 1024, 1024).cuda() * (torch.rand(1024, 1024, device="cuda") < 1e-4)
    options = {"kernel_size": 1, "stride": 2}
    result = run(op, name, x, **options)
    expected = run(op, "reference", x[-1:].double(), **options)
    if op == "conv_reduce_gram":  # its means are rounded
        torch_result = run(op, "reference", x[-1:], **options)
        return assert_within_budget(result, torch_result, expected)
    assert torch.equal(result[-1:] if op == "conv_window_sum" else result, expected.float())


@convolutions
@dtypes
def test_repeats_bit_for_bit(op: str, name: str, dtype: torch.dtype) -> None:
    if name == "reference":
        pytest.skip("PyTorch's own sums need not repeat")
    x = random((16, 48, 28, 28), dtype)
    results = [run(op, name, x, bias=True, kernel_size=3, padding=1) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)


@convolutions
def test_graph_capture_on_a_side_stream(op: str, name: str) -> None:
    x = random((8, 16, 20, 20), torch.float32)
    options = {"bias": True, "kernel_size": 3, "padding": 1}
    out = torch.full_like(run(op, name, x, **options), torch.nan)
    run(op, name, x, out=out, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(op, name, x, out=out, **options)
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected = run(op, name, x, **options)
    if name == "reference":
        return assert_within_budget(out, expected, run(op, name, x.double(), **options))
    assert torch.equal(out, expected)


# Shared positions

MORE_SHARED_SHAPES = {
    "tokens": (64, 197, 384),
    "few-positions": (512, 7, 130),
    "many-positions": (4, 5000, 64),
    "one-feature": (33, 65, 1),
}


@shared
@dtypes
@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize(
    "shape",
    [*SHARED_SHAPES.values(), *MORE_SHARED_SHAPES.values()],
    ids=[*SHARED_SHAPES, *MORE_SHARED_SHAPES],
)
def test_shared(name: str, shape: tuple[int, ...], reduction: str, dtype: torch.dtype) -> None:
    x = random(shape, dtype)
    check("shared_gram", name, x, reduction=reduction, bias=True)
    mask = torch.rand(shape[:-1], device="cuda") < 0.7
    x[~mask] = torch.nan
    options = {"mask": mask, "reduction": reduction, "bias": True}
    check("shared_gram", name, x, **options)
    if shape[-1] % 2 == 0:
        check("shared_gram", name, x, alpha=0.3, beta=0.9, groups=2, **options)


@shared
@dtypes
@pytest.mark.parametrize(
    "layout",
    [
        spread,
        lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
        lambda x: x[:, 1:-1],
        lambda x: x[..., 1:],
        lambda x: x[:, :1].expand(x.shape),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ],
    ids=("spread", "features first", "cropped", "unaligned", "expanded", "positions first"),
)
def test_shared_strides(name: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = layout(random((16, 14, 15, 96), dtype))
    check("shared_gram", name, x, bias=True)
    mask = spread(torch.rand(x.shape[:-1], device="cuda") < 0.5)
    check("shared_gram", name, x, mask=mask, bias=True)


@shared
@dtypes
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_shared_segments(name: str, reduction: str, dtype: torch.dtype) -> None:
    x = random((3000, 65), dtype)
    graphs = torch.randint(0, 200, (3000,), device="cuda")
    graphs[graphs == 7] = 8  # one without nodes
    mask = torch.rand(3000, device="cuda") < 0.7
    for m in (None, mask):
        options = {"segments": graphs, "num_segments": 201, "mask": m}
        check("shared_gram", name, x, reduction=reduction, bias=True, **options)


@shared
def test_shared_repeats_bit_for_bit(name: str) -> None:
    if name == "reference":
        pytest.skip("PyTorch's own sums need not repeat")
    x = random((64, 300, 200), torch.float32)
    results = [run("shared_gram", name, x, bias=True) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.large
@shared
def test_shared_more_elements_than_int32_counts(name: str) -> None:
    if name == "reference":
        pytest.skip("copies more than a device holds")
    x = torch.zeros(4, 2**19 + 2, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = torch.arange(1024, device="cuda") % 16
    row = x[-1, -1].float()
    positions_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    for layout in (x, positions_first):
        assert torch.equal(run("shared_gram", name, layout, reduction="sum"), row.outer(row))
    rows = x.flatten(0, 1)
    graphs = torch.arange(len(rows), device="cuda") // 3
    options = {"segments": graphs, "num_segments": len(rows) // 3 + 1, "reduction": "sum"}
    assert torch.equal(run("shared_gram", name, rows, **options), row.outer(row))
