"""Biases whose weights are frozen: their blocks, against dense ones and those of whole layers.

Also the shifts of normalisations whose scales are.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import DAMPING, Net, classes, images, preconditioner, train_step
from oracle import assert_same
from plain_kfac import covariances
from settings import APPROXIMATIONS, Attends, expand_setting, kronecker_block, reduce_setting
from torch import Tensor, nn

from kfac_fast import KFAC, Decomposition

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("default:The .grad attribute"),
]
approximations = pytest.mark.parametrize("approx", APPROXIMATIONS)

# A module, the shape of its input, and its features.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "rows": (lambda: nn.Linear(3, 4), (5, 3), 4),
    "sequence": (lambda: nn.Linear(3, 4), (5, 4, 3), 4),
    "grid": (lambda: nn.Linear(3, 4), (5, 2, 3, 3), 4),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (3, 2, 5, 4), 4),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 4, 5), 6),
    "depthwise": (lambda: nn.Conv1d(3, 3, 2, groups=3), (3, 3, 5), 3),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, (2, 3), stride=2, groups=2), (2, 4, 2, 3), 4),
}
layers = pytest.mark.parametrize("name", LAYERS)


def unscaled() -> nn.Module:
    """A normalisation that shifts only."""
    norm = nn.LayerNorm(3)
    norm.weight = None
    return norm


# A normalisation and the shape of its input.
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(3), (4, 3)),
    "layer-shared": (lambda: nn.LayerNorm(3), (4, 2, 5, 3)),
    "layer-grid": (lambda: nn.LayerNorm((2, 3)), (4, 5, 2, 3)),
    "layer-unscaled": (unscaled, (4, 5, 3)),
    "group": (lambda: nn.GroupNorm(2, 6), (4, 6, 3, 2)),
    "batch1d": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (4, 3)),
    "batch1d-shared": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (4, 3, 5)),
    "batch2d": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 5)),
    "batch-evaluated": (lambda: nn.BatchNorm2d(3).eval(), (4, 3, 2, 5)),
    "single-unit": (lambda: nn.GroupNorm(1, 1), (4, 1, 7)),
}
norms = pytest.mark.parametrize("name", NORMS)
KINDS = nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d
# Of which the examples of a batch have nothing to do with each other.
APART = [name for name in NORMS if name == "batch-evaluated" or not name.startswith("batch")]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def frozen(layer: nn.Module) -> nn.Module:
    """In float64, with its bias alone to be trained."""
    layer.double().requires_grad_(False)
    layer.bias.requires_grad_(True)
    return layer


def made(name: str) -> tuple[nn.Module, Tensor, int]:
    make, shape, features = LAYERS[name]
    return frozen(make()), torch.randn(shape, dtype=torch.float64), features


def made_norm(name: str) -> tuple[nn.Module, Tensor]:
    """Anywhere but where it begins."""
    make, shape = NORMS[name]
    norm = frozen(make())
    for parameter in norm.parameters():
        parameter.data.uniform_(0.5, 2)
    return norm, torch.randn(shape, dtype=torch.float64)


def gauss_newton(model: nn.Sequential, x: Tensor, hessian: Tensor) -> Tensor:
    """``J^T H J`` of the first module's bias, given the loss's Hessian in the flat outputs."""

    def outputs(bias: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"0.bias": bias}, x).flatten()

    j = torch.func.jacrev(outputs)(model[0].bias.detach()).flatten(1)
    return j.mT @ hessian @ j


def squared_error(f: Tensor) -> Tensor:
    """Hessian of its mean."""
    return 2 / f.numel() * torch.eye(f.numel(), dtype=torch.float64)


def cross_entropy(f: Tensor) -> Tensor:
    """Hessian of its mean over examples; no label enters."""
    p = f.softmax(1)
    return torch.block_diag(*(torch.diag(row) - row.outer(row) for row in p)) / len(p)


def assert_solves(model: nn.Sequential, x: Tensor, approx: Any, loss: str) -> None:
    """Check the block, and the step that comes of it, against the dense block of each group."""
    f = model(x).detach()
    if loss == "mse":
        y, hessian = torch.randn_like(f), squared_error(f)
    else:
        y, hessian = classes(f), cross_entropy(f)
    kfac = preconditioner(model, approx=approx, fisher="exact", damping_mode="exact")
    outputs = model(x)
    kfac.update_curvature(outputs, loss=loss)
    (F.mse_loss if loss == "mse" else F.cross_entropy)(outputs, y).backward()
    bias = model[0].bias
    groups = bias.numel() if isinstance(model[0], KINDS) else getattr(model[0], "groups", 1)
    before = bias.grad.clone()
    kfac.step()
    kfac.detach()
    exact = gauss_newton(model, x, hessian)
    size = len(exact) // groups
    expected = torch.stack([exact[i : i + size, i : i + size] for i in range(0, len(exact), size)])
    torch.testing.assert_close(kronecker_block(kfac._blocks[0]), expected, rtol=1e-11, atol=1e-14)
    damped = expected + DAMPING * torch.eye(size, dtype=torch.float64)
    step = torch.linalg.solve(damped, before.reshape(groups, size, 1)).flatten()
    torch.testing.assert_close(bias.grad.flatten(), step, rtol=1e-9, atol=1e-12)


@layers
def test_expand_is_exact_in_its_setting(name: str) -> None:
    layer, x, features = made(name)
    assert_solves(expand_setting(layer, x, features).model, x, "expand", "mse")


@layers
def test_reduce_is_exact_in_its_setting(name: str) -> None:
    layer, x, features = made(name)
    assert_solves(reduce_setting(layer, x, features).model, x, "reduce", "mse")


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@layers
def test_reduce_is_exact_for_any_network_and_loss(name: str, loss: str) -> None:
    layer, x, _ = made(name)
    width = layer(x).flatten(1).shape[1]
    head = nn.Linear(5, 3).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 5).double(), nn.GELU())
    assert_solves(model.append(head), x, "reduce", loss)


def test_expand_is_exact_for_any_network_without_positions() -> None:
    layer, x, _ = made("rows")
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3).double())
    assert_solves(model, x, "expand", "cross_entropy")


@approximations
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@norms
def test_a_shifts_blocks_are_exact_for_any_network_and_loss(
    name: str, loss: str, approx: str
) -> None:
    norm, x = made_norm(name)
    tail = [nn.Linear(x[0].numel(), 5), nn.GELU(), nn.Linear(5, 3)]
    model = nn.Sequential(norm, nn.Tanh(), nn.Flatten(), *tail).double()
    assert_solves(model, x, approx, loss)


class Rows(nn.Module):
    """Maps of each row alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


SHARING: dict[str, dict[str, Any]] = {
    "none": {},
    "mask": {"mask": torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()},
    "graphs": {"segments": torch.tensor([0, 0, 2, 2, 2, 3]), "num_segments": 5},
    "masked-graphs": {
        "mask": torch.tensor([1, 0, 1, 1, 0, 0]).bool(),
        "segments": torch.tensor([0, 0, 2, 2, 2, 3]),
        "num_segments": 5,
    },
}


def twins(model: nn.Module, biases: set[str]) -> tuple[nn.Module, nn.Module]:
    """The model and a copy of which only these biases are trained."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for name in biases:
        twin.get_parameter(name).requires_grad_(True)
    return model, twin


def assert_corners(alone: KFAC, whole: KFAC, names: set[str]) -> None:
    """Check that the factors are those of the layers with both: all of G, the last entry of A."""
    expected = covariances(whole)
    assert covariances(alone).keys() == names
    for name, (corner, gradients) in covariances(alone).items():
        assert_same(corner, expected[name][0][..., -1:, -1:])
        assert_same(gradients, expected[name][1])


@approximations
@pytest.mark.parametrize("sharing", SHARING)
def test_factors_are_a_part_of_the_whole_layers_whatever_rows_count(
    sharing: str, approx: str
) -> None:
    shape = (3, 4, 3) if sharing in ("none", "mask") else (6, 3)
    x, kfacs = torch.randn(shape, dtype=torch.float64), []
    for model in twins(Rows(), {"first.bias", "last.bias"}):
        kfac = preconditioner(model, approx=approx)
        for _ in range(2):
            if SHARING[sharing]:
                kfac.share_rows("", **SHARING[sharing])
            model(x).square().mean().backward()
            kfac.step()
        kfacs.append(kfac)
    assert_corners(kfacs[1], kfacs[0], {"first", "last"})


@approximations
@pytest.mark.parametrize("fisher", ["empirical", "exact", "forward-only"])
@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_factors_are_a_part_of_the_whole_layers_under_each_fisher(
    run: str, fisher: str, approx: str
) -> None:
    x, kfacs = images(), []
    y = torch.randint(3, (5,))
    for model in twins(Net(), {"grouped.bias", "shared.bias", "head.bias"}):
        kfac = preconditioner(model, fisher=fisher, approx=approx)
        called = torch.compile(model, backend="aot_eager") if run == "compiled" else model
        with torch._functorch.config.patch(donated_buffer=False):
            train_step(called, kfac, x, y)
        kfacs.append(kfac)
        torch.compiler.reset()
    assert_corners(kfacs[1], kfacs[0], {"grouped", "shared", "head"})


class Normalised(nn.Module):
    """Normalisations of rows and of channels, without and with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.channels = nn.LayerNorm(3), nn.GroupNorm(2, 4)
        self.between, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.features(x))
        return self.head(self.channels(x.movedim(-1, 1)).movedim(1, -1).tanh())


def assert_corner(alone: KFAC, whole: KFAC, entry: int) -> None:
    """Check that a normalisation's one factor is an entry of that of the whole."""
    expected = covariances(whole)
    assert covariances(alone).keys() == {"features", "channels"}
    for name, (joint,) in covariances(alone).items():
        own = expected[name][0][..., [entry], :][..., [entry]]
        torch.testing.assert_close(joint, own, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("part", "entry"), [("weight", 0), ("bias", 1)])
@pytest.mark.parametrize("sharing", SHARING)
def test_the_trained_part_of_a_norm_is_a_part_of_the_whole_whatever_rows_count(
    sharing: str, part: str, entry: int
) -> None:
    shape = (3, 4, 3) if sharing in ("none", "mask") else (6, 3)
    x, kfacs = torch.randn(shape, dtype=torch.float64), []
    for model in twins(Normalised(), {f"features.{part}", f"channels.{part}"}):
        kfac = preconditioner(model)
        for _ in range(2):
            if SHARING[sharing]:
                kfac.share_rows("features|channels", **SHARING[sharing])
            model(x).square().mean().backward()
            kfac.step()
        kfacs.append(kfac)
    assert_corner(kfacs[1], kfacs[0], entry)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_a_shifts_factor_is_a_part_of_the_whole_norms_under_each_fisher(
    run: str, fisher: str
) -> None:
    x, y, kfacs = torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,)), []
    for model in twins(Normalised(), {"features.bias", "channels.bias"}):
        kfac = preconditioner(model, fisher=fisher)
        called = torch.compile(model, backend="aot_eager") if run == "compiled" else model
        with torch._functorch.config.patch(donated_buffer=False):
            train_step(called, kfac, x, y)
        kfacs.append(kfac)
        torch.compiler.reset()
    assert_corner(kfacs[1], kfacs[0], 1)


def test_a_half_precision_shifts_sums_are_formed_in_float32() -> None:
    norm, x = made_norm("layer-shared")
    model, results = nn.Sequential(norm, nn.Flatten()), []
    weights = torch.randn(4, 30).bfloat16()
    for dtype in (torch.float64, torch.bfloat16):
        kfac = preconditioner(model.to(dtype), loss_reduction="sum")
        (model(x.to(dtype)) * weights.to(dtype)).sum().backward()
        kfac.step()
        results.append(kfac._blocks[0].factors[0].mean)
    exact, result = results
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=0)


def test_a_shifts_curvature_is_diagonal() -> None:
    norm, x = made_norm("layer-grid")
    kfac = preconditioner(norm, loss_reduction="sum")
    weights = torch.randn_like(x)
    (norm(x) * weights).sum().backward()
    kfac.step()
    diagonal = weights.sum(1).square().sum(0)
    curvature, vector = Decomposition(kfac), torch.randn(2, 3, dtype=torch.float64)
    values = curvature.eigenvalues()[""]
    torch.testing.assert_close(values.reshape(2, 3), diagonal, rtol=1e-13, atol=0)
    (product,) = curvature.multiply({norm.bias: vector}, -0.5, 0.1).values()
    torch.testing.assert_close(product, vector / (diagonal + 0.1).sqrt(), rtol=1e-13, atol=0)
    (numbers,) = kfac.condition_numbers()[""]
    assert torch.equal(numbers, torch.ones(6, dtype=torch.float64))
    assert "(model): LayerNorm, bias alone  joint [6, 1, 1]" in kfac.summary()


@approximations
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("frozen_weight", ["in_proj_weight", "out_proj.weight", "both"])
def test_factors_of_attentions_biases_are_a_part_of_the_projections(
    frozen_weight: str, masked: bool, approx: str
) -> None:
    model, x = Attends(), torch.randn(3, 5, 4, dtype=torch.float64)
    twin, kfacs = copy.deepcopy(model), []
    for name in ("in_proj_weight", "out_proj.weight"):
        twin.attention.get_parameter(name).requires_grad_(frozen_weight not in (name, "both"))
    for each in (model, twin):
        kfac = preconditioner(each, approx=approx)
        if masked:
            kfac.share_rows("proj", mask=torch.arange(15).reshape(3, 5) % 4 > 0)
        each(x).square().mean().backward()
        kfac.step()
        kfacs.append(covariances(kfac))
    whole, alone = kfacs
    assert whole.keys() == alone.keys()
    projections = {"in_proj_weight": "qkv", "out_proj.weight": ["out"], "both": [*"qkv", "out"]}
    for name in whole:
        is_alone = name in [f"attention.{letter}_proj" for letter in projections[frozen_weight]]
        inputs = whole[name][0][..., -1:, -1:] if is_alone else whole[name][0]
        for factor, expected in zip(alone[name], (inputs, whole[name][1]), strict=True):
            torch.testing.assert_close(factor, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", [*LAYERS, *APART])
def test_corrected_eigenvalues_are_those_of_each_examples_gradient(name: str) -> None:
    layer, x = made(name)[:2] if name in LAYERS else made_norm(name)
    x = torch.cat([x, torch.randn_like(x)])
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten())
    options = {"damping_mode": "exact", "eigenvalue_correction": True, "inverse_update_steps": 9}
    kfac = preconditioner(model, loss_reduction="sum", **options)
    for _ in range(2):  # corrected from the second on
        model(x).pow(3).sum().backward()
        kfac.step()
    (block,) = kfac._blocks
    left = block.bases[-1].vectors
    expected = torch.zeros_like(block.correction.mean)
    for example in x:
        (gradient,) = torch.autograd.grad(model(example[None]).pow(3).sum(), layer.bias)
        expected += (left.mT @ gradient.reshape(expected.shape)).square()
    torch.testing.assert_close(block.correction.mean, expected, rtol=1e-11, atol=1e-14)


def bent() -> nn.Sequential:
    """Nothing but the bias' layer would keep what comes out of the activation."""
    return nn.Sequential(frozen(nn.Linear(3, 4)), nn.GELU(), frozen(nn.Linear(4, 2)))


def test_the_input_of_a_frozen_weight_is_let_go_of() -> None:
    model, inputs = bent(), []
    model[2].register_forward_pre_hook(
        lambda module, x: inputs.append(weakref.ref(x[0].untyped_storage()))
    )
    kfac = preconditioner(model, damping_mode="exact", eigenvalue_correction=True)
    for _ in range(2):  # corrected from the second on
        outputs = model(torch.randn(5, 3, dtype=torch.float64))
        outputs.square().mean().backward()
        kfac.step()
        outputs = model(torch.randn(5, 3, dtype=torch.float64))
        assert outputs.requires_grad and inputs[-1]() is None


def test_a_compiled_graph_saves_no_input_of_a_frozen_weight() -> None:
    model, saved = bent(), []
    kfac, x = preconditioner(model), torch.randn(5, 3, dtype=torch.float64)
    inner = model[:2](x).detach()
    called = torch.compile(model, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        outputs = called(x)
    outputs.square().mean().backward()
    assert all(block.pending for block in kfac._blocks) and saved
    assert not any(
        t.shape == own.shape and torch.equal(t, own) for t in saved for own in (x, inner)
    )
    torch.compiler.reset()


def test_a_bias_that_is_frozen_later_is_left_alone() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    model[0].weight.requires_grad_(False)
    kfac = preconditioner(model)
    model[0].bias.requires_grad_(False)
    model(x).square().mean().backward()
    kfac.step()
    assert list(covariances(kfac)) == ["1"] and model[0].bias.grad is None
    assert (
        "0: Linear, bias alone  no factors yet  left alone since, its bias is frozen"
        in kfac.summary()
    )
    model[0].bias.requires_grad_(True)
    model(x).square().mean().backward()
    kfac.step()
    assert list(covariances(kfac)) == ["0", "1"]


def test_a_weight_that_is_trained_later_keeps_its_gradient() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    model[0].weight.requires_grad_(False)
    kfac = preconditioner(model)
    model[0].weight.requires_grad_(True)
    model(x).square().mean().backward()
    raw = [parameter.grad.clone() for parameter in model[0].parameters()]
    kfac.step()
    assert torch.equal(model[0].weight.grad, raw[0])
    assert not torch.equal(model[0].bias.grad, raw[1])


def test_only_passes_that_add_to_the_bias_count() -> None:
    model = frozen(nn.Linear(3, 2))
    kfac, x = preconditioner(model), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(model(x).square().sum(), x)
    model(x).square().sum().backward(inputs=[x])
    assert not kfac._blocks[0].pending
    model(x).square().sum().backward()
    assert kfac._blocks[0].pending


def biases_only() -> nn.Sequential:
    convolution, head = frozen(nn.Conv2d(2, 4, 3, groups=2)), frozen(nn.Linear(64, 3))
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), head)


def test_an_attached_step_solves_for_the_damped_factors() -> None:
    model, x = biases_only(), images()
    y, biases = torch.randint(3, (5,)), [model[0].bias, model[3].bias]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    kfac = preconditioner(model)
    kfac.attach(optimizer)
    before = [bias.detach().clone() for bias in biases]
    weights = [model[0].weight.clone(), model[3].weight.clone()]
    F.cross_entropy(model(x), y).backward()
    raw = [bias.grad.clone() for bias in biases]
    optimizer.step()
    for block, bias, old, gradient in zip(kfac._blocks, biases, before, raw, strict=True):
        a, g = (factor.mean.reshape(-1, *factor.mean.shape[-2:]) for factor in block.factors)
        assert torch.equal(a, torch.ones_like(a))
        size = g.shape[-1]
        # Factored damping: pi^2 is the ratio of the mean eigenvalues of A, which is 1, and G.
        pi = (a.mean((1, 2)) / g.diagonal(dim1=1, dim2=2).mean(1)).sqrt()[:, None, None]
        damped = g + DAMPING**0.5 / pi * torch.eye(size, dtype=torch.float64)
        step = torch.linalg.solve(damped, gradient.reshape(-1, size, 1)) / (1 + DAMPING**0.5 * pi)
        torch.testing.assert_close(bias.detach(), old - 0.1 * step.flatten(), rtol=1e-10, atol=0)
    assert torch.equal(model[0].weight, weights[0]) and torch.equal(model[3].weight, weights[1])


@pytest.mark.parametrize(
    "options",
    [{}, {"damping_mode": "exact", "eigenvalue_correction": True}, {"grafting": "adam"}],
    ids=["factored", "corrected", "grafted"],
)
def test_a_resumed_run_continues_bit_for_bit(options: dict[str, Any]) -> None:
    model, x, y = biases_only(), images(), torch.randint(3, (5,))
    model.insert(1, frozen(nn.GroupNorm(2, 4)))
    kfac = preconditioner(model, **options)
    for _ in range(2):
        train_step(model, kfac, x, y)
    twin = copy.deepcopy(model)
    other = preconditioner(twin, **options)
    state = kfac.state_dict()
    assert state["layers"]["0"]["input"]["mean"].shape == (2, 1, 1)
    assert state["layers"]["1"]["joint"]["mean"].shape == (4, 1, 1)
    other.load_state_dict(state)
    for each, own in ((model, kfac), (twin, other)):
        train_step(each, own, x, y)
    for index in (0, 1, 4):
        assert torch.equal(model[index].bias.grad, twin[index].bias.grad)
    whole = preconditioner(copy.deepcopy(model).requires_grad_(True), **options)
    with pytest.raises(ValueError, match="must have shape|must hold"):
        whole.load_state_dict(state)
