"""Losses on sampled labels: their gradients' covariance is the Fisher of the training loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from host import NeverWaits
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.curvature import SAMPLED_LOSSES, sampled_loss

pytestmark = pytest.mark.usefixtures("one_thread")
losses = pytest.mark.parametrize("loss", SAMPLED_LOSSES)
TORCH_LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def labels_for(loss: str, outputs: Tensor) -> Tensor:
    """Training labels of the right kind, unrelated to the outputs."""
    if loss == "cross_entropy":
        return torch.randint(outputs.shape[1], (len(outputs), *outputs.shape[2:]))
    return torch.rand_like(outputs)


def exact_fisher(loss: str, f: Tensor) -> Tensor:
    """Hessian of one example's loss with respect to its outputs."""
    if loss == "cross_entropy":
        p = f.softmax(0)
        return p.diag() - torch.outer(p, p)
    p = f.sigmoid()
    return 2 * torch.eye(len(f), dtype=f.dtype) if loss == "mse" else (p * (1 - p)).diag()


def sampled_gradients(loss: str, f: Tensor, samples: int) -> Tensor:
    """Gradients of independently sampled labels for the same outputs, ``[samples, C]``."""
    outputs = f.expand(samples, -1).clone().requires_grad_()
    total, _ = sampled_loss(outputs, loss)
    return torch.autograd.grad(total, outputs)[0]


def sampled_fisher(loss: str, f: Tensor, samples: int) -> Tensor:
    g = sampled_gradients(loss, f, samples)
    return g.mT @ g / samples


@losses
def test_the_exact_fisher_is_the_hessian_of_the_training_loss(loss: str) -> None:
    f = torch.randn(4, dtype=torch.float64)
    labels = labels_for(loss, f[None])
    hessian = torch.autograd.functional.hessian(
        lambda outputs: TORCH_LOSSES[loss](outputs[None], labels, reduction="sum"), f
    )
    torch.testing.assert_close(hessian, exact_fisher(loss, f), rtol=1e-12, atol=1e-14)


@losses
def test_the_sampled_fisher_converges_to_the_exact_one_at_the_monte_carlo_rate(loss: str) -> None:
    f = torch.randn(4, dtype=torch.float64)
    exact = exact_fisher(loss, f)
    rms = []
    for samples in (100, 6400):
        errors = torch.stack([sampled_fisher(loss, f, samples) - exact for _ in range(40)])
        rms.append(float(errors.square().mean().sqrt()))
    assert rms[0] < exact.norm() and 6 < rms[0] / rms[1] < 10.7  # 8 = sqrt(64)


@losses
def test_the_sampled_fisher_is_unbiased(loss: str) -> None:
    f = torch.randn(4, dtype=torch.float64)
    g = sampled_gradients(loss, f, 200_000)
    outer = g[:, :, None] * g[:, None, :]
    standard_error = outer.std(0) / len(g) ** 0.5
    deviation = (outer.mean(0) - exact_fisher(loss, f)).abs()
    assert (deviation <= 5 * standard_error + 1e-12).all()
    assert (g.mean(0).abs() <= 5 * g.std(0) / len(g) ** 0.5).all()


@losses
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5), (2, 4, 3, 5)], ids=str)
def test_the_terms_are_what_a_mean_loss_divides_by(loss: str, shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape, dtype=torch.float64)
    labels = labels_for(loss, outputs)
    total, mean = (TORCH_LOSSES[loss](outputs, labels, reduction=r) for r in ("sum", "mean"))
    assert sampled_loss(outputs, loss)[1] == pytest.approx(float(total / mean), rel=1e-12)


def test_classes_are_drawn_over_dimension_one() -> None:
    classes = torch.randint(4, (3, 5, 2))
    outputs = 1e3 * F.one_hot(classes, 4).double().movedim(-1, 1)
    assert sampled_loss(outputs, "cross_entropy")[0] == 0


@losses
def test_a_generator_alone_decides_the_labels(loss: str) -> None:
    outputs = torch.randn(50, 4, dtype=torch.float64)
    draws = []
    state = torch.get_rng_state()
    for seed in (3, 3, 4):
        generator = torch.Generator().manual_seed(seed)
        draws.append(sampled_loss(outputs, loss, generator)[0])
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert sampled_loss(outputs, loss)[0] == draws[0]


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits"])
def test_rare_labels_are_drawn_from_bfloat16_outputs_as_often_as_they_should(loss: str) -> None:
    draws, logit = 400_000, -7.0
    columns = [logit, 0.0] if loss == "cross_entropy" else [logit]
    outputs = torch.tensor(columns, dtype=torch.bfloat16).expand(draws, -1).clone()
    g = torch.autograd.grad(sampled_loss(outputs.requires_grad_(), loss)[0], outputs)[0]
    rare = int((g[:, 0] < 0).sum())  # the gradient is p - 1 where the label was drawn
    expected = draws * torch.tensor(logit).sigmoid()
    assert abs(rare - expected) < 5 * expected.sqrt()


@losses
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_outputs_give_bad_gradients_and_no_error(loss: str, value: float) -> None:
    outputs = torch.randn(3, 4)
    outputs[1, 2] = value
    with NeverWaits():
        total, _ = sampled_loss(outputs.requires_grad_(), loss)
        (gradient,) = torch.autograd.grad(total, outputs)
    if loss != "bce_with_logits" or math.isnan(value):
        assert not gradient[1].isfinite().all()
    assert gradient[[0, 2]].isfinite().all()


def test_an_unknown_loss_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="loss must be one of .*'mse'.* got 'nll'"):
        sampled_loss(torch.ones(2, 2), "nll")


@losses
@pytest.mark.parametrize("mc_samples", [1, 4])
def test_the_preconditioners_gradient_covariance_is_unbiased_in_the_number_of_samples(
    loss: str, mc_samples: int
) -> None:
    """Many updates of 20 examples; the mean over a loss's terms has the mean Fisher."""
    model = nn.Linear(3, 4, dtype=torch.float64)
    x = torch.randn(20, 3, dtype=torch.float64)
    exact = sum(exact_fisher(loss, f) for f in model(x).detach())
    exact = exact / (20 if loss == "cross_entropy" else 80)
    kfac = KFAC(model, fisher="mc", mc_samples=mc_samples, factor_update_steps=1, factor_decay=0)
    covariances = []
    for _ in range(300):
        kfac.update_curvature(model(x), loss=loss)
        kfac.step()
        covariances.append(kfac.state_dict()["layers"][""]["gradient"]["total"])
    draws = torch.stack(covariances)
    deviation = (draws.mean(0) - exact).abs()
    assert (deviation <= 5 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all()
