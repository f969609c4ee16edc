"""A layer's block ``A (x) G`` against the exact Gauss-Newton block, where theory says they agree.

For the squared error in float64: expand is exact if only per-position linear maps follow the layer
and the loss sums over positions; reduce is exact if per-position maps, then a sum or mean over the
positions, then linear maps follow. Each is wrong in the other's setting, and both are if a second
spatial convolution follows, which mixes positions. The same holds for other losses where all
outputs are alike, because their Hessians then are. A single datum without shared positions is exact
for any network and loss. The blocks are those of ``KFAC`` with the exact Fisher.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CONVOLUTIONS, Convolution
from loss_cases import LOSS_CASES, LossCase
from nets import preconditioner
from oracle import convolution
from settings import (
    APPROXIMATIONS,
    EXACT,
    NOT_EXACT,
    FeaturesFirst,
    PerPosition,
    Pool,
    Setting,
    expand_setting,
    kronecker_block,
    reduce_setting,
)
from torch import Tensor, nn

from kfac_fast.layers import RULES, Approximation

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.usefixtures("one_thread"),
]

MSE = LOSS_CASES["mse"]


def curvature_of_the_loss(case: LossCase, f: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Hessian in the flat outputs."""
    hessian = case.hessian(f, targets)
    if reduction == "sum":
        return hessian
    return hessian * case.loss(f, targets, "mean") / case.loss(f, targets, "sum")


def exact_blocks(
    setting: Setting, case: LossCase, targets: Tensor, reduction: str, layer: nn.Module
) -> Tensor:
    """``J^T H J`` of each group's matrix of parameters, ``[groups, out * in, out * in]``."""
    rule = RULES[type(layer)]("layer", layer, "expand")
    parameters = rule.parameters()
    outputs = setting.model(setting.x)
    flat = outputs.flatten()
    every = torch.eye(len(flat), dtype=flat.dtype)
    batched = torch.autograd.grad(flat, parameters, every, is_grads_batched=True)
    rows = []
    for row in zip(*batched, strict=True):
        for parameter, gradient in zip(parameters, row, strict=True):
            parameter.grad = gradient
        rows.append(rule.matrix(rule.gradients(), torch.float64).reshape(rule.groups, -1))
    setting.model.zero_grad()
    j = torch.stack(rows, 1)  # [groups, outputs, out * in]
    return j.mT @ curvature_of_the_loss(case, outputs.detach(), targets, reduction) @ j


def kronecker_blocks(
    setting: Setting,
    approx: Approximation,
    case: LossCase,
    targets: Tensor,
    reduction: str,
    layer: nn.Module,
) -> Tensor:
    """``G (x) A``, row-major like the parameters' matrix."""
    kfac = preconditioner(setting.model, approx=approx, fisher="exact", loss_reduction=reduction)
    outputs = case.outputs(setting.model(setting.x))
    kfac.update_curvature(outputs, loss=case.module(reduction=reduction), targets=targets)
    kfac.step()
    kfac.detach()
    (block,) = (block for block in kfac._blocks if block.layer.module is layer)
    return kronecker_block(block)


def relative_errors(
    setting: Setting,
    reduction: str = "sum",
    case: LossCase = MSE,
    layer: nn.Module | None = None,
) -> dict[Approximation, float]:
    """Of each approximation, the largest relative error of a group's block."""
    layer = setting.layer if layer is None else layer
    targets = case.targets(setting.model(setting.x).detach())
    exact = exact_blocks(setting, case, targets, reduction, layer)
    size = torch.linalg.matrix_norm(exact)
    errors = {
        approx: kronecker_blocks(setting, approx, case, targets, reduction, layer) - exact
        for approx in APPROXIMATIONS
    }
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


# Other losses


class PositiveEntries(nn.Module):
    """``[N, 4, positions]``, as every loss takes them, of outputs ``[N, 4, *positions]``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x.reshape(*x.shape[:2], -1)) + 0.3


# The Hessian must be that of every label and, for expand, of every position.
ALIKE = {
    name: LOSS_CASES[name]
    for name in ("cross-entropy", "soft-labels", "smoothed", "mse", "bce", "bce-weights", "normal")
}


def alike(layer: nn.Module, x: Tensor, features: int, pooled: bool) -> Setting:
    """The settings above with 4 outputs, which are alike because the layer's weight is zero."""
    nn.init.zeros_(layer.weight)
    linear = nn.Conv1d(features, 4, 1, dtype=torch.float64)
    tail = [Pool(mean=True), nn.Unflatten(1, (4, 1))] if pooled else []
    layers = [layer, nn.Flatten(2), linear, *tail, PositiveEntries()]
    return Setting(nn.Sequential(*layers), x)


@pytest.mark.parametrize("case", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_every_loss_where_all_outputs_are_alike(case: LossCase, reduction: str) -> None:
    layer = nn.Conv2d(2, 3, 2, dtype=torch.float64)
    x = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    for pooled, exact in ((False, "expand"), (True, "reduce")):
        errors = relative_errors(alike(layer, x, 3, pooled), reduction, case)
        assert errors.pop(exact) < EXACT < NOT_EXACT < min(errors.values())


@pytest.mark.parametrize("case", LOSS_CASES.values(), ids=LOSS_CASES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_datum_of_any_network_and_loss(case: LossCase, reduction: str) -> None:
    layers = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)]
    model = nn.Sequential(*layers, nn.Unflatten(1, (4, 1)), PositiveEntries()).double()
    setting = Setting(model, torch.randn(1, 3, dtype=torch.float64))
    for layer in (model[0], model[2]):
        assert max(relative_errors(setting, reduction, case, layer).values()) < EXACT


@pytest.mark.parametrize("case", LOSS_CASES.values(), ids=LOSS_CASES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_corrected_eigenvalues_add_up_to_the_trace_of_any_block(
    case: LossCase, reduction: str
) -> None:
    """Of any number of examples and positions, after any layers."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), FeaturesFirst(), nn.Conv1d(5, 4, 2))
    setting = Setting(
        nn.Sequential(*model, PositiveEntries()).double(), torch.randn(2, 3, 3).double()
    )
    f = setting.model(setting.x).detach()
    targets = case.targets(f)
    options = {"damping_mode": "exact", "eigenvalue_correction": True, "inverse_update_steps": 9}
    kfac = preconditioner(setting.model, fisher="exact", loss_reduction=reduction, **options)
    for _ in range(2):
        outputs = case.outputs(setting.model(setting.x))
        kfac.update_curvature(outputs, loss=case.module(reduction=reduction), targets=targets)
        kfac.step()
    kfac.detach()
    for block in kfac._blocks:
        exact = exact_blocks(setting, case, targets, reduction, block.layer.module)
        trace = exact.diagonal(dim1=1, dim2=2).sum()
        assert abs(block.correction.mean.sum() - trace) < EXACT * trace
