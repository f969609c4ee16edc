"""What the factors of convolutions need in memory: the input about once, never its patches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kfac_fast import backends

pytestmark = pytest.mark.skipif(not backends.EXTENSION_BUILT, reason="needs the C++ extension")
ROOT = Path(__file__).parents[1]

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
    "depthwise": ((4, 96, 28, 28), 7, {"padding": 3, "groups": 96}),
    "many taps": ((1, 16, 56, 56), 13, {}),
}
SMALL = 2**20  # of tables, and of how the kernel counts

# A process of its own: reading a peak sets for good how the process allocates.
MEASURE = """
import json, sys
sys.path.insert(0, "bench")
import memory, torch
from kfac_fast import ops

torch.set_num_threads(2)
found = {}
for name, (size, kernel, geometry) in json.load(sys.stdin).items():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(size).to(dtype)
        out = ops.conv_expand_gram(x, kernel, **geometry)  # also makes the plan
        call = lambda: ops.conv_expand_gram(x, kernel, out=out, **geometry)
        found[f"{name} {dtype}"] = memory.peak_growth(call), x.nbytes, out.nbytes
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, int, int]]:
    """Peak growth, bytes of the input and of the result, by shape and dtype."""
    command = [sys.executable, "-c", MEASURE]
    asked = json.dumps(SHAPES)
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        command, input=asked, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode and "clear_refs" in done.stderr:
        pytest.skip("peaks need Linux, glibc and a writable /proc/self/clear_refs")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", ("torch.float32", "torch.bfloat16"))
@pytest.mark.parametrize("shape", SHAPES)
def test_no_more_than_input_and_result(
    measured: dict[str, tuple[int, int, int]], shape: str, dtype: str
) -> None:
    growth, input_bytes, result_bytes = measured[f"{shape} {dtype}"]
    assert growth <= 1.5 * input_bytes + result_bytes + SMALL


@pytest.mark.parametrize("shape", [s for s in SHAPES if "@" in s])
def test_a_fifth_of_the_patches(measured: dict[str, tuple[int, int, int]], shape: str) -> None:
    growth, input_bytes, _ = measured[f"{shape} torch.float32"]
    assert growth <= SHAPES[shape][1] ** 2 * input_bytes / 5
