"""The Triton Gram kernels without a GPU: compiled for two devices."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from compile_kernels import compiled_only
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton_kernels import (  # noqa: E402
    ARITHMETIC,
    SHARED_BYTES,
    assert_multiplies_on_tensor_cores,
    assert_no_spills,
)

from kfac_fast import backends, schema  # noqa: E402
from kfac_fast.kernels import gram as kernels  # noqa: E402
from kfac_fast.kernels import launch  # noqa: E402

WIDE, NARROW = 768, 64

# How x lies in memory: contiguous along its columns or rows, aligned or not, or along neither.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda x: x,
    "rows": lambda x: x.T.contiguous().T,
    "unaligned columns": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    "unaligned rows": lambda x: torch.cat([x, x[:1]]).T.contiguous().T[:-1],
    "neither": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}
# Layout, width, masked: all tiles, and the layouts that differ in what the compiler makes of them.
VARIANTS = [
    ("columns", WIDE, False),
    ("columns", WIDE, True),
    ("columns", NARROW, True),
    ("rows", WIDE, False),
    ("unaligned columns", WIDE, True),
    ("neither", WIDE, True),
]


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("dtype, precision", ARITHMETIC)
@pytest.mark.parametrize("layout, width, masked", VARIANTS)
def test_compiles_without_spills(
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, str], None],
    capability: int,
    dtype: torch.dtype,
    precision: str,
    layout: str,
    width: int,
    masked: bool,
) -> None:
    monkeypatch.setattr(launch, "device", lambda index: launch.Device(capability, 132))
    x = LAYOUTS[layout](torch.zeros(64, width, dtype=dtype))
    mask = torch.ones(64, dtype=torch.bool) if masked else None
    out = torch.zeros(width + 1, width + 1)
    with compiled_only(capability) as compiled:
        kernels.gram(x, mask, 1, True, 1.0, 0.0, out, precision)
    assert compiled.keys() == {"gram_partial_kernel", "triangle_finish_kernel"}
    partial = assert_no_spills(compiled, capability, record_property)["gram_partial_kernel"]
    assert_multiplies_on_tensor_cores(partial, capability, block=64)
    if layout in ("columns", "rows"):
        assert partial.count("cp.async.cg.shared.global")  # 16 bytes at once
    elif dtype == torch.float32:
        assert partial.count("cp.async.ca.shared.global")


def test_one_compilation_serves_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device", lambda index: launch.Device(90, 132))
    compiled = set()
    for rows, width in ((64, 768), (4096, 1000), (1, 1024), (33, 1016)):
        with compiled_only(90) as kernels_by_name:
            x = torch.zeros(rows, width, dtype=torch.bfloat16)
            kernels.gram(x, None, 1, False, 0.5, 0.9, torch.zeros(width, width), "highest")
        compiled.add(frozenset(kernel.hash for kernel in kernels_by_name.values()))
    assert len(compiled) == 1


def _lies(x: Tensor, masked: bool = False, width: int = 0) -> tuple[launch.Line, int]:
    mask = torch.ones(x.shape[:-1], dtype=torch.bool) if masked else None
    rows = launch.Rows.of(x, mask, width or x.shape[-1])
    return rows.line, rows.chunk


def test_chunks() -> None:
    x = torch.zeros(16, 40, dtype=torch.bfloat16)
    columns, rows = launch.Line.COLUMNS, launch.Line.ROWS
    assert _lies(LAYOUTS["columns"](x)) == (columns, 8)
    assert _lies(LAYOUTS["columns"](x), masked=True) == (columns, 8)
    assert _lies(LAYOUTS["columns"](x), width=20) == (columns, 1)  # groups start unaligned
    assert _lies(x.flatten()[1:-39].view(15, 40)) == (columns, 1)
    assert _lies(LAYOUTS["unaligned columns"](x)) == (columns, 1)
    assert _lies(LAYOUTS["rows"](x)) == (rows, 8)
    assert _lies(LAYOUTS["rows"](x), masked=True) == (rows, 1)
    assert _lies(LAYOUTS["unaligned rows"](x)) == (rows, 1)
    assert _lies(LAYOUTS["neither"](x)) == (launch.Line.NEITHER, 1)


def test_rows_are_copied_only_if_more_than_two_strides_describe_them() -> None:
    x = torch.zeros(4, 6, 8, 16)
    for view in (x, x[:, :, :5], x[:, :3], x.transpose(0, 2), x.movedim(-1, 1), x[:1, :2, :3]):
        rows = launch.Rows.of(view, None, view.shape[-1])
        assert rows.x.data_ptr() == x.data_ptr()
        assert rows.outer * rows.inner == view[..., 0].numel()
    assert launch.Rows.of(x[:, :3, :5], None, 16).x.data_ptr() != x.data_ptr()


def test_split_fills_the_device() -> None:
    assert launch.choose_split(1, 0, 65536, 132) == 1
    assert launch.choose_split(1, 1, 65536, 132) == 1
    assert launch.choose_split(132, 1024, 65536, 132) == 1
    assert launch.choose_split(10**6, 1024, 65536, 132) == 1  # no room for more
    for tiles in (21, 36, 136, 300):
        parts = launch.choose_split(tiles, 1024, 65536, 132)
        busiest = -(-tiles * parts // 132) / parts
        assert busiest <= 1.2 * tiles / 132


def test_parts_fill_the_device() -> None:
    assert launch.choose_part([], 1, 65536, 132) == 1
    for steps in ([1024] * 13 + [16] * 16, [9], [2000] * 8 + [1]):
        longest = launch.choose_part(steps, 1, 65536, 132)
        assert 1 <= longest <= max(steps)
        parts = sum(-(-own // longest) for own in steps)
        assert parts * 65536 <= launch.MAX_WORKSPACE
        # Even if the longest part starts last, the device is not idle for long.
        busiest = sum(steps) / 132 + longest
        assert busiest <= 1.5 * max(sum(steps) / 132, launch.STEPS_PER_STORE)
    assert launch.choose_part([1024] * 13, 10**6, 65536, 132) == 1024  # no room for more


@pytest.mark.parametrize("op", [op for op in schema.OPERATORS if op.endswith(("gram", "_sum"))])
def test_refusals(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    (implementation,) = (i for i in backends.TABLE[op, "cuda"] if i.name == "triton")

    def refusal(dtype: torch.dtype) -> str | None:
        return implementation.refuses(torch.zeros(2, 3, 4, dtype=dtype), None, None, None)

    assert refusal(torch.bfloat16) is None
    assert "float64" in refusal(torch.float64)
    monkeypatch.setattr(launch, "device", lambda index: launch.Device(75, 40))
    assert "compute capability 8.0" in refusal(torch.float32)
