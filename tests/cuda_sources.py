"""The CUDA C++ kernels without a GPU: compiled for emulation on the CPU, and by nvcc."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from compile_kernels import ROOT, cached, toolkit
from torch import Tensor

CUDA = ROOT / "csrc" / "cuda"
LISTS = ("layer.h", "layer_lists.h", "strided.h", "tensor_lists.h")
HEADERS = sorted((*CUDA.glob("*.cuh"), *CUDA.glob("*.h"), *(CUDA.parent / n for n in LISTS)))
TORCH = Path(torch.__file__).parent


# Emulation


def integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


class Launches(ctypes.Structure):
    """The struct of the same name in ``emulate_lists.h``."""

    _fields_ = (
        ("table_rows", ctypes.c_int64),
        ("launches", ctypes.c_int64),
        ("thread_blocks", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
    )


def emulation(name: str) -> ctypes.CDLL:
    """``emulate_<name>.cpp`` as a library; skips the test where there is no compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("emulation needs g++")
    folder = Path(__file__).parent
    source, emulator = folder / f"emulate_{name}.cpp", folder / "emulate_cuda.h"
    sources = [source, *sorted(folder.glob("emulate_*.h")), *HEADERS]
    flags = ["-std=c++20", "-O2", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-fPIC", "-shared"]
    # A GPU refuses unaligned vectors.
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command = [compiler, *flags, "-include", str(emulator), str(source), "-o", "{out}"]
    return ctypes.CDLL(str(cached(f"emulate_{name}.so", command, sources)))


def barriers(header: str) -> list[int]:
    """Lines of a kernel's header at which its threads wait for each other."""
    lines = (CUDA / header).read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if "__syncthreads();" in line]


def assert_every_barrier_is_needed(
    library: ctypes.CDLL, run: Callable[[bool], Tensor], *headers: str
) -> None:
    """Check that without any one of its barriers, a kernel's results are wrong.

    Args:
        library: The emulated kernel.
        run: Runs the kernel with the threads' turns in descending order or not.
        *headers: Files with the barriers.
    """
    expected = run(False)
    assert torch.equal(run(True), expected)
    for header in headers:
        lines = barriers(header)
        assert lines
        for line in lines:
            assert _races(library, header, line, run, expected), f"{header}:{line}"


def _races(
    library: ctypes.CDLL, header: str, line: int, run: Callable[[bool], Tensor], expected: Tensor
) -> bool:
    """Whether something goes wrong without a barrier, in a process of its own for it may crash."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child starts no thread
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        library.mute_barrier(header.encode(), line)
        right = all(torch.equal(run(descending), expected) for descending in (False, True))
        os._exit(0 if right else 1)
    return os.waitpid(child, 0)[1] != 0


# Compilation


def compiled(home: Path, name: str) -> Path:
    """Object file of ``<name>.cu`` for both architectures; ptxas' words lie beside it."""
    source = CUDA / f"{name}.cu"
    sources = [source, *HEADERS, TORCH / "version.py", home / "include/cuda.h"]
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
    command = ["nvcc", *flags, *targets, *defines, *includes, "-c", str(source), "-o", "{out}"]
    return cached(f"{name}.o", command, sources)


def assert_compiles_without_spills(
    name: str, kernels: int, record_property: Callable[[str, str], None]
) -> None:
    """Check that a file's kernels, of this number, spill no registers on either architecture."""
    home = toolkit()
    if home is None:
        pytest.skip("compiling CUDA needs nvcc")
    found = _instantiations(compiled(home, name).with_name("log.txt").read_text())
    assert len(found) == 2 * kernels
    for (arch, kernel), (registers, spilled, shared) in sorted(found.items()):
        line = f"{registers} registers, {spilled} bytes spilled, {shared} bytes shared"
        record_property(f"{arch} {kernel}", line)
        print(f"{arch} {kernel}: {line}")
        assert spilled == 0 and shared <= 48 * 1024


def _instantiations(log: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Registers, spilled bytes and static shared bytes by (architecture, kernel)."""
    pattern = re.compile(
        r" '_ZN9kfac_fast\d+([a-z_]+_kernelI\w+?)EEv\w+' for '(\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers(?:.*? (\d+) bytes smem)?",
        re.DOTALL,
    )
    found = {}
    for part in log.split("Compiling entry function")[1:]:
        name, arch, stores, loads, registers, shared = pattern.match(part).groups()
        found[arch, name] = (int(registers), int(stores) + int(loads), int(shared or 0))
    return found


def assert_loads_where_torch_has_no_cuda(name: str, op: str, then: str = "") -> None:
    """Check that a torch without CUDA loads the kernels' library: the stream's symbol is weak.

    Args:
        name: Of the source file.
        op: Operator that it registers.
        then: Python code that is run with the library loaded.
    """
    home = toolkit()
    if home is None or torch.version.cuda:
        pytest.skip("needs nvcc and a torch without CUDA")
    object_file = compiled(home, name)
    torch_libraries = [str(TORCH / "lib" / file) for file in ("libtorch.so", "libtorch_cpu.so")]
    linked = cached(
        f"{name}.so",
        [
            *("g++", "-shared", str(object_file), "-Wl,--no-as-needed", *torch_libraries),
            *("-Wl,--allow-shlib-undefined", f"-L{home}/lib64", "-lcudart_static"),
            *("-ldl", "-lrt", "-lpthread", "-o", "{out}"),
        ],
        [object_file],
    )
    code = f"""
import torch
from kfac_fast import schema
torch.ops.load_library({str(linked)!r})
assert torch._C._dispatch_has_kernel_for_dispatch_key("kfac_fast_native::{op}", "CUDA")
{then}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
