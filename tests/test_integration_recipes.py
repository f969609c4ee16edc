"""The recipes of docs/integrations.md run as they stand, and give the libraries' own results."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_kfac import assert_solved
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Failed to lookup operations:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*GradScaler is enabled:UserWarning"),
]
TEXT = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text()
RECIPES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def kronfluence_task() -> Any:
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    return Classification()


def asdl_maker(model: nn.Module) -> Any:
    from asdl import FisherConfig, get_fisher_maker

    return get_fisher_maker(model, FisherConfig("fisher_emp", ["kron"]))


def kfac_preconditioner(model: nn.Module) -> Any:
    from kfac.preconditioner import KFACPreconditioner

    return KFACPreconditioner(model, compute_method="inverse")


# What a recipe is given besides, made of the model.
GIVEN: dict[str, dict[str, Callable[[nn.Module], Any]]] = {
    "kronfluence": {"task": lambda model: kronfluence_task()},
    "asdl": {"maker": asdl_maker},
    "kfac-pytorch": {"preconditioner": kfac_preconditioner},
}


def run(recipe: str, source: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 3)
    )
    images, labels = torch.randn(12, 1, 6, 6), torch.arange(12) % 3
    names: dict[str, Any] = {
        "model": model,
        "loss_function": nn.CrossEntropyLoss(),
        "data": DataLoader(TensorDataset(images, labels), batch_size=6),
        "inputs": images,
        "targets": labels,
    }
    names |= {name: make(model) for name, make in GIVEN.get(recipe, {}).items()}
    exec(source, names)
    return names


def parameters(names: dict[str, Any]) -> Tensor:
    return nn.utils.parameters_to_vector(names["model"].parameters()).detach()


def gradients(names: dict[str, Any]) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in names["model"].parameters()])


def covariances(names: dict[str, Any]) -> Tensor:
    factors = names["analyzer"].load_covariance_matrices("ekfac")
    return torch.cat([m.flatten().double() for kind in factors.values() for m in kind.values()])


def inverses(names: dict[str, Any]) -> Tensor:
    layers = [names["model"][i].fisher.kron for i in (0, 4)]
    return torch.cat([m.flatten() for kron in layers for m in (kron.A_inv, kron.B_inv)])


# What each recipe needs, and its result.
LIBRARIES: dict[str, tuple[str, Callable[[dict[str, Any]], Tensor]]] = {
    "curvlinops": ("curvlinops", lambda names: names["inverse"] @ torch.ones(114)),
    "laplace-torch": ("laplace", lambda names: names["posterior"].H.to_matrix()),
    "nngeometry": ("nngeometry", lambda names: names["fisher"].to_torch()),
    "kronfluence": ("kronfluence.analyzer", covariances),
    "asdl": ("asdl.fisher", inverses),
    "singd": ("singd", parameters),
    "kfac-pytorch": ("kfac", gradients),
}
# What turns a recipe into one of the library alone.
WITHOUT = {
    r"with \w+\.enabled\(.*\):": "if True:",
    r"kfac_fast\.integrations\.laplace import KFACGGN": "laplace.curvature.curvlinops import "
    "CurvlinopsGGN as KFACGGN",
    r"kfac_fast\.integrations\.singd": "singd.optim.optimizer",
}
# kronfluence's factors and kfac-pytorch's inverses are float32 by default.
CONDITION = {"kronfluence": 1e3 * 2**29, "kfac-pytorch": 1e3 * 2**29}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_the_results_of_its_library(recipe: str) -> None:
    library, result = LIBRARIES[recipe]
    pytest.importorskip(library, reason=f"needs {recipe} and what it imports")
    alone = RECIPES[recipe]
    for pattern, replacement in WITHOUT.items():
        alone = re.sub(pattern, replacement, alone)
    assert alone != RECIPES[recipe]
    found = result(run(recipe, RECIPES[recipe]))
    expected = result(run(recipe, alone.replace('"influence"', '"alone"')))
    assert_solved(found, expected, CONDITION.get(recipe, 1e6))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_at_most_five_lines(recipe: str) -> None:
    assert len([line for line in RECIPES[recipe].splitlines() if line]) <= 5


def test_there_is_a_recipe_under_every_heading() -> None:
    assert list(RECIPES) == list(LIBRARIES) == re.findall("^## (.*)$", TEXT, re.MULTILINE)
