"""Builds the native extension with CMake. What describes the package is in pyproject.toml.

Torch is imported only when the extension is built, so a source distribution needs none.
"""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
USUAL_TOOLKIT = "/usr/local/cuda"


class CudaChoice(NamedTuple):
    """What is built for the GPU: nothing where ``archs`` is empty."""

    note: str
    archs: str = ""
    nvcc: str = ""


def require_compiler() -> None:
    """Stop with a plain sentence where CMake would find no C++ compiler."""
    wanted = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, wanted)):
        raise SystemExit(
            f"kfac_fast: no C++ compiler found (looked for {', '.join(wanted)}): install one with "
            "C++20, such as g++ 11 or newer (on Debian: apt-get install g++)"
        )


def require_python_headers() -> None:
    """Stop with a plain sentence where Python.h is missing."""
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        raise SystemExit(
            f"kfac_fast: Python's headers are missing ({folder} has no Python.h): "
            "install them (on Debian: apt-get install python3-dev)"
        )


def require_torch() -> None:
    """Stop with a plain sentence where there is no torch, as in pip's isolated builds."""
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "kfac_fast: the build needs the torch it will run with and sees none: install torch, "
            "then kfac_fast with pip install --no-build-isolation"
        )


def torch_versions() -> tuple[str, str | None]:
    """Version of the installed torch, and of the CUDA it was built for."""
    require_torch()
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SystemExit(f"kfac_fast: torch {oldest} or newer is needed, got {torch.__version__}")
    return torch.__version__, torch.version.cuda


def toolkit_nvcc(nvcc: str) -> str | None:
    """The nvcc inside a complete CUDA toolkit that ``nvcc`` stands for.

    The nvcc on PATH may be a script or a link elsewhere, so its folder says nothing: it is asked.
    """
    dry_run = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    answer = subprocess.run(dry_run, capture_output=True, text=True, check=False).stderr
    for top in re.findall(r"^#\$ TOP=(.+)$", answer, re.MULTILINE):
        root = Path(top).resolve()
        if (root / "include/cuda_runtime.h").is_file():
            return shutil.which(f"{root}/bin/nvcc")
    return None


def find_nvcc() -> tuple[str | None, list[str]]:
    """The toolkit's nvcc, and what was tried in vain before it."""
    home = os.environ.get("CUDA_HOME")
    places = [(f"CUDA_HOME={home}", f"{home}/bin/nvcc")] if home else []
    places += [("PATH", "nvcc"), (USUAL_TOOLKIT, f"{USUAL_TOOLKIT}/bin/nvcc")]
    tried = []
    for place, name in places:
        candidate = shutil.which(name)
        if candidate is None:
            tried.append(f"{place} has no nvcc")
        elif nvcc := toolkit_nvcc(candidate):
            return nvcc, tried
        else:
            tried.append(f"{candidate} belongs to no toolkit with include/cuda_runtime.h")
    return None, tried


def cuda_choice() -> CudaChoice:
    """Decide whether the CUDA kernels are built, from KFAC_FAST_CUDA, torch and the toolkit."""
    switch = os.environ.get("KFAC_FAST_CUDA", "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"kfac_fast: KFAC_FAST_CUDA must be 0, 1 or unset, got {switch!r}")
    version, cuda = torch_versions()
    if switch == "0":
        return CudaChoice("kfac_fast: CPU only: KFAC_FAST_CUDA=0")
    if cuda is None and not switch:
        return CudaChoice(f"kfac_fast: CPU only: torch {version} is built without CUDA")
    nvcc, tried = find_nvcc()
    vain = f" ({', '.join(tried)})" if tried else ""
    if nvcc:
        archs = os.environ.get("KFAC_FAST_CUDA_ARCHS") or "80;90a"
        return CudaChoice(f"kfac_fast: CUDA kernels for {archs} with {nvcc}{vain}", archs, nvcc)
    if switch:
        raise SystemExit(f"kfac_fast: KFAC_FAST_CUDA=1, but no CUDA toolkit was found{vain}")
    return CudaChoice(
        f"kfac_fast: CPU only: torch {version} is built for CUDA {cuda}, but no CUDA toolkit was "
        f"found{vain}; on the GPU the Triton kernels serve"
    )


def build_tool(name: str, folder: str) -> str:
    """Path of cmake or ninja: of this interpreter's package where it has one, else on PATH."""
    packaged = importlib.util.find_spec(name)
    place = getattr(importlib.import_module(name), folder) if packaged else None
    tool = (place and shutil.which(name, path=place)) or shutil.which(name)
    if tool is None:
        raise SystemExit(f"kfac_fast: the build needs {name}: pip install {name}")
    return tool


def pybind11_folder() -> str:
    """Folder of pybind11's CMake files."""
    if importlib.util.find_spec("pybind11") is None:
        raise SystemExit("kfac_fast: the build needs pybind11: pip install pybind11")
    return importlib.import_module("pybind11").get_cmake_dir()


class Metadata(dist_info):
    """What pip asks for before any download: the moment to say that the build must fail."""

    def run(self) -> None:
        """Write the metadata unless torch is missing."""
        require_torch()
        super().run()


class CMakeBuild(build_ext):
    """Builds kfac_fast._C with CMake, in a folder that outlives the call so rebuilds are short."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build, and copy the library to where setuptools wants it."""
        require_compiler()
        require_python_headers()
        choice = cuda_choice()
        print(choice.note, flush=True)
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = build_tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            *(cmake, "--log-level=NOTICE", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)),
            f"-DCMAKE_MAKE_PROGRAM={build_tool('ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_folder()}",
            f"-DKFAC_FAST_CUDA_ARCHS={choice.archs}",
        ]
        if choice.nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={choice.nvcc}")
        for command in (configure, [cmake, "--build", str(folder)]):
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(f"kfac_fast: the native build failed at: {shlex.join(command)}")
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / library.name), str(library))


if __name__ == "__main__":
    # The Triton kernels lie beside the package in the tree and inside it once installed.
    setup(
        packages=[*find_packages(include=["kfac_fast*"]), "kfac_fast.kernels"],
        package_dir={"kfac_fast.kernels": "kernels"},
        package_data={"kfac_fast": ["py.typed", "*.pyi"]},
        ext_modules=[Extension("kfac_fast._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "dist_info": Metadata},
    )
