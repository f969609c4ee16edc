"""Input factors of convolutions under expand and reduce, and the window sums alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import baselines_conv
import pytest
import torch
from baselines import Ways
from baselines_conv import gram_of_means, unfoldings, window_sums
from measure import Case, poisoned
from shapes import CONV_EXPAND, CONV_REDUCE, Conv
from torch import Tensor

from kfac_fast.conv import ConvGeometry


def _input(conv: Conv, device: str) -> Tensor:
    return torch.randn(conv.batch, conv.channels, *conv.size, device=device)


def _options(conv: Conv) -> dict[str, Any]:
    return {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
    }


def _geometry(conv: Conv) -> ConvGeometry:
    return ConvGeometry.normalize("bench", len(conv.size), conv.kernel, **_options(conv))


def _case(op: str, shape: str, conv: Conv, x: Tensor, out: Tensor, flops: int) -> Case:
    dispatched = (x, *_geometry(conv).arguments(), False, 1.0, 0.0)
    ways = getattr(baselines_conv, op)(x, conv, dispatched)
    return Case(op, shape, (x, conv.kernel), _options(conv), out, ways, flops)


def _sizes(conv: Conv) -> tuple[int, int]:
    """Output positions of one example, and length of one group's patch."""
    geometry = _geometry(conv)
    positions = math.prod(geometry.output_size(conv.size))
    return positions, geometry.features(conv.channels)


def _factor(conv: Conv, features: int, device: str) -> Tensor:
    stack = () if conv.groups == 1 else (conv.groups,)
    return poisoned(*stack, features, features, device=device)


def _one_pass(x: Tensor) -> Ways:
    """One reading of the input and one writing of the result: no form under reduce takes less."""
    dimensions = tuple(range(2, x.dim()))
    return {"x.sum": lambda out: x.sum(dimensions), "fill_": lambda out: out.fill_(1.0)}


@pytest.mark.parametrize("shape", CONV_EXPAND)
def bench_conv_expand_gram(shape: str, compare: Callable[[Case], None], device: str) -> None:
    conv = CONV_EXPAND[shape]
    positions, features = _sizes(conv)
    x, out = _input(conv, device), _factor(conv, features, device)
    flops = conv.groups * conv.batch * positions * features * (features + 1)
    # The patches alone, of all examples: what a way makes of them comes on top of that.
    source, unfolding = next(iter(unfoldings(conv).items()))
    peaks: Ways = {source: lambda out: unfolding(x, conv)}
    compare(replace(_case("conv_expand_gram", shape, conv, x, out, flops), peaks=peaks))


@pytest.mark.parametrize("shape", CONV_REDUCE)
def bench_conv_reduce_gram(shape: str, compare: Callable[[Case], None], device: str) -> None:
    conv = CONV_REDUCE[shape]
    positions, features = _sizes(conv)
    x, out = _input(conv, device), _factor(conv, features, device)
    flops = conv.groups * conv.batch * features * (positions + features + 1)
    case = _case("conv_reduce_gram", shape, conv, x, out, flops)
    unfold_and_sum = window_sums(x, conv)["unfold + sum"]
    whole = {"unfold + sum, mm": case.ways["unfold + sum, mm"]}
    means = torch.randn(conv.batch, *out.shape[:-1], device=device)

    def product(out: Tensor) -> Tensor:
        return gram_of_means(means, out)

    product.inputs = means  # type: ignore[attr-defined]
    terms: Ways = {
        "unfold + sum": lambda out: unfold_and_sum(),
        "mm": product,
        **_one_pass(x),
    }
    compare(replace(case, beside=whole | terms))


@pytest.mark.parametrize("shape", CONV_REDUCE)
def bench_conv_window_sum(shape: str, compare: Callable[[Case], None], device: str) -> None:
    conv = CONV_REDUCE[shape]
    positions, features = _sizes(conv)
    stack = () if conv.groups == 1 else (conv.groups,)
    x, out = _input(conv, device), poisoned(conv.batch, *stack, features, device=device)
    flops = conv.groups * conv.batch * features * positions
    case = _case("conv_window_sum", shape, conv, x, out, flops)
    named = {name: case.ways[name] for name in ("unfold + sum", "einconv")}
    compare(replace(case, beside=named | _one_pass(x)))
