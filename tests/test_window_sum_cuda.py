"""The CUDA C++ window sum without a GPU: compiled by nvcc, and run on the CPU by emulation."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cases import CONVOLUTIONS, Convolution
from cuda_sources import (
    assert_compiles_without_spills,
    assert_every_barrier_is_needed,
    assert_loads_where_torch_has_no_cuda,
    emulation,
    integers,
)
from oracle import assert_within_budget, bits, poisoned, spread, whole_numbers
from torch import Tensor

from kfac_fast import conv_kernels, reference
from kfac_fast.conv import ConvGeometry
from kfac_fast.schema import result_dtype, result_shape

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.usefixtures("one_thread"),
]
KERNELS = {
    "float": torch.float32,
    "double": torch.float64,
    "bfloat16": torch.bfloat16,
    "half": torch.float16,
}
VECTORS = {"float": (1, 2, 4), "double": (1, 2), "bfloat16": (1, 2, 4, 8), "half": (1, 2, 4, 8)}
FEW_BLOCKS, MANY_BLOCKS = 1, 40  # that fill the device
SHARED_BYTES = 160 * 1024
kernels = pytest.mark.parametrize("kernel", KERNELS)


class Arguments(ctypes.Structure):
    """The struct of the same name in ``emulate_window_sum.cpp``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("axes", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("plan", ctypes.c_void_p),
        ("cells", ctypes.POINTER(ctypes.c_int64)),
        ("taps", ctypes.POINTER(ctypes.c_int64)),
        ("groups", ctypes.c_int64),
        ("bias", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("beta", ctypes.c_double),
        ("out", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("most_bytes", ctypes.c_int64),
        ("descending", ctypes.c_int64),
    )


class Choice(ctypes.Structure):
    """The struct of the same name in ``emulate_window_sum.cpp``."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("vector", "channels", "bundles", "pieces", "row_parts"),
            *("walkers", "chunks", "lanes", "bytes", "reads"),
        )
    )


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    return emulation("window_sum")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def geometry_of(x: Tensor, options: dict[str, Any]) -> ConvGeometry:
    return ConvGeometry.normalize("test", x.dim() - 2, **options)


def launch(
    library: ctypes.CDLL,
    kernel: str,
    x: Tensor,
    geometry: ConvGeometry,
    out: Tensor,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    blocks: int = FEW_BLOCKS,
    most_bytes: int = SHARED_BYTES,
    descending: bool = False,
) -> Choice:
    size = tuple(x.shape[2:])
    plan = conv_kernels.plan("conv_window_sum", geometry, size)
    cells = [len(axis.sums().weights[0]) for axis in geometry.axes(size)]
    arguments = Arguments(
        x.data_ptr(),
        geometry.dimensions,
        integers(x.shape),
        integers(x.stride()),
        plan.data_ptr(),
        integers(cells),
        integers(geometry.kernel_size),
        geometry.groups,
        bias,
        alpha,
        beta,
        out.data_ptr(),
        blocks,
        most_bytes,
        descending,
    )
    choice = Choice()
    getattr(library, f"window_sum_{kernel}")(ctypes.byref(arguments), ctypes.byref(choice))
    return choice


def window_sums(x: Tensor, geometry: ConvGeometry, bias: bool) -> Tensor:
    """Each tap's pixels of the framed input, added up in extended precision."""
    framed = geometry.frame_input(x.double()).numpy().astype(np.longdouble)
    outputs = geometry.output_size(x.shape[2:])
    sums = []
    for taps in product(*map(range, geometry.kernel_size)):
        window = tuple(
            slice(d * k, d * k + s * (o - 1) + 1, s)
            for d, k, s, o in zip(
                geometry.dilation, taps, geometry.window_stride, outputs, strict=True
            )
        )
        read = framed[(slice(None), slice(None), *window)]
        sums.append(read.sum(axis=tuple(range(2, x.dim()))))
    result = torch.from_numpy(np.stack(sums, -1).astype(np.float64))
    result = result.reshape(len(x), geometry.groups, geometry.features(x.shape[1]))
    if bias:
        ones = result.new_full((len(x), geometry.groups, 1), math.prod(outputs))
        result = torch.cat([result, ones], -1)
    return result[:, 0] if geometry.groups == 1 else result


def check(
    library: ctypes.CDLL,
    kernel: str,
    x: Tensor,
    options: dict[str, Any],
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    **limits: int,
) -> Choice:
    """Check a result, and that it does not depend on the order of the threads."""
    geometry = geometry_of(x, options)
    inputs = (x, *geometry.arguments(), bias)
    shape, dtype = result_shape("conv_window_sum", *inputs), result_dtype(x.dtype)
    start = torch.randn(shape, dtype=dtype) if beta else poisoned(*shape, dtype=dtype)
    results = []
    for descending in (False, True):
        out = start.clone()
        choice = launch(
            library, kernel, x, geometry, out, bias, alpha, beta, descending=descending, **limits
        )
        assert 0 <= choice.bytes <= limits.get("most_bytes", SHARED_BYTES)
        assert choice.reads <= x.numel()
        results.append(out)
    assert torch.equal(bits(results[0]), bits(results[1]))
    torch_result = start.clone()
    reference.conv_window_sum(*inputs, alpha, beta, torch_result)
    expected = alpha * window_sums(x, geometry, bias)
    if beta:
        expected += beta * start.double()
    assert_within_budget(results[0], torch_result, expected)
    return choice


def random(kernel: str, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(KERNELS[kernel])


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def cropped(x: Tensor) -> Tensor:
    """The same values as the inside of a larger tensor: no two dimensions step evenly."""
    view = x.new_full([n + 3 for n in x.shape], torch.nan)
    return view[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": channels_last,
    "reversed-with-gaps": spread,
    "cropped": cropped,
    "cropped-channels-last": lambda x: cropped(x.movedim(1, -1)).movedim(-1, 1),
    "one-example-repeated": lambda x: x[:1].expand_as(x),
    "one-pixel-repeated": lambda x: x[..., :1].expand_as(x),
    "transposed-space": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "examples-inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every-second-row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "unaligned": lambda x: x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x),
}


@kernels
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_result(emulated: ctypes.CDLL, kernel: str, case: Convolution) -> None:
    x = random(kernel, 3, case.channels, *case.size)
    for layout in (torch.Tensor.contiguous, channels_last):
        for blocks in (FEW_BLOCKS, MANY_BLOCKS):
            check(emulated, kernel, layout(x), case.options, bias=True, blocks=blocks)


@kernels
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(emulated: ctypes.CDLL, kernel: str, layout: Callable[[Tensor], Tensor]) -> None:
    options = {"kernel_size": 3, "padding": 1}
    for shape in ((3, 6, 5, 4), (2, 8, 9, 16), (2, 5, 4, 3, 6)):
        x = layout(random(kernel, *shape))
        for blocks in (FEW_BLOCKS, MANY_BLOCKS):
            check(emulated, kernel, x, options, bias=True, blocks=blocks)
    check(emulated, kernel, layout(random(kernel, 3, 4, 9)), {"kernel_size": 3})


@kernels
@pytest.mark.parametrize("groups", (1, 2, 6))
@pytest.mark.parametrize("layout", (torch.Tensor.contiguous, channels_last))
def test_accumulates(
    emulated: ctypes.CDLL, kernel: str, layout: Callable[[Tensor], Tensor], groups: int
) -> None:
    x = layout(random(kernel, 3, 6, 7, 8))
    options = {"kernel_size": (2, 3), "stride": 2, "padding": 1, "groups": groups}
    for bias, blocks in product((False, True), (FEW_BLOCKS, MANY_BLOCKS)):
        check(emulated, kernel, x, options, bias, alpha=0.3, beta=0.9, blocks=blocks)


LARGE = {
    "wide": ((1, 2, 9, 1100), {"kernel_size": 3}),
    "tall": ((1, 2, 1300, 5), {"kernel_size": 3, "padding": 1}),
    "image": ((2, 3, 70, 64), {"kernel_size": 7, "stride": 2, "padding": 3}),
    "volume": ((1, 2, 11, 12, 16), {"kernel_size": 3}),
    "signal": ((2, 3, 5000), {"kernel_size": 9, "stride": 2, "padding": 4}),
    "patches": ((2, 3, 64, 64), {"kernel_size": 16, "stride": 16}),
    "large-kernel": ((1, 2, 28, 28), {"kernel_size": 31, "padding": 15}),
    "whole-image": ((2, 2, 20, 20), {"kernel_size": 20}),
    "long-kernel": ((1, 2, 600), {"kernel_size": 129, "padding": 64}),
    "many-planes": ((30, 40, 3, 2), {"kernel_size": 2}),
    "pixels": ((20, 70, 1, 1), {"kernel_size": 3, "padding": 1}),
    "line": ((3, 8, 50, 1), {"kernel_size": (3, 1)}),
    "many-channels": ((2, 300, 5, 5), {"kernel_size": 3, "padding": 1}),
    "many-signals": ((40, 16, 36), {"kernel_size": 3}),
}


@pytest.mark.parametrize("kernel", ("float", "bfloat16", "double"))
@pytest.mark.parametrize(("shape", "options"), LARGE.values(), ids=LARGE)
def test_large(
    emulated: ctypes.CDLL, kernel: str, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    # All positive, as after a rectifier: the errors of long sums do not cancel.
    x = random(kernel, *shape).abs()
    for layout in (torch.Tensor.contiguous, channels_last):
        for blocks in (FEW_BLOCKS, MANY_BLOCKS):
            check(emulated, kernel, layout(x), options, bias=True, blocks=blocks)


@kernels
def test_little_shared_memory(emulated: ctypes.CDLL, kernel: str) -> None:
    """Many cells take narrower vectors and fewer threads, down to one."""
    options = {"kernel_size": 3}
    x = random(kernel, 2, 6, 9, 10, 16)
    lanes = set()
    for most_bytes in (40000, 20000, 10000, 5000, 2500):
        for layout in (torch.Tensor.contiguous, channels_last):
            lanes.add(
                check(emulated, kernel, layout(x), options, True, most_bytes=most_bytes).lanes
            )
    assert max(lanes) > 32 and min(lanes) < 8


def test_too_little_shared_memory(emulated: ctypes.CDLL) -> None:
    x = torch.randn(1, 1, 40, 40)
    geometry, out = geometry_of(x, {"kernel_size": 40}), poisoned(1, 1600)
    assert launch(emulated, "float", x, geometry, out, most_bytes=9000).bytes > 9000
    assert out.isnan().all()


def test_vectors_are_as_wide_as_the_layout_allows(emulated: ctypes.CDLL) -> None:
    def vector(kernel: str, x: Tensor) -> int:
        return check(emulated, kernel, x, {"kernel_size": 1}).vector

    for kernel, widths in VECTORS.items():
        widest = widths[-1]
        for width in widths:
            elements = width * 3
            assert vector(kernel, random(kernel, 2, 3, 5, elements)) == width
            assert vector(kernel, channels_last(random(kernel, 2, elements, 3, 5))) == width
            assert vector(kernel, channels_last(random(kernel, 2, 3, 3, elements))) == width
            padded = torch.cat([random(kernel, 2, 3, 5, 16)] * 2, -1)[..., width : width + 16]
            assert vector(kernel, padded) == width
        assert vector(kernel, random(kernel, 2, 3, 5, 32)[..., ::2]) == 1
        assert vector(kernel, random(kernel, 2, 3, 6, 32)[:, :, ::2]) == widest
        odd_rows = random(kernel, 2, 3, 5, 33)[..., :32]
        assert vector(kernel, odd_rows) == 1
        assert vector(kernel, odd_rows[:1, :1, :1]) == widest  # whose strides do not matter
        many = channels_last(random(kernel, 2, 96 + widest // 2, 3, 5))
        assert vector(kernel, many) == max(widest // 2, 1)


def test_reads_once_what_is_read(emulated: ctypes.CDLL) -> None:
    """Every element of the rows that some tap reads, and no other row."""
    x = torch.randn(3, 5, 12, 13)
    for blocks, layout in product((FEW_BLOCKS, MANY_BLOCKS), (torch.clone, channels_last)):
        choice = check(emulated, "float", layout(x), {"kernel_size": 3}, blocks=blocks)
        assert choice.reads == x.numel()
        sparse = {"kernel_size": 2, "stride": 4}
        choice = check(emulated, "float", layout(x), sparse, blocks=blocks)
        assert choice.reads == x.numel() // 2


def test_work_is_shared_out(emulated: ctypes.CDLL) -> None:
    """Several planes for a block, several walkers and blocks for a plane, several loads at once."""
    options = {"kernel_size": 3, "padding": 1}
    small = check(emulated, "float", torch.randn(40, 64, 4, 4), options, blocks=8)
    assert small.bundles >= 64 and small.pieces * small.row_parts == small.walkers == 1
    large = check(emulated, "float", torch.randn(1, 1, 64, 64), options, blocks=4)
    assert large.walkers > 1 and large.row_parts > 1
    signal = check(emulated, "float", torch.randn(2, 40, 512), options, blocks=1)
    assert signal.chunks == 4 and signal.pieces == signal.row_parts == 1
    last = check(emulated, "float", channels_last(torch.randn(2, 64, 7, 7)), options)
    assert last.channels == 16 and last.vector == 4


def test_wide_strides(emulated: ctypes.CDLL) -> None:
    # Untouched pages take no memory.
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    for strides in ((2**30, 4, 2, 1), (8, 2**30, 2, 1), (4, 2, 2**30, 1), (4, 2, 1, 2**30)):
        shape = [3 if stride == 2**30 else 2 for stride in strides]
        x = storage.as_strided(shape, strides)
        x.copy_(torch.randn(shape))
        check(emulated, "bfloat16", x, {"kernel_size": 2})


def test_whole_numbers_are_exact(emulated: ctypes.CDLL) -> None:
    options = {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}
    x = whole_numbers(3, 4, 9, 8)
    geometry = geometry_of(x, options)
    for kernel, layout in product(KERNELS, (torch.clone, channels_last)):
        out = poisoned(3, 36, dtype=result_dtype(KERNELS[kernel]))
        launch(emulated, kernel, layout(x.to(KERNELS[kernel])), geometry, out)
        assert torch.equal(out.double(), window_sums(x, geometry, False))


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_bad_pixels_show_in_the_taps_that_read_them(emulated: ctypes.CDLL, value: float) -> None:
    for shape, options in (
        ((2, 3, 5, 6), {"kernel_size": 3}),
        ((2, 3, 9, 8), {"kernel_size": 2, "stride": 3}),
        ((2, 3, 4, 3, 4), {"kernel_size": (2, 3, 2), "padding": 1}),
    ):
        for place in product(*((0, n // 2, n - 1) for n in shape[2:])):
            x = torch.randn(shape)
            x[1, 2][place] = value
            geometry = geometry_of(x, options)
            out = poisoned(*result_shape("conv_window_sum", x, *geometry.arguments(), False))
            launch(emulated, "float", x, geometry, out, blocks=MANY_BLOCKS)
            expected = torch.empty_like(out)
            reference.conv_window_sum(x, *geometry.arguments(), False, 1.0, 0.0, expected)
            assert torch.equal(out.isfinite(), expected.isfinite())


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((0, 3, 4, 4), {"kernel_size": 2}),
        ((2, 0, 3, 3), {"kernel_size": 2}),
        ((2, 3, 0, 3), {"kernel_size": 2, "padding": 1}),
        ((2, 3, 1), {"kernel_size": 1, "stride": 3, "padding": 1}),  # no tap reads the pixel
    ],
)
def test_nothing_to_sum(
    emulated: ctypes.CDLL, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    check(emulated, "float", torch.randn(shape), options, bias=True)
    check(emulated, "float", torch.randn(shape), options, True, alpha=0.5, beta=2.0)


def test_quotients(emulated: ctypes.CDLL) -> None:
    largest = 2**31 - 1
    for divisor in (1, 2, 3, 5, 7, 49, 63, 64, 65, 641, 3136, 65537, 10**6 + 3, 2**30, largest):
        near = [m * divisor + d for m in (0, 1, 2, 9, largest // divisor) for d in (-1, 0, 1)]
        for numerator in (*near, largest - 1, largest, largest // 2, 12345):
            if 0 <= numerator <= largest:
                assert emulated.quotient(numerator, divisor) == numerator // divisor


def test_every_barrier_is_needed(emulated: ctypes.CDLL) -> None:
    x = torch.randn(2, 3, 9, 10, 12)
    geometry = geometry_of(x, {"kernel_size": 3})

    def run(descending: bool) -> Tensor:
        out = poisoned(2, 81)
        launch(emulated, "float", x, geometry, out, blocks=MANY_BLOCKS, descending=descending)
        return out

    assert_every_barrier_is_needed(emulated, run, "window_sum.cuh")


def test_loads_where_torch_has_no_cuda() -> None:
    assert_loads_where_torch_has_no_cuda("conv_window_sum", "conv_window_sum")


def test_compiles_without_spills(record_property: Callable[[str, str], None]) -> None:
    kernels, finishing = sum(map(len, VECTORS.values())), 2
    assert_compiles_without_spills("conv_window_sum", kernels + finishing, record_property)
