"""Normalisations: each unit's block against autograd and the exact Gauss-Newton block."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from nets import DAMPING, preconditioner
from oracle import assert_same
from plain_kfac import assert_solved, example_gradients
from torch import Tensor, nn

from kfac_fast.layers import RULES, Layer, Sharing

pytestmark = pytest.mark.usefixtures("one_thread")
approximations = pytest.mark.parametrize("approx", ["expand", "reduce"])

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(3), (4, 3)),
    "layer-shared": (lambda: nn.LayerNorm(3), (4, 2, 5, 3)),
    "layer-grid": (lambda: nn.LayerNorm((2, 3)), (4, 5, 2, 3)),
    "layer-no-bias": (lambda: nn.LayerNorm(3, bias=False), (4, 5, 3)),
    "rms": (lambda: nn.RMSNorm(3, eps=1e-3), (4, 5, 3)),
    "group": (lambda: nn.GroupNorm(2, 6), (4, 6, 3, 2)),
    "group-one-example": (lambda: nn.GroupNorm(1, 5), (1, 5)),
    "batch1d": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "batch1d-shared": (lambda: nn.BatchNorm1d(3), (4, 3, 5)),
    "batch2d": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 5)),
    "batch3d": (lambda: nn.BatchNorm3d(2), (4, 2, 2, 3, 2)),
    "batch-evaluated": (lambda: nn.BatchNorm2d(3).eval(), (4, 3, 2, 5)),
    "batch-untracked": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 5)),
    "single-unit": (lambda: nn.GroupNorm(1, 1), (4, 1, 7)),
}
norms = pytest.mark.parametrize("name", NORMS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def norm_and_input(name: str, approx: str = "expand") -> tuple[Layer, Tensor]:
    """A layer with weights and statistics of its own, and an input for it."""
    make, shape = NORMS[name]
    module = make().double()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    return RULES[type(module)]("norm", module, approx), torch.randn(shape, dtype=torch.float64)


@approximations
@norms
def test_a_units_block_is_of_its_examples_gradients(name: str, approx: str) -> None:
    layer, x = norm_and_input(name, approx)
    gradient = torch.randn_like(x)
    v = example_gradients(layer, x, gradient)
    result = layer.gradient_gram(gradient, 0.5, x)
    assert result.shape == layer.factor_shapes()["joint"]
    assert_same(result, 0.5 * (v.mT @ v).sum(0))
    assert layer.input_gram(x, x) is None and layer.examples(x) == len(x)


@pytest.mark.parametrize("name", ["batch2d", "group"])
def test_inputs_far_from_zero_cost_no_more_digits_than_the_forward_pass(name: str) -> None:
    squares = []
    for _ in range(16):  # by chance, one draw comes out better or worse
        layer, x = norm_and_input(name)
        x = x.float() + 1000
        gradient = torch.randn_like(x)
        exact = layer.gradient_gram(gradient.double(), 1.0, x.double())
        module = layer.module.float()
        z = (module(x) - module.bias[:, None, None]) / module.weight[:, None, None]
        v = torch.stack([(gradient * z).sum((2, 3)), gradient.sum((2, 3))], -1).detach()
        plain = torch.einsum("nci,ncj->cij", v, v)
        differences = layer.gradient_gram(gradient, 1.0, x) - exact, plain - exact, exact
        squares.append([float(difference.square().sum()) for difference in differences])
    error, allowed, size = torch.tensor(squares).mean(0).sqrt()
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * size


@norms
def test_squared_gradients_are_those_of_autograd(name: str) -> None:
    layer, x = norm_and_input(name)
    gradient = torch.randn_like(x)
    v = example_gradients(layer, x, gradient)
    right = torch.linalg.qr(torch.randn(layer.factor_shapes()["joint"]).double())[0]
    result = layer.squared_gradients(x, gradient, right, torch.ones(len(right), 1, 1).double(), 0.5)
    assert_same(result, 0.5 * (v @ right).square().sum(0))


@norms
def test_an_input_may_be_given_by_its_name(name: str) -> None:
    layer, x = norm_and_input(name)
    (argument,) = inspect.signature(layer.module.forward).parameters
    kfac = preconditioner(layer.module, loss_reduction="sum")
    layer.module(**{argument: x}).pow(3).sum().backward()
    output = layer.module(x).detach()
    kfac.step()
    assert_same(kfac._blocks[0].factors[0].mean, layer.gradient_gram(3 * output**2, 1.0, x))


@approximations
@pytest.mark.parametrize("name", [name for name in NORMS if not name.startswith("batch")])
def test_the_block_is_the_gauss_newton_block_in_any_network(name: str, approx: str) -> None:
    layer, x = norm_and_input(name, approx)
    model = nn.Sequential(layer.module, nn.Tanh(), nn.Flatten()).double()
    model.append(nn.Linear(x[0].numel(), 2).double())
    seen = model[0](x)
    outputs = model[1:](seen)
    block, exact = torch.zeros(2, *layer.factor_shapes()["joint"], dtype=torch.float64)
    for column in outputs.unbind(1):
        (gradient,) = torch.autograd.grad(2**0.5 * column.sum(), seen, retain_graph=True)
        block += layer.gradient_gram(gradient, 1.0, x)
        for output in column:
            layer.module.zero_grad()
            output.backward(retain_graph=True)
            row = layer.matrix(layer.gradients(), torch.float64)
            exact += 2 * row.mT @ row
    assert_same(block, exact)


@pytest.mark.parametrize("damping_mode", ["factored", "plain", "exact"])
@pytest.mark.parametrize("name", ["layer-shared", "batch2d", "rms"])
def test_a_step_solves_each_units_damped_block(name: str, damping_mode: str) -> None:
    layer, x = norm_and_input(name)
    weights = torch.randn_like(x)
    v = example_gradients(layer, x, weights)
    kfac = preconditioner(layer.module, damping_mode=damping_mode, loss_reduction="sum")
    layer.module.zero_grad()
    loss = (layer.module(x) * weights).sum()
    loss.backward()
    grad = layer.matrix(layer.gradients(), torch.float64).clone()
    kfac.step()
    damped = (v.mT @ v).sum(0) + DAMPING * torch.eye(v.shape[-1]).double()
    assert_solved(
        layer.matrix(layer.gradients(), torch.float64), torch.linalg.solve(damped, grad.mT).mT
    )


def test_half_precision_blocks_are_formed_in_float32() -> None:
    layer, x = norm_and_input("layer-shared")
    gradient = torch.randn_like(x)
    exact = layer.gradient_gram(gradient.bfloat16().double(), 1.0, x.bfloat16().double())
    module = layer.module.bfloat16()
    result = RULES[nn.LayerNorm]("norm", module, "expand").gradient_gram(
        gradient.bfloat16(), 1.0, x.bfloat16()
    )
    assert result.dtype == torch.float32
    # The normalised input is rounded to bfloat16 once.
    error = torch.linalg.matrix_norm(result.double() - exact)
    assert (error <= 4 * torch.finfo(torch.bfloat16).eps * torch.linalg.matrix_norm(exact)).all()


def test_rows_of_a_graphs_nodes_are_its_own() -> None:
    """Heads of nodes, as rows, are positions of the graph that the node belongs to."""
    norm = nn.LayerNorm(6).double()
    layer = RULES[nn.LayerNorm]("norm", norm, "reduce")
    x, gradient = torch.randn(2, 7, 3, 6, dtype=torch.float64)
    graphs = torch.tensor([0, 2, 0, 1, 2, 2, 0])
    mask = torch.rand(7, 3) < 0.8
    shared = layer.shared(Sharing(mask, graphs, 3))
    result = shared.gradient_gram(gradient, 1.0, x)
    alone = torch.zeros_like(result)
    for graph in range(3):
        own = [t[graphs == graph].flatten(0, 1)[None] for t in (x, gradient)]
        counts = mask[graphs == graph].flatten()[None]
        alone += layer.shared(Sharing(counts)).gradient_gram(own[1], 1.0, own[0])
    assert_same(result, alone)


SEGMENTS = torch.tensor([0, 2, 0, 1, 2, 2, 0])
CHANNELS = [
    name
    for name in NORMS
    if name.startswith(("batch", "group", "single")) and "example" not in name
]


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["rows", "graphs"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", CHANNELS)
def test_channels_of_shared_rows(name: str, masked: bool, segments: Tensor | None) -> None:
    """What the gradients of a graph's rows add up to; statistics are those of all rows."""
    layer, x = norm_and_input(name)
    x = torch.randn(7, *x.shape[1:], dtype=torch.float64)
    gradient = torch.randn_like(x)
    mask = torch.rand(len(x), *x.shape[2:]) < 0.6 if masked else None
    counted = gradient if mask is None else gradient * mask[:, None]
    v = example_gradients(layer, x, counted)
    if segments is not None:
        v = v.new_zeros(3, *v.shape[1:]).index_add(0, segments, v)
    shared = layer.shared(Sharing(mask, segments, None if segments is None else 3))
    result = shared.gradient_gram(gradient, 0.5, x)
    assert result.shape == layer.factor_shapes()["joint"]
    assert_same(result, 0.5 * (v.mT @ v).sum(0))


def test_half_precision_channels_of_shared_rows_are_formed_in_float32() -> None:
    layer, x = norm_and_input("batch1d")
    gradient, sharing = torch.randn_like(x), Sharing(None, torch.tensor([0, 1, 1, 0]), 2)
    exact = layer.shared(sharing).gradient_gram(
        gradient.bfloat16().double(), 1.0, x.bfloat16().double()
    )
    layer.module.bfloat16()
    result = layer.shared(sharing).gradient_gram(gradient.bfloat16(), 1.0, x.bfloat16())
    assert result.dtype == torch.float32
    error = torch.linalg.matrix_norm(result.double() - exact)
    bound = 64 * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(exact)
    assert (error <= bound).all()
