"""Rates of the exact quadratic model, against the dense Gauss-Newton matrix."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gauss_newton import flat, gauss_newton, normalised, trained
from host import never_waits
from nets import Net, images, preconditioner
from plain_kfac import assert_solved
from torch import Tensor, nn

from kfac_fast import KFAC, QuadraticModel
from kfac_fast.losses import MSE, WeightedSum
from kfac_fast.quadratic import _minimum

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What PyTorch's own compiler does, and hides outside of tests.
    pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning"),
]
DAMPING = 0.05


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def gradients(model: nn.Module) -> Tensor:
    return flat({name: p.grad for name, p in trained(model).items()})


def test_several_losses_are_one_whose_labels_may_be_learned() -> None:
    model = nn.Linear(6, 5).double()
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, -100, 1])
    labels = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def loss_of(outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs[:, :3], y) + 0.5 * F.mse_loss(outputs[:, 3:], labels)

    dense = gauss_newton(model, x, loss_of)
    kfac = KFAC(model, fisher="exact", damping=DAMPING)
    loss = WeightedSum(["cross_entropy", "mse"], weights=[1.0, 0.5])
    quadratic = QuadraticModel(kfac, loss=loss)

    def outputs_of() -> tuple[Tensor, Tensor]:
        return tuple(model(x).split([3, 2], 1))

    kfac.update_curvature(outputs_of(), loss=loss, targets=(y, labels))
    loss_of(model(x)).backward()
    gradient = gradients(model)
    with quadratic.step(outputs_of, targets=(y, labels)):
        kfac.step()
        step = gradients(model)
    expected = (step @ gradient) / (step @ dense @ step + DAMPING * step @ step)
    assert_solved(quadratic.learning_rate[None], expected[None], 10)


def step(
    model: nn.Module,
    kfac: KFAC,
    quadratic: QuadraticModel | None,
    x: Tensor,
    y: Tensor,
    loss_function: Callable[..., Tensor] = F.cross_entropy,
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of SGD; the gradient, the preconditioned one, and the change of the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.zero_grad()
    loss_function(model(x), y).backward()
    raw, before = gradients(model), flat(trained(model))
    if quadratic is None:
        kfac.step()
        return raw, gradients(model), torch.zeros_like(before)
    with quadratic.step(lambda: model(x), targets=y):
        kfac.step()
        direction = gradients(model)
    optimizer.step()
    return raw, direction, flat(trained(model)) - before


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_both_rates_are_those_of_the_dense_model(penalty: float) -> None:
    model, x, y = Net(), images(), torch.randint(3, (5,))
    kfac = preconditioner(model, skip=["head"])
    quadratic = QuadraticModel(kfac, loss="cross_entropy", l2_penalty=penalty)

    def loss_of(outputs: Tensor, y: Tensor) -> Tensor:
        length = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(outputs, y) + penalty / 2 * length

    past = None
    for _ in range(3):
        dense = gauss_newton(model, x, lambda f: F.cross_entropy(f, y))
        dense += (DAMPING + penalty) * torch.eye(len(dense)).double()
        raw, direction, change = step(model, kfac, quadratic, x, y, loss_of)
        span = torch.stack([-direction] if past is None else [-direction, past], 1)
        rates = -torch.linalg.solve(span.T @ dense @ span, span.T @ raw)
        assert_solved(change, span @ rates)
        assert_solved(quadratic.learning_rate[None], rates[:1])
        expected = torch.zeros(1).double() if past is None else rates[1:]
        assert_solved(quadratic.momentum[None], expected)
        model_change = raw @ change + change @ dense @ change / 2
        assert_solved(quadratic.predicted_change[None], model_change[None])
        past = change


def test_an_accumulated_sum_has_the_steps_of_the_sum() -> None:
    model, x, y = Net(), images(4), torch.randint(3, (4,))
    models = [model, copy.deepcopy(model)]
    kfacs = [
        preconditioner(net, loss_reduction="sum", accumulation_steps=count)
        for net, count in zip(models, (1, 2), strict=True)
    ]
    dense = gauss_newton(model, x, lambda f: F.cross_entropy(f, y, reduction="sum")) / 2
    dense += DAMPING / 2 * torch.eye(len(dense)).double()
    changes = []
    for net, kfac in zip(models, kfacs, strict=True):
        quadratic = QuadraticModel(kfac, loss="cross_entropy")
        count = kfac.accumulation_steps
        for inputs, labels in zip(x.chunk(count), y.chunk(count), strict=True):
            (F.cross_entropy(net(inputs), labels, reduction="sum") / count).backward()
        raw = gradients(net)
        with quadratic.step(lambda net=net: net(x)):
            kfac.step()
            direction = gradients(net)
        changes.append(-gradients(net))
    assert_solved(changes[1], changes[0])
    expected = (direction @ raw) / (direction @ dense @ direction)
    assert_solved(quadratic.learning_rate[None], expected[None])
    model_change = raw @ changes[1] + changes[1] @ dense @ changes[1] / 2
    assert_solved(quadratic.predicted_change[None], model_change[None])


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    """Least squares, of which empirical K-FAC is no exact model, but the quadratic one is."""
    scales = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)
    x = torch.randn(64, 3, dtype=torch.float64) * scales
    return nn.Linear(3, 2, dtype=torch.float64), x, torch.randn(64, 2, dtype=torch.float64)


def test_least_squares_without_damping_goes_to_the_minimum_of_the_span() -> None:
    model, x, y = regression()
    kfac = preconditioner(model, damping=0)
    quadratic = QuadraticModel(kfac, loss="mse")
    past = None
    for _ in range(3):
        before = F.mse_loss(model(x), y).detach()
        _, direction, change = step(model, kfac, quadratic, x, y, F.mse_loss)
        model.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        assert_solved(quadratic.predicted_change[None], (loss.detach() - before)[None])
        for along in [direction] if past is None else [direction, past]:
            slope = along @ gradients(model)
            assert abs(slope) < 1e-12 * along.norm()
        past = change


def test_momentum_goes_further_in_as_many_steps() -> None:
    losses = []
    for momentum in (False, True):
        torch.manual_seed(0)
        model, x, y = regression()
        kfac = preconditioner(model, damping=1e-3, damping_mode="exact")
        quadratic = QuadraticModel(kfac, loss="mse", momentum=momentum)
        for _ in range(5):
            step(model, kfac, quadratic, x, y, F.mse_loss)
        assert (quadratic.momentum != 0) == momentum
        losses.append(F.mse_loss(model(x), y).detach() - least_squares(x, y))
    assert losses[1] < losses[0] / 10


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    return F.mse_loss(rows @ torch.linalg.lstsq(rows, y).solution, y)


def test_without_a_gradient_there_is_no_step() -> None:
    model, x = nn.Linear(3, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    kfac = preconditioner(model, fisher="forward-only")
    quadratic = QuadraticModel(kfac, loss="mse")
    for _ in range(2):
        _, _, change = step(model, kfac, quadratic, x, model(x).detach(), F.mse_loss)
        assert torch.equal(change, torch.zeros(8).double())
        assert quadratic.learning_rate == quadratic.momentum == quadratic.predicted_change == 0


@pytest.mark.parametrize("multiple", [-3.0, 0.0, 0.7])
def test_a_second_direction_that_is_the_first_again_leaves_its_minimum(multiple: float) -> None:
    curvature, slope = torch.tensor(0.3), torch.tensor(1.7)
    alpha, mu = _minimum(
        [slope, multiple * slope], [curvature, multiple * curvature, multiple**2 * curvature]
    )
    assert alpha == slope / curvature and mu == 0


def test_a_step_that_is_not_finite_is_no_step_before() -> None:
    model, x, y = Net(), images(), torch.randint(3, (5,))
    kfac = preconditioner(model)
    quadratic = QuadraticModel(kfac, loss="cross_entropy")
    F.cross_entropy(model(x), y).backward()
    model.head.weight.grad[0, 0] = math.inf  # a scaler skips the step
    with quadratic.step(lambda: model(x)):
        kfac.step()
    assert not all(p.grad.isfinite().all() for p in model.parameters())
    step(model, kfac, quadratic, x, y)
    assert quadratic.learning_rate > 0 and quadratic.momentum == 0
    assert quadratic.predicted_change < 0


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("broken", ["outputs", "direction"])
def test_a_model_that_is_not_finite_has_no_step(broken: str, momentum: bool) -> None:
    model, x, y = Net(), images(), torch.randint(3, (5,))
    kfac = preconditioner(model)
    quadratic = QuadraticModel(kfac, loss="cross_entropy", momentum=momentum)
    step(model, kfac, quadratic, x, y)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    factor = math.inf if broken == "outputs" else 1
    with quadratic.step(lambda: model(x) * factor):
        kfac.step()
        if broken == "direction":
            model.head.weight.grad[0, 0] = math.inf
    assert torch.equal(gradients(model), torch.zeros_like(gradients(model)))
    assert not quadratic.predicted_change.isfinite()
    step(model, kfac, quadratic, x, y)
    assert quadratic.learning_rate > 0 and quadratic.momentum == 0


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**24])
def test_the_length_of_a_direction_is_nothing_to_half_precision(scale: float) -> None:
    model, x, y = Net().float(), images().float(), torch.randint(3, (5,))
    kfac = preconditioner(model)
    rates, steps = [], []
    for factor in (1.0, scale):
        quadratic = QuadraticModel(kfac, loss="cross_entropy")
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

        def outputs_of() -> Tensor:
            with torch.autocast("cpu", torch.float16):
                return model(x)

        with quadratic.step(outputs_of):
            kfac.step()
            for parameter in model.parameters():
                parameter.grad *= factor
        rates.append(factor * quadratic.learning_rate)
        steps.append(gradients(model))
    assert rates[0] > 0 and torch.equal(*rates) and torch.equal(*steps)


@pytest.mark.parametrize("options", [{}, {"fisher": "forward-only"}], ids=str)
def test_its_passes_leave_no_trace(options: dict[str, Any]) -> None:
    x, y = torch.randn(6, 2, 6, 6, dtype=torch.float64), torch.randint(3, (6,))
    model = normalised()
    plain = copy.deepcopy(model)
    kfacs = [preconditioner(net, **options) for net in (model, plain)]
    quadratic = QuadraticModel(kfacs[0], loss="cross_entropy")
    for _ in range(2):
        step(model, kfacs[0], quadratic, x, y)
        step(plain, kfacs[1], None, x, y)
        assert all(map(torch.equal, model.buffers(), plain.buffers()))
        states = [kfac.state_dict()["layers"] for kfac in kfacs]
        for name, parts in states[0].items():
            for part, fields in parts.items():
                assert all(torch.equal(v, states[1][name][part][k]) for k, v in fields.items())
        plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_as_good_as_their_forward_passes(dtype: torch.dtype) -> None:
    x, y = images(), torch.randint(3, (5,))
    model = Net()
    lower = copy.deepcopy(model).to(dtype)
    rates = []
    for net, inputs in ((model, x), (lower, x.to(dtype))):
        kfac = preconditioner(net)
        quadratic = QuadraticModel(kfac, loss="cross_entropy")
        step(net, kfac, quadratic, inputs, y)
        rates.append(quadratic.learning_rate.double())
    assert abs(rates[1] / rates[0] - 1) < 50 * torch.finfo(dtype).eps


def test_the_host_does_not_wait() -> None:
    model, x, y = normalised(), torch.randn(6, 2, 6, 6, dtype=torch.float64), torch.arange(6) % 3
    kfac = preconditioner(model)
    quadratic = QuadraticModel(kfac, loss="cross_entropy")
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with never_waits(), quadratic.step(lambda: model(x), targets=y):
            kfac.step()


def test_a_run_is_resumed_bit_for_bit() -> None:
    model, x, y = Net(), images(), torch.randint(3, (5,))
    kfac = preconditioner(model)
    quadratic = QuadraticModel(kfac, loss="cross_entropy")
    for _ in range(2):
        step(model, kfac, quadratic, x, y)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, kfac, quadratic)], file)
    _, _, expected = step(model, kfac, quadratic, x, y)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    other = Net()
    kfac = preconditioner(other)
    resumed = QuadraticModel(kfac, loss="cross_entropy")
    for part, state in zip((other, kfac, resumed), states, strict=True):
        part.load_state_dict(state)
    _, _, change = step(other, kfac, resumed, x, y)
    assert torch.equal(change, expected) and resumed.momentum == quadratic.momentum != 0


def test_compiled_and_eager_runs_exchange_states() -> None:
    x, y = images(), torch.randint(3, (5,))
    models: list[nn.Module] = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    models[1] = torch.compile(models[1], backend="eager")
    kfacs = [preconditioner(model) for model in models]
    quadratics = [QuadraticModel(kfac, loss="cross_entropy") for kfac in kfacs]
    pairs = list(zip(models, kfacs, quadratics, strict=True))
    for run in pairs:
        step(*run, x, y)
    states = [quadratic.state_dict() for quadratic in quadratics]
    assert states[1]["previous"].keys() == trained(models[0]).keys()
    torch.testing.assert_close(*states, rtol=0, atol=0)
    for quadratic, state in zip(quadratics, reversed(states), strict=True):
        quadratic.load_state_dict(state)
    changes = [step(*run, x, y)[2] for run in pairs]
    assert torch.equal(*changes) and quadratics[0].momentum == quadratics[1].momentum != 0
    kfacs[1].detach()


def test_a_state_that_does_not_fit_is_refused() -> None:
    quadratic = QuadraticModel(preconditioner(Net()), loss="cross_entropy")
    for state, message in (
        ({}, "state must hold previous, got "),
        ({"previous": {"tail.bias": torch.zeros(3)}}, r"got others \['tail.bias'\]"),
        ({"previous": {"head.bias": torch.zeros(2)}}, r"got others \['head.bias'\]"),
    ):
        with pytest.raises(ValueError, match=f"load_state_dict: .*{message}"):
            quadratic.load_state_dict(state)
    assert quadratic.state_dict() == {"previous": {}}


class OfLogits(MSE):
    """Squared errors of outputs in an object of its own kind."""

    def root(self, outputs: SimpleNamespace, targets: Tensor | None) -> Tensor:
        return super().root(outputs.logits, targets)

    def terms(self, outputs: SimpleNamespace, targets: Tensor | None) -> int:
        return super().terms(outputs.logits, targets)


def test_what_cannot_be_right_is_refused() -> None:
    model, x, y = Net(), images(), torch.randint(3, (5,))
    kfac = preconditioner(model)
    with pytest.raises(ValueError, match="l2_penalty must be a number from 0, got -1"):
        QuadraticModel(kfac, loss="mse", l2_penalty=-1)
    with pytest.raises(ValueError, match="must have the loss_reduction 'mean'"):
        QuadraticModel(kfac, loss=nn.MSELoss(reduction="sum"))
    quadratic = QuadraticModel(kfac, loss="cross_entropy")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="parameters must not change in the block"):
        with quadratic.step(lambda: model(x)):
            kfac.step()
            optimizer.step()
    with pytest.raises(RuntimeError, match="must be called once in the block, got 0 calls"):
        with quadratic.step(lambda: model(x)):
            pass
    model.zero_grad()
    with pytest.raises(RuntimeError, match="must be called before the block, got no .grad"):
        with quadratic.step(lambda: model(x)):
            pass
    model.head.bias.grad = torch.ones(3).double().to_sparse()
    with pytest.raises(ValueError, match=r"must be dense, got sparse ones of \['head.bias'\]"):
        with quadratic.step(lambda: model(x)):
            pass
    model.zero_grad()
    outputs = model(x).detach()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="outputs_of must return outputs that depend on"):
        with quadratic.step(lambda: outputs):
            kfac.step()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="tensors or tuples, lists and dicts of them"):
        with QuadraticModel(kfac, loss=OfLogits()).step(lambda: SimpleNamespace(logits=model(x))):
            kfac.step()
    kfac.attach(optimizer)
    with pytest.raises(RuntimeError, match="got one that is attached to an optimizer"):
        with quadratic.step(lambda: model(x)):
            pass
