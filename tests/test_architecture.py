"""The house: who imports whom, what C++ includes, what is documented, how long files are."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

import kfac_fast
from kfac_fast import ops, schema

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kfac_fast"

# Lower rooms first: a module imports from its own room and from those before it.
ROOMS = [
    {
        "checks",
        "list_checks",
        "conv",
        "dispatch",
        "checkpoint",
        "compiled",
        "graph",
        "host_copy",
        "options",
        "precision",
    },
    {"schema", "reference", "conv_kernels", "_C"},
    {"kernels"},
    {"backends"},
    {"ops"},
    {"buffers", "layers", "factors", "losses", "curvature", "gauss_newton", "grafting"},
    {"inverses", "eigenbases"},
    {"blocks"},
    {"capture", "input_grams", "selection", "state", "steps"},
    {"preconditioner"},
    {"quadratic"},
    {"damping", "decomposition"},
    {"__init__"},
    {"env", "integrations"},
]
FLOOR = {name: level for level, room in enumerate(ROOMS) for name in room}
OUTSIDE = {"bench", "tests", "examples"}
PYTHON = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
LONGEST = 600  # lines; around 300 is where one looks for a second purpose


def module_name(path: Path) -> str:
    """Dotted name of a file of the package; ``kernels/`` is installed inside it."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("kfac_fast", *inside) if inside[0] == "kernels" else inside)


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports; ``from package import name`` is ``package.name``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def room_of(name: str) -> str:
    """The module of the package that a dotted name is, or lies in."""
    parts = name.split(".")
    inner = parts[1] if len(parts) > 1 else "__init__"
    return inner if inner in FLOOR else "__init__"


def test_every_module_has_a_room() -> None:
    names = {module_name(path).split(".")[1] for path in PYTHON}
    assert names <= set(FLOOR), "a new module needs a place in ROOMS"


@pytest.mark.parametrize("path", PYTHON, ids=module_name)
def test_imports_go_downwards(path: Path) -> None:
    own = room_of(module_name(path))
    for name in imports(path):
        if name.partition(".")[0] == "kfac_fast":
            assert FLOOR[room_of(name)] <= FLOOR[own], f"{module_name(path)} imports {name}"
        assert name.partition(".")[0] not in OUTSIDE, f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("path", [p for p in PYTHON if p.parent.name == "kernels"], ids=module_name)
def test_kernels_are_a_leaf(path: Path) -> None:
    for name in imports(path):
        standard = name.partition(".")[0] in sys.stdlib_module_names
        assert standard or re.match(r"(torch|triton|kfac_fast\.kernels)\b", name), name


def test_lower_rooms_know_only_torch() -> None:
    """The operators run wherever torch does."""
    for path in PYTHON:
        if FLOOR[room_of(module_name(path))] > FLOOR["preconditioner"]:
            continue
        packages = {name.partition(".")[0] for name in imports(path)}
        foreign = packages - set(sys.stdlib_module_names)
        allowed = {"torch", "kfac_fast"} | ({"triton"} if path.parent.name == "kernels" else set())
        assert foreign <= allowed, f"{module_name(path)} imports {foreign - allowed}"


SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cuh", ".cu"))
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_no_python_and_only_the_stable_abi(path: Path) -> None:
    includes = INCLUDE.findall(path.read_text())
    python = [i for i in includes if i == "Python.h" or i.startswith("pybind11")]
    assert not python or path.name == "module.cpp" or path.parent.name == "python"
    unstable = r"torch/(?!csrc/stable/|headeronly/|csrc/inductor/aoti_torch/c/)|ATen/|c10/"
    assert not [i for i in includes if re.match(unstable, i)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_threads_are_torchs_alone(path: Path) -> None:
    own = r"#\s*pragma\s+omp|<omp\.h>|std::j?thread\b|std::async|pthread_"
    assert not re.search(own, path.read_text())
    assert "parallel_for(" not in path.read_text() or path.name == "parallel.h"


# Documentation

PUBLIC_OPERATORS = [getattr(ops, name) for name in schema.OPERATORS]
SECTIONS = (".. math::", "Equivalent to::", "Args:", "Returns:", "Raises:", "Source:")


def documented_parameters(section: str) -> list[str]:
    """Names of a Google style Args section, at its own indentation."""
    return re.findall(r"^    \*{0,2}(\w+): ", section, re.MULTILINE)


@pytest.mark.parametrize("function", PUBLIC_OPERATORS, ids=lambda f: f.__name__)
def test_operators_are_documented(function) -> None:
    text = inspect.getdoc(function)
    positions = [text.find(section) for section in SECTIONS]
    assert min(positions) > 0, f"missing: {SECTIONS[positions.index(min(positions))]}"
    assert positions == sorted(positions)
    summary = text.partition("\n\n")[0]
    assert summary.endswith(".") and ". " not in summary and len(summary) < 100
    args = text[text.find("Args:") : text.find("Returns:")]
    assert documented_parameters(args) == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", kfac_fast.__all__)
def test_public_names_are_documented_and_typed(name: str) -> None:
    thing = getattr(kfac_fast, name)
    text = inspect.getdoc(thing)
    assert text and text.partition("\n\n")[0].endswith(".")
    signature = inspect.signature(thing)
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    for parameter in signature.parameters:
        assert re.search(rf"^ +\*{{0,2}}{parameter}: ", text, re.MULTILINE), parameter


def test_every_operator_is_public() -> None:
    assert set(schema.OPERATORS) <= set(kfac_fast.__all__)
    assert kfac_fast.__all__ == sorted(kfac_fast.__all__)


# Size

TEXT = (".py", ".pyi", ".h", ".cpp", ".cuh", ".cu", ".md", ".toml", ".txt")
FOLDERS = ("kfac_fast", "kernels", "csrc", "tests", "bench", "examples", "docs")


def test_no_file_is_too_long() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in [*paths, *ROOT.glob("*")]
        if path.suffix in TEXT and path.is_file()
    }
    assert lengths
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}
