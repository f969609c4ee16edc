"""The factors of normalisations, from their inputs and the gradients of their outputs."""

from __future__ import annotations

from collections.abc import Callable

import baselines_norm
import pytest
import torch
from measure import Case, poisoned
from shapes import CHANNEL_NORM, FEATURE_NORM

FLOPS_AN_ENTRY = 8  # two moments, and two sums with the gradient


@pytest.mark.parametrize("shape", FEATURE_NORM)
def bench_feature_norm_gram(shape: str, compare: Callable[[Case], None], device: str) -> None:
    size = FEATURE_NORM[shape]
    x, gradient = (torch.randn(size, device=device) for _ in range(2))
    ways = baselines_norm.feature_norm_gram(x, gradient)
    out = poisoned(size[-1], 2, 2, device=device)
    flops = FLOPS_AN_ENTRY * x.numel()
    compare(Case("feature_norm_gram", shape, (x, gradient), {}, out, ways, flops))


@pytest.mark.parametrize("shape", CHANNEL_NORM)
def bench_channel_norm_gram(shape: str, compare: Callable[[Case], None], device: str) -> None:
    *size, num_groups = CHANNEL_NORM[shape]
    x, gradient = (torch.randn(size, device=device) for _ in range(2))
    ways = baselines_norm.channel_norm_gram(x, gradient, num_groups)
    out = poisoned(size[1], 2, 2, device=device)
    flops = FLOPS_AN_ENTRY * x.numel()
    options = {"num_groups": num_groups}
    compare(Case("channel_norm_gram", shape, (x, gradient), options, out, ways, flops))
