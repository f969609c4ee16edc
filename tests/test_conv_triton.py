"""The Triton kernels of convolutions without a GPU: compiled for two devices."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compile_kernels import compiled_only
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from conv_kernels import OPERATORS, offset_tables, run  # noqa: E402
from triton_kernels import (  # noqa: E402
    ARITHMETIC,
    SHARED_BYTES,
    assert_multiplies_on_tensor_cores,
    assert_no_spills,
)

from kfac_fast.conv import ConvGeometry  # noqa: E402
from kfac_fast.kernels import (  # noqa: E402
    conv_offset_gram,
    conv_patch_gram,
    launch,
)
from kfac_fast.schema import result_shape  # noqa: E402

SQUARE = ConvGeometry.normalize("test", 2, 3, padding=1)
capabilities = pytest.mark.parametrize("capability", SHARED_BYTES)
# Channels, dtype, precision: every tile with its most and its least registers a product.
PRODUCTS = [
    *((256, *arithmetic) for arithmetic in ARITHMETIC),
    *((channels, *arithmetic) for channels in (32, 64) for arithmetic in ARITHMETIC[:2]),
]


def _compile(
    kernel: str,
    capability: int,
    x: Tensor,
    precision: str = "highest",
    beta: float = 0.0,
    geometry: ConvGeometry = SQUARE,
) -> dict[str, Any]:
    """What a call of a kernel compiles."""
    shape = result_shape(OPERATORS[kernel], x, *geometry.arguments(), True)
    with compiled_only(capability) as compiled:
        run(kernel, x, geometry, True, 1.0, beta, torch.zeros(shape), precision)
    return compiled


def _images(
    channels: int, dtype: torch.dtype, batch: int = 4, size: int = 32, channels_last: bool = False
) -> Tensor:
    x = torch.zeros(batch, channels, size, size, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    parameters = getattr(request.node, "callspec", None)
    capability = parameters.params.get("capability", 90) if parameters else 90
    monkeypatch.setattr(launch, "device", lambda index: launch.Device(capability, 132))


@capabilities
@pytest.mark.parametrize("channels, dtype, precision", PRODUCTS)
@pytest.mark.parametrize("kernel", ("conv_offset_gram", "conv_patch_gram"))
def test_products_compile_without_spills(
    record_property: Callable[[str, str], None],
    capability: int,
    kernel: str,
    channels: int,
    dtype: torch.dtype,
    precision: str,
) -> None:
    compiled = _compile(kernel, capability, _images(channels, dtype), precision)
    name = {"conv_offset_gram": "offset_partial_kernel", "conv_patch_gram": "tap_partial_kernel"}
    others = {"pack_kernel"} if kernel == "conv_offset_gram" else set()
    assert compiled.keys() == others | {name[kernel], "add_parts_kernel", "tap_finish_kernel"}
    partial = assert_no_spills(compiled, capability, record_property)[name[kernel]]
    assert_multiplies_on_tensor_cores(partial, capability, min(channels, 128))
    assert partial.count("cp.async.cg.shared.global")  # 16 bytes at once


@capabilities
@pytest.mark.parametrize("dtype, precision", ARITHMETIC[:2])
def test_gathered_patches_compile_without_spills(
    record_property: Callable[[str, str], None],
    capability: int,
    dtype: torch.dtype,
    precision: str,
) -> None:
    compiled = _compile("conv_patch_gram", capability, _images(3, dtype), precision)
    assert compiled.keys() == {"patch_partial_kernel", "triangle_finish_kernel"}
    statistics = assert_no_spills(compiled, capability, record_property)
    assert_multiplies_on_tensor_cores(statistics["patch_partial_kernel"], capability, 64)


@capabilities
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("channels_last", (False, True))
def test_copies_and_sums_compile_without_spills(
    record_property: Callable[[str, str], None],
    capability: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    x = _images(64, dtype, channels_last=channels_last)
    packed = _compile("conv_offset_gram", capability, x)["pack_kernel"]
    compiled = _compile("conv_window_sum", capability, x)
    assert compiled.keys() == {"line_sums_kernel", "window_sum_kernel"}
    compiled["pack_kernel"] = packed
    statistics = assert_no_spills(compiled, capability, record_property)
    assert "ld.global.v4" in statistics["line_sums_kernel"].assembly  # 16 bytes at once
    assert "st.global.v4" in statistics["pack_kernel"].assembly
    if channels_last:
        assert "ld.global.v4" in statistics["pack_kernel"].assembly


@pytest.mark.parametrize("kernel", OPERATORS)
def test_one_compilation_serves_all_sizes(kernel: str) -> None:
    geometries = [SQUARE, ConvGeometry.normalize("test", 2, 5, padding=1, stride=2)]
    compiled = defaultdict(set)
    for batch, channels, size, geometry in zip(
        (64, 17), (256, 384), (48, 64), geometries, strict=True
    ):
        x = _images(channels, torch.bfloat16, batch, size)
        for name, own in _compile(kernel, 90, x, beta=0.9, geometry=geometry).items():
            compiled[name].add(own.hash)
    assert {name: len(hashes) for name, hashes in compiled.items()} == dict.fromkeys(compiled, 1)


def test_as_many_pairs_of_taps_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second and third side of a grid hold 65535."""
    grids: list[tuple[int, ...]] = []

    def take_down(*args: Any, grid: tuple[int, ...], **options: Any) -> None:
        grids.append(grid)

    monkeypatch.setattr(conv_patch_gram.tap_partial_kernel, "run", take_down)
    geometry = ConvGeometry.normalize("test", 2, 20, stride=20)
    _compile("conv_patch_gram", 90, _images(32, torch.bfloat16, 1, 40), geometry=geometry)
    assert [grid[0] for grid in grids] == [400 * 401 // 2] and max(grids[0][1:]) <= 65535


def test_of_two_opposite_shifts_one_is_multiplied() -> None:
    tables = offset_tables(SQUARE, _images(1, torch.float32))
    assert len({cell.shift for cell in tables.cells}) == 13  # of 25
    assert sum(cell.symmetric for cell in tables.cells) == 9


def test_tables_are_copied_to_the_device_once() -> None:
    tables = offset_tables(SQUARE, _images(1, torch.float32))
    tiling = launch.block_tiling(64, 1, 2, 90)
    tasks = [conv_offset_gram._tasks(tables, batch, tiling, 1, 132) for batch in (8, 8, 16)]
    assert tasks[0] is tasks[1] and tasks[0] is not tasks[2]
