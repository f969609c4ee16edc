"""The Triton kernels of normalisations on CPU tensors; run by test_interpreted.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_blocks import DEFINITIONS, Norm, assert_blocks
from oracle import lower_only, spread
from torch import Tensor
from triton_kernels import cropped

import kfac_fast
from kfac_fast import ops
from kfac_fast.kernels import launch
from kfac_fast.kernels.norm_gram import MOST_ROWS

FEATURES = {
    "plain": (5, 3),
    "shared": (3, 7, 12),
    "grid": (2, 3, 5, 33),
    "wide": (3, 4, 300),
    "long": (1, 2100, 5),
    "no-examples": (0, 4, 5),
    "no-positions": (2, 0, 5),
    "no-features": (2, 3, 0),
}
CHANNELS = {
    "plain": (5, 4),
    "images": (3, 8, 5, 4),
    "volumes": (2, 4, 2, 3, 4),
    "long": (2, 4, 1500),
    "many": (70, 2, 2),
    "no-examples": (0, 4, 5),
    "no-pixels": (2, 4, 0),
    "no-channels": (2, 0, 3),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "spread": spread,
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "cropped": cropped,
    "one-position": lambda x: x[..., :1, :].expand(x.shape),
}


def _check(op: Norm, x: Tensor, gradient: Tensor, **options: Any) -> None:
    with kfac_fast.use("triton"):
        result = op(x, gradient, **options)
    with kfac_fast.use("reference"):
        expected = op(x, gradient, **options)
    assert_blocks(result, expected, DEFINITIONS[op](x, gradient, **options))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("center, bias", [(True, True), (False, False)])
@pytest.mark.parametrize("shape", FEATURES.values(), ids=FEATURES)
def test_features(shape: tuple[int, ...], center: bool, bias: bool) -> None:
    x, gradient = torch.randn(2, *shape)
    _check(ops.feature_norm_gram, x, gradient, center=center, bias=bias)
    mask = spread(torch.rand(shape[:-1]) < 0.6)
    x[~mask], gradient[~mask] = torch.nan, torch.inf
    clean = (t.where(mask[..., None], 0) for t in (x, gradient))
    expected = DEFINITIONS[ops.feature_norm_gram](*clean, center=center, bias=bias, mask=mask)
    with kfac_fast.use("triton"):
        result = ops.feature_norm_gram(x, gradient, center=center, bias=bias, mask=mask)
    assert_blocks(result, result, expected)


@pytest.mark.parametrize("num_groups", [None, 1, 2])
@pytest.mark.parametrize("shape", CHANNELS.values(), ids=CHANNELS)
def test_channels(shape: tuple[int, ...], num_groups: int | None) -> None:
    x, gradient = torch.randn(2, *shape)
    _check(ops.channel_norm_gram, x + 3, gradient, num_groups=num_groups)
    _check(ops.channel_norm_gram, x, gradient, num_groups=num_groups, bias=False, eps=0.1)


def test_given_statistics() -> None:
    x, gradient = torch.randn(2, 5, 6, 4, 3)
    _check(ops.channel_norm_gram, x, gradient, mean=torch.randn(6), variance=torch.rand(6) + 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", DEFINITIONS, ids=lambda op: op.__name__)
def test_half_precision(op: Norm, dtype: torch.dtype) -> None:
    _check(op, *torch.randn(2, 3, 7, 24).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("op", DEFINITIONS, ids=lambda op: op.__name__)
def test_strides(op: Norm, layout: Callable[[Tensor], Tensor]) -> None:
    x, gradient = torch.randn(2, 3, 4, 8, 20)
    _check(op, layout(x), gradient)
    _check(op, x, layout(gradient))


@pytest.mark.parametrize("op", DEFINITIONS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("shape", [(4, 5, 5), (0, 5, 5)], ids=str)
def test_accumulates_on_the_lower_triangles(op: Norm, shape: tuple[int, ...]) -> None:
    x, gradient = torch.randn(2, *shape)
    before = torch.randn(5, 2, 2)
    before = before @ before.mT
    results = []
    for name in ("triton", "reference"):
        with kfac_fast.use(name):
            start = lower_only(before)
            results.append(op(x, gradient, alpha=0.3, beta=0.9, out=start))
    assert_blocks(*results, 0.3 * DEFINITIONS[op](x, gradient) + 0.9 * before.double())


def test_sums_of_many_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part, of which a single processor has few, has more steps than are summed at once."""
    monkeypatch.setattr(launch, "device", lambda index: launch.Device(90, 1))
    steps = launch.choose_adding_split(1, 10**6, 1) * (launch.STEPS_PER_SUM + 6)
    _check(ops.feature_norm_gram, *(torch.randn(2, 1, MOST_ROWS * steps, 8) + 1))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy sees the overflow
@pytest.mark.parametrize("op", DEFINITIONS, ids=lambda op: op.__name__)
def test_large_means_and_overflows(op: Norm) -> None:
    x, gradient = torch.randn(2, 4, 6, 50)
    expected = DEFINITIONS[op](x + 1e6, gradient)
    with kfac_fast.use("triton"):
        result = op(x + 1e6, gradient)
        assert op(1e25 * x, gradient)[:, 0, 0].isnan().all()
    error = (result - expected).norm() / expected.norm()
    assert error < 16 * torch.finfo(torch.float32).eps


def test_segments_are_left_to_pytorch() -> None:
    x, options = torch.ones(4, 3), {"segments": torch.zeros(4).long(), "num_segments": 1}
    with kfac_fast.use("triton"), pytest.raises(RuntimeError, match="segments"):
        ops.feature_norm_gram(x, x, **options)
