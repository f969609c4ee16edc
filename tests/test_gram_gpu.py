"""The Gram kernels on a CUDA device: every implementation of the table against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import FLOATING, GRAM_ROWS
from oracle import assert_symmetric, assert_within_budget, lower_only, poisoned, spread
from torch import Tensor

from kfac_fast import reference
from kfac_fast.backends import TABLE
from kfac_fast.schema import result_dtype, result_shape

pytestmark = pytest.mark.gpu

IMPLEMENTATIONS = {i.name: i for i in TABLE["gram", "cuda"] if i.name != "reference"}
LARGE_ROWS = {"tall": (65536, 768), "square": (4096, 4100), "narrow": (200000, 48)}
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "groups": {"groups": 2, "bias": True},
    "accumulate": {"bias": True, "alpha": 0.3, "beta": 0.9},
}


@pytest.fixture(params=IMPLEMENTATIONS)
def gram(request: pytest.FixtureRequest) -> Callable[..., None]:
    implementation = IMPLEMENTATIONS[request.param]

    def run(*args: object) -> None:
        reason = implementation.reason_against(*args)
        if reason is not None:
            pytest.skip(reason)
        implementation.run(*args)

    return run


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers; whole ones in float64, in which the budget's own sums would err, too."""
    if dtype == torch.float64:
        return torch.randint(-4, 5, shape, device="cuda").double()
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.fixture(autouse=True)
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def _check(
    gram: Callable[..., None],
    x: Tensor,
    mask: Tensor | None = None,
    groups: int = 1,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> None:
    shape = result_shape("gram", x, mask, groups, bias)
    old = torch.randn(shape, dtype=result_dtype(x.dtype), device="cuda")
    old = old + old.mT
    out = lower_only(old) if beta else poisoned(*shape, dtype=old.dtype, device="cuda")
    torch_result, expected = old.clone(), old.double()
    reference.gram(x.double(), mask, groups, bias, alpha, beta, expected)
    # With "medium", PyTorch may round to bfloat16, and these kernels do.
    rounds = torch.get_float32_matmul_precision() == "medium" and x.dtype == torch.float32
    rounded = x.bfloat16().float() if rounds else x
    reference.gram(rounded, mask, groups, bias, alpha, beta, torch_result)
    gram(x, mask, groups, bias, alpha, beta, out)
    assert_symmetric(out)
    assert_within_budget(out, torch_result, expected)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", GRAM_ROWS.values(), ids=GRAM_ROWS.keys())
def test_small(gram: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    _check(gram, _random(*shape, dtype=dtype), bias=True)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", LARGE_ROWS.values(), ids=LARGE_ROWS.keys())
def test_large(
    gram: Callable[..., None],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    options: dict[str, object],
) -> None:
    torch.manual_seed(0)
    _check(gram, _random(*shape, dtype=dtype), **options)


@pytest.mark.parametrize("precision", ("highest", "high", "medium"))
@pytest.mark.parametrize("features", (64, 770, 1024))
def test_precisions(gram: Callable[..., None], features: int, precision: str) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(precision)
    _check(gram, torch.randn(20000, features, device="cuda"), bias=True)


@pytest.mark.parametrize("dtype", FLOATING)
def test_mask(gram: Callable[..., None], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = _random(64, 300, 768, dtype=dtype)
    mask = torch.rand(64, 300, device="cuda") < 0.7
    x[~mask] = torch.nan
    _check(gram, x, mask, groups=2, bias=True)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(
    "layout",
    [
        spread,
        lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
        lambda x: x[:, 1:-1, 1:-1],
        lambda x: x[..., 1:],
        lambda x: x[:, :1].expand(x.shape),
    ],
    ids=("spread", "channels first", "cropped", "unaligned", "expanded"),
)
def test_strides(
    gram: Callable[..., None],
    layout: Callable[[Tensor], Tensor],
    masked: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    x = layout(_random(16, 28, 28, 256, dtype=dtype))
    mask = spread(torch.rand(x.shape[:-1], device="cuda") < 0.5) if masked else None
    _check(gram, x, mask, bias=True)


@pytest.mark.large
def test_more_elements_than_int32_counts(gram: Callable[..., None]) -> None:
    x = torch.zeros(2**21 + 8, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(1024, device="cuda") % 16
    for rows in (x, x.view(1024, -1).T):
        out = poisoned(rows.shape[1], rows.shape[1], device="cuda")
        expected = poisoned(*out.shape, device="cuda")
        last = rows[rows.ne(0).any(1)]
        reference.gram(last, None, 1, False, 1.0, 0.0, expected)
        gram(rows, None, 1, False, 1.0, 0.0, out)
        assert torch.equal(out, expected)  # sums of few small whole numbers are exact


@pytest.mark.parametrize("dtype", FLOATING)
def test_repeats_bit_for_bit(gram: Callable[..., None], dtype: torch.dtype) -> None:
    x = torch.randn(30000, 520, dtype=dtype, device="cuda")
    results = [poisoned(521, 521, dtype=result_dtype(dtype), device="cuda") for _ in range(3)]
    for out in results:
        gram(x, None, 1, True, 1.0, 0.0, out)
    assert all(torch.equal(out, results[0]) for out in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_steps_with_a_bias(gram: Callable[..., None], dtype: torch.dtype) -> None:
    """The last loads of a loop follow each other fastest, and may not overtake its products."""
    for rows in range(64, 256, 8):
        for _ in range(20):
            _check(gram, torch.randn(rows, 768, dtype=dtype, device="cuda"), bias=True)


def test_graph_capture_on_a_side_stream(gram: Callable[..., None]) -> None:
    x = torch.randn(5000, 300, device="cuda")
    mask = torch.rand(5000, device="cuda") < 0.5
    out, expected = poisoned(301, 301, device="cuda"), poisoned(301, 301, device="cuda")
    gram(x, mask, 1, True, 1.0, 0.0, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram(x, mask, 1, True, 1.0, 0.0, out)
    x.copy_(torch.randn_like(x))
    graph.replay()
    gram(x, mask, 1, True, 1.0, 0.0, expected)
    assert torch.equal(out, expected)
