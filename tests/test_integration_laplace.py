"""laplace-torch with this package's curvature against laplace-torch with curvlinops'."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from plain_kfac import assert_solved, plain_covariances
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

laplace = pytest.importorskip("laplace", reason="needs laplace-torch and what it imports")
from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN  # noqa: E402
from laplace.marglik_training import marglik_training  # noqa: E402
from laplace.utils.matrix import Kron  # noqa: E402

from kfac_fast.integrations.laplace import KFACEF, KFACGGN, Factors  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CASES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "type-2": (KFACGGN, CurvlinopsGGN, {}),
    "mc": (KFACGGN, CurvlinopsGGN, {"stochastic": True}),
    "empirical": (KFACEF, CurvlinopsEF, {}),
}


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem(likelihood: str, **options: Any) -> tuple[nn.Module, DataLoader[tuple[Tensor, ...]]]:
    convolution = nn.Conv2d(1, 3, 3, padding=1, **options)
    model = nn.Sequential(convolution, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 3))
    x = torch.randn(12, 1, 6, 6)
    y = torch.randint(3, (12,)) if likelihood == "classification" else torch.randn(12, 3)
    return model, DataLoader(TensorDataset(x, y), batch_size=5)


def fitted(backend: type, subset: str, likelihood: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    model, data = problem(likelihood)
    la = laplace.Laplace(
        model,
        likelihood,
        subset_of_weights=subset,
        hessian_structure="kron",
        backend=backend,
        backend_kwargs=options,
    )
    la.fit(data)
    return la


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("case", CASES)
def test_posterior_and_marginal_likelihood_are_those_of_laplace(
    case: str, subset: str, likelihood: str
) -> None:
    ours, theirs, options = CASES[case]
    mine, expected = (fitted(b, subset, likelihood, options) for b in (ours, theirs))
    assert_solved(mine.H.to_matrix(), expected.H.to_matrix(), condition=1e5)
    assert_solved(mine.loss, expected.loss)
    assert_solved(
        mine.log_marginal_likelihood(torch.tensor(2.0)),
        expected.log_marginal_likelihood(torch.tensor(2.0)),
    )
    x = torch.randn(4, 1, 6, 6)
    for found, wanted in zip(as_tuple(mine(x)), as_tuple(expected(x)), strict=True):
        assert_solved(found, wanted, condition=1e6)


def test_a_second_data_set_adds_to_the_posterior_as_in_laplace() -> None:
    posteriors = []
    for backend in (KFACGGN, CurvlinopsGGN):
        la = fitted(backend, "all", "classification", {})
        la.fit(problem("classification")[1], override=False)
        posteriors.append(la)
    mine, expected = posteriors
    assert type(mine.H_facs) is Factors
    for own, wanted in zip(mine.H_facs.kfacs, expected.H_facs.kfacs, strict=True):
        for factor, theirs in zip(own, wanted, strict=True):
            assert_solved(factor, theirs)
    assert_solved(mine.H.to_matrix(), expected.H.to_matrix(), condition=1e5)


def test_a_sum_is_formed_in_place_and_a_batch_stays_as_it_is() -> None:
    model, data = problem("classification")
    backend = KFACGGN(model, "classification")
    first, second = (backend.kron(x, y, N=12)[1] for x, y in list(data)[:2])
    kept = [factor.clone() for block in (*first.kfacs, *second.kfacs) for factor in block]
    zeros = Kron.init_from_model(model, torch.device("cpu"), torch.float64)
    total = zeros + first
    addresses = [factor.data_ptr() for block in total.kfacs for factor in block]
    total += second
    assert addresses == [factor.data_ptr() for block in total.kfacs for factor in block]
    unchanged = [factor for block in (*first.kfacs, *second.kfacs) for factor in block]
    assert all(map(torch.equal, unchanged, kept))
    own = copy.deepcopy(first)
    first += second
    for sums in zip(total.kfacs, first.kfacs, (own + second).kfacs, strict=True):
        for found, other, wanted in zip(*sums, strict=True):
            assert torch.equal(found, wanted)
            assert torch.equal(other, wanted)


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        Factors([[torch.eye(3), torch.full((2, 2), torch.nan)]]).decompose()


def test_correct_factors_are_those_of_the_fisher() -> None:
    model, data = problem("classification", padding_mode="circular")
    posterior = laplace.Laplace(
        model,
        "classification",
        subset_of_weights="all",
        hessian_structure="kron",
        backend=KFACEF,
        backend_kwargs={"correct": True},
    )
    posterior.fit(data)
    x, y = data.dataset.tensors
    loss = nn.CrossEntropyLoss(reduction="sum")
    expected = plain_covariances(model, lambda: loss(model(x), y), "expand", 1, "sum")
    kfacs = posterior.H_facs.kfacs[::2]
    for (b, a), (input_factor, gradient_factor) in zip(kfacs, expected.values(), strict=True):
        assert_solved(a, input_factor[0, :-1, :-1])  # laplace-torch has a block for each bias
        assert_solved(b, gradient_factor[0])


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_training_by_the_marginal_likelihood_is_that_of_laplace(likelihood: str) -> None:
    results = []
    for backend in (KFACGGN, CurvlinopsGGN):
        torch.manual_seed(1)
        model, data = problem(likelihood)
        options = {"hessian_structure": "kron", "n_epochs": 3, "n_hypersteps": 2}
        found = marglik_training(model, data, likelihood, backend=backend, **options)
        weights = nn.utils.parameters_to_vector(model.parameters()).detach()
        results.append([weights, found[0].prior_precision.detach(), *map(torch.tensor, found[2:])])
    for mine, theirs in zip(*results, strict=True):
        assert_solved(mine, theirs, condition=1e5)


def test_each_factor_of_a_regression_has_its_share_of_the_half() -> None:
    """The Hessian of squared errors is 2, that of the Gaussian likelihood 1."""
    model, data = problem("regression")
    x, y = data.dataset.tensors
    kfacs = KFACGGN(model, "regression").kron(x, y, N=4 * len(x))[1].kfacs
    passes = [
        plain_covariances(model, lambda c=c: model(x)[:, c].sum(), "expand", 1, "sum")
        for c in range(3)
    ]
    for i, (name, (inputs, _)) in enumerate(passes[0].items()):
        gradients = sum(covariances[name][1][0] for covariances in passes)
        (b, a), (bias,) = kfacs[2 * i : 2 * i + 2]
        assert_solved(a, 0.5**0.5 * inputs[0, :-1, :-1] / 4)
        assert_solved(b, 0.5**0.5 * 2 * gradients)
        assert_solved(bias, gradients)


def test_a_batch_takes_one_forward_pass() -> None:
    passes: list[nn.Module] = []
    model, data = problem("classification")
    model.register_forward_hook(lambda module, inputs, output: passes.append(module))
    x, y = next(iter(data))
    KFACGGN(model, "classification").kron(x, y, N=12)
    assert len(passes) == 1


def test_inputs_may_be_a_mapping() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = problem("classification")[0]

        def forward(self, inputs: Any) -> Tensor:
            return self.layers(inputs["images"])

    model, y = Mapped(), torch.randint(3, (5,))
    inputs = UserDict(images=torch.randn(5, 1, 6, 6), labels=y)
    for stochastic in (False, True):
        found, expected = (
            kind(model, "classification", dict_key_x="images", stochastic=stochastic).kron(
                inputs, y, N=12
            )
            for kind in (KFACGGN, CurvlinopsGGN)
        )
        assert_solved(found[0], expected[0])
        for mine, theirs in zip(found[1].kfacs, expected[1].kfacs, strict=True):
            for factor, wanted in zip(mine, theirs, strict=True):
                assert_solved(factor, wanted)


def as_tuple(prediction: Any) -> tuple[Tensor, ...]:
    return prediction if isinstance(prediction, tuple) else (prediction,)
