"""What set-up says when something is missing, and what the source distribution and wheel hold."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kfac_fast._C

ROOT = Path(__file__).parents[1]
NOT_SOURCES = (".*", "build", "dist", "output", "__pycache__", "*.so", "*.egg-info")
CPU_TORCH = ("2.13.0+cpu", None)
CUDA_TORCH = ("2.13.0+cu130", "13.0")


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module, on a machine that has nothing on PATH and no toolkit."""
    spec = importlib.util.spec_from_file_location("kfac_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CXX", "CUDA_HOME", "KFAC_FAST_CUDA", "KFAC_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "USUAL_TOOLKIT", str(tmp_path / "usual"))
    return module


@pytest.fixture
def torch_is(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda versions: monkeypatch.setattr(build, "torch_versions", lambda: versions)


def write_program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A complete toolkit, far from PATH, whose nvcc says where it lives as the real one does."""
    root = tmp_path / "toolkit"
    write_program(root / "bin/nvcc", f"echo '#$ TOP={root}/bin/..' >&2")
    (root / "include").mkdir()
    (root / "include/cuda_runtime.h").touch()
    return root


def test_no_compiler(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler found \(looked for c\+\+, g\+\+, cl"):
        build.require_compiler()
    monkeypatch.setenv("CXX", "absent-compiler -pipe")
    with pytest.raises(SystemExit, match="looked for absent-compiler"):
        build.require_compiler()


def test_any_compiler_will_do(build: ModuleType, tmp_path: Path) -> None:
    write_program(tmp_path / "bin/clang++", "")
    build.require_compiler()


def test_no_python_headers(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/absent/include")
    with pytest.raises(SystemExit, match="headers are missing .*/absent/include has no Python.h"):
        build.require_python_headers()


def test_no_torch(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="pip install --no-build-isolation"):
        build.torch_versions()


def test_torch_too_old(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    with pytest.raises(SystemExit, match=r"torch 2\.11 or newer is needed, got 2\.10\.1\+cpu"):
        build.torch_versions()


@pytest.mark.parametrize("name", ["cmake", "ninja", "pybind11"])
def test_build_package_missing(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=f"needs {name}: pip install {name}"):
        build.pybind11_folder() if name == "pybind11" else build.build_tool(name, "BIN_DIR")


def test_cpu_torch_needs_no_toolkit(build: ModuleType, torch_is: Callable[..., None]) -> None:
    torch_is(CPU_TORCH)
    choice = build.cuda_choice()
    assert choice.note == "kfac_fast: CPU only: torch 2.13.0+cpu is built without CUDA"
    assert not choice.archs


def test_cpu_torch_leaves_the_toolkit_alone(
    build: ModuleType, torch_is: Callable[..., None], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_is(CPU_TORCH)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert not build.cuda_choice().archs
    monkeypatch.setenv("KFAC_FAST_CUDA", "1")
    assert build.cuda_choice().nvcc == str(toolkit / "bin/nvcc")


def test_cuda_torch_without_nvcc(build: ModuleType, torch_is: Callable[..., None]) -> None:
    torch_is(CUDA_TORCH)
    choice = build.cuda_choice()
    assert choice.note.startswith("kfac_fast: CPU only: torch 2.13.0+cu130 is built for CUDA 13.0")
    assert re.search(r"\(PATH has no nvcc, .*/usual has no nvcc\); .* Triton", choice.note)
    assert not choice.archs


def test_misleading_cuda_home(
    build: ModuleType,
    torch_is: Callable[..., None],
    toolkit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch_is(CUDA_TORCH)
    monkeypatch.setenv("CUDA_HOME", "/absent/cuda")
    write_program(tmp_path / "bin/nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    choice = build.cuda_choice()
    assert choice.nvcc == str(toolkit / "bin/nvcc")
    assert choice.archs == "80;90a"
    assert "CUDA_HOME=/absent/cuda has no nvcc" in choice.note


def test_nvcc_without_a_toolkit(
    build: ModuleType, torch_is: Callable[..., None], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_is(CUDA_TORCH)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    (toolkit / "include/cuda_runtime.h").unlink()
    choice = build.cuda_choice()
    assert not choice.archs
    assert f"{toolkit}/bin/nvcc belongs to no toolkit with include/cuda_runtime.h" in choice.note


def test_cuda_switch(
    build: ModuleType, torch_is: Callable[..., None], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_is(CUDA_TORCH)
    monkeypatch.setenv("KFAC_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="KFAC_FAST_CUDA=1, but no CUDA toolkit was found"):
        build.cuda_choice()
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("KFAC_FAST_CUDA_ARCHS", "100a")
    assert build.cuda_choice().archs == "100a"
    monkeypatch.setenv("KFAC_FAST_CUDA", "0")
    assert build.cuda_choice().note == "kfac_fast: CPU only: KFAC_FAST_CUDA=0"
    monkeypatch.setenv("KFAC_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        build.cuda_choice()


@pytest.mark.parametrize(
    ("python", "module", "body", "message"),
    [
        ("absent-python", "", "", "there is no 'absent-python'"),
        (
            sys.executable,
            "sitecustomize",
            "import sys; sys.version_info = (3, 9)",
            "is 3.9: choose",
        ),
        (sys.executable, "ensurepip", "raise ModuleNotFoundError", "venv and ensurepip modules"),
    ],
)
def test_make_names_what_python_lacks(
    tmp_path: Path, python: str, module: str, body: str, message: str
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("csrc", "modules"):
        (tmp_path / name).mkdir()
    (tmp_path / "modules" / f"{module}.py").write_text(body)
    for name in ("constraints.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "modules")}
    make = run("make", "lint", f"PYTHON={python}", cwd=tmp_path, env=environment)
    assert make.returncode
    assert "kfac_fast needs" in make.stdout + make.stderr
    assert message in make.stdout + make.stderr
    assert "Traceback" not in make.stderr
    assert not (tmp_path / ".venv").exists()


def test_every_dependency_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    pinned = {name.lower() for name in re.findall(r"^([\w-]+)==", pins, re.MULTILINE)}
    wanted = {re.match(r"[\w-]+", line)[0] for line in importlib.metadata.requires("kfac_fast")}
    assert wanted - {"kfac_fast"} <= pinned


def test_stub_names_what_the_extension_has() -> None:
    stub = ast.parse((ROOT / "kfac_fast/_C.pyi").read_text())
    named = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    named |= {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert named == {name for name in vars(kfac_fast._C) if not name.startswith("_")}


def test_extension_facts() -> None:
    facts = kfac_fast._C
    assert facts.version == importlib.metadata.version("kfac_fast")
    assert facts.torch_target == "2.11"
    assert facts.cxx_standard >= 202002
    assert facts.instruction_set() in facts.instruction_sets()
    with pytest.raises(ValueError, match="absent"):
        facts.use_instruction_set("absent")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources alone, as a fresh clone has them."""
    folder = tmp_path_factory.mktemp("clone") / "tree"
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCES))


def backend_without_torch(call: str, tree: Path) -> subprocess.CompletedProcess[str]:
    hidden = "import sys; sys.modules['torch'] = None; from setuptools import build_meta"
    return run(sys.executable, "-c", f"{hidden}; build_meta.{call}", cwd=tree)


def test_sdist_needs_no_torch_and_holds_the_sources(tree: Path) -> None:
    made = backend_without_torch("build_sdist('dist')", tree)
    assert not made.returncode, made.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    folders = ("csrc", "kernels", "kfac_fast", "tests")
    needed = [path for folder in folders for path in (tree / folder).rglob("*") if path.is_file()]
    assert {str(path.relative_to(tree)) for path in needed} <= held
    assert {"CMakeLists.txt", "LICENSE", "Makefile", "constraints.txt", "setup.py"} <= held


def test_isolated_build_says_one_sentence(tree: Path) -> None:
    made = backend_without_torch("prepare_metadata_for_build_wheel('dist')", tree)
    assert made.returncode
    (sentence,) = made.stderr.splitlines()
    assert sentence.endswith("then kfac_fast with pip install --no-build-isolation")


def test_wheel_installs_beside_torch(tmp_path: Path) -> None:
    library_name = Path(kfac_fast._C.__file__).name
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    made = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    assert not made.returncode, made.stderr
    (wheel,) = tmp_path.glob("kfac_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
        library = archive.read(f"kfac_fast/{library_name}")
    assert {"kfac_fast/py.typed", "kfac_fast/_C.pyi", "kfac_fast/kernels/__init__.py"} <= set(held)
    assert {name.split("/")[0].split("-")[0] for name in held} == {"kfac_fast"}
    packages = Path(torch.__file__).parents[1]
    assert str(packages / "torch/lib").encode() not in library

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import site; print(*site.getsitepackages())").stdout.strip())
    (site / "torch.pth").write_text(f"{packages}\n")
    installed = run(*pip, "--python", python, "install", "--no-deps", wheel)
    assert not installed.returncode, installed.stderr
    probe = (
        "import importlib.util, kfac_fast.kernels, kfac_fast._C;"
        "print(kfac_fast._C.__file__, importlib.util.find_spec('kernels'))"
    )
    seen = run(python, "-c", probe, cwd=tmp_path)
    assert seen.stdout.split() == [
        str(site / "kfac_fast" / Path(kfac_fast._C.__file__).name),
        "None",
    ]
