"""Convolution geometry against PyTorch's own modules, and the plans made from it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CONVOLUTIONS, Convolution
from oracle import convolution, patches, whole_numbers
from torch import Tensor

import kfac_fast
from kfac_fast import conv_kernels, ops
from kfac_fast.conv import ConvGeometry, OffsetPlan

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


# Plans


def taps_of(geometry: ConvGeometry) -> list[tuple[int, ...]]:
    return list(product(*map(range, geometry.kernel_size)))


@convolutions
def test_reads_are_those_of_the_window(case: Convolution) -> None:
    """What an axis' taps read of the input is what the framed input holds there."""
    geometry = geometry_of(case)
    x = 1 + torch.arange(math.prod(case.size)).reshape(1, 1, *case.size).double()
    framed = geometry.frame_input(x)[0, 0]
    axes = geometry.axes(case.size)
    padded = torch.zeros([n + 1 for n in case.size], dtype=torch.float64)
    padded[tuple(map(slice, case.size))] = x[0, 0]  # index -1 reads a zero
    for tap in taps_of(geometry):
        places = [
            [axis.stride * o + axis.dilation * k for o in range(axis.outputs)]
            for axis, k in zip(axes, tap, strict=True)
        ]
        reads = [axis.reads(k) for axis, k in zip(axes, tap, strict=True)]
        assert torch.equal(padded[np.ix_(*reads)], framed[np.ix_(*places)])


@convolutions
def test_sum_plan_gives_the_window_sums(case: Convolution) -> None:
    geometry = geometry_of(case)
    x = whole_numbers(2, case.channels, *case.size)
    sums = x
    for axis in geometry.axes(case.size):
        plan = axis.sums()
        weights = torch.zeros(axis.taps, axis.size, dtype=torch.float64)
        for tap, pixel in product(range(axis.taps), range(axis.size)):
            if plan.cells[pixel] >= 0:
                weights[tap, pixel] = plan.weights[tap][plan.cells[pixel]]
        sums = torch.tensordot(sums, weights, dims=([2], [1]))  # the axis goes last
    assert torch.equal(
        sums.flatten(2), patches(x, **case.options).sum(1).reshape_as(sums.flatten(2))
    )


@convolutions
def test_offset_plan_gives_every_pair_of_taps(case: Convolution) -> None:
    """The products of the line with its shifted self, cell by cell, make up all blocks."""
    geometry = geometry_of(case)
    x = whole_numbers(2, case.channels, *case.size)
    plans = [axis.offsets() for axis in geometry.axes(case.size)]
    line = x
    for i, plan in enumerate(plans):
        line = line.index_select(i + 2, torch.tensor(plan.line, dtype=torch.int64))
    rows = patches(x, **case.options).flatten(0, 1)  # [positions, groups, channel and tap]
    rows = rows.unflatten(2, (case.channels // case.groups, -1))
    taps = taps_of(geometry)
    for (i, left), (j, right) in product(enumerate(taps), repeat=2):
        block = torch.einsum("pga,pgb->gab", rows[..., i], rows[..., j])
        pairs = [
            plan.pairs[a * k + b]
            for plan, k, a, b in zip(plans, geometry.kernel_size, left, right, strict=True)
        ]
        total = torch.zeros_like(block)
        for cells in product(*(range(first, last) for _, first, last in pairs)):
            total += _cell_product(line, plans, [shift for shift, _, _ in pairs], cells, case)
        assert torch.equal(total, block)


def _cell_product(
    line: Tensor,
    plans: list[OffsetPlan],
    shifts: list[int],
    cells: tuple[int, ...],
    case: Convolution,
) -> Tensor:
    left = right = line
    for dim, (plan, index, cell) in enumerate(zip(plans, shifts, cells, strict=True), 2):
        shift = plan.shifts[index]
        first, length = shift.cells[cell]
        left = left.narrow(dim, first, length)
        right = right.narrow(dim, first + shift.distance, length)
    left, right = (side.flatten(2).unflatten(1, (case.groups, -1)) for side in (left, right))
    return torch.einsum("ngap,ngbp->gab", left, right)


@convolutions
def test_mirrored_shifts_have_the_same_cells(case: Convolution) -> None:
    for axis in geometry_of(case).axes(case.size):
        shifts = axis.offsets().shifts
        for index, shift in enumerate(shifts):
            mirror = shifts[shift.mirror]
            assert mirror.mirror == index and mirror.distance == -shift.distance
            moved = tuple((first + shift.distance, length) for first, length in shift.cells)
            assert mirror.cells == moved


@pytest.mark.parametrize(
    ("kernel_size", "products"), [((3, 3), 13), ((5, 5), 41), ((7, 7), 85), (9, 9), ((3, 3, 3), 63)]
)
def test_offset_plan_needs_few_products(kernel_size: tuple[int, ...], products: int) -> None:
    dimensions = len(kernel_size) if isinstance(kernel_size, tuple) else 1
    for options in ({"padding": "same"}, {"dilation": 2}, {"padding_mode": "circular"}):
        geometry = ConvGeometry.normalize("test", dimensions, kernel_size, **options)
        axes = geometry.axes((32,) * dimensions)
        shifts = math.prod(len(axis.offsets().shifts) for axis in axes)
        assert (shifts + 1) // 2 == products  # a shift's mirror image needs no product


def test_chosen_kernels() -> None:
    """Offset correlation where it saves products; patches where channels are few or taps apart."""

    def chosen(shape: tuple[int, ...], *arguments: int, **options: int) -> str:
        geometry = ConvGeometry.normalize("test", len(shape) - 2, *arguments, **options)
        return conv_kernels.expand_kernel(geometry, shape, 4)

    for shape in ((8, 64, 56, 56), (32, 512, 7, 7), (1, 32, 14, 14)):
        assert chosen(shape, 3, padding=1) == "conv_offset_gram"
    assert chosen((32, 64, 256), 9, padding=4) == "conv_offset_gram"
    assert chosen((8, 128, 56, 56), 3, stride=2, padding=1) == "conv_offset_gram"
    for depthwise in ((32, 32, 56, 56), (8, 768, 14, 14), (2, 96, 56, 56)):
        assert chosen(depthwise, 7, padding=3, groups=depthwise[1]) == "conv_offset_gram"
        assert chosen(depthwise, 3, padding=1, groups=depthwise[1]) == "conv_offset_gram"
    assert chosen((8, 3, 224, 224), 7, stride=2, padding=3) == "conv_patch_gram"
    assert chosen((8, 3, 224, 224), 16, stride=16) == "conv_patch_gram"
    assert chosen((4, 1, 28, 28), 5) == "conv_patch_gram"


def test_offset_correlation_needs_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each limit of the model alone decides for the patches."""

    def costs(shape: tuple[int, ...], kernel_size: int, **options: Any) -> float:
        geometry = ConvGeometry.normalize("test", len(shape) - 2, kernel_size, **options)
        return conv_kernels._cost("conv_offset_gram", geometry, shape, 4)

    limits = {
        "MOST_SUMS": ((256, 64, 56, 56), 7, {}),
        "MOST_CELLS_OF_WINDOWS": ((64, 64, 200, 200), 15, {"groups": 64}),
        "ALWAYS_ALLOWED": ((1, 24, 28, 28), 5, {"padding": 2, "padding_mode": "reflect"}),
    }
    for limit, (shape, kernel_size, options) in limits.items():
        assert costs(shape, kernel_size, **options) == math.inf
        with monkeypatch.context() as patch:
            patch.setattr(conv_kernels, limit, 2**60)
            assert costs(shape, kernel_size, **options) < math.inf


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


def test_one_side_of_a_transposed_convolution_may_crop_more_than_its_input() -> None:
    """While the other side pads it back."""
    x, options = torch.randn(2, 1, 4), {"padding": 5, "output_padding": 7, "dilation": 8}
    assert F.conv_transpose1d(x, torch.ones(1, 1, 1), **options).shape == (2, 1, 1)
    expected = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    for implementation in ("cpp", "reference"):
        with kfac_fast.use(implementation):
            found = ops.conv_expand_gram(x, 1, bias=True, transposed=True, **options)
        assert torch.equal(found, expected)
