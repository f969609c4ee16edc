"""The Triton kernels of shared positions without a GPU: compiled."""

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

from triton_kernels import SHARED_BYTES, assert_no_spills  # noqa: E402

from kfac_fast.kernels import launch  # noqa: E402
from kfac_fast.kernels import shared_gram as kernels  # noqa: E402

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda x: x,
    "rows": lambda x: x.mT.contiguous().mT,
}


def _compile(
    capability: int, x: Tensor, masked: bool = False, segmented: bool = False, beta: float = 0.0
) -> dict[str, Any]:
    """What a call compiles besides the Gram of the reduced rows."""
    if segmented:
        x = x.flatten(0, 1)
    mask = torch.ones(x.shape[:-1], dtype=torch.bool) if masked else None
    segments = torch.zeros(len(x), dtype=torch.int64) if segmented else None
    out = torch.zeros(x.shape[-1] + 1, x.shape[-1] + 1)
    with compiled_only(capability) as compiled:
        count = 8 if segmented else -1
        kernels.shared_gram(x, mask, segments, count, "mean", 1, True, 1.0, beta, out, "highest")
    return {name: compiled[name] for name in ("position_sums_kernel", "rows_kernel")}


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("masked, segmented", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_without_spills(
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, str], None],
    capability: int,
    dtype: torch.dtype,
    masked: bool,
    segmented: bool,
    layout: str,
) -> None:
    monkeypatch.setattr(launch, "device", lambda index: launch.Device(capability, 132))
    x = LAYOUTS[layout](torch.zeros(8, 200, 768, dtype=dtype))
    compiled = _compile(capability, x, masked, segmented)
    sums = assert_no_spills(compiled, capability, record_property)["position_sums_kernel"]
    if layout == "columns" or not masked:
        assert "ld.global.v4" in sums.assembly  # 16 bytes at once


def test_one_compilation_serves_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device", lambda index: launch.Device(90, 132))
    compiled = defaultdict(set)
    for shape in ((8, 200, 768), (17, 4096, 1024), (1, 16, 1016)):
        for name, own in _compile(90, torch.zeros(shape, dtype=torch.bfloat16)).items():
            compiled[name].add(own.hash)
    assert {name: len(hashes) for name, hashes in compiled.items()} == dict.fromkeys(compiled, 1)


def test_parts_fill_the_device() -> None:
    assert launch.choose_adding_split(1, 0, 132) == 1
    assert launch.choose_adding_split(10**6, 100, 132) == 1
    assert launch.choose_adding_split(1, 10**6, 132) == launch.MAX_SPLIT
    assert launch.choose_adding_split(100, 5, 132) == 5  # no part without a step


def test_what_is_added_at_once_fits_the_input() -> None:
    columns, rows = launch.Line.COLUMNS, launch.Line.ROWS
    assert launch.adding_block(4096, 768, columns) == (16, 128)
    assert launch.adding_block(4096, 768, rows) == (64, 32)
    assert launch.adding_block(7, 768, rows) == (8, 256)
    assert launch.adding_block(4096, 3, columns) == (16, 4)
