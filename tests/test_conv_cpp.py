"""The C++ kernels of convolutions with every instruction set that this processor has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CONVOLUTIONS, FLOATING, Convolution
from guard_page import before_a_guard_page
from oracle import (
    assert_same,
    assert_symmetric,
    assert_within_budget,
    lower_only,
    poisoned,
    spread,
    whole_numbers,
)
from torch import Tensor

from kfac_fast import conv_kernels, reference
from kfac_fast.backends import native
from kfac_fast.conv import ConvGeometry
from kfac_fast.schema import result_dtype, result_shape

pytestmark = [
    pytest.mark.usefixtures("one_thread", "instruction_set", "seed"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
# Each kernel, and the operator that it computes.
KERNELS = {
    **dict.fromkeys(conv_kernels.EXPAND_KERNELS, "conv_expand_gram"),
    "conv_reduce_gram": "conv_reduce_gram",
    "conv_window_sum": "conv_window_sum",
}
kernels = pytest.mark.parametrize("kernel", KERNELS)
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=str)
convolutions = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


def geometry_of(x: Tensor, **options: Any) -> ConvGeometry:
    return ConvGeometry.normalize("test", x.dim() - 2, **options)


def run(
    kernel: str,
    x: Tensor,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    geometry = geometry_of(x, **options)
    if out is None:
        shape = result_shape(KERNELS[kernel], x, *geometry.arguments(), bias)
        out = poisoned(*shape, dtype=result_dtype(x.dtype))
    size = tuple(x.shape[2:])
    plan = conv_kernels.plan(kernel, geometry, size).tolist()
    assert native.ConvKernel(kernel, plan, size, geometry.groups)(x, bias, alpha, beta, out) is out
    return out


def defined(
    kernel: str,
    x: Tensor,
    out: Tensor,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    **options: Any,
) -> Tensor:
    """The operator by the pure-PyTorch version, in the precision of x and out."""
    arguments = (*geometry_of(x, **options).arguments(), bias, alpha, beta)
    getattr(reference, KERNELS[kernel])(x, *arguments, out)
    return out


def check(kernel: str, x: Tensor, exact: bool = False, **options: Any) -> None:
    out = run(kernel, x, **options)
    ref64 = defined(kernel, x.double(), torch.empty_like(out, dtype=torch.float64), **options)
    if exact:
        assert torch.equal(out.double(), ref64)
    elif x.dtype == torch.float64:
        assert_same(out, ref64)
    else:
        assert_within_budget(out, defined(kernel, x, torch.empty_like(out), **options), ref64)
    if kernel != "conv_window_sum":
        assert_symmetric(out)


# Means are no whole numbers.
exact_kernels = pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "conv_reduce_gram"])


@exact_kernels
@convolutions
@dtypes
def test_every_geometry(kernel: str, case: Convolution, dtype: torch.dtype) -> None:
    """The expand kernels serve the same geometries, whichever the cost model prefers."""
    for examples, factor in ((1, 1), (3, 5), (2, 17)):
        x = whole_numbers(examples, factor * case.channels, *case.size, dtype=dtype)
        check(kernel, x, exact=True, bias=factor == 5, **case.options)


@convolutions
def test_means_of_every_geometry(case: Convolution) -> None:
    for factor in (1, 6):
        x = torch.randn(4, factor * case.channels, *case.size)
        check("conv_reduce_gram", x, bias=factor == 6, **case.options)


# Channels about the edges of vectors, panels and tiles.
CHANNELS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 33, 47, 48, 49, 64, 96, 97, 130)


@exact_kernels
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_edges_of_panels(kernel: str, dtype: torch.dtype) -> None:
    for channels in CHANNELS:
        x = whole_numbers(2, channels, 4, 5, dtype=dtype)
        check(kernel, x, exact=True, kernel_size=(2, 3), padding=1, bias=True)


@exact_kernels
def test_groups_narrower_and_wider_than_a_vector(kernel: str) -> None:
    for groups, width in ((2, 1), (70, 1), (40, 2), (7, 3), (5, 7), (3, 16), (4, 17), (2, 50)):
        x = whole_numbers(3, groups * width, 5, 4, dtype=torch.float32)
        for bias in (False, True):
            check(kernel, x, exact=True, groups=groups, bias=bias, kernel_size=3, padding=1)


@exact_kernels
@pytest.mark.parametrize("width", [1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 40, 63, 64, 65, 130])
def test_edges_of_rows(kernel: str, width: int) -> None:
    for channels in (1, 9):
        x = whole_numbers(2, channels, 6, width, dtype=torch.float32)
        check(kernel, x, exact=True, kernel_size=3, padding=1)
        check(kernel, x, exact=True, kernel_size=(3, 1), stride=(2, 3), bias=True)


@pytest.mark.parametrize("kernel", conv_kernels.EXPAND_KERNELS)
def test_one_tap_for_any_number_of_threads(kernel: str, set_threads: Callable[[int], None]) -> None:
    """One cell a tile, so that whatever is written beside a tile's sums is in another task's."""
    for channels, groups in ((3, 1), (5, 1), (6, 1), (7, 1), (13, 1), (22, 1), (46, 1), (35, 7)):
        x = whole_numbers(24, channels, 40, 40, dtype=torch.float32)
        options = {"kernel_size": 1, "groups": groups}
        expected = run(kernel, x, **options).double()
        defined(kernel, x.double(), expected, **options)
        for threads in (1, 2, 3):
            set_threads(threads)
            for _ in range(3):
                assert torch.equal(run(kernel, x, **options).double(), expected)


@kernels
@convolutions
def test_nothing_to_sum(kernel: str, case: Convolution) -> None:
    """No examples or no channels; and no pixels where a padding of zeros makes up for them."""
    shapes = [(0, case.channels, *case.size), (2, 0, *case.size)]
    if case.options.get("padding_mode", "zeros") == "zeros" and not case.transposed:
        shapes.append((2, case.channels, *(0 for _ in case.size)))
    for shape in shapes:
        x = torch.empty(shape)
        geometry = geometry_of(x, **case.options)
        if min(geometry.output_size(shape[2:])) < 1:
            continue
        for bias in (False, True):
            out = run(kernel, x, bias=bias, **case.options)
            expected = defined(kernel, x, torch.empty_like(out), bias=bias, **case.options)
            assert torch.equal(out, expected)


@pytest.mark.parametrize("kernel", ["conv_window_sum", "conv_reduce_gram"])
@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize(
    "shape", [(2, 16, 224, 224), (1, 3, 300, 300), (1, 20, 1, 40_000)], ids=str
)
def test_long_sums(kernel: str, last: bool, shape: tuple[int, ...]) -> None:
    """Of terms with a mean, whose roundings add up; added in chains, which round less."""
    for x in (torch.randn(shape).relu(), torch.full(shape, 0.1)):
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        for top in {0, int(shape[2] > 1)}:
            check(kernel, x, kernel_size=(min(3, shape[2]), 3), padding=(top, 1))
        check(kernel, x, kernel_size=(min(5, shape[2]), 5), stride=(1, 2))


@pytest.mark.parametrize(
    ("groups", "width", "examples", "edge", "dtype"),
    [
        (193, 1, 2, 7, torch.float32),
        (194, 1, 8, 5, torch.bfloat16),
        (193, 1, 3, 5, torch.float64),
        (192, 3, 1, 3, torch.float32),
    ],
)
def test_few_examples_of_many_groups(
    groups: int,
    width: int,
    examples: int,
    edge: int,
    dtype: torch.dtype,
    set_threads: Callable[[int], None],
) -> None:
    """Whose means are multiplied some groups at a time, also where tasks of sums end inside one."""
    x = whole_numbers(examples, groups * width, 32, 64, dtype=dtype)
    for bias in (False, True):
        options = {"kernel_size": edge, "padding": edge // 2, "groups": groups, "bias": bias}
        check("conv_reduce_gram", x, exact=True, **options)  # of 2^11 positions
        rounded = torch.randn(x.shape).to(dtype)
        results = []
        for threads in (1, 2):
            set_threads(threads)
            results.append(run("conv_reduce_gram", rounded, alpha=0.3, **options))
        assert torch.equal(*results)
        assert_symmetric(results[0])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "channels-first-of-all": lambda x: x.movedim(1, 0).contiguous().movedim(0, 1),
    "channels-of-a-wider-one": lambda x: torch.cat([x, x], 1)[:, 2 : 2 + x.shape[1]],
    "last-channels-of-a-wider-one": lambda x: (
        torch.cat([x, x], 1).movedim(1, -1).contiguous()[..., 1 : 1 + x.shape[1]].movedim(-1, 1)
    ),
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 2, 1), value=math.nan)[..., 2:-1, 1:-2],
    "every-second-column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one-example-repeated": lambda x: x[:1].expand_as(x),
    "one-pixel-repeated": lambda x: x[..., :1, :1].expand_as(x),
    "with-gaps-and-reversed": spread,
}


@kernels
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(kernel: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    for channels, size in ((6, (7, 9)), (36, (4, 5)), (20, (3, 17))):
        x = layout(torch.randn(3, channels, *size).to(dtype))
        check(kernel, x, kernel_size=3, padding=1)
        check(kernel, x, kernel_size=(2, 3), stride=(1, 2), groups=2, bias=True)


# Shapes for which the offset kernel cuts the examples into chunks, the 16-bit ones into rounds too.
MANY = [(40, 17, 6, 5), (9, 70, 9, 9), (23, 3, 20, 20), (6, 130, 12, 13)]


@kernels
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", MANY, ids=str)
@pytest.mark.parametrize("depthwise", (False, True))
def test_many_examples(
    kernel: str, dtype: torch.dtype, shape: tuple[int, ...], depthwise: bool
) -> None:
    groups = shape[1] if depthwise else 1
    x = torch.randn(shape).to(dtype)
    check(kernel, x, kernel_size=3, padding=1, groups=groups, bias=True)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.05, 0.95)])
def test_more_means_than_are_held_at_once(alpha: float, beta: float) -> None:
    """Those of tiny images are formed and multiplied some examples at a time."""
    x = torch.randn(8000, 16, 2, 2)
    options = {"kernel_size": 3, "padding": 1, "bias": True, "alpha": alpha, "beta": beta}
    old = torch.randn(145, 145)
    start = lower_only(old + old.mT) if beta else torch.full((145, 145), math.nan)
    out = run("conv_reduce_gram", x, out=start.clone(), **options)
    torch_result = defined("conv_reduce_gram", x, start.clone(), **options)
    ref64 = defined("conv_reduce_gram", x.double(), start.double(), **options)
    assert_within_budget(out, torch_result, ref64)
    assert_symmetric(out)


@kernels
@dtypes
@pytest.mark.parametrize(("alpha", "beta"), [(0.05, 0.95), (2.0, 1.0), (0.0, 0.5), (3.0, 0.0)])
def test_accumulates(kernel: str, dtype: torch.dtype, alpha: float, beta: float) -> None:
    """Gram matrices read their lower triangle only; with beta 0 nothing is read."""
    layers = ((5, 12, 1), (0, 12, 1), (3, 40, 1), (4, 24, 8), (2, 34, 2), (3, 20, 20))
    for examples, channels, groups in layers:
        x = torch.randn(examples, channels, 5, 6).to(dtype)
        options = {"kernel_size": 3, "padding": (1, 0), "groups": groups, "bias": True}
        like = run(kernel, x, **options)
        before = torch.randn(like.shape, dtype=like.dtype)
        if kernel != "conv_window_sum":
            before = before + before.mT
        start = before if kernel == "conv_window_sum" else lower_only(before)
        start = start if beta else torch.full_like(start, math.nan)
        scaled = {**options, "alpha": alpha, "beta": beta}
        out = run(kernel, x, out=start.clone(), **scaled)
        torch_result = defined(kernel, x, start.clone(), **scaled)
        ref64 = defined(kernel, x.double(), before.double(), **scaled)
        assert_within_budget(out, torch_result, ref64)
        if kernel != "conv_window_sum":
            assert_symmetric(out)


@kernels
@pytest.mark.parametrize("shape", [*MANY, (2, 300, 7, 7), (1, 64, 30, 30)], ids=str)
@pytest.mark.parametrize("depthwise", (False, True))
def test_same_bits_every_time_and_for_any_number_of_threads(
    kernel: str, shape: tuple[int, ...], depthwise: bool, set_threads: Callable[[int], None]
) -> None:
    x = torch.randn(shape)
    groups = shape[1] if depthwise else 1
    results = []
    for threads in (1, 1, 2, 3, 5):
        set_threads(threads)
        results.append(run(kernel, x, kernel_size=3, padding=1, groups=groups, bias=True))
    assert all(torch.equal(out, results[0]) for out in results)


@exact_kernels
@dtypes
@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
def test_reads_nothing_beyond_the_end(kernel: str, dtype: torch.dtype, last: bool) -> None:
    for shape in ((2, 16, 7, 7), (1, 8, 5, 3), (2, 5, 3, 70), (1, 40, 9, 11), (3, 3, 16, 16)):
        image = whole_numbers(*shape, dtype=dtype)
        with before_a_guard_page(image.movedim(1, -1) if last else image) as memory:
            x = memory.movedim(-1, 1) if last else memory
            check(kernel, x, exact=True, kernel_size=3, padding=1)


@kernels
@pytest.mark.parametrize(
    ("size", "unread", "options"),
    [
        ((8, 9), slice(2, None, 3), {"kernel_size": 2, "stride": 3}),
        # Both ends of an axis are read less often than what lies between them.
        ((5, 5), slice(1, None, 2), {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 2}),
    ],
    ids=str,
)
def test_pixels_that_no_tap_reads_do_not_count(
    kernel: str, size: tuple[int, int], unread: slice, options: dict[str, Any]
) -> None:
    """Whatever they hold, they are not even multiplied by zero."""
    x = torch.randn(3, 20, *size)
    dirty = x.clone()
    dirty[:, :, unread], dirty[..., unread] = math.nan, math.inf
    assert torch.equal(
        run(kernel, dirty, bias=True, **options), run(kernel, x, bias=True, **options)
    )
    check(kernel, x, bias=True, **options)


@kernels
@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 7, "stride": 2, "padding": 3},
        {"kernel_size": 5, "stride": 3, "dilation": 2, "padding": 1},
        {"kernel_size": (2, 19), "stride": (3, 18)},  # wider apart than interleaved cells may be
        {"kernel_size": 5},
        {"kernel_size": (4, 7), "padding": (0, 5)},
    ],
    ids=str,
)
def test_cells_interleaved_and_in_windows(
    kernel: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Rows and pixels in steps, in more of them than are added up in a chain; taps that overlap."""
    for shape in ((2, 3, 71, 40), (1, 9, 13, 530), (2, 10, 9, 25)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(dtype, memory_format=memory_format)
            check(kernel, x, **options)


@kernels
@dtypes
@pytest.mark.parametrize("width", [3, 4, 8, 9, 16, 17, 33, 129, 257])
def test_frames(kernel: str, dtype: torch.dtype, width: int) -> None:
    """From one block of pixels to more than are added up in a chain, with one in the last."""
    for shape in ((2, 17, 4, width), (1, 3, 3, width), (1, 9, 70, min(width, 17))):
        x = torch.randn(shape).to(dtype)
        check(kernel, x, kernel_size=3, padding=1)
        check(kernel, x, kernel_size=(2, 3), padding=(0, 1), bias=True)


@pytest.mark.parametrize("kernel", conv_kernels.EXPAND_KERNELS)
def test_a_bad_channel_shows_on_its_own_diagonal_only(kernel: str) -> None:
    x = torch.randn(2, 20, 5, 5)
    x[1, 7, 2, 2] = math.nan
    out = run(kernel, x, kernel_size=3, padding=1)
    expected = torch.ones(20, 9, dtype=torch.bool)
    expected[7] = False
    assert torch.equal(out.diagonal().isfinite(), expected.flatten())


@kernels
def test_offsets_beyond_32_bits(kernel: str) -> None:
    step = 2**30 + 3
    memory = torch.empty(3 * step, dtype=torch.float16)  # touched in few places
    for strides in ((step, 9, 3, 1), (9, step, 3, 1), (27, 9, step, 1), (27, 9, 1, step)):
        x = memory.as_strided((3, 3, 3, 3), strides)
        x.copy_(whole_numbers(3, 3, 3, 3))
        check(kernel, x, kernel_size=2)


@kernels
def test_refuses_an_out_of_another_size_or_dtype(kernel: str) -> None:
    x = torch.ones(3, 2, 4, 4)
    right = run(kernel, x, kernel_size=2)
    for out in (right[1:].clone(), right.double(), torch.zeros(*right.shape, 2)[..., 0]):
        before = out.clone()
        with pytest.raises(AssertionError, match="False"):
            run(kernel, x, out=out, kernel_size=2)
        assert torch.equal(out, before)
