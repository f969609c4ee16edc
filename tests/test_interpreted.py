"""The Triton kernels on CPU tensors, run by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compile_kernels import ROOT
from packaging.version import Version

triton = pytest.importorskip("triton")
FILES = sorted(path.name for path in Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason="the interpreter of Triton before 3.7 does not work with NumPy 2.4 and newer",
)
@pytest.mark.parametrize("files", [FILES[:1], FILES[1:]], ids=["convolutions", "others"])
def test_kernels_under_the_interpreter(files: list[str]) -> None:
    """In processes of their own, for Triton reads the variable at its import; two, for balance."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT / "tests",
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
