"""Compile GPU kernels without a GPU and read registers, spills and shared memory."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "compiled"


class Statistics(NamedTuple):
    """What the assembler made of a kernel; a stack is where it spills registers."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    assembly: str

    def count(self, instruction: str) -> int:
        """How often a PTX instruction occurs."""
        return len(re.findall(rf"\b{re.escape(instruction)}\b", self.assembly))


class CompileOnly:
    """A Triton driver of a device that is not there, numbered by its compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_only(capability: int) -> Iterator[dict[str, Any]]:
    """Make Triton launches compile for a capability and not run; yields the kernels by name."""
    from triton.runtime import JITFunction, driver

    kernels = {}
    run = JITFunction.run

    def compile_kernel(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernels[self.fn.__name__] = run(self, *args, warmup=True, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_kernel)
        patch.setattr(driver, "_active", CompileOnly(capability))
        yield kernels


def triton_statistics(kernel: Any) -> Statistics:
    """Read the statistics of a compiled Triton kernel with the tool that every Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Statistics(int(registers), int(stack), kernel.metadata.shared, kernel.asm["ptx"])


def toolkit() -> Path | None:
    """Root of the CUDA toolkit that nvcc, possibly a wrapper script, belongs to."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else None


def cached(name: str, command: list[str], sources: list[Path]) -> Path:
    """Run a compiler once for each state of its sources and flags.

    Args:
        name: File that ``command`` writes.
        command: The compiler's arguments; ``{out}`` stands for the path of ``name``.
        sources: Files that the result depends on.

    Returns:
        Path of ``name``; what the compiler printed lies beside it in ``log.txt``.
    """
    state = hashlib.sha256(repr(command).encode())
    for source in sources:
        state.update(source.read_bytes())
    folder = CACHE / state.hexdigest()[:16]
    result = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # of the processes that run tests
        if not result.exists():
            temporary = folder / f"unfinished-{name}"
            done = subprocess.run(
                [part.format(out=temporary) for part in command], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            (folder / "log.txt").write_text(done.stderr)
            temporary.rename(result)
    return result
