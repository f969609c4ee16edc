"""Convolution geometry against PyTorch's own modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CONVOLUTIONS, Convolution
from oracle import convolution, whole_numbers

from kfac_fast.conv import ConvGeometry

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
convolutions = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def geometry_of(case: Convolution) -> ConvGeometry:
    return ConvGeometry.normalize("test", len(case.size), **case.options)


@convolutions
def test_output_size_is_that_of_the_module(case: Convolution) -> None:
    module = convolution(len(case.size), case.channels, case.groups, case.options)
    output = module(torch.zeros(1, case.channels, *case.size, dtype=torch.float64))
    assert geometry_of(case).output_size(case.size) == output.shape[2:]


@convolutions
def test_framed_size_is_that_of_the_framed_input(case: Convolution) -> None:
    geometry = geometry_of(case)
    framed = geometry.frame_input(torch.zeros(2, case.channels, *case.size))
    assert framed.shape == (2, case.channels, *geometry.framed_size(case.size))


@convolutions
def test_a_window_over_the_framed_input_is_the_convolution(case: Convolution) -> None:
    """The picture that every kernel relies on: frame, then correlate with the (flipped) weight."""
    geometry, dimensions = geometry_of(case), len(case.size)
    x = whole_numbers(2, case.channels, *case.size)
    module = convolution(dimensions, case.channels, case.groups * 2, case.options)
    with torch.no_grad():
        module.weight.copy_(whole_numbers(*module.weight.shape))
        expected = module(x)
    weight = module.weight.detach()
    if case.transposed:
        spatial = tuple(range(2, x.dim()))
        blocks = weight.flip(spatial).unflatten(0, (case.groups, -1))
        weight = blocks.transpose(1, 2).flatten(0, 1)
    correlate = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    result = correlate(
        geometry.frame_input(x),
        weight,
        stride=geometry.window_stride,
        dilation=geometry.dilation,
        groups=case.groups,
    )
    assert torch.equal(result, expected)


@convolutions
def test_arguments_round_trip(case: Convolution) -> None:
    geometry = geometry_of(case)
    assert ConvGeometry.from_arguments(*geometry.arguments()) == geometry


def test_one_number_stands_for_every_dimension() -> None:
    short = ConvGeometry.normalize("test", 3, 3, 2, 1, dilation=4)
    long = ConvGeometry.normalize("test", 3, [3] * 3, (2, 2, 2), (1, 1, 1), dilation=(4, 4, 4))
    assert short == long
    assert short.padding == (1, 1, 1, 1, 1, 1)


def test_same_puts_the_odd_pixel_after() -> None:
    geometry = ConvGeometry.normalize("test", 2, (4, 3), padding="same", dilation=(3, 1))
    assert geometry.padding == (4, 5, 1, 1)


def test_nothing_is_copied_where_nothing_is_added() -> None:
    x = torch.zeros(1, 2, 4, 4)
    assert ConvGeometry.normalize("test", 2, 3).frame_input(x) is x


def test_features_count_one_group() -> None:
    geometry = ConvGeometry.normalize("test", 2, (3, 2), groups=4)
    assert geometry.features(12) == 3 * 6


def test_kernel_that_does_not_fit_has_no_positive_size() -> None:
    geometry = ConvGeometry.normalize("test", 2, 3, padding=(1, 0))
    assert geometry.output_size((1, 2)) == (1, 0)
    assert replace(geometry, dilation=(2, 1)).output_size((1, 3))[0] < 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kernel_size": (3, 3, 3)}, r"kernel_size must be an int or 2 ints, got \(3, 3, 3\)"),
    ({"kernel_size": 2.5}, r"kernel_size must be an int or 2 ints, got 2.5"),
    ({"kernel_size": ()}, r"kernel_size must be an int or 2 ints, got \(\)"),
    ({"stride": (1,)}, r"stride must be an int or 2 ints, got \(1,\)"),
    ({"stride": None}, r"stride must be an int or 2 ints, got None"),
    ({"dilation": (1, 1.0)}, r"dilation must be an int or 2 ints, got \(1, 1.0\)"),
    ({"output_padding": [0]}, r"output_padding must be an int or 2 ints, got \[0\]"),
    ({"padding": (1, 1, 1)}, r"padding must be an int or 2 ints, got \(1, 1, 1\)"),
    ({"padding": "full"}, r"padding must be 'same', 'valid', an int or ints, got 'full'"),
    ({"padding": "same", "stride": (1, 2)}, r"padding='same' needs stride 1, got \(1, 2\)"),
    (
        {"padding": "same", "transposed": True},
        r"padding must be an int or ints if transposed, got 'same'",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^some_op: {message}$"):
        ConvGeometry.normalize("some_op", 2, **{"kernel_size": 3, **arguments})
