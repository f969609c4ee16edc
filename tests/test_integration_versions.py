"""Adapters refuse versions of other libraries that they are not tested with."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

from kfac_fast.integrations import versions
from kfac_fast.integrations.versions import require

# Adapters: what their library is installed as, and modules of it, of those that are replaced in.
ADAPTERS = {
    "asdl": ("asdfghjkl", ["asdl.core", "asdl.precondition.natural_gradient"]),
    "curvlinops": ("curvlinops-for-pytorch", ["curvlinops"]),
    "kfac_pytorch": ("kfac-pytorch", ["kfac.preconditioner"]),
    "kronfluence": ("kronfluence", ["kronfluence.analyzer"]),
    "laplace": ("laplace-torch", ["laplace"]),
    "nngeometry": ("nngeometry", ["nngeometry.metrics", "nngeometry.object"]),
    "singd": ("singd", ["singd.optim.optimizer"]),
}
SCRIPT = """
import importlib, sys

def parts(package):
    belongs = lambda name: name.partition(".")[0] == package
    owners = [module for name, module in sys.modules.items() if belongs(name)]
    held = [part for module in owners for part in vars(module).values()]
    owners += [part for part in held if isinstance(part, type) and belongs(part.__module__)]
    found = {}
    for owner in owners:
        for name, part in list(vars(owner).items()):
            found[owner, name] = part
            if type(part) is dict:
                found |= {(owner, name, key): entry for key, entry in part.items()}
    return found

for adapter, *modules in map(str.split, sys.argv[1:]):
    package = modules[0].partition(".")[0]
    for name in modules:
        importlib.import_module(name)
    before = parts(package)
    importlib.import_module(f"kfac_fast.integrations.{adapter}")
    after = parts(package)
    assert len(before) > 100
    assert not [key for key, value in before.items() if after.get(key) is not value], adapter
"""


def test_the_tested_version_is_taken() -> None:
    require("pytest", pytest.__version__)


def test_another_version_is_refused() -> None:
    with pytest.raises(ImportError, match=f"needs pytest 0.1, got {pytest.__version__}"):
        require("pytest", "0.1")


def test_a_missing_library_is_named() -> None:
    with pytest.raises(ImportError, match="needs no-such-library 1.0, got none"):
        require("no-such-library", "1.0")


def test_a_library_that_nothing_is_imported_of_may_be_missing() -> None:
    require("no-such-library", "1.0", may_be_missing=True)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_refuses_another_version(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if adapter == "laplace":
        pytest.importorskip("curvlinops", reason="laplace-torch needs it")
    package, own = ADAPTERS[adapter][0], versions.version
    fake = {package: "0.0.1"}
    monkeypatch.setattr(versions, "version", lambda name: fake.get(name) or own(name))
    name = f"kfac_fast.integrations.{adapter}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=rf"needs {package} [\d.a]+, got 0.0.1"):
        importlib.import_module(name)


def test_importing_an_adapter_changes_nothing() -> None:
    installed = [
        " ".join([adapter, *modules])
        for adapter, (_, modules) in ADAPTERS.items()
        if importlib.util.find_spec(modules[0].partition(".")[0])
    ]
    assert installed
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *installed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
