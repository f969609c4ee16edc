"""What a run was made on: names, versions and measured rates."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timers import timer_of

from kfac_fast import backends


def _processor() -> str:
    """Name of the processor, with family and model: virtual machines often tell only the maker."""
    description = Path("/proc/cpuinfo")
    text = description.read_text() if description.exists() else ""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    if len(facts) < 3:
        return facts.get("model name") or platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"


def _git(*arguments: str) -> str | None:
    """Output of a git command in this directory; None without git or outside a repository."""
    if shutil.which("git") is None:
        return None
    directory = Path(__file__).parent
    result = subprocess.run(
        ["git", *arguments], cwd=directory, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else None


def _commit() -> str | None:
    """Of the working tree; a copy of it without git is told by KFAC_FAST_COMMIT."""
    if told := os.environ.get("KFAC_FAST_COMMIT"):
        return told
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


@cache
def facts(device: str) -> dict[str, Any]:
    """The fields of a record that are the same for a whole run."""
    built = backends.EXTENSION_BUILT
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": import_module("kfac_fast._C").instruction_set() if built else None,
        "torch": str(torch.__version__),
        "kfac_fast": version("kfac_fast"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


@cache
def product_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product by PyTorch."""
    timer, size = timer_of(device), 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / min(timer(lambda: torch.mm(a, a, out=out)) for _ in range(5))


@cache
def copy_rate(device: str) -> float:
    """Bytes per second of a copy larger than the caches, reads and writes counted."""
    timer = timer_of(device)
    a = torch.zeros(2**26, device=device)
    b = torch.zeros_like(a)
    return 2 * a.nbytes / min(timer(lambda: b.copy_(a)) for _ in range(5))
