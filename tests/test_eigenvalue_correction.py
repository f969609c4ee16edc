"""EKFAC: eigenvalues corrected by squared per-example gradients, against autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import DAMPING, LAYER_NAMES, Net, images, preconditioner, train_step
from oracle import assert_same
from plain_kfac import assert_solved, grad_matrices
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.losses import MSE

pytestmark = pytest.mark.usefixtures("one_thread")
approximations = pytest.mark.parametrize("approx", ["expand", "reduce"])
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def corrected(model: nn.Module, **options: Any) -> KFAC:
    """EKFAC whose bases are refreshed at the first step only."""
    return preconditioner(
        model,
        damping_mode="exact",
        eigenvalue_correction=True,
        inverse_update_steps=100,
        **options,
    )


def bases(kfac: KFAC) -> dict[str, tuple[Tensor, Tensor]]:
    """Each layer's eigenvectors of inputs and of gradients, ``[groups, n, n]``."""
    return {
        block.layer.name: tuple(b.vectors.reshape(-1, *b.vectors.shape[-2:]) for b in block.bases)
        for block in kfac._blocks
    }


def example_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradients of each example's loss, ``[N, groups, out, in (+ 1)]``."""
    model = copy.deepcopy(model)  # whose passes are not captured
    found: dict[str, list[Tensor]] = {name: [] for name in LAYER_NAMES}
    for example, label in zip(x, y, strict=True):
        model.zero_grad()
        F.cross_entropy(model(example[None]), label[None]).backward()
        for name in LAYER_NAMES:
            found[name].append(grad_matrices(model.get_submodule(name)))
    return {name: torch.stack(gradients) for name, gradients in found.items()}


@approximations
@reductions
def test_the_step_divides_by_the_mean_squared_gradient_in_the_eigenbasis(
    reduction: str, approx: str
) -> None:
    model, x, y = Net(), images(), torch.randint(3, (5,))
    kfac = corrected(model, approx=approx, loss_reduction=reduction)
    train_step(model, kfac, x, y)
    x, y = images(), torch.randint(3, (5,))
    gradients = example_gradients(model, x, y)
    model.zero_grad()
    F.cross_entropy(model(x), y, reduction=reduction).backward()
    raw = {name: grad_matrices(model.get_submodule(name)) for name in LAYER_NAMES}
    kfac.step()
    for block in kfac._blocks:
        name = block.layer.name
        right, left = bases(kfac)[name]
        squares = (left.mT @ gradients[name] @ right).square().sum(0)
        eigenvalues = squares / 5 if reduction == "mean" else squares
        assert_same(block.correction.mean.reshape(eigenvalues.shape), eigenvalues)
        # In an orthonormal basis they add up to the trace of the exact block.
        trace = gradients[name].square().sum() / (5 if reduction == "mean" else 1)
        assert_same(eigenvalues.sum(), trace)
        step = left @ ((left.mT @ raw[name] @ right) / (eigenvalues + DAMPING)) @ right.mT
        assert_solved(grad_matrices(model.get_submodule(name)), step)


def test_new_bases_start_without_a_correction() -> None:
    """The step right after a refresh is that of exact damping."""
    models = []
    for correction in (False, True):
        torch.manual_seed(0)
        model = Net()
        kfac = preconditioner(model, damping_mode="exact", eigenvalue_correction=correction)
        for _ in range(2):
            train_step(model, kfac, images(), torch.randint(3, (5,)))
        models.append(model)
        assert all((block.correction is not None) == correction for block in kfac._blocks)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_drawn_labels_correct_the_eigenvalues_with_their_own_gradients() -> None:
    model, x = nn.Linear(4, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    kfac = corrected(model, fisher="mc", mc_samples=3)
    for _ in range(2):
        outputs = model(x)
        torch.manual_seed(1)
        kfac.update_curvature(outputs, loss="mse")
        F.mse_loss(outputs, torch.zeros_like(outputs)).backward()
        kfac.step()
    torch.manual_seed(1)
    total = torch.zeros(3, 5).double()
    (block,) = kfac._blocks
    right, left = (basis.vectors for basis in block.bases)
    rows = torch.cat([x, torch.ones(6, 1).double()], 1) @ right
    for _ in range(3):
        outputs = model(x).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(MSE().sample(outputs, None, None), outputs)
        total += (gradient @ left).square().mT @ rows.square() / 3
    assert_same(block.correction.mean, total / 18)


@approximations
def test_a_bad_batch_leaves_the_correction_as_it_was(approx: str) -> None:
    model = Net()
    kfac = corrected(model, approx=approx)
    for _ in range(2):
        train_step(model, kfac, images(), torch.randint(3, (5,)))
    before = [block.correction.mean.clone() for block in kfac._blocks]
    bad = images()
    bad[0, 0, 0, 0] = torch.nan
    train_step(model, kfac, bad, torch.randint(3, (5,)))
    for block, mean in zip(kfac._blocks, before, strict=True):
        assert torch.equal(block.correction.mean, mean) and block.correction.skipped == 1


@approximations
def test_the_quadratic_model_is_that_of_the_step(approx: str) -> None:
    """Its minimum is the step, half of the gradient's inner product with it below where we are.

    The first step is that of bases without a correction yet.
    """
    model, reports = Net(), []
    kfac = corrected(model, approx=approx, callback=reports.append)
    for _ in range(3):
        model.zero_grad()
        F.cross_entropy(model(images()), torch.randint(3, (5,))).backward()
        gradients = {p: p.grad.clone() for p in model.parameters()}
        kfac.step()
        steps = {p: -p.grad for p in model.parameters()}
        change = kfac.predicted_change(gradients, steps)
        assert_solved(change, -reports[-1].inner_product / 2)
        for length in (0.5, 3.0):
            other = {p: length * step for p, step in steps.items()}
            expected = (2 * length - length**2) * change
            assert_solved(kfac.predicted_change(gradients, other), expected)


def test_a_corrected_state_survives_saving() -> None:
    model = Net()
    kfac = corrected(model)
    for _ in range(2):
        train_step(model, kfac, images(), torch.randint(3, (5,)))
    other = corrected(Net())
    other.load_state_dict(kfac.state_dict())
    for block, loaded in zip(kfac._blocks, other._blocks, strict=True):
        assert torch.equal(block.correction.mean, loaded.correction.mean)
        assert {"correction", "input_basis", "gradient_basis"} < set(loaded.parts())
    plain = preconditioner(Net())
    with pytest.raises(ValueError, match="load_state_dict: .* must hold .*gradient_inverse.*"):
        plain.load_state_dict(kfac.state_dict())


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_an_empty_batch_leaves_the_correction_finite(approx: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    kfac = preconditioner(model, approx=approx, damping_mode="exact", eigenvalue_correction=True)
    for examples in (8, 0, 8):
        x = torch.randn(examples, 3, dtype=torch.float64)
        model(x).square().sum().backward()
        kfac.step()
    assert all(block.correction.mean.isfinite().all() for block in kfac._blocks)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
