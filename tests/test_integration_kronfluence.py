"""kronfluence with this package's factors against kronfluence itself, in float64."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_kfac import assert_solved, plain_covariances, record
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("kronfluence", reason="needs kronfluence and what it imports")
from kronfluence.analyzer import Analyzer, prepare_model  # noqa: E402
from kronfluence.arguments import FactorArguments, ScoreArguments  # noqa: E402
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader  # noqa: E402
from kronfluence.factor.eigen import (  # noqa: E402
    fit_lambda_matrices_with_loader,
    perform_eigendecomposition,
)
from kronfluence.module.tracked_module import TrackedModule  # noqa: E402
from kronfluence.task import Task  # noqa: E402
from kronfluence.utils.state import State  # noqa: E402

from kfac_fast.integrations import kronfluence as ours  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*GradScaler is enabled:UserWarning"),
]
DTYPES = ("activation_covariance", "gradient_covariance", "eigendecomposition")
PRECISE = {f"{name}_dtype": torch.float64 for name in (*DTYPES, "per_sample_gradient", "lambda")}


class Problem(Task):
    """Summed cross entropy, of images or of every token of a padded sequence."""

    def __init__(self, processes: bool = False) -> None:
        self.enable_post_process_per_sample_gradient = processes

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten(), reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_attention_mask(self, batch: Any) -> Tensor | None:
        return batch[2] if len(batch) > 2 else None

    def post_process_per_sample_gradient(self, module_name: str, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.1, 0.1)


def images(groups: int = 1, padding_mode: str = "zeros") -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", groups=groups, padding_mode=padding_mode),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, (2, 3), stride=2, dilation=(1, 2), padding=(1, 0), bias=False),
        nn.Flatten(),
        nn.Linear(30, 5, bias=False),
        nn.ReLU(inplace=True),
        nn.Linear(5, 3),
    )


def padded(mode: str) -> nn.Module:
    convolution = nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode)
    return nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(256, 3))


class Twice(nn.Module):
    """Calls a layer two times, of which kronfluence without shared parameters knows the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Overwrites(nn.Module):
    """Overwrites a layer's input, which autograd does not keep of a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden) + hidden.mul_(2)


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))


NETWORKS: dict[str, Any] = {
    "images": images,
    "groups": lambda: images(groups=2),
    "padding": lambda: images(padding_mode="circular"),
    "tokens": tokens,
    "padded tokens": tokens,
    "tokens twice": Twice,
    "tokens overwritten": Overwrites,
}


def dataset(network: str) -> TensorDataset:
    torch.manual_seed(1)
    if "tokens" not in network:
        x = torch.randn(8, 2, 8, 8, dtype=torch.float64)
        return TensorDataset(x, torch.randint(3, (8, 1)))
    x, y = torch.randn(8, 6, 4, dtype=torch.float64), torch.randint(3, (8, 6))
    masks = [torch.arange(6) < torch.randint(1, 7, (8, 1))] if "padded" in network else []
    return TensorDataset(x, y, *masks)


def both(network: str, task: Task) -> list[nn.Module]:
    """Equal models, prepared by kronfluence and by this package."""
    torch.manual_seed(0)
    model = NETWORKS[network]().double()
    theirs = prepare_model(copy.deepcopy(model), task)
    with ours.enabled():
        return [theirs, prepare_model(model, task)]


def fit(model: nn.Module, network: str, task: Task, bases: Any = None, **options: Any) -> Any:
    """Covariances, or with bases lambda matrices, from two unequal batches."""
    data = DataLoader(dataset(network), batch_size=5)
    arguments = FactorArguments(**{**PRECISE, **options})
    given = {"disable_tqdm": True, "factor_args": arguments}
    if bases is None:
        return fit_covariance_matrices_with_loader(model, State(cpu=True), task, data, **given)[1]
    given["eigen_factors"] = bases
    return fit_lambda_matrices_with_loader(model, State(cpu=True), task, data, **given)[1]


def decomposed(model: nn.Module, covariances: Any, function: Any) -> Any:
    arguments = FactorArguments(**PRECISE)
    given = copy.deepcopy(covariances)
    return function(given, model, State(cpu=True), arguments, disable_tqdm=True)


def assert_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for kind, factors in expected.items():
        assert found[kind].keys() == factors.keys()
        for name, factor in factors.items():
            if factor.dtype == torch.int64:
                assert found[kind][name].equal(factor)
            else:
                assert_solved(found[kind][name], factor)


@pytest.mark.parametrize("network", NETWORKS)
def test_covariances_are_those_of_kronfluence(network: str) -> None:
    task = Problem()
    expected, found = (fit(model, network, task) for model in both(network, task))
    assert_equal(found, expected)


def test_low_precision_totals_stay_low() -> None:
    task = Problem()
    narrow = {f"{name}_dtype": torch.bfloat16 for name in DTYPES[:2]}
    expected, found = (fit(m, "images", task, **narrow) for m in both("images", task))
    for kind in ours.constants.COVARIANCE_FACTOR_NAMES:
        for name, factor in expected[kind].items():
            mine = found[kind][name]
            assert mine.dtype == factor.dtype
            if factor.dtype == torch.bfloat16:
                distance = (mine.double() - factor.double()).abs().max()
                # Each rounds the sums of two batches, kronfluence's also within a batch.
                assert distance <= 4 * torch.finfo(torch.bfloat16).eps * factor.double().abs().max()


def test_gradients_are_scaled_back() -> None:
    task = Problem()
    models = both("images", task)
    for model in models:
        for module in model.modules():
            if isinstance(module, TrackedModule):
                module.set_gradient_scale(0.25)
    expected, found = (fit(model, "images", task) for model in models)
    assert_equal(found, expected)
    bases = decomposed(models[0], expected, perform_eigendecomposition)
    expected, found = (fit(model, "images", task, bases) for model in models)
    assert_equal(found, expected)


@pytest.mark.parametrize("network", NETWORKS)
def test_eigendecompositions_are_those_of_kronfluence(network: str) -> None:
    task = Problem()
    model = both(network, task)[0]
    covariances = fit(model, network, task)
    expected, found = (
        decomposed(model, covariances, function)
        for function in (perform_eigendecomposition, ours.perform_eigendecomposition)
    )
    for side in ("activation", "gradient"):
        for name, values in expected[f"{side}_eigenvalues"].items():
            assert_solved(found[f"{side}_eigenvalues"][name], values)
            matrices = []
            for one in (found, expected):
                vectors = one[f"{side}_eigenvectors"][name]
                matrices.append(vectors * one[f"{side}_eigenvalues"][name] @ vectors.mT)
            assert_solved(*matrices)


def test_matrices_in_parts_and_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "MOST_ENTRIES", 4)  # one by one
    size = 40
    model = prepare_model(nn.Sequential(nn.Linear(size - 1, 2)).double(), Problem())
    torch.manual_seed(0)
    rows = torch.randn(size, size, dtype=torch.float64)
    covariances = {
        "activation_covariance": {"0": rows @ rows.T},
        "gradient_covariance": {"0": torch.eye(2, dtype=torch.float64)},
        "num_activation_covariance_processed": {"0": torch.tensor([4])},
        "num_gradient_covariance_processed": {"0": torch.tensor([4])},
    }
    found = decomposed(model, covariances, ours.perform_eigendecomposition)
    vectors, values = (found[f"activation_eigen{kind}"]["0"] for kind in ("vectors", "values"))
    assert_solved(vectors * values @ vectors.mT, rows @ rows.T / 4)
    covariances["gradient_covariance"]["0"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="0: gradient_covariance has no eigendecomposition"):
        decomposed(model, covariances, ours.perform_eigendecomposition)


@pytest.mark.parametrize("options", [{}, {"has_shared_parameters": True}, {"strategy": "kfac"}])
@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_lambda_matrices_are_those_of_kronfluence(
    network: str, processes: bool, options: dict[str, Any]
) -> None:
    task = Problem(processes)
    models = both(network, task)
    bases = decomposed(models[0], fit(models[0], network, task), perform_eigendecomposition)
    expected, found = (fit(model, network, task, bases, **options) for model in models)
    assert_equal(found, expected)


def prepared(model: nn.Module, task: Task) -> nn.Module:
    with ours.enabled(correct=True):
        return prepare_model(model, task)


def one_by_one(model: nn.Sequential) -> Tensor:
    """Gradients of the first layer by autograd, ``[N, out, in + 1]``."""
    gradients = []
    for batch in DataLoader(dataset("images"), batch_size=1):
        loss = Problem().compute_train_loss(batch, model)
        weight, bias = torch.autograd.grad(loss, [model[0].weight, model[0].bias])
        gradients.append(torch.cat([weight.flatten(1), bias[:, None]], 1))
    return torch.stack(gradients)


@pytest.mark.parametrize("mode", ["circular", "reflect", "zeros"])
def test_correct_covariances_are_those_of_the_fisher(mode: str) -> None:
    task, x, y = Problem(), *dataset("images").tensors
    torch.manual_seed(0)
    model = padded(mode).double()
    expected = plain_covariances(
        model, lambda: task.compute_train_loss((x, y), model), "expand", 1, "sum"
    )
    found = fit(prepared(model, task), "images", task)
    for name, (a, g) in expected.items():
        count = found["num_activation_covariance_processed"][name]
        assert_solved(found["activation_covariance"][name] / count, a[0])
        assert_solved(found["gradient_covariance"][name], g[0])


def test_correct_covariances_are_without_the_rows_that_a_mask_leaves_out() -> None:
    task, (x, y, mask) = Problem(), dataset("padded tokens").tensors
    torch.manual_seed(0)
    model = tokens().double()
    calls = record(model, lambda: task.compute_train_loss((x, y), model))
    found = fit(prepared(model, task), "padded tokens", task)
    for name, (call,) in calls.items():
        rows, gradients = (part.flatten(2)[mask] for part in call)
        assert_solved(found["activation_covariance"][name], rows.T @ rows)
        assert_solved(found["gradient_covariance"][name], gradients.T @ gradients)
        assert found["num_gradient_covariance_processed"][name] == mask.sum()


@pytest.mark.parametrize("options", [{}, {"has_shared_parameters": True}])
def test_correct_lambda_matrices_are_those_of_the_examples_gradients(
    options: dict[str, Any],
) -> None:
    task = Problem()
    torch.manual_seed(0)
    model = padded("circular").double()
    gradients = one_by_one(model)
    model = prepared(model, task)
    bases = decomposed(model, fit(model, "images", task), perform_eigendecomposition)
    found = fit(model, "images", task, bases, **options)["lambda_matrix"]["0"]
    right, left = (bases[f"{side}_eigenvectors"]["0"] for side in ("activation", "gradient"))
    assert_solved(found, (left.T @ gradients @ right).square().sum(0), condition=1e6)


def test_correct_scores_are_of_the_examples_gradients(tmp_path: Path) -> None:
    """With the identity for the curvature they are inner products of gradients."""
    task, data = Problem(), dataset("images")
    torch.manual_seed(0)
    model = padded("circular").double()
    gradients = one_by_one(model).flatten(1)
    task.get_influence_tracked_modules = lambda: ["0"]
    options = {"cpu": True, "disable_tqdm": True, "output_dir": str(tmp_path)}
    analyzer = Analyzer("run", prepared(model, task), task, **options)
    analyzer.fit_all_factors("factors", data, factor_args=FactorArguments("identity"))
    names = ("per_sample_gradient_dtype", "precondition_dtype", "score_dtype")
    given = {f"per_device_{kind}_batch_size": 4 for kind in ("query", "train")}
    given["score_args"] = ScoreArguments(**dict.fromkeys(names, torch.float64))
    analyzer.compute_pairwise_scores("scores", "factors", data, data, **given)
    found = analyzer.load_pairwise_scores("scores")["all_modules"]
    assert_solved(found.double(), gradients @ gradients.T)


def test_patches_are_never_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Problem()
    model = both("images", task)[1]
    bases = decomposed(model, fit(model, "images", task), perform_eigendecomposition)
    monkeypatch.delattr(ours.conv2d, "extract_patches")
    fit(model, "images", task)
    fit(model, "images", task, bases)


def test_all_factors_of_an_analysis(tmp_path: Path) -> None:
    task, data = Problem(), dataset("images")
    torch.manual_seed(0)
    model = images().double()
    results = []
    for replaced in (False, True):
        options = {"cpu": True, "disable_tqdm": True, "output_dir": str(tmp_path / str(replaced))}
        with ours.enabled() if replaced else nullcontext():
            analyzer = Analyzer("run", prepare_model(copy.deepcopy(model), task), task, **options)
            given = {"per_device_batch_size": 5, "factor_args": FactorArguments(**PRECISE)}
            analyzer.fit_all_factors("factors", data, **given)
        sums = analyzer.load_lambda_matrices("factors")["lambda_matrix"]
        results.append(analyzer.load_covariance_matrices("factors"))
        results[-1]["squared_norms"] = {name: matrix.sum() for name, matrix in sums.items()}
    assert_equal(*reversed(results))


def test_classes_are_replaced_inside_of_a_block_only() -> None:
    before = dict(TrackedModule.SUPPORTED_MODULES)
    with pytest.raises(ZeroDivisionError), ours.enabled():
        assert TrackedModule.SUPPORTED_MODULES[nn.Linear].func is ours.TrackedLinear
        assert ours.factor_computer.perform_eigendecomposition is ours.perform_eigendecomposition
        raise ZeroDivisionError
    assert before == TrackedModule.SUPPORTED_MODULES
    assert ours.factor_computer.perform_eigendecomposition is perform_eigendecomposition
