"""The recipes run as they stand, take steps and lower the loss."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn

import kfac_fast

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("default:The .grad attribute"),
]
TEXT = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
RECIPES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))


class Writer:
    """TensorBoard's, as far as the recipe knows it."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float | Tensor, step: int) -> None:
        self.scalars.append((name, float(value), step))


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch._dynamo.reset()
    donated = torch._functorch.config.donated_buffer
    yield
    torch._functorch.config.donated_buffer = donated


def run(recipe: str) -> dict[str, Any]:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    images = torch.randn(32, 1, 8, 8)
    labels = images.mean((1, 2, 3)).argsort().argsort() // 11
    names = {
        "torch": torch,
        "kfac_fast": kfac_fast,
        "model": model,
        "loss_function": nn.functional.cross_entropy,
        "data": [(images, labels)] * 20,
        "device": "cpu",
        "SummaryWriter": Writer,
    }
    before = float(nn.functional.cross_entropy(model(images), labels).detach())
    exec(RECIPES[recipe], names)
    names["before"] = before
    names["after"] = float(nn.functional.cross_entropy(model(images), labels).detach())
    return names


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_lowers_the_loss(recipe: str) -> None:
    names = run(recipe)
    assert names["kfac"].steps == 20
    assert names["after"] < names["before"]


def test_the_log_has_what_it_says() -> None:
    scalars = run("A log for TensorBoard")["writer"].scalars
    assert {name for name, _, _ in scalars} == {
        "kfac/damping",
        "kfac/batches skipped",
        "kfac/inverses failed",
        "kfac/clip",
        *(f"kfac/condition/{layer}" for layer in "014"),
    }
    assert {step for _, _, step in scalars} == {0, 10}


def test_the_recipe_of_a_compiled_model_imports_what_it_sets() -> None:
    recipe = RECIPES["A compiled model, with drawn labels"]
    first = recipe[: recipe.index("kfac =")]
    subprocess.run([sys.executable, "-c", f"import torch, kfac_fast\n{first}"], check=True)


def test_there_is_a_recipe_under_every_heading() -> None:
    assert list(RECIPES) == re.findall("^## (.*)$", TEXT, re.MULTILINE)
