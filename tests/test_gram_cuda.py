"""The CUDA C++ Gram kernels without a GPU: compiled by nvcc, and run on the CPU by emulation."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import GRAM_ROWS
from compile_kernels import ROOT, cached, toolkit
from oracle import assert_symmetric, assert_within_budget, bits, lower_only, poisoned, spread
from oracle import gram as oracle_gram
from torch import Tensor

from kfac_fast import reference
from kfac_fast.schema import result_dtype, result_shape

CUDA = ROOT / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent
# Element type and tile of every instantiation.
KERNELS = {
    "float_64": torch.float32,
    "float_128": torch.float32,
    "bfloat16_64": torch.bfloat16,
    "bfloat16_128": torch.bfloat16,
    "half_64": torch.float16,
    "half_128": torch.float16,
    "double_64": torch.float64,
}
# With rows for more than one chain and columns for more than one tile.
ROWS = {**GRAM_ROWS, "many-rows": (1100, 6), "wide": (40, 260)}


class Arguments(ctypes.Structure):
    """The struct of the same name in ``emulate_gram.cpp``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("dimensions", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("mask_strides", ctypes.POINTER(ctypes.c_int64)),
        ("width", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("bias", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("beta", ctypes.c_double),
        ("out", ctypes.c_void_p),
        ("split", ctypes.c_int64),
        ("descending", ctypes.c_int64),
    )


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("emulation needs g++")
    folder = Path(__file__).parent
    sources = [folder / "emulate_gram.cpp", folder / "emulate_cuda.h", CUDA / "gram.cuh"]
    flags = ["-std=c++20", "-O2", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-fPIC", "-shared"]
    emulation = ["-include", str(sources[1])]
    command = [compiler, *flags, *emulation, str(sources[0]), "-o", "{out}"]
    return ctypes.CDLL(str(cached("emulate_gram.so", command, sources)))


def _integers(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _run(
    library: ctypes.CDLL,
    kernel: str,
    x: Tensor,
    mask: Tensor | None = None,
    groups: int = 1,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    split: int = 1,
    old: Tensor | None = None,
) -> Tensor:
    """The result, after checking that it does not depend on the order of the threads."""
    shape = result_shape("gram", x, mask, groups, bias)
    dtype = result_dtype(x.dtype)
    results = []
    for descending in (False, True):
        out = poisoned(*shape, dtype=dtype) if old is None else lower_only(old)
        arguments = Arguments(
            x.data_ptr(),
            None if mask is None else mask.data_ptr(),
            x.dim() - 1,
            _integers(x.shape[:-1]),
            _integers(x.stride()[:-1]),
            _integers((0,) * (x.dim() - 1) if mask is None else mask.stride()),
            x.shape[-1] // groups,
            x.stride(-1),
            groups,
            bias,
            alpha,
            beta,
            out.data_ptr(),
            split,
            descending,
        )
        assert getattr(library, f"gram_{kernel}")(ctypes.byref(arguments)) >= 0
        results.append(out)
    assert torch.equal(bits(results[0]), bits(results[1]))
    assert_symmetric(results[0])
    return results[0]


def _check(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    groups: int = 1,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    old: Tensor | None = None,
) -> None:
    expected = alpha * oracle_gram(x, mask, groups, bias)
    torch_result = poisoned(*out.shape, dtype=out.dtype)
    if old is not None:
        expected += beta * old.double()
        torch_result = old.clone()
    reference.gram(x, mask, groups, bias, alpha, beta, torch_result)
    assert_within_budget(out, torch_result, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS.keys())
def test_result(emulated: ctypes.CDLL, kernel: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(KERNELS[kernel])
    for split in (1, 3):
        _check(_run(emulated, kernel, x, bias=True, split=split), x, bias=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_options(emulated: ctypes.CDLL, kernel: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 11, 3 * 70, dtype=torch.float64).to(KERNELS[kernel])
    mask = torch.rand(7, 11) < 0.6
    x[~mask] = torch.nan
    old = torch.randn(3, 71, 71, dtype=result_dtype(x.dtype))
    old = old + old.mT
    options = {"mask": mask, "groups": 3, "bias": True, "alpha": 0.3, "beta": 0.9, "old": old}
    _check(_run(emulated, kernel, x, split=2, **options), x, **options)


def _cropped(x: Tensor) -> Tensor:
    """The same values as the inside of a larger tensor: no two dimensions step evenly."""
    buffer = x.new_full([n + 3 for n in x.shape], torch.nan)
    view = buffer[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


@pytest.mark.parametrize("layout", [spread, _cropped, lambda x: x.mT.contiguous().mT])
@pytest.mark.parametrize("kernel", ["float_64", "bfloat16_128", "double_64"])
def test_strides(emulated: ctypes.CDLL, kernel: str, layout: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = layout(torch.randn(3, 4, 9, 70, dtype=torch.float64).to(KERNELS[kernel]))
    mask = spread(torch.rand(3, 4, 9) < 0.6)
    for m in (None, mask):
        _check(_run(emulated, kernel, x, m, bias=True, split=2), x, m, bias=True)


@pytest.mark.parametrize("kernel", ["float_64", "float_128"])
def test_everything_masked(emulated: ctypes.CDLL, kernel: str) -> None:
    x = torch.full((40, 70), torch.nan)
    out = _run(emulated, kernel, x, torch.zeros(40, dtype=torch.bool), bias=True)
    assert torch.equal(out, torch.zeros(71, 71))


def test_wide_strides(emulated: ctypes.CDLL) -> None:
    # Untouched pages take no memory.
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    x = storage.as_strided((3, 20), (2**30, 1)).copy_(torch.randn(3, 20))
    _check(_run(emulated, "bfloat16_64", x), x)
    _check(_run(emulated, "bfloat16_64", x.mT), x.mT)


def test_merged_axes(emulated: ctypes.CDLL) -> None:
    x, out = torch.randn(5, 3, 4, 2), torch.empty(2, 2)
    for view, axes in ((x, 1), (x[:, :, :3], 2), (x[:, :2, :3], 3), (x[:, :, :1], 1)):
        shape, strides = _integers(view.shape[:-1]), _integers(view.stride()[:-1])
        arguments = Arguments(
            view.data_ptr(), None, 3, shape, strides, _integers((0, 0, 0)), 2, 1, 1, 0, 1.0, 0.0,
            out.data_ptr(), 1, 0,
        )  # fmt: skip
        assert emulated.gram_float_64(ctypes.byref(arguments)) == axes


def test_tiles_of_the_triangle(emulated: ctypes.CDLL) -> None:
    side = 400
    tiles = side * (side + 1) // 2
    row, column = emulated.gram_tile_row, emulated.gram_tile_column
    row.argtypes = column.argtypes = (ctypes.c_int64,) * 2
    found = [(row(n, tiles), column(n, tiles)) for n in range(tiles)]
    assert found == [(i, j) for i in range(side) for j in range(i + 1)]


def test_split_fills_the_device(emulated: ctypes.CDLL) -> None:
    split = emulated.gram_split_of
    split.argtypes, split.restype = (ctypes.c_int64,) * 4, ctypes.c_int64
    assert split(1, 0, 65536, 132) == 1
    assert split(1, 16, 65536, 132) == 1
    assert split(132, 65536, 65536, 132) == 1
    assert split(10**6, 65536, 65536, 132) == 1  # no room for more
    for tiles in (21, 36, 136, 300):
        parts = split(tiles, 65536, 65536, 132)
        busiest = -(-tiles * parts // 132) / parts
        assert busiest <= 1.1 * tiles / 132


def test_loads_where_torch_has_no_cuda() -> None:
    # The stream's symbol is weak: a torch without CUDA lacks it, and must load the library still.
    home = toolkit()
    if home is None or torch.version.cuda:
        pytest.skip("needs nvcc and a torch without CUDA")
    torch_libraries = [str(TORCH / "lib" / name) for name in ("libtorch.so", "libtorch_cpu.so")]
    linked = cached(
        "gram.so",
        [
            *("g++", "-shared", str(_compiled(home)), "-Wl,--no-as-needed", *torch_libraries),
            *("-Wl,--allow-shlib-undefined", f"-L{home}/lib64", "-lcudart_static"),
            *("-ldl", "-lrt", "-lpthread", "-o", "{out}"),
        ],
        [_compiled(home)],
    )
    code = f"""
import torch
from kfac_fast import schema
torch.ops.load_library({str(linked)!r})
assert torch._C._dispatch_has_kernel_for_dispatch_key("kfac_fast_native::gram", "CUDA")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def _instantiations(log: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Registers, spilled bytes and shared bytes by (architecture, kernel)."""
    pattern = re.compile(
        r"Compiling entry function '_ZN9kfac_fast\d+(gram_[a-z]+_kernelI\w+?)EEv\w+' for '(\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers.*? (\d+) bytes smem",
        re.DOTALL,
    )
    return {
        (arch, name): (int(registers), int(stores) + int(loads), int(shared))
        for name, arch, stores, loads, registers, shared in pattern.findall(log)
    }


def _compiled(home: Path) -> Path:
    """The object file of both architectures; what ptxas says of them lies beside it."""
    sources = [CUDA / "gram.cu", CUDA / "gram.cuh", TORCH / "version.py", home / "include/cuda.h"]
    includes = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
    defines = ["-DUSE_CUDA", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ("80", "90a")]
    flags = [
        "-std=c++20",
        "-O3",
        "-Xptxas=-v",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "--threads=2",
    ]
    command = ["nvcc", *flags, *targets, *defines, *includes, "-c", str(sources[0]), "-o", "{out}"]
    return cached("gram.o", command, sources)


def test_compiles_without_spills(record_property: Callable[[str, str], None]) -> None:
    home = toolkit()
    if home is None:
        pytest.skip("compiling CUDA needs nvcc")
    kernels = _instantiations(_compiled(home).with_name("log.txt").read_text())
    assert len(kernels) == 2 * (len(KERNELS) + 2)
    for (arch, name), (registers, spilled, shared) in sorted(kernels.items()):
        line = f"{registers} registers, {spilled} bytes spilled, {shared} bytes shared"
        record_property(f"{arch} {name}", line)
        print(f"{arch} {name}: {line}")
        assert spilled == 0 and shared <= 48 * 1024
