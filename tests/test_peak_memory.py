"""What the factors of convolutions need in memory: the input about once, never its patches."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kfac_fast import backends, ops

pytestmark = pytest.mark.skipif(not backends.EXTENSION_BUILT, reason="needs the C++ extension")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    module = importlib.import_module("memory")
    yield module
    del sys.modules["memory"]


# Input, kernel size, other geometry: 3x3 of a residual network, and what is not square or plain.
SHAPES = {
    "64@56": ((8, 64, 56, 56), 3, {"padding": 1}),
    "128@16": ((32, 128, 16, 16), 3, {"padding": 1}),
    "256@8": ((32, 256, 8, 8), 3, {"padding": 1}),
    "512@7": ((32, 512, 7, 7), 3, {"padding": 1}),
    "reflected": ((16, 64, 32, 32), 3, {"padding": 1, "padding_mode": "reflect"}),
    "5x5": ((16, 64, 28, 28), 5, {"padding": 2}),
    "stride": ((8, 96, 56, 56), 3, {"padding": 1, "stride": 2}),
    "transposed": ((16, 64, 16, 16), 4, {"stride": 2, "padding": 1, "transposed": True}),
    "grouped": ((8, 128, 28, 28), 3, {"padding": 1, "groups": 32}),
    "stem": ((4, 3, 224, 224), 7, {"padding": 3, "stride": 2}),
    "3d": ((8, 32, 12, 12, 12), 3, {"padding": 1}),
}
SMALL = 2**20  # of tables, and of how the kernel counts


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_more_than_input_and_result(
    memory: ModuleType, set_threads: Callable[[int], None], shape: str, dtype: torch.dtype
) -> None:
    if reason := memory.missing("cpu"):
        pytest.skip(reason)
    size, kernel, geometry = SHAPES[shape]
    set_threads(2)
    x = torch.randn(size).to(dtype)
    out = ops.conv_expand_gram(x, kernel, **geometry)  # also makes the plan
    growth = memory.peak_growth(lambda: ops.conv_expand_gram(x, kernel, out=out, **geometry))
    assert growth <= 1.5 * x.nbytes + out.nbytes + SMALL


@pytest.mark.parametrize("shape", [s for s in SHAPES if "@" in s])
def test_a_fifth_of_the_patches(
    memory: ModuleType, set_threads: Callable[[int], None], shape: str
) -> None:
    if reason := memory.missing("cpu"):
        pytest.skip(reason)
    size, kernel, geometry = SHAPES[shape]
    set_threads(2)
    x = torch.randn(size)
    out = ops.conv_expand_gram(x, kernel, **geometry)
    growth = memory.peak_growth(lambda: ops.conv_expand_gram(x, kernel, out=out, **geometry))
    assert growth <= kernel**2 * x.nbytes / 5
