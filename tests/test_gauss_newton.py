"""Products with the Gauss-Newton matrix in forward mode, against the dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gauss_newton import flat, gauss_newton, normalised, random_direction
from loss_cases import LOSS_CASES, LossCase
from nets import Net, classes, images, preconditioner
from oracle import assert_same
from plain_kfac import assert_solved
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_fast.gauss_newton import root_product
from kfac_fast.losses import LOSSES, MSE, find_loss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What PyTorch's own compiler does, and hides outside of tests.
    pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning"),
]
LOSS_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
def test_a_product_has_the_length_that_the_dense_matrix_gives(name: str, reduction: str) -> None:
    model, x = Net(tokens=name == "cross_entropy"), images()
    outputs = model(x).detach()
    y = classes(outputs) if name == "cross_entropy" else torch.rand_like(outputs)
    dense = gauss_newton(model, x, lambda f: LOSS_FUNCTIONS[name](f, y, reduction=reduction))
    v, w = random_direction(model), random_direction(model)
    of = {"loss": LOSSES[name](), "reduction": reduction, "targets": y}
    moved, other = (root_product(model, lambda: model(x), u, **of) for u in (v, w))
    assert_solved((moved * other).sum()[None], (flat(v) @ dense @ flat(w))[None], 10)


@pytest.mark.parametrize("case", LOSS_CASES.values(), ids=LOSS_CASES)
def test_every_root_is_that_of_the_hessian(case: LossCase) -> None:
    model, x = nn.Linear(3, 8).double(), torch.randn(4, 3, dtype=torch.float64)

    def entries_of() -> Tensor:
        return model(x).exp().reshape(4, 4, 2)

    f, v = entries_of().detach(), random_direction(model)
    y = case.targets(f)
    loss = find_loss(case.module(reduction="sum"), "sum")
    product = root_product(
        model, lambda: case.outputs(entries_of()), v, loss=loss, reduction="sum", targets=y
    )
    change = (x @ v["weight"].T + v["bias"]).flatten() * f.flatten()
    expected = change @ case.hessian(f, y) @ change
    assert_solved(product.square().sum()[None], expected[None], 100)


class Saturating(MSE):
    """Squared errors, of which each counts the less the larger the output, as of a constant."""

    def root(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        with torch.no_grad():
            weight = 1 / (1 + outputs.square())
        return super().root(weight * outputs, targets)


def test_what_a_root_makes_without_gradients_is_constant() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    v = random_direction(model)
    of = {"loss": Saturating(), "reduction": "sum", "targets": None}
    product = root_product(model, lambda: model(x), v, **of)
    change = x @ v["weight"].T + v["bias"]
    assert_same(product, 2**0.5 * change / (1 + model(x).detach().square()))


def test_ignored_labels_count_neither_in_the_product_nor_in_the_mean() -> None:
    model, x, y = Net(tokens=True), images(), torch.randint(3, (5, 6))
    y[:2] = -100
    of = {"loss": LOSSES["cross_entropy"](), "reduction": "mean"}
    v = random_direction(model)
    out = root_product(model, lambda: model(x), v, targets=y, **of).square().sum()
    expected = root_product(model, lambda: model(x[2:]), v, targets=None, **of).square().sum()
    assert_same(out, expected)


def test_a_trained_variance_is_part_of_the_curvature() -> None:
    class Gaussian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.spread = (nn.Linear(3, 2, dtype=torch.float64) for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.mean(x), self.spread(x).exp()

    model, x = Gaussian(), torch.randn(4, 3, dtype=torch.float64)
    v = random_direction(model)
    product = root_product(
        model,
        lambda: model(x),
        v,
        loss=LOSSES["gaussian_nll"](),
        reduction="sum",
        targets=None,
    )
    variance = model(x)[1].detach()
    mean = x @ v["mean.weight"].T + v["mean.bias"]
    logarithm = x @ v["spread.weight"].T + v["spread.bias"]
    expected = (mean.square() / variance + logarithm.square() / 2).sum()
    assert_solved(product.square().sum()[None], expected.detach()[None], 10)


class Attention(nn.Module):
    """A transformer's layer with embedded tokens in front, whose weight the head shares."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x)).mean(1))


ARCHITECTURES = {
    "attention": (Attention, lambda: torch.randint(7, (4, 5))),
    "batch norm": (normalised, lambda: torch.randn(6, 2, 6, 6, dtype=torch.float64)),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.RMSNorm(18)
        ).double(),
        lambda: torch.randn(3, 2, 4, dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_kinds_of_layers_have_derivatives_in_forward_mode(name: str) -> None:
    make, inputs = ARCHITECTURES[name]
    model, x = make(), inputs()
    y = classes(model(x).detach())
    kept = [buffer.clone() for buffer in model.buffers()]
    v = random_direction(model)
    product = root_product(
        model,
        lambda: model(x),
        v,
        loss=LOSSES["cross_entropy"](),
        reduction="mean",
        targets=None,
    )
    assert all(map(torch.equal, model.buffers(), kept))
    dense = gauss_newton(model, x, lambda f: F.cross_entropy(f, y))
    assert_solved(product.square().sum()[None], (flat(v) @ dense @ flat(v))[None], 100)


class Doubled(torch.autograd.Function):
    """A function without a derivative in forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


WITHOUT_DERIVATIVES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "fast path": lambda model, x: (
        nn.TransformerEncoderLayer(4, 2, 4, batch_first=True).double().eval()(model(x)[:, None])
    ),
    "weight norm": lambda model, x: nn.utils.parametrizations.weight_norm(model)(x),
    "spectral norm": lambda model, x: nn.utils.parametrizations.spectral_norm(model)(x),
    "function": lambda model, x: Doubled.apply(model(x)),
    "checkpoint": lambda model, x: checkpoint(torch.tanh, model(x), use_reentrant=True),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", WITHOUT_DERIVATIVES)
def test_what_has_no_derivative_in_forward_mode_raises(name: str) -> None:
    model, x = nn.Linear(4, 4).double(), torch.randn(4, 4, dtype=torch.float64)
    of = {"loss": LOSSES["mse"](), "reduction": "mean", "targets": None}
    with pytest.raises(NotImplementedError):
        root_product(
            model, lambda: WITHOUT_DERIVATIVES[name](model, x), random_direction(model), **of
        )


@pytest.mark.parametrize("ended", [True, False])
def test_derivatives_go_through_no_grad_and_end_at_detach(ended: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    x, v = torch.randn(4, 3, dtype=torch.float64), random_direction(model)

    def outputs_of() -> Tensor:
        with torch.no_grad():
            hidden = model[0](x)
        return model[1](hidden.detach() if ended else hidden)

    of = {"loss": LOSSES["mse"](), "reduction": "sum", "targets": None}
    product = root_product(model, outputs_of, v, **of)
    expected = model[0](x) @ v["1.weight"].T + v["1.bias"]
    if not ended:
        expected += (x @ v["0.weight"].T + v["0.bias"]) @ model[1].weight.T
    assert_same(product, 2**0.5 * expected.detach())


def test_a_compiled_model_has_derivatives_too() -> None:
    model, x, y = Net(), images(), torch.randint(3, (5,))
    kfac = preconditioner(model)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    v = random_direction(model)
    of = {"loss": LOSSES["cross_entropy"](), "reduction": "mean", "targets": y}
    products = [root_product(model, lambda net=net: net(x), v, **of) for net in (model, compiled)]
    assert torch.equal(*products)
    kfac.detach()
