"""A layer's block ``A (x) G`` against the exact Gauss-Newton block, where theory says they agree.

For the squared error in float64: expand is exact if only per-position linear maps follow the layer
and the loss sums over positions; reduce is exact if per-position maps, then a sum or mean over the
positions, then linear maps follow. Each is wrong in the other's setting, and both are if a second
spatial convolution follows, which mixes positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import CONVOLUTIONS, Convolution
from oracle import convolution
from torch import Tensor, nn

from kfac_fast.layers import RULES, Approximation

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.usefixtures("one_thread"),
]

EXACT = 1e-12
NOT_EXACT = 1e-2
OUTPUTS = 2


class PerPosition(nn.Module):
    """The same linear map at every position of ``[N, C, *positions]``."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, OUTPUTS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


class Pool(nn.Module):
    """Sum or mean over the positions of ``[N, C, *positions]``."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        positions = x.reshape(*x.shape[:2], -1)
        return positions.mean(-1) if self.mean else positions.sum(-1)


class FeaturesFirst(nn.Module):
    """``[N, *shared, D]`` to ``[N, D, *shared]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


class Setting(NamedTuple):
    """A network whose first module is the layer under test."""

    model: nn.Sequential
    x: Tensor

    @property
    def layer(self) -> nn.Module:
        return self.model[0]


def expand_setting(layer: nn.Module, x: Tensor, features: int) -> Setting:
    """Per-position maps follow the layer, and the loss sums over the positions."""
    first = [FeaturesFirst()] if isinstance(layer, nn.Linear) else []
    return Setting(nn.Sequential(layer, *first, PerPosition(features), PerPosition(OUTPUTS)), x)


def reduce_setting(layer: nn.Module, x: Tensor, features: int, mean: bool = True) -> Setting:
    """A per-position map, a pooling over the positions and a linear map follow the layer."""
    first = [FeaturesFirst()] if isinstance(layer, nn.Linear) else []
    last = nn.Linear(OUTPUTS, OUTPUTS, dtype=torch.float64)
    return Setting(nn.Sequential(layer, *first, PerPosition(features), Pool(mean), last), x)


def loss_curvature(outputs: Tensor, reduction: str) -> Tensor:
    """Diagonal of the squared error's Hessian in the flat outputs; the rest of it is zero."""
    flat = outputs.detach().flatten().requires_grad_()
    loss = F.mse_loss(flat, torch.randn_like(flat), reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
    return torch.autograd.grad(gradient.sum(), flat)[0]


def exact_blocks(setting: Setting, reduction: str) -> Tensor:
    """``J^T H J`` of each group's matrix of parameters, ``[groups, out * in, out * in]``."""
    rule = RULES[type(setting.layer)]("layer", setting.layer, "expand")
    parameters = rule.parameters()
    outputs = setting.model(setting.x)
    rows = []
    for output in outputs.flatten():
        row = torch.autograd.grad(output, parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, row, strict=True):
            parameter.grad = gradient
        rows.append(rule.gradient_matrix(torch.float64).reshape(rule.groups, -1))
    j = torch.stack(rows, 1)  # [groups, outputs, out * in]
    return (j.mT * loss_curvature(outputs, reduction)) @ j


def kronecker_blocks(setting: Setting, approx: Approximation, reduction: str) -> Tensor:
    """``G (x) A``, row-major like the parameters' matrix, from type-2 gradients."""
    rule = RULES[type(setting.layer)]("layer", setting.layer, approx)
    layer_output = setting.layer(setting.x)
    outputs = setting.model[1:](layer_output)
    examples = outputs.flatten(1)
    scale = 1.0 if reduction == "sum" else 1 / outputs.numel()
    total, count = rule.input_gram(setting.x, layer_output)
    a = total / count
    g = torch.zeros((), dtype=torch.float64)
    for output in range(examples.shape[1]):
        root = 2**0.5 * examples[:, output].sum()  # the squared error's Hessian is 2
        (gradient,) = torch.autograd.grad(root, layer_output, retain_graph=True)
        g = g + rule.gradient_gram(gradient, scale)
    stacked = zip(g.reshape(-1, *g.shape[-2:]), a.reshape(-1, *a.shape[-2:]), strict=True)
    return torch.stack([torch.kron(gradient, inputs) for gradient, inputs in stacked])


def relative_errors(setting: Setting, reduction: str = "sum") -> dict[Approximation, float]:
    """Of each approximation, the largest relative error of a group's block."""
    exact = exact_blocks(setting, reduction)
    size = torch.linalg.matrix_norm(exact)
    errors = {a: kronecker_blocks(setting, a, reduction) - exact for a in ("expand", "reduce")}
    return {a: float((torch.linalg.matrix_norm(e) / size).max()) for a, e in errors.items()}


def check_both_settings(layer: nn.Module, x: Tensor, features: int) -> None:
    """Each approximation is exact in its own setting and, with several positions, in no other."""
    positions = layer(x).numel() // (len(x) * features)
    expand = relative_errors(expand_setting(layer, x, features), "mean")
    reduce = relative_errors(reduce_setting(layer, x, features), "mean")
    assert expand["expand"] < EXACT and reduce["reduce"] < EXACT
    for other in (expand["reduce"], reduce["expand"]):
        assert other < EXACT if positions == 1 else other > NOT_EXACT


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shared", [(), (4,), (2, 3)], ids=["rows", "sequence", "grid"])
def test_linear(shared: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(3, 4, bias=bias, dtype=torch.float64)
    check_both_settings(layer, torch.randn(5, *shared, 3, dtype=torch.float64), 4)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(case: Convolution, bias: bool) -> None:
    features = 2 * case.groups
    layer = convolution(len(case.size), case.channels, features, case.options, bias)
    check_both_settings(layer, torch.randn(2, case.channels, *case.size).double(), features)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", ["2d-padded", "2d-transposed"])
def test_reductions_of_the_loss_and_of_the_positions(name: str, reduction: str) -> None:
    case = CONVOLUTIONS[name]
    layer = convolution(2, case.channels, 3, case.options, bias=True)
    x = torch.randn(2, case.channels, *case.size, dtype=torch.float64)
    assert relative_errors(expand_setting(layer, x, 3), reduction)["expand"] < EXACT
    for mean in (False, True):
        assert relative_errors(reduce_setting(layer, x, 3, mean), reduction)["reduce"] < EXACT


def two_convolutions(pooled: bool, **options: Any) -> Setting:
    """A 3x3 convolution after the one under test, without and with a pooling behind it."""
    layers = [nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64, **options) for _ in range(2)]
    tail = [Pool(mean=True), nn.Linear(2, 2, dtype=torch.float64)] if pooled else [PerPosition(2)]
    return Setting(nn.Sequential(*layers, *tail), torch.randn(3, 2, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("pooled", [False, True], ids=["every-position", "pooled"])
def test_a_second_convolution_breaks_both(pooled: bool) -> None:
    assert min(relative_errors(two_convolutions(pooled)).values()) > 0.1


def test_a_second_circular_convolution_keeps_reduce_exact() -> None:
    errors = relative_errors(two_convolutions(pooled=True, padding_mode="circular"))
    assert errors["reduce"] < EXACT
    assert errors["expand"] > 0.1
