"""Levenberg-Marquardt damping: the quadratic model, the reduction ratio and what it does."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net, images, preconditioner
from oracle import assert_same
from plain_kfac import covariances
from torch import Tensor, nn

from kfac_fast import KFAC, LevenbergMarquardt, QuadraticModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    """A linear layer, whose empirical data make the quadratic model exact but for the Fisher."""
    x = torch.randn(64, 3, dtype=torch.float64)
    return nn.Linear(3, 2, dtype=torch.float64), x, torch.randn(64, 2, dtype=torch.float64)


def test_the_predicted_change_is_the_damped_quadratic_model() -> None:
    model, y = Net(), torch.randint(3, (5,))
    kfac = preconditioner(model, damping=0.3)
    F.cross_entropy(model(images()), y).backward()
    kfac.step()
    gradients = {p: torch.randn_like(p) for p in model.parameters()}
    steps = {p: torch.randn_like(p) for p in model.parameters()}
    expected = torch.zeros((), dtype=torch.float64)
    for block in kfac._blocks:
        parameters = block.layer.parameters()
        v, delta = (
            block.layer.matrix([of[p] for p in parameters], torch.float64).flatten(-2)
            for of in (gradients, steps)
        )
        a, g = covariances(kfac)[block.layer.name]
        for i in range(len(a)):
            d, w = delta.reshape(len(a), -1)[i], v.reshape(len(a), -1)[i]
            curvature = torch.kron(g[i], a[i]) + 0.3 * torch.eye(len(d)).double()
            expected += w @ d + d @ curvature @ d / 2
    assert_same(kfac.predicted_change(gradients, steps), expected)


def test_an_accumulated_sum_is_predicted_as_the_sum_of_one_batch_divided() -> None:
    changes = []
    model, x, y = regression()
    for count in (1, 4):
        kfac = preconditioner(model, loss_reduction="sum", accumulation_steps=count)
        model.zero_grad()
        for inputs, labels in zip(x.chunk(count), y.chunk(count), strict=True):
            (F.mse_loss(model(inputs), labels, reduction="sum") / count).backward()
        gradients = {p: p.grad.clone() for p in model.parameters()}
        kfac.step()
        kfac.detach()
        steps = {p: torch.full_like(p, 0.1) for p in gradients}
        changes.append(kfac.predicted_change(gradients, steps))
    assert_same(changes[1], changes[0] / 4)


def step(
    kfac: KFAC, damping: LevenbergMarquardt, model: nn.Module, x: Tensor, y: Tensor, lr: float
) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model.zero_grad()
    outputs = model(x)
    kfac.update_curvature(outputs, loss="mse")
    loss = F.mse_loss(outputs, y)
    loss.backward()
    with damping.adapt(kfac, lambda: F.mse_loss(model(x), y)):
        kfac.step()
        optimizer.step()
    return float(loss.detach())


def run(lr: float, steps: int, **options: Any) -> tuple[LevenbergMarquardt, list[float]]:
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1, **options)
    kfac = preconditioner(model, damping=damping, fisher="mc", mc_samples=50)
    return damping, [step(kfac, damping, model, x, y, lr) for _ in range(steps)]


def test_steps_that_keep_the_promise_lower_the_damping_to_its_bound() -> None:
    damping, losses = run(0.5, 12, interval=2, decay=0.5, bounds=(0.01, 1.0))
    assert losses[-1] < losses[0]
    assert damping.ratio is not None and damping.ratio > 3 / 4
    assert damping.damping == 0.01


def test_steps_that_overshoot_raise_the_damping() -> None:
    damping, _ = run(4.0, 1, interval=1)
    assert damping.ratio is not None and math.isnan(damping.ratio)
    assert damping.damping == pytest.approx(0.1 / 0.95)


def test_the_ratio_is_that_of_the_losses_and_the_model() -> None:
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1, interval=1)
    kfac = preconditioner(model, damping=lambda step: 0.1)
    old = [p.detach().clone() for p in model.parameters()]
    before = F.mse_loss(model(x), y)
    before.backward()
    gradients = {p: p.grad.clone() for p in model.parameters()}
    with damping.adapt(kfac, lambda: F.mse_loss(model(x), y)):
        kfac.step()
        torch.optim.SGD(model.parameters(), lr=0.3).step()
    steps = {p: p.detach() - o for p, o in zip(model.parameters(), old, strict=True)}
    change = F.mse_loss(model(x), y) - before
    expected = float(change.detach()) / float(kfac.predicted_change(gradients, steps))
    assert damping.ratio == pytest.approx(expected, rel=1e-12)


def test_with_the_exact_model_least_squares_keep_the_promise_to_rounding() -> None:
    model, x, y = regression()
    damping = LevenbergMarquardt(1e-8, interval=1)
    kfac = preconditioner(model, damping=damping)
    quadratic = QuadraticModel(kfac, loss="mse")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        model.zero_grad()
        F.mse_loss(model(x), y).backward()
        with damping.adapt(kfac, lambda: F.mse_loss(model(x), y), quadratic=quadratic):
            with quadratic.step(lambda: model(x)):
                kfac.step()
            optimizer.step()
        assert damping.ratio == pytest.approx(1, rel=1e-6)


def test_a_model_without_a_step_in_the_block_is_refused() -> None:
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1, interval=1)
    kfac = preconditioner(model, damping=damping)
    quadratic = QuadraticModel(kfac, loss="mse")
    F.mse_loss(model(x), y).backward()
    with quadratic.step(lambda: model(x)):
        kfac.step()
    with pytest.raises(RuntimeError, match="adapt: quadratic must take its step in the block"):
        with damping.adapt(kfac, lambda: F.mse_loss(model(x), y), quadratic=quadratic):
            pass


def snapshot(*parts: Any) -> list[Any]:
    return [copy.deepcopy(part.state_dict()) for part in parts]


@pytest.mark.parametrize("rates", [(0.01, 9.0), (0.01, math.inf)], ids=str)
def test_a_step_that_raises_the_loss_is_undone(rates: tuple[float, float]) -> None:
    model, x, y = Net(), images(), torch.randint(3, (5,))
    damping = LevenbergMarquardt(0.1, interval=1)
    kfac = preconditioner(model, damping=damping, skip=["head"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)

    def take_step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        with damping.adapt(kfac, loss_of, undo=[optimizer]):
            kfac.step()
            optimizer.step()

    def loss_of() -> Tensor:
        return F.cross_entropy(model(x), y)

    optimizer.param_groups[0]["lr"] = rates[0]
    take_step()
    assert not damping.rejected
    optimizer.param_groups[0]["lr"] = rates[1]
    before, raised = snapshot(model, optimizer), damping.damping
    take_step()
    assert damping.rejected and kfac.steps == 2 and damping.damping > raised
    for old, new in zip(before, snapshot(model, optimizer), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    optimizer.param_groups[0]["lr"] = rates[0]
    expected = copy.deepcopy(model)
    take_step()
    assert not damping.rejected
    assert not torch.equal(model.head.weight, expected.head.weight)


def test_a_first_step_that_is_undone_leaves_the_optimizer_without_a_state() -> None:
    model, x, y = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=40.0, momentum=0.9)
    damping = LevenbergMarquardt(0.1, interval=1)
    kfac = preconditioner(model, damping=damping)
    F.mse_loss(model(x), y).backward()
    with damping.adapt(kfac, lambda: F.mse_loss(model(x), y), undo=[optimizer]):
        kfac.step()
        optimizer.step()
    assert damping.rejected and optimizer.state_dict()["state"] == {}


def test_a_step_that_is_undone_is_no_step_before_to_the_exact_model() -> None:
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1, interval=1)
    kfac = preconditioner(model, damping=damping)
    quadratic = QuadraticModel(kfac, loss="mse")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def loss_of() -> Tensor:
        return F.mse_loss(model(x), y)

    for rate, rejected in ((1.0, False), (9.0, True)):
        optimizer.param_groups[0]["lr"] = rate
        model.zero_grad()
        loss_of().backward()
        before = quadratic.state_dict()
        with damping.adapt(kfac, loss_of, quadratic=quadratic, undo=[optimizer]):
            with quadratic.step(lambda: model(x)):
                kfac.step()
            optimizer.step()
        assert damping.rejected == rejected
    torch.testing.assert_close(quadratic.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("loss_after", [-math.inf, math.inf, math.nan])
def test_a_change_that_is_not_finite_is_bad(loss_after: float) -> None:
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1, interval=1)
    kfac = preconditioner(model, damping=damping)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    F.mse_loss(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    losses = iter([torch.tensor(1.0), torch.tensor(loss_after)])
    with damping.adapt(kfac, lambda: next(losses), undo=[optimizer]):
        kfac.step()
        optimizer.step()
    assert damping.rejected and damping.damping == pytest.approx(0.1 / 0.95)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_step_that_is_not_looked_at_is_not_rejected() -> None:
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1, interval=2)
    kfac = preconditioner(model, damping=damping)
    optimizer = torch.optim.SGD(model.parameters(), lr=40.0)
    rejected = []
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        with damping.adapt(kfac, lambda: F.mse_loss(model(x), y), undo=[optimizer]):
            kfac.step()
            if kfac.steps != 2:
                optimizer.step()
        rejected.append(damping.rejected)
    assert rejected == [True, False, True]


@pytest.mark.parametrize("exact", [False, True])
def test_a_step_that_a_scaler_skips_leaves_the_damping(exact: bool) -> None:
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1, interval=1)
    kfac = preconditioner(model, damping=damping)
    quadratic = QuadraticModel(kfac, loss="mse") if exact else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(F.mse_loss(model(x), y)).backward()
    model.bias.grad[0] = math.inf
    scaler.unscale_(optimizer)
    before = copy.deepcopy(model.state_dict())
    with damping.adapt(
        kfac, lambda: F.mse_loss(model(x), y), quadratic=quadratic, undo=[optimizer]
    ):
        with quadratic.step(lambda: model(x)) if quadratic else nullcontext():
            kfac.step()
        scaler.step(optimizer)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert damping.damping == 0.1 and damping.ratio is None and not damping.rejected


def ratio_of_scaled(scale: float) -> float | None:
    """Of the second step of an attached preconditioner, in whose block the scale is divided out."""
    torch.manual_seed(0)
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1, interval=1)
    kfac = preconditioner(model, damping=damping, loss_scale=scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x), y)).backward()
        with damping.adapt(kfac, lambda: F.mse_loss(model(x), y)):
            scaler.step(optimizer)
        scaler.update()
    assert not kfac._listeners
    return damping.ratio


def test_a_scale_that_is_divided_out_in_the_block_does_not_count() -> None:
    assert ratio_of_scaled(2.0**16) == pytest.approx(ratio_of_scaled(1.0), rel=1e-9)


def test_gradients_that_a_fused_optimizer_unscales_are_refused() -> None:
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1, interval=1)
    kfac = preconditioner(model, damping=damping, loss_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    kfac.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(F.mse_loss(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="gradients must be unscaled for .* adapt"):
        with damping.adapt(kfac, lambda: F.mse_loss(model(x), y)):
            scaler.step(optimizer)
    assert not kfac._listeners


def test_gradients_that_come_in_the_block_are_refused_without_an_exact_model() -> None:
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1, interval=1)
    kfac = preconditioner(model, damping=damping)
    with pytest.raises(RuntimeError, match=r"backward\(\) must be called before the block"):
        with damping.adapt(kfac, lambda: F.mse_loss(model(x), y)):
            F.mse_loss(model(x), y).backward()


def test_steps_stay_where_nothing_is_to_be_undone() -> None:
    damping, losses = run(4.0, 2, interval=1)
    assert losses[1] > losses[0] and not damping.rejected


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [(0.76, 0.5**3), (0.75, 1), (0.25, 1), (0.24, 2**3), (-1.0, 2**3), (float("nan"), 2**3)],
)
def test_thresholds(ratio: float, factor: float) -> None:
    damping = LevenbergMarquardt(1.0, interval=3, decay=0.5)
    damping.update(ratio)
    assert damping(7) == damping.damping == factor


def test_the_loss_is_evaluated_only_when_due() -> None:
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1, interval=3)
    kfac = preconditioner(model, damping=damping)
    calls = []

    def loss_of() -> Tensor:
        calls.append(kfac.steps)
        return F.mse_loss(model(x), y)

    for _ in range(5):
        F.mse_loss(model(x), y).backward()
        with damping.adapt(kfac, loss_of):
            kfac.step()
    assert calls == [0, 1, 3, 4]  # before and after the steps 0 and 3


def test_a_state_is_continued() -> None:
    damping = LevenbergMarquardt(0.5)
    damping.update(0.9)
    other = LevenbergMarquardt(0.5)
    other.load_state_dict(damping.state_dict())
    assert (other.damping, other.ratio) == (damping.damping, 0.9)
    for state in ({}, {"damping": None, "ratio": 1.0}, {"damping": 1e9, "ratio": None}):
        with pytest.raises(ValueError, match="load_state_dict: "):
            other.load_state_dict(state)
    assert other.damping == damping.damping


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping must be in bounds .*, got 0.0"),
        ({"interval": 0}, "interval must be an int from 1, got 0"),
        ({"decay": 1.0}, r"decay must be in \(0, 1\), got 1.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LevenbergMarquardt: {message}"):
        LevenbergMarquardt(**options)


def test_adapting_leaves_running_statistics_as_after_one_pass() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    damping = LevenbergMarquardt(0.1, interval=1)
    kfac = KFAC(model, damping=damping, factor_update_steps=1, inverse_update_steps=1)
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    F.mse_loss(model(x), y).backward()
    expected = [buffer.clone() for buffer in model.buffers()]
    with damping.adapt(kfac, lambda: F.mse_loss(model(x), y)):
        kfac.step()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert damping.ratio is not None
    assert all(map(torch.equal, model.buffers(), expected))


def test_adapting_takes_buffers_of_every_kind() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("expanded", torch.zeros(1).expand(4))
            self.register_buffer("mean", torch.zeros(2))
            self.register_buffer("absent", None)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            return y - self.mean

    model, damping = Buffered(), LevenbergMarquardt(0.1, interval=1)
    kfac = KFAC(model, damping=damping, factor_update_steps=1, inverse_update_steps=1)
    x = torch.randn(8, 3)
    model(x).square().mean().backward()
    expected = model.mean.clone()
    with damping.adapt(kfac, lambda: model(x).square().mean()):
        kfac.step()
    assert torch.equal(model.mean, expected)


class Dropping(nn.Module):
    """Dropout between a batch normalisation and a layer that is not preconditioned."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


def calibrated(
    candidates: list[float], first: float = 1.0
) -> tuple[LevenbergMarquardt, nn.Module, list[float]]:
    """Three steps after a calibration; the damping, the model and each candidate's loss."""
    torch.manual_seed(0)
    model, x, y = Dropping(), torch.randn(32, 3), torch.randint(2, (32,))
    damping, losses = LevenbergMarquardt(first), []
    options = {"factor_update_steps": 1, "inverse_update_steps": 2, "skip": ["head"]}
    kfac = KFAC(model, damping=damping, fisher="mc", **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)

    def loss_of() -> Tensor:
        losses.append(F.cross_entropy(model(x), y))
        return losses[-1]

    def take_step() -> None:
        optimizer.zero_grad()
        outputs = model(x)
        kfac.update_curvature(outputs, loss="cross_entropy")
        F.cross_entropy(outputs, y).backward()
        kfac.step()
        optimizer.step()

    outputs = model(x)
    F.cross_entropy(outputs, y).backward()
    old = {p: (p.grad, p.grad.clone()) for p in model.parameters()}
    if candidates:
        damping.calibrate(kfac, take_step, loss_of, candidates, undo=[optimizer])
    assert all(p.grad is own and torch.equal(own, values) for p, (own, values) in old.items())
    assert kfac.steps == 0
    for _ in range(3):
        take_step()
    return damping, model, [float(loss) for loss in losses]


def test_the_first_damping_is_the_candidate_with_the_lowest_loss() -> None:
    candidates = [10.0, 1e-3, 0.1, 1e-8]
    damping, _, losses = calibrated(candidates)
    assert len(set(losses)) == 4
    assert damping.damping == candidates[losses.index(min(losses))]
    assert calibrated(candidates[::-1])[2] == losses[::-1]  # none sees those before it


def test_a_calibration_leaves_no_trace_but_the_damping() -> None:
    damping, model, _ = calibrated([10.0, 1e-3, 0.1])
    _, expected, _ = calibrated([], first=damping.damping)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("end", ["take_step", "loss_of"])
def test_a_calibration_that_is_interrupted_leaves_all_as_before(end: str) -> None:
    model, y = Dropping(), torch.randint(2, (32,))
    damping = LevenbergMarquardt(0.5)
    kfac = KFAC(model, damping=damping, factor_update_steps=1, inverse_update_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(32, 3)

    def loss_of() -> Tensor:
        if kfac.steps and end == "loss_of":
            raise KeyboardInterrupt
        return F.cross_entropy(model(x), y)

    def take_step() -> None:
        loss_of().backward()
        kfac.step()
        optimizer.step()
        if end == "take_step":
            raise KeyboardInterrupt

    before, numbers = snapshot(model, optimizer), torch.get_rng_state()
    fresh = kfac.state_dict()
    with pytest.raises(KeyboardInterrupt):
        damping.calibrate(kfac, take_step, loss_of, [0.1, 1.0], undo=[optimizer])
    for old, new in zip(before, snapshot(model, optimizer), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    assert kfac.state_dict() == fresh
    assert damping.damping == 0.5 and torch.equal(torch.get_rng_state(), numbers)
    assert all(p.grad is None for p in model.parameters())


def test_a_calibration_that_would_not_act_is_refused() -> None:
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1)
    kfac = preconditioner(model, damping=damping)

    def loss_of() -> Tensor:
        return F.mse_loss(model(x), y)

    with pytest.raises(ValueError, match="kfac must have this as its damping, got <"):
        LevenbergMarquardt(0.2).calibrate(kfac, loss_of, loss_of, [1.0], undo=[])
    loss_of().backward()
    kfac.step()
    with pytest.raises(RuntimeError, match="must come before the first step, got 1 steps"):
        damping.calibrate(kfac, loss_of, loss_of, [1.0], undo=[])


def test_candidates_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ValueError, match=r"candidates must be in \(1e-08, 10000.0\), got \[0\]"):
        calibrated([0])
    model, x, y = regression()
    damping = LevenbergMarquardt(0.1)
    kfac = preconditioner(model, damping=damping)
    with pytest.raises(ValueError, match="candidates must hold one that leaves the loss finite"):
        damping.calibrate(
            kfac, lambda: None, lambda: F.mse_loss(model(x), y) * math.nan, [1.0, 2.0], undo=[]
        )
    assert damping.damping == 0.1
