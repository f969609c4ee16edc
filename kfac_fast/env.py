"""What this installation can do: ``python -m kfac_fast.env``."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from kfac_fast import backends


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _facts() -> Iterator[tuple[str, str]]:
    """Versions, devices and build facts, by name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "kfac_fast", _version("kfac_fast")
    yield "Python", platform.python_version()
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    yield "Triton", _version("triton")
    yield "nvcc", shutil.which("nvcc") or "not found"
    yield "GPUs", ", ".join(gpus) or "none"
    yield "threads", str(torch.get_num_threads())
    if not backends.EXTENSION_BUILT:
        yield "extension", "not built"
        return
    extension = backends.native
    yield "extension", f"{extension.compiler}, for torch {extension.torch_target} and newer"
    yield "CUDA kernels", extension.cuda_archs or "none"
    others = ", ".join(extension.instruction_sets())
    yield "instruction set", f"{extension.instruction_set()} (of {others})"


def _choices() -> Iterator[str]:
    """What serves each operator on the devices that are here, and why nothing before it does."""
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for (op, device), row in backends.TABLE.items():
        if device not in here:
            continue
        present = next(i for i, implementation in enumerate(row) if implementation.missing is None)
        yield f"{op} on {device}: {row[present].name}"
        for implementation in row[:present]:
            yield f"    not {implementation.name}: {implementation.missing}"


def report() -> str:
    """Versions, devices, build facts, and which implementation serves which operator.

    Returns:
        Lines of text.
    """
    facts = [f"{name:16} {value}" for name, value in _facts()]
    return "\n".join([*facts, "", *_choices()])


if __name__ == "__main__":
    print(report())
