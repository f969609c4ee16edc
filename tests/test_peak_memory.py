"""What factors need in memory: the input about once, never its patches, whatever the shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kfac_fast import backends

pytestmark = pytest.mark.skipif(not backends.EXTENSION_BUILT, reason="needs the C++ extension")
ROOT = Path(__file__).parents[1]

# Operator, input, kernel size, other options: 3x3 of a residual network, what is not square or
# plain, and small inputs whose results have many parts.
SHAPES: dict[str, tuple[str, tuple[int, ...], int | None, dict[str, Any]]] = {
    name: ("conv_expand_gram", *rest)
    for name, rest in {
        "64@56": ((8, 64, 56, 56), 3, {"padding": 1}),
        "128@16": ((32, 128, 16, 16), 3, {"padding": 1}),
        "256@8": ((32, 256, 8, 8), 3, {"padding": 1}),
        "512@7": ((32, 512, 7, 7), 3, {"padding": 1}),
        "reflected": ((16, 64, 32, 32), 3, {"padding": 1, "padding_mode": "reflect"}),
        "5x5": ((16, 64, 28, 28), 5, {"padding": 2}),
        "5x5 reflected": ((2, 48, 28, 28), 5, {"padding": 2, "padding_mode": "reflect"}),
        "5x5 not padded": ((8, 24, 28, 28), 5, {}),
        "7x7 circular": ((4, 16, 32, 32), 7, {"padding": 3, "padding_mode": "circular"}),
        "7x7 not padded": ((1, 16, 56, 56), 7, {}),
        "stride": ((8, 96, 56, 56), 3, {"padding": 1, "stride": 2}),
        "transposed": ((16, 64, 16, 16), 4, {"stride": 2, "padding": 1, "transposed": True}),
        "grouped": ((8, 128, 28, 28), 3, {"padding": 1, "groups": 32}),
        "depthwise, stride": ((4, 512, 28, 28), 7, {"padding": 3, "stride": 2, "groups": 512}),
        "stem": ((4, 3, 224, 224), 7, {"padding": 3, "stride": 2}),
        "3d": ((8, 32, 12, 12, 12), 3, {"padding": 1}),
        "3d not padded": ((1, 16, 12, 12, 12), 3, {}),
        "depthwise": ((4, 96, 28, 28), 7, {"padding": 3, "groups": 96}),
        "many taps": ((1, 16, 56, 56), 13, {}),
        "few, depthwise": ((4, 240, 56, 56), 7, {"padding": 3, "groups": 240}),
        "mostly padding": (
            *((64, 192, 14, 14), 7),
            {"padding": 3, "padding_mode": "reflect", "groups": 192},
        ),
        "3d, mostly padding": (
            *((32, 25, 8, 8, 8), 4),
            {"padding": 2, "padding_mode": "replicate", "groups": 25},
        ),
    }.items()
}
SHAPES |= {
    "means": ("conv_reduce_gram", (32, 128, 28, 28), 3, {"padding": 1}),
    "means, depthwise": ("conv_reduce_gram", (128, 768, 4, 4), 7, {"padding": 3, "groups": 768}),
    "means of few": ("conv_reduce_gram", (256, 1024, 2, 2), 3, {"padding": 1, "groups": 1024}),
    "means of single pixels": ("conv_reduce_gram", (8000, 4, 1, 1), 3, {"padding": 1}),
    "sums": ("conv_window_sum", (32, 128, 28, 28), 3, {"padding": 1}),
    "rows": ("gram", (8192, 768), None, {}),
    "many columns": ("gram", (64, 4096), None, {}),
    "groups a bit wider than panels": ("gram", (200, 512 * 25), None, {"groups": 512}),
    "sequences": ("shared_gram", (64, 197, 768), None, {}),
    "wide sequences": ("shared_gram", (8, 50, 3072), None, {}),
}
SMALL = 2**20  # of tables, and of how the kernel counts

# A process of its own: reading a peak sets for good how the process allocates.
MEASURE = """
import gc, json, sys
sys.path.insert(0, "bench")
import memory, torch
from kfac_fast import ops

gc.freeze()  # what is imported need not be collected at each reading
torch.set_num_threads(2)
found = {}
for name, (op, size, kernel, options) in json.load(sys.stdin).items():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        form = getattr(ops, op)
        x = torch.randn(size).to(dtype)
        if len(size) == 4 and dtype == torch.float64:
            x = x.contiguous(memory_format=torch.channels_last)  # read where it is
        arguments = (x,) if kernel is None else (x, kernel)
        out = form(*arguments, **options)  # also makes the plan
        call = lambda: form(*arguments, out=out, **options)
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


@pytest.mark.parametrize("dtype", ("torch.float32", "torch.bfloat16", "torch.float64"))
@pytest.mark.parametrize("shape", SHAPES)
def test_no_more_than_input_and_result(
    measured: dict[str, tuple[int, int, int]], shape: str, dtype: str
) -> None:
    growth, input_bytes, result_bytes = measured[f"{shape} {dtype}"]
    assert growth <= 1.5 * input_bytes + result_bytes + SMALL


@pytest.mark.parametrize("shape", [s for s in SHAPES if "@" in s])
def test_a_fifth_of_the_patches(measured: dict[str, tuple[int, int, int]], shape: str) -> None:
    growth, input_bytes, _ = measured[f"{shape} torch.float32"]
    assert growth <= 3**2 * input_bytes / 5


# Counts the threads of a process whose kernels may use one, then three.
COUNT = """
import os, torch
import torch.nn.functional as F
from kfac_fast import ops

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
x, image = torch.randn(4096, 256), torch.randn(8, 64, 32, 32)
matrices = [torch.eye(200) + 0.1 for _ in range(8)]
before = threads()
for count in (1, 3):
    torch.set_num_threads(count)
    ops.gram(x)
    ops.shared_gram(x.view(64, 64, 256))
    ops.conv_expand_gram(image, 3, padding=1)
    ops.conv_reduce_gram(image, 3, padding=1)
    ops.damped_inverse(matrices, 0.1)
    ops.damped_cholesky(matrices, 0.1)
    ops.eigh(matrices)
    ops.precondition(matrices, matrices, matrices)
    ops.cholesky_precondition(matrices, matrices, matrices)
    ops.feature_norm_gram(x, x)
    ops.channel_norm_gram(image, image)
    ops.update_averages(
        matrices, [1] * 8, 0.9, out=[torch.zeros(200, 200) for _ in matrices],
        weights=[torch.zeros(()) for _ in matrices],
        skipped=[torch.zeros((), dtype=torch.int64) for _ in matrices],
    )
    print(threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_as_many_threads_as_torch_allows() -> None:
    command = [sys.executable, "-c", COUNT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    one, three = map(int, done.stdout.split())
    assert one == 0 and three >= 2
