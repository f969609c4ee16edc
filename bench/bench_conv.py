"""Input factors of convolutions under expand and reduce, and the window sums alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import baselines
import pytest
import torch
from measure import Case, poisoned
from shapes import CONV_EXPAND, CONV_REDUCE, Conv
from torch import Tensor

from kfac_fast.conv import ConvGeometry


def _input(conv: Conv, device: str) -> Tensor:
    return torch.randn(conv.batch, conv.channels, conv.size, conv.size, device=device)


def _geometry(conv: Conv) -> ConvGeometry:
    steps = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups}
    return ConvGeometry.normalize("bench", 2, conv.kernel, **steps)


def _case(op: str, shape: str, conv: Conv, x: Tensor, out: Tensor, flops: int) -> Case:
    dispatched = (x, *_geometry(conv).arguments(), False, 1.0, 0.0)
    ways = getattr(baselines, op)(x, conv, dispatched)
    options: dict[str, Any] = {
        "stride": conv.stride,
        "padding": conv.padding,
        "groups": conv.groups,
    }
    return Case(op, shape, (x, conv.kernel), options, out, ways, flops)


def _sizes(conv: Conv) -> tuple[int, int]:
    """Output positions of one example, and length of one group's patch."""
    geometry = _geometry(conv)
    positions = math.prod(geometry.output_size((conv.size, conv.size)))
    return positions, geometry.features(conv.channels)


def _factor(conv: Conv, features: int, device: str) -> Tensor:
    stack = () if conv.groups == 1 else (conv.groups,)
    return poisoned(*stack, features, features, device=device)


@pytest.mark.parametrize("shape", CONV_EXPAND)
def bench_conv_expand_gram(shape: str, compare: Callable[[Case], None], device: str) -> None:
    conv = CONV_EXPAND[shape]
    positions, features = _sizes(conv)
    x, out = _input(conv, device), _factor(conv, features, device)
    flops = conv.groups * conv.batch * positions * features * (features + 1)
    compare(_case("conv_expand_gram", shape, conv, x, out, flops))


@pytest.mark.parametrize("shape", CONV_REDUCE)
def bench_conv_reduce_gram(shape: str, compare: Callable[[Case], None], device: str) -> None:
    conv = CONV_REDUCE[shape]
    positions, features = _sizes(conv)
    x, out = _input(conv, device), _factor(conv, features, device)
    flops = conv.groups * conv.batch * features * (positions + features + 1)
    compare(_case("conv_reduce_gram", shape, conv, x, out, flops))


@pytest.mark.parametrize("shape", CONV_REDUCE)
def bench_conv_window_sum(shape: str, compare: Callable[[Case], None], device: str) -> None:
    conv = CONV_REDUCE[shape]
    positions, features = _sizes(conv)
    stack = () if conv.groups == 1 else (conv.groups,)
    x, out = _input(conv, device), poisoned(conv.batch, *stack, features, device=device)
    flops = conv.groups * conv.batch * features * positions
    compare(_case("conv_window_sum", shape, conv, x, out, flops))
