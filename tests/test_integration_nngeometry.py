"""nngeometry with this package's factors against nngeometry itself, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from plain_kfac import assert_solved, plain_covariances
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("nngeometry", reason="needs nngeometry")
from nngeometry.backend import TorchHooksJacobianBackend  # noqa: E402
from nngeometry.backend.torch_hooks.grads import FactoryMap  # noqa: E402
from nngeometry.object import PMatDiag, PMatEKFAC, PMatKFAC  # noqa: E402

from kfac_fast.integrations import nngeometry as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """The default, too: nngeometry's identities, and so its damping, are of that."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def images(**options: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, **options),
        nn.Tanh(),
        nn.Conv2d(4, 3, (2, 3), stride=2, dilation=(1, 2), padding=(1, 0), bias=False),
        nn.Flatten(),
        nn.Linear(30, 5, bias=False),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def signals() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2),
        nn.Tanh(),
        nn.Conv1d(4, 3, 2, bias=False),
        nn.Flatten(),
        nn.Linear(9, 3),
    )


class Twice(nn.Module):
    """Calls a layer two times, of which nngeometry knows the input of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (images, (2, 8, 8)),
    "groups": (lambda: images(groups=2), (2, 8, 8)),
    "padding": (lambda: images(padding_mode="circular"), (2, 8, 8)),
    "signals": (signals, (2, 8)),
    "twice": (Twice, (4,)),
}


def problem(network: str) -> tuple[TorchHooksJacobianBackend, DataLoader[Any]]:
    """A generator and two unequal batches."""
    make, shape = NETWORKS[network]
    x = torch.randn(8, *shape, dtype=torch.float64)
    return TorchHooksJacobianBackend(make().double()), DataLoader(TensorDataset(x), batch_size=5)


@pytest.mark.parametrize("network", NETWORKS)
def test_factors_are_those_of_nngeometry(network: str) -> None:
    generator, data = problem(network)
    expected = PMatKFAC(generator=generator, examples=data).data
    with ours.enabled():
        found = PMatKFAC(generator=generator, examples=data).data
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        for mine, theirs in zip(found[name], pair, strict=True):
            assert_solved(mine, theirs)


@pytest.mark.parametrize("use_pi", [True, False])
def test_a_damping_of_0_is_taken(use_pi: bool) -> None:
    generator, data = problem("signals")
    matrix = PMatKFAC(generator=generator, examples=data)
    name = next(iter(matrix.data))
    a, g = (factor + torch.eye(len(factor)).to(factor) for factor in matrix.data[name])
    matrix.data = {name: (a, g)}
    with ours.enabled():
        found = matrix.inverse(regul=0.0, use_pi=use_pi)
    for factor, inverse in zip((a, g), found.data[name], strict=True):
        assert_solved(inverse, torch.linalg.inv(factor))


@pytest.mark.parametrize("use_pi", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_inverses_are_those_of_nngeometry(network: str, use_pi: bool) -> None:
    generator, data = problem(network)
    matrix = PMatKFAC(generator=generator, examples=data)
    options = {"regul": 1e-4, "use_pi": use_pi}
    expected = matrix.inverse(**options)
    with ours.enabled():
        found = matrix.inverse(**options)
    assert found.data.keys() == expected.data.keys()
    for name, pair in expected.data.items():
        for mine, theirs in zip(found.data[name], pair, strict=True):
            assert_solved(mine, theirs, condition=1e6)


def test_inverses_of_indefinite_factors_are_those_of_nngeometry() -> None:
    generator, data = problem("signals")
    matrix = PMatKFAC(generator=generator, examples=data)
    name = next(iter(matrix.data))
    matrix.data[name] = tuple(-factor for factor in matrix.data[name])
    expected = matrix.inverse(regul=1e-4)
    with ours.enabled():
        found = matrix.inverse(regul=1e-4)
    for mine, theirs in zip(found.data[name], expected.data[name], strict=True):
        assert mine.equal(theirs)


@pytest.mark.parametrize("network", NETWORKS)
def test_diagonals_in_the_eigenbasis_are_those_of_nngeometry(network: str) -> None:
    generator, data = problem(network)
    matrix = PMatEKFAC(generator=generator, examples=data)
    bases = matrix.data[0]
    matrix.update_diag(data)
    with ours.enabled():
        found = generator.get_kfe_diag(bases, data)
    for name, expected in matrix.data[1].items():
        assert_solved(found[name], expected)


def test_sequences_are_refused_as_by_nngeometry() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    generator = TorchHooksJacobianBackend(model)
    data = DataLoader(TensorDataset(torch.randn(5, 2, 4, dtype=torch.float64)), batch_size=5)
    with pytest.raises(RuntimeError):
        PMatKFAC(generator=generator, examples=data)
    with ours.enabled(), pytest.raises(ValueError, match=r"must have a \[N, in\] input, got 3-d"):
        PMatKFAC(generator=TorchHooksJacobianBackend(model), examples=data)


def test_factories_are_replaced_inside_of_a_block_only() -> None:
    before = dict(FactoryMap)
    with pytest.raises(ZeroDivisionError), ours.enabled():
        assert {FactoryMap[kind] for kind in ours._OURS} == set(ours._OURS.values())
        assert PMatKFAC.inverse is ours.inverse
        raise ZeroDivisionError
    assert FactoryMap == before and PMatKFAC.inverse is not ours.inverse


@pytest.mark.parametrize("network", ["images", "signals"])
def test_models_in_half_precision_are_served(network: str) -> None:
    make, shape = NETWORKS[network]
    torch.set_default_dtype(torch.bfloat16)
    model = make()
    data = DataLoader(TensorDataset(torch.randn(8, *shape)), batch_size=5)
    with ours.enabled():
        found = PMatKFAC(generator=TorchHooksJacobianBackend(model), examples=data).data
    torch.set_default_dtype(torch.float64)
    exact = DataLoader(TensorDataset(data.dataset.tensors[0].double()), batch_size=5)
    generator = TorchHooksJacobianBackend(model.double())
    expected = PMatKFAC(generator=generator, examples=exact).data
    for name, pair in expected.items():
        for mine, theirs in zip(found[name], pair, strict=True):
            assert mine.dtype == torch.bfloat16
            assert (mine.double() - theirs).norm() <= 0.03 * theirs.norm()


CORRECT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "circular": (lambda: images(padding_mode="circular"), (2, 8, 8)),
    "reflect": (lambda: images(padding_mode="reflect"), (2, 8, 8)),
    "signals": (signals, (2, 8)),
    "twice": (Twice, (4,)),
}


@pytest.mark.parametrize("network", CORRECT)
def test_correct_factors_are_those_of_the_fisher(network: str) -> None:
    """Up to how the scales are shared: the sum over the outputs' Jacobians, a mean of examples."""
    make, shape = CORRECT[network]
    model, x = make(), torch.randn(8, *shape)
    data = DataLoader(TensorDataset(x), batch_size=5)
    with ours.enabled(correct=True):
        found = PMatKFAC(generator=TorchHooksJacobianBackend(model), examples=data).data
    outputs = model(x).shape[1]
    passes = [
        plain_covariances(model, lambda c=c: model(x)[:, c].sum(), "expand", 1, "sum")
        for c in range(outputs)
    ]
    for (a, g), name in zip(found.values(), passes[0], strict=True):
        inputs = passes[0][name][0][0]
        gradients = sum(covariances[name][1][0] for covariances in passes) / len(x)
        assert_solved(a / a.trace(), inputs / inputs.trace())
        assert_solved(torch.kron(g, a), torch.kron(gradients, inputs))


def test_correct_diagonals_are_those_of_the_examples_gradients() -> None:
    model, x = images(padding_mode="circular"), torch.randn(4, 2, 8, 8)
    data = DataLoader(TensorDataset(x), batch_size=3)
    with ours.enabled(correct=True):
        matrix = PMatEKFAC(generator=TorchHooksJacobianBackend(model), examples=data)
        matrix.update_diag(data)
    layer = next(iter(matrix.data[1]))
    right, left = matrix.data[0][layer]
    expected = torch.zeros(4, 19)
    for scalar in model(x).flatten():
        weight, bias = torch.autograd.grad(
            scalar, [model[0].weight, model[0].bias], retain_graph=True
        )
        gradient = torch.cat([weight.flatten(1), bias[:, None]], 1)
        expected += (left.T @ gradient @ right).square() / len(x)
    assert_solved(matrix.data[1][layer], expected.flatten())


def test_other_matrices_are_nngeometrys_own_in_a_correct_block() -> None:
    generator = TorchHooksJacobianBackend(Twice())
    data = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=5)
    expected = PMatDiag(generator=generator, examples=data).get_diag()
    with ours.enabled(correct=True):
        found = PMatDiag(generator=generator, examples=data).get_diag()
    assert found.equal(expected)


def test_blocks_may_be_nested() -> None:
    with ours.enabled():
        with ours.enabled():
            pass
        assert PMatKFAC.inverse is ours.inverse
        assert {FactoryMap[kind] for kind in ours._OURS} == set(ours._OURS.values())
    assert PMatKFAC.inverse is not ours.inverse
