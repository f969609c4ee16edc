"""kfac-pytorch's factors and inverses by this package against a double of its layers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_kfac import assert_solved, plain_covariances
from torch import Tensor, nn

from kfac_fast.integrations import kfac_pytorch as ours

pytestmark = pytest.mark.usefixtures("one_thread")
DAMPING = 0.1


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Helper:
    """A ``ModuleHelper``: the factors as kfac-pytorch scales them, from patches."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def has_bias(self) -> bool:
        return self.module.bias is not None

    def has_symmetric_factors(self) -> bool:
        return True

    def get_a_factor(self, a: Tensor) -> Tensor:
        rows, positions = a.flatten(0, -2), 1
        if isinstance(self.module, nn.Conv2d):
            options = {"stride": self.module.stride, "padding": self.module.padding}
            patches = F.unfold(a, self.module.kernel_size, **options).mT
            rows, positions = patches.flatten(0, 1), patches.shape[1]
        rows = F.pad(rows, (0, int(self.has_bias())), value=1.0) / positions
        return rows.T @ rows / len(rows)

    def get_g_factor(self, g: Tensor) -> Tensor:
        is_convolution = isinstance(self.module, nn.Conv2d)
        positions = g.shape[2:].numel() if is_convolution else 1
        rows = (g.movedim(1, -1) if is_convolution else g).flatten(0, -2) / positions
        return rows.T @ rows / len(rows)


class InverseLayer:
    """A ``KFACInverseLayer`` as far as its inverses go."""

    def __init__(self, module: nn.Module) -> None:
        self.module = Helper(module)
        self.inv_dtype = torch.float32
        self.a_factor: Tensor | None = None
        self.g_factor: Tensor | None = None
        self.a_inv: Tensor | None = None
        self.g_inv: Tensor | None = None

    def update(self, x: Tensor) -> None:
        g = torch.randn_like(self.module.module(x))
        self.a_factor, self.g_factor = self.module.get_a_factor(x), self.module.get_g_factor(g)

    def compute_a_inv(self, damping: float = 0.001) -> None:
        self.a_inv = self._inverse(self.a_factor, damping)

    def compute_g_inv(self, damping: float = 0.001) -> None:
        self.g_inv = self._inverse(self.g_factor, damping)

    def _inverse(self, factor: Tensor | None, damping: float) -> Tensor:
        if factor is None:
            raise RuntimeError("no factor yet")
        damped = factor + damping * torch.eye(len(factor), dtype=factor.dtype)
        return torch.linalg.inv(damped.float()).to(self.inv_dtype)


class EigenLayer:
    """A ``KFACEigenLayer``, which has no inverses."""

    def __init__(self, module: nn.Module) -> None:
        self.module = Helper(module)
        self.a_factor = self.g_factor = None

    def compute_a_inv(self, damping: float = 0.001) -> None:
        self.decomposed = True

    compute_g_inv = compute_a_inv


class Preconditioner:
    """A ``BaseKFACPreconditioner`` of one rank, which is also what assigns the work."""

    def __init__(self, *layers: Any, workers: tuple[int, ...] = ()) -> None:
        self._layers = {layer.module.module: (str(i), layer) for i, layer in enumerate(layers)}
        self._assignment = self
        self._workers = dict(enumerate(workers))

    def inv_worker(self, layer: str, factor: str) -> int:
        assert factor in {"A", "G"}
        return self._workers.get(int(layer), 0)

    def step(self, damping: float = DAMPING) -> None:
        for name, layer in reversed(list(self._layers.values())):
            if self.inv_worker(name, "A") == 0:
                layer.compute_a_inv(damping=damping)
                layer.compute_g_inv(damping=damping)


MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (5, 4)),
    "sequences": (nn.Linear(4, 3, bias=False), (5, 6, 4)),
    "conv": (nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 2)), (5, 2, 8, 8)),
    "dilated": (nn.Conv2d(2, 3, 3, dilation=2, bias=False), (5, 2, 8, 8)),
    "grouped": (nn.Conv2d(4, 2, 3, groups=2, padding_mode="circular", padding=1), (5, 4, 6, 6)),
}


def helper_of(kind: str, module: nn.Module) -> Any:
    if kind == "double":
        return Helper(module)
    library = pytest.importorskip("kfac.layers.modules", reason="needs kfac-pytorch")
    is_linear = isinstance(module, nn.Linear)
    return (library.LinearModuleHelper if is_linear else library.Conv2dModuleHelper)(module)


@pytest.mark.parametrize("kind", ["double", "kfac-pytorch"])
@pytest.mark.parametrize("module", MODULES)
def test_factors_are_those_of_kfac_pytorch(module: str, kind: str) -> None:
    layer, shape = MODULES[module]
    x = torch.randn(shape, dtype=torch.float64)
    g = torch.randn_like(layer.double()(x))
    helper = helper_of(kind, layer)
    assert_solved(ours.get_a_factor(helper, x), helper.get_a_factor(x))
    assert_solved(ours.get_g_factor(helper, g), helper.get_g_factor(g))


class Padded(nn.Module):
    """A convolution that is dilated and padded as kfac-pytorch does not, and shared rows."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=2, dilation=2, padding_mode=mode)
        self.shared, self.last = nn.Linear(30, 3), nn.Linear(12, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(self.conv(x).tanh().flatten(2)).tanh().flatten(1))


@pytest.mark.parametrize("mode", ["circular", "reflect", "zeros"])
def test_correct_factors_are_those_of_the_fisher(mode: str) -> None:
    model, x, y = Padded(mode).double(), torch.randn(7, 2, 5, 6).double(), torch.arange(7) % 2
    expected = plain_covariances(model, lambda: F.cross_entropy(model(x), y), "expand", 7, "mean")
    made = {name: InverseLayer(model.get_submodule(name)) for name in expected}
    seen: dict[str, list[Tensor]] = {name: [] for name in expected}
    for name, layer in made.items():
        layer.module.module.register_forward_hook(
            lambda module, inputs, output, name=name: seen[name].extend([inputs[0], output])
        )
    loss = F.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
    with ours.enabled(Preconditioner(*made.values()), correct=True):
        for (name, layer), gradient in zip(made.items(), gradients, strict=True):
            a, g = expected[name]
            assert_solved(layer.module.get_a_factor(seen[name][0].detach()), a[0])
            assert_solved(layer.module.get_g_factor(gradient), g[0])


def test_factors_keep_the_dtype() -> None:
    helper = Helper(nn.Linear(4, 3))
    assert ours.get_a_factor(helper, torch.randn(5, 4).bfloat16()).dtype == torch.bfloat16
    assert ours.get_g_factor(helper, torch.randn(5, 3).bfloat16()).dtype == torch.bfloat16


def layers() -> list[InverseLayer]:
    return [InverseLayer(nn.Linear(4, 3)), InverseLayer(nn.Conv2d(2, 3, 3))]


def update(made: list[InverseLayer]) -> None:
    made[0].update(torch.randn(20, 4))
    made[1].update(torch.randn(5, 2, 8, 8))


def assert_inverted(layer: Any, damping: float = DAMPING) -> None:
    """Check that errors are at most twice those of the layer's own inverse."""
    for side in ("a", "g"):
        factor = getattr(layer, f"{side}_factor")
        exact = torch.linalg.inv(factor.double() + damping * torch.eye(len(factor)))
        own, found = InverseLayer._inverse(layer, factor, damping), getattr(layer, f"{side}_inv")
        allowed = 2 * (own - exact).norm() + 4 * torch.finfo(torch.float32).eps * exact.norm()
        assert found.dtype == layer.inv_dtype and (found - exact).norm() <= allowed


def test_all_inverses_are_one_call(inverted: list[int]) -> None:
    made = layers()
    made[1].inv_dtype = torch.float64
    of_another_rank = layers()[0]
    of_another_rank.update(torch.randn(20, 4))
    preconditioner = Preconditioner(*made, of_another_rank, workers=(0, 0, 1))
    with ours.enabled(preconditioner):
        for steps in (1, 2):
            update(made)
            preconditioner.step()
            for layer in made:
                assert_inverted(layer)
            assert inverted == steps * [4]


def test_inverses_are_of_the_factors_as_they_are() -> None:
    made = layers()
    preconditioner = Preconditioner(*made)
    with ours.enabled(preconditioner):
        update(made)
        made[0].compute_a_inv(damping=DAMPING)
        update(made)
        preconditioner.step()
        for layer in made:
            assert_inverted(layer)
        made[0].compute_a_inv(damping=DAMPING)
        for layer in made:
            layer.a_factor *= 2
            layer.g_factor *= 2
        preconditioner.step()
        for layer in made:
            assert_inverted(layer)
        made[0].compute_a_inv(damping=DAMPING)
        preconditioner.step(damping=0.5)
        for layer in made:
            assert_inverted(layer, 0.5)


def test_a_factor_that_is_not_positive_definite_is_left_to_its_layer() -> None:
    made = layers()
    preconditioner = Preconditioner(*made)
    update(made)
    made[0].g_factor -= 100 * torch.eye(3)
    with ours.enabled(preconditioner):
        preconditioner.step()
    for layer in made:
        assert_inverted(layer)


def test_other_layers_are_left_alone() -> None:
    made = layers()
    eigen, other = EigenLayer(nn.Linear(2, 2)), InverseLayer(nn.Bilinear(2, 2, 2))
    other.a_factor = other.g_factor = torch.eye(3)
    preconditioner = Preconditioner(*made, eigen, other, workers=(0, 1))
    update(made)
    with ours.enabled(preconditioner):
        assert "get_a_factor" not in vars(other.module)
        preconditioner.step()
        made[0].a_factor = None
        with pytest.raises(RuntimeError, match="no factor yet"):
            preconditioner.step()
    assert eigen.decomposed
    assert made[1].a_inv is None
    assert_inverted(other)


def test_functions_are_replaced_inside_of_a_block_only() -> None:
    made = layers()
    preconditioner = Preconditioner(*made)
    with pytest.raises(ZeroDivisionError), ours.enabled(preconditioner):
        assert made[0].module.get_a_factor.func is ours.get_a_factor
        raise ZeroDivisionError
    for layer in made:
        assert not {"compute_a_inv", "compute_g_inv"} & set(vars(layer))
        assert set(vars(layer.module)) == {"module"}


def test_blocks_may_be_nested() -> None:
    made = layers()
    preconditioner = Preconditioner(*made)
    with ours.enabled(preconditioner):
        with ours.enabled(preconditioner):
            pass
        assert made[0].module.get_a_factor.func is ours.get_a_factor
        update(made)
        preconditioner.step()
    for layer in made:
        assert_inverted(layer)
        assert set(vars(layer.module)) == {"module"}


def test_blocks_may_overlap() -> None:
    made = layers()
    preconditioner = Preconditioner(*made)
    with ExitStack() as second:
        with ours.enabled(preconditioner):
            second.enter_context(ours.enabled(preconditioner))
        update(made)
        preconditioner.step()
    for layer in made:
        assert_inverted(layer)
        assert not {"compute_a_inv", "compute_g_inv"} & set(vars(layer))
        assert set(vars(layer.module)) == {"module"}
