"""The factors of normalisations on a CUDA device: every implementation of the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from norm_blocks import DEFINITIONS, Norm, assert_blocks
from oracle import bits, lower_only
from torch import Tensor

import kfac_fast
from kfac_fast import ops
from kfac_fast.backends import TABLE

pytestmark = pytest.mark.gpu
both = pytest.mark.parametrize("op", DEFINITIONS, ids=lambda op: op.__name__)
names = pytest.mark.parametrize("name", [i.name for i in TABLE["channel_norm_gram", "cuda"]])
FEATURES = ((256, 16, 48), (16, 197, 768), (2, 2000, 33), (4096, 1100))
CHANNELS = ((128, 16, 32, 32), (32, 512, 7, 7), (3, 64, 300, 300), (1000, 96))


def _check(op: Norm, name: str, x: Tensor, gradient: Tensor, **options: Any) -> None:
    with kfac_fast.use(name):
        result = op(x, gradient, **options)
    with kfac_fast.use("reference"):
        expected = op(x, gradient, **options)
    on_host = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    ref64 = DEFINITIONS[op](x.cpu(), gradient.cpu(), **on_host)
    assert_blocks(result.cpu(), expected.cpu(), ref64)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", FEATURES, ids=str)
def test_features(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    x, gradient = torch.randn(2, *shape, device="cuda").to(dtype)
    _check(ops.feature_norm_gram, name, x, gradient)
    mask = torch.rand(shape[:-1], device="cuda") < 0.6
    _check(ops.feature_norm_gram, name, x, gradient, center=False, bias=False, mask=mask)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", CHANNELS, ids=str)
def test_channels(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    x, gradient = torch.randn(2, *shape, device="cuda").to(dtype)
    for num_groups in (None, 8):
        _check(ops.channel_norm_gram, name, x, gradient, num_groups=num_groups)
    mean, variance = torch.randn(shape[1], device="cuda"), torch.rand(shape[1], device="cuda")
    _check(ops.channel_norm_gram, name, x, gradient, mean=mean, variance=variance, bias=False)


@names
@both
def test_accumulates_the_same_bits(op: Norm, name: str) -> None:
    x, gradient = torch.randn(2, 40, 24, 24, device="cuda")
    before = torch.eye(2, device="cuda").expand(24, 2, 2)
    results = []
    for _ in range(3):
        with kfac_fast.use(name):
            out = lower_only(before)
            results.append(op(x, gradient, alpha=0.3, beta=0.9, out=out).clone())
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)
    expected = 0.3 * DEFINITIONS[op](x.cpu(), gradient.cpu()) + 0.9 * torch.eye(2).double()
    with kfac_fast.use("reference"):
        plain = op(x, gradient, alpha=0.3, beta=0.9, out=lower_only(before))
    assert_blocks(results[0].cpu(), plain.cpu(), expected)
