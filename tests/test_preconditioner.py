"""What a step computes: factors and preconditioned gradients against K-FAC in plain PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import DAMPING, LAYER_NAMES, Net, classes, images, preconditioner
from plain_kfac import (
    LAYERS,
    Call,
    assert_covariances,
    assert_grads,
    assert_solved,
    condition,
    covariances,
    damp,
    expected_grads,
    factors,
    grad_matrices,
    output_rows,
    plain_covariances,
    record,
    solve,
)
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.losses import MSE

pytestmark = pytest.mark.usefixtures("one_thread")
approximations = pytest.mark.parametrize("approx", ["expand", "reduce"])
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@approximations
@reductions
@pytest.mark.parametrize("mode", ["factored", "plain"])
def test_the_step_is_the_explicit_kronecker_solve(approx: str, reduction: str, mode: str) -> None:
    model, x = Net(), images()
    y = classes(model(x))

    def loss_of() -> Tensor:
        return F.cross_entropy(model(x), y, reduction=reduction)

    plain = plain_covariances(model, loss_of, approx, 5, reduction)
    kfac = preconditioner(model, approx=approx, loss_reduction=reduction, damping_mode=mode)
    loss_of().backward()
    expected = expected_grads(model, plain, DAMPING, mode)
    kfac.step()
    assert_covariances(kfac, plain)
    assert_grads(model, plain, expected)


LOSSES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "cross_entropy": (F.cross_entropy, 6),
    "mse": (F.mse_loss, 18),
}


@approximations
@reductions
@pytest.mark.parametrize("loss", LOSSES)
def test_a_mean_divides_by_all_terms_of_the_loss(loss: str, reduction: str, approx: str) -> None:
    """Six positions of three outputs: 6 labels, or 18 squares, an example."""
    function, terms_per_example = LOSSES[loss]
    model, x = Net(tokens=True), images()
    y = classes(model(x)) if loss == "cross_entropy" else torch.randn(5, 3, 6).double()

    def loss_of() -> Tensor:
        return function(model(x), y, reduction=reduction)

    plain = plain_covariances(model, loss_of, approx, 5 * terms_per_example, reduction)
    options = {"loss_reduction": reduction, "loss_terms_per_example": terms_per_example}
    kfac = preconditioner(model, approx=approx, **options)
    loss_of().backward()
    kfac.step()
    assert_covariances(kfac, plain)


def run_batches(
    x: Tensor, y: Tensor, sizes: list[int], loss_of: Callable[..., Tensor], **options: Any
) -> tuple[KFAC, list[Tensor]]:
    """Factors and gradients after a step on micro-batches of these sizes, from the same weights."""
    torch.manual_seed(1)
    model = Net()
    kfac = preconditioner(model, **options)
    for inputs, targets in zip(x.split(sizes), y.split(sizes), strict=True):
        loss_of(model(inputs), targets).backward()
    kfac.step()
    return kfac, [parameter.grad for parameter in model.parameters()]


@approximations
@pytest.mark.parametrize(
    ("sizes", "reduction"), [([4] * 3, "mean"), ([4] * 3, "sum"), ([7, 1, 4], "sum")]
)
def test_accumulated_micro_batches_equal_one_batch(
    sizes: list[int], reduction: str, approx: str
) -> None:
    x, y = images(12), torch.randint(3, (12,))
    options = {"approx": approx, "loss_reduction": reduction}

    def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction=reduction)

    whole, whole_grads = run_batches(x, y, [12], loss_of, **options)
    if reduction == "mean":
        parts, grads = run_batches(
            x, y, sizes, lambda f, t: loss_of(f, t) / 3, accumulation_steps=3, **options
        )
    else:
        parts, grads = run_batches(x, y, sizes, loss_of, **options)
    assert_covariances(parts, covariances(whole))
    for grad, expected in zip(grads, whole_grads, strict=True):
        assert_solved(grad, expected)


def test_means_over_unequal_micro_batches_still_have_one_batchs_factors() -> None:
    x, y = images(12), torch.randint(3, (12,))
    whole, _ = run_batches(x, y, [12], F.cross_entropy)
    parts, _ = run_batches(
        x, y, [7, 1, 4], lambda f, t: F.cross_entropy(f, t) / 3, accumulation_steps=3
    )
    assert_covariances(parts, covariances(whole))


def test_a_divided_sum_is_scaled_back_by_the_accumulation_steps() -> None:
    x, y = images(12), torch.randint(3, (12,))
    options = {"loss_reduction": "sum"}

    def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")

    whole, _ = run_batches(x, y, [12], loss_of, **options)
    parts, _ = run_batches(
        x, y, [7, 1, 4], lambda f, t: loss_of(f, t) / 3, accumulation_steps=3, **options
    )
    assert_covariances(parts, covariances(whole))


@approximations
@reductions
def test_copies_of_the_examples_change_a_sums_gradient_covariance_only(
    reduction: str, approx: str
) -> None:
    x, y = images(), torch.randint(3, (5,))
    options = {"approx": approx, "loss_reduction": reduction}

    def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction=reduction)

    once, _ = run_batches(x, y, [5], loss_of, **options)
    thrice, _ = run_batches(x.repeat(3, 1, 1, 1), y.repeat(3), [15], loss_of, **options)
    scale = 1 if reduction == "mean" else 3
    assert_covariances(thrice, {name: (a, scale * g) for name, (a, g) in covariances(once).items()})


class Twice(nn.Module):
    """One layer called twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


@approximations
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_two_calls_in_one_pass_are_one_step_of_the_running_average(
    fisher: str, approx: str
) -> None:
    """Inputs average over both calls; the loss's terms count once."""
    model, x = Twice(), torch.randn(5, 4, 3, dtype=torch.float64)
    twin, y = copy.deepcopy(model), torch.randn(5, 4, 3, dtype=torch.float64)
    options = {"approx": approx, "fisher": fisher, "loss_terms_per_example": 12}
    kfac = preconditioner(model, factor_decay=0.9, **options)

    def loss_of() -> Tensor:
        outputs = twin(x)
        if fisher == "empirical":
            return F.mse_loss(outputs, y)
        torch.manual_seed(3)
        return MSE().sample(outputs, None, None) / 60

    expected = plain_covariances(twin, loss_of, approx, 60, "mean")
    for _ in range(2):
        outputs = model(x)
        if fisher == "mc":
            torch.manual_seed(3)
            kfac.update_curvature(outputs, loss="mse")
        F.mse_loss(outputs, y).backward()
        kfac.step()
    assert_covariances(kfac, expected)
    assert float(kfac._blocks[0].factors[0].weight) == pytest.approx(1 - 0.9**2, rel=1e-14)


def test_a_single_linear_layer_is_a_model() -> None:
    model, x = nn.Linear(3, 2, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    expected = plain_covariances(model, lambda: model(x).square().sum(), "expand", 5, "sum")
    kfac = preconditioner(model, loss_reduction="sum")
    model(x).square().sum().backward()
    grads = expected_grads(model, expected, DAMPING)
    kfac.step()
    assert_grads(model, expected, grads)
    assert "(model): Linear  input [4, 4]  gradient [2, 2]" in kfac.summary()
    assert list(kfac.state_dict()["layers"]) == [""]


def test_a_frozen_bias_keeps_no_gradient_and_no_row() -> None:
    model, x = Net(), images()
    model.grouped.bias.requires_grad_(False)
    y = torch.randint(3, (5,))
    expected = plain_covariances(model, lambda: F.cross_entropy(model(x), y), "expand", 5, "mean")
    kfac = preconditioner(model)
    F.cross_entropy(model(x), y).backward()
    grads = expected_grads(model, expected, DAMPING)
    kfac.step()
    assert_grads(model, expected, grads)
    assert model.grouped.bias.grad is None
    assert covariances(kfac)["grouped"][0].shape == (2, 9, 9)


def clipped_and_free(kl_clip: float, learning_rate: float) -> tuple[Net, Net, float]:
    """Twin networks after a step with and without clipping, and the raw gradient times the step."""
    models = []
    for options in ({}, {"kl_clip": kl_clip, "learning_rate": learning_rate}):
        torch.manual_seed(0)
        model = Net()
        kfac = preconditioner(model, **options)
        F.cross_entropy(model(images()), torch.tensor([0, 1, 2, 0, 1])).backward()
        raw = [parameter.grad.clone() for parameter in model.parameters()]
        kfac.step()
        models.append(model)
    free = [parameter.grad for parameter in models[0].parameters()]
    inner = sum(float((v * p).sum()) for v, p in zip(raw, free, strict=True))
    return models[0], models[1], inner


def test_the_kl_clip_scales_all_layers_by_its_formula() -> None:
    free, clipped, inner = clipped_and_free(1e-3, 0.3)
    nu = math.sqrt(1e-3 / (0.3**2 * inner))
    assert nu < 0.9
    for out, expected in zip(clipped.parameters(), free.parameters(), strict=True):
        assert_solved(out.grad, nu * expected.grad)


def test_a_short_step_is_not_clipped() -> None:
    free, clipped, inner = clipped_and_free(1.0, 1e-4)
    assert 1.0 / (1e-4**2 * inner) > 1
    for out, expected in zip(clipped.parameters(), free.parameters(), strict=True):
        assert torch.equal(out.grad, expected.grad)


@pytest.mark.parametrize(
    "options",
    [{"kl_clip": 1e-3, "learning_rate": 0.1}, {"grafting": "adam"}],
    ids=["clip", "graft"],
)
def test_a_zero_gradient_has_a_zero_step(options: dict[str, Any]) -> None:
    model = nn.Linear(3, 2)
    kfac = preconditioner(model, **options)
    (0 * model(torch.randn(5, 3))).sum().backward()
    kfac.step()
    assert torch.equal(model.weight.grad, torch.zeros(2, 3))


def test_grafting_keeps_the_direction_and_takes_adams_length() -> None:
    free, grafted = Net(), Net()
    grafted.load_state_dict(free.state_dict())
    preconditioners = preconditioner(free), preconditioner(grafted, grafting="adam")
    adams: dict[str, torch.optim.Adam] = {}
    for _ in range(3):
        x, y = images(), torch.randint(3, (5,))
        for model in (free, grafted):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
        raw = {name: grad_matrices(free.get_submodule(name)) for name in LAYER_NAMES}
        for kfac in preconditioners:
            kfac.step()
        for name, matrix in raw.items():
            if name not in adams:
                start = nn.Parameter(torch.zeros_like(matrix))
                adams[name] = torch.optim.Adam([start], lr=1.0, betas=(0.0, 0.999))
            direction = grad_matrices(free.get_submodule(name))
            unit = direction / torch.linalg.vector_norm(direction)
            expected = adam_length(adams[name], matrix) * unit
            assert_solved(grad_matrices(grafted.get_submodule(name)), expected)


def adam_length(adam: torch.optim.Adam, gradient: Tensor) -> Tensor:
    (parameter,) = adam.param_groups[0]["params"]
    before = parameter.detach().clone()
    parameter.grad = gradient
    adam.step()
    return torch.linalg.vector_norm(parameter.detach() - before)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_bfloat16_layers_have_float32_factors_and_bfloat16_gradients(approx: str) -> None:
    model, x, y = Net().bfloat16(), images().bfloat16(), torch.randint(3, (5,))
    kfac = preconditioner(model, approx=approx, damping=1.0)
    F.cross_entropy(model(x).float(), y).backward()
    raw = {name: grad_matrices(model.get_submodule(name)).double() for name in LAYER_NAMES}
    kfac.step()
    for block in kfac._blocks:
        pair = block.factors
        tensors = [t for f in pair for t in (f.mean, f.weight)]
        tensors += [inverse.matrix for inverse in block.inverses]
        assert {t.dtype for t in tensors} == {torch.float32}
        a, g = (f.mean.double().reshape(-1, *f.mean.shape[-2:]) for f in pair)
        expected = solve(raw[block.layer.name], damp((a, g), 1.0))
        out = grad_matrices(block.layer.module)
        assert out.dtype == torch.bfloat16
        # The gradient is rounded once, on the way back.
        error = torch.linalg.vector_norm(out - expected)
        assert error <= torch.finfo(torch.bfloat16).eps * torch.linalg.vector_norm(expected)


@approximations
def test_factors_under_autocast_are_sums_in_float32(approx: str) -> None:
    """The covariances are those of the bfloat16 activations, not themselves rounded to bfloat16."""
    model, x, y = Net().float(), images().float(), torch.randint(3, (5,))
    twin = copy.deepcopy(model)
    kfac = preconditioner(model, approx=approx)
    with torch.autocast("cpu", torch.bfloat16):
        calls = record(twin, lambda: F.cross_entropy(twin(x).float(), y))
        F.cross_entropy(model(x).float(), y).backward()
    kfac.step()
    for name, of in calls.items():
        double = [Call(call.rows.double(), 5.0 * call.gradients.double()) for call in of]
        for out, expected in zip(covariances(kfac)[name], factors(double, approx, 5), strict=True):
            assert out.dtype == torch.float32
            error = torch.linalg.vector_norm(out - expected)
            assert error <= 1e-6 * torch.linalg.vector_norm(expected)


@approximations
@pytest.mark.parametrize("mode", ["factored", "corrected"])
def test_the_memorys_order_changes_nothing(mode: str, approx: str) -> None:
    """A network, its images and its gradients with the channels last; the steps of an optimizer."""
    exact = {"damping_mode": "exact", "eigenvalue_correction": True, "inverse_update_steps": 2}
    results = []
    for order in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        model = Net().to(memory_format=order)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kfac = preconditioner(model, approx=approx, **(exact if mode == "corrected" else {}))
        kfac.attach(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            x = images(64).to(memory_format=order)  # so many that eigenvectors are unique
            F.cross_entropy(model(x), torch.randint(3, (64,))).backward()
            optimizer.step()
        assert model.grouped.weight.grad.is_contiguous(memory_format=order)
        results.append((kfac, model))
    (plain, expected), (kfac, model) = results
    assert_covariances(kfac, covariances(plain))
    for out, weight in zip(model.parameters(), expected.parameters(), strict=True):
        assert_solved(out.detach(), weight.detach())
        assert_solved(out.grad, weight.grad)


GEOMETRIES = st.fixed_dictionaries(
    {
        "kernel": st.integers(1, 3),
        "stride": st.integers(1, 3),
        "padding": st.integers(0, 2),
        "dilation": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "bias": st.booleans(),
    }
)


def layer_and_input(
    kind: type[nn.Module], geometry: dict[str, Any], examples: int, size: list[int]
) -> tuple[nn.Module, Tensor]:
    groups, bias = geometry["groups"], geometry["bias"]
    if kind is nn.Linear:
        layer = nn.Linear(geometry["kernel"], groups, bias=bias)
        shape = (*size[: geometry["stride"] - 1], geometry["kernel"])
    else:
        spacing = {name: geometry[name] for name in ("stride", "padding", "dilation")}
        layer = kind(groups, 2 * groups, geometry["kernel"], groups=groups, bias=bias, **spacing)
        shape = (groups, *size[: len(layer.kernel_size)])
    return layer.double(), torch.randn(examples, *shape, dtype=torch.float64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(LAYERS),
    geometry=GEOMETRIES,
    examples=st.integers(1, 4),
    size=st.lists(st.integers(5, 7), min_size=3, max_size=3),
    approx=st.sampled_from(["expand", "reduce"]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_any_layers_step_equals_the_formula(
    kind: type[nn.Module],
    geometry: dict[str, Any],
    examples: int,
    size: list[int],
    approx: str,
    reduction: str,
) -> None:
    """However a weight is laid out, its step moves the outputs as ``G^-1 V A^-1`` moves rows."""
    torch.manual_seed(0)
    layer, x = layer_and_input(kind, geometry, examples, size)

    def loss_of() -> Tensor:
        outputs = layer(x).sin().flatten(1).sum(1)
        return outputs.mean() if reduction == "mean" else outputs.sum()

    expected = plain_covariances(layer, loss_of, approx, examples, reduction)
    (call,) = record(layer, loss_of)[""]
    v = torch.einsum("nsgo,nsgi->goi", call.gradients, call.rows)
    damped = damp(expected[""], DAMPING)
    step = solve(v, damped)
    with preconditioner(layer, approx=approx, loss_reduction=reduction) as kfac:
        loss_of().backward()
        kfac.step()
    assert_covariances(kfac, expected)
    layer.load_state_dict({name: p.grad for name, p in layer.named_parameters()})
    moved = output_rows(layer, layer(x).detach())
    expected_move = torch.einsum("nsgi,goi->nsgo", call.rows, step)
    assert_solved(moved, expected_move, condition(damped))
