"""One weight of layers with a bias and without: against rows with a 1 or a 0, and dense blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import DAMPING, preconditioner
from plain_kfac import (
    Call,
    Factors,
    assert_covariances,
    assert_solved,
    condition,
    covariances,
    damp,
    factors,
    grad_matrices,
    record,
    scaled,
    solve,
)
from settings import APPROXIMATIONS, EXACT, expand_setting, kronecker_block, reduce_setting
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.layers import RULES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("default:The .grad attribute"),
]
approximations = pytest.mark.parametrize("approx", APPROXIMATIONS)

# A layer, the shape of its input, and its features.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "rows": (lambda: nn.Linear(3, 4), (6, 3), 4),
    "sequence": (lambda: nn.Linear(3, 4), (6, 4, 3), 4),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (4, 2, 5, 4), 4),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 4, 4, 5), 6),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, (2, 3), stride=2, groups=2), (4, 4, 2, 3), 4),
}
layers = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Halves(nn.Module):
    """A layer for one half of the examples, and one without a bias of the same weight for others.

    Args:
        layer: The layer with a bias.
        frozen: The other one has a bias, which is not trained.
    """

    def __init__(self, layer: nn.Module, frozen: bool = False) -> None:
        super().__init__()
        self.bare = copy.deepcopy(layer)  # the first of both
        self.layer = layer
        self.bare.weight = layer.weight
        self.bare.bias = nn.Parameter(layer.bias.detach(), requires_grad=False) if frozen else None

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2)
        return torch.cat([self.bare(one), self.layer(two)])


def dense(model: nn.Sequential, x: Tensor) -> Tensor:
    """``J^T J`` of each group's matrix of weight and bias, times that of the mean squared error."""
    rule = RULES[type(model[0].layer)]("layer", model[0].layer, "expand")
    outputs, rows = model(x), []
    for output in outputs.flatten():
        gradients = torch.autograd.grad(
            output, rule.parameters(), retain_graph=True, materialize_grads=True
        )
        rows.append(rule.matrix(gradients, torch.float64).reshape(rule.groups, -1))
    j = torch.stack(rows, 1)
    return 2 / outputs.numel() * j.mT @ j


@pytest.mark.parametrize("frozen", [False, True], ids=["no-bias", "frozen-bias"])
@approximations
@layers
def test_the_block_is_that_of_weight_and_bias_in_its_setting(
    name: str, approx: str, frozen: bool
) -> None:
    make, shape, features = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    setting = expand_setting if approx == "expand" else reduce_setting
    model = setting(layer, x, features).model
    model[0] = Halves(layer, frozen)
    kfac = preconditioner(model, approx=approx, fisher="exact")
    outputs = model(x)
    kfac.update_curvature(outputs, loss="mse")
    outputs.square().mean().backward()
    kfac.step()
    kfac.detach()
    block, exact = kfac._blocks[0], dense(model, x)
    assert [rule.name for rule in block.layers] == ["0.layer", "0.bare"]
    error = torch.linalg.matrix_norm(kronecker_block(block) - exact)
    assert (error < EXACT * torch.linalg.matrix_norm(exact)).all()


class Nested(nn.Module):
    """Layers of one weight on one another's outputs, and one on the same input as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.bare, self.first = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.again, self.beside = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.bare.weight = self.again.weight = self.first.weight
        self.again.bias = self.first.bias
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(self.bare(x).tanh()) + self.beside(x)
        return self.again(inner.sin()).flatten(1)


def padded(call: Call) -> Call:
    """With the column of a bias that is not there."""
    return call._replace(rows=F.pad(call.rows, (0, 1)))


def calls_of(model: Nested, x: Tensor) -> dict[str, list[Call]]:
    """As of the block and of the layer beside, for the gradients of a mean's terms."""
    model.zero_grad()
    found = scaled(record(model, lambda: model(x).pow(3).sum(1).mean()), len(x))
    joined = [*found["first"], *found["again"], *map(padded, found["bare"])]
    return {"first": joined, "beside": found["beside"]}


def expected_factors(model: Nested, x: Tensor, approx: str) -> dict[str, Factors]:
    return {name: factors(calls, approx, len(x)) for name, calls in calls_of(model, x).items()}


def train_step(model: nn.Module, kfac: KFAC, x: Tensor) -> list[Tensor]:
    """A step; the gradients before it."""
    kfac.model.zero_grad()
    model(x).pow(3).sum(1).mean().backward()
    raw = [grad_matrices(kfac.model.first), grad_matrices(kfac.model.beside)]
    kfac.step()
    return raw


@approximations
@pytest.mark.parametrize("run", ["eager", "compiled"])
@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)], ids=["rows", "positions"])
def test_rows_without_a_bias_have_a_zero_where_others_have_the_one(
    shape: tuple[int, ...], run: str, approx: str
) -> None:
    model = Nested()
    kfac = preconditioner(model, approx=approx, factor_decay=0.0)
    called = torch.compile(model, backend="aot_eager") if run == "compiled" else model
    for _ in range(3):  # in the memory of the last one's sums
        x = torch.randn(shape, dtype=torch.float64)
        raw = train_step(called, kfac, x)
        steps = [grad_matrices(model.first), grad_matrices(model.beside)]
        expected = expected_factors(model, x, approx)
        assert_covariances(kfac, expected)
        for step, matrix, pair in zip(steps, raw, expected.values(), strict=True):
            both = damp(pair, DAMPING)
            assert_solved(step, solve(matrix, both), condition(both))
    torch.compiler.reset()


@approximations
@pytest.mark.parametrize("fisher", ["exact", "forward-only"])
def test_accumulated_passes_of_other_fishers_have_the_zeros_too(fisher: str, approx: str) -> None:
    model, xs = Nested(), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    calls = [call for x in xs for call in calls_of(model, x)["first"]]
    options = {"approx": approx, "fisher": fisher, "accumulation_steps": 2}
    kfac = preconditioner(model, **options)
    for x in xs:
        outputs = model(x)
        kfac.update_curvature(outputs, loss="mse")
        (outputs.square().mean() / 2).backward()
    kfac.step()
    assert_solved(covariances(kfac)["first"][0], factors(calls, approx)[0])


def test_a_layer_without_a_bias_may_be_the_only_one_that_is_called() -> None:
    model = Nested()
    kfac, x = preconditioner(model, loss_reduction="sum"), torch.randn(5, 4, dtype=torch.float64)
    weights = torch.randn_like(x)
    (model.bare(x) * weights).sum().backward()
    raw = F.pad(model.first.weight.grad, (0, 1))
    kfac.step()
    a, g = F.pad(x.T @ x / 5, (0, 1, 0, 1)), weights.T @ weights
    both = damp((a[None], g[None]), DAMPING)
    step = solve(raw[None], both)[0, :, :-1]
    assert_solved(model.first.weight.grad, step, condition(both))
    assert model.first.bias.grad is None


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 40, 4)], ids=["row", "few", "many"])
def test_corrected_eigenvalues_have_the_zeros_too(shape: tuple[int, ...]) -> None:
    """Of a rotated gradient, or of rotated rows."""
    model, x = Nested(), torch.randn(shape, dtype=torch.float64)
    options = {"damping_mode": "exact", "eigenvalue_correction": True, "inverse_update_steps": 9}
    kfac = preconditioner(model, factor_decay=0.0, **options)
    for _ in range(2):  # corrected from the second on
        train_step(model, kfac, x)
    block = kfac._blocks[0]
    right, left = (basis.vectors for basis in block.bases)
    expected = torch.zeros_like(block.correction.mean)
    for rows, gradients in calls_of(model, x)["first"]:
        products = gradients[:, :, 0].mT @ rows[:, :, 0]
        expected += (left.mT @ products @ right).square().sum(0) / len(x)
    torch.testing.assert_close(block.correction.mean, expected, rtol=1e-10, atol=1e-13)


@approximations
def test_each_tied_layer_has_rows_of_its_own(approx: str) -> None:
    model, x = Halves(nn.Linear(3, 4)).double(), torch.randn(4, 5, 3, dtype=torch.float64)
    masks = {"bare": torch.rand(2, 5) < 0.6, "layer": torch.rand(2, 5) < 0.6}
    kfac = preconditioner(model, approx=approx)
    for name, mask in masks.items():
        mask[:, 0] = True
        kfac.share_rows(name, mask=mask)
    model(x).square().mean().backward()
    kfac.step()
    rows = []
    for half, mask, one in zip(x.chunk(2), masks.values(), (0, 1), strict=True):
        own = [
            F.pad(row[counts], (0, 1), value=one) for row, counts in zip(half, mask, strict=True)
        ]
        rows += own if approx == "expand" else [row.mean(0, keepdim=True) for row in own]
    joined = torch.cat(rows)
    assert_solved(covariances(kfac)["layer"][0][0], joined.mT @ joined / len(joined))


@pytest.mark.parametrize(
    "options",
    [{}, {"damping_mode": "exact", "eigenvalue_correction": True}, {"grafting": "adam"}],
    ids=["factored", "corrected", "grafted"],
)
def test_a_resumed_run_continues_bit_for_bit(options: dict[str, Any]) -> None:
    model, x = Nested(), torch.randn(5, 3, 4, dtype=torch.float64)
    kfac = preconditioner(model, **options)
    for _ in range(2):
        train_step(model, kfac, x)
    twin = copy.deepcopy(model)
    other = preconditioner(twin, **options)
    other.load_state_dict(kfac.state_dict())
    for each, own in ((model, kfac), (twin, other)):
        train_step(each, own, x)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
