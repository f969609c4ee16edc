"""A loaded preconditioner continues bit for bit, and refuses a state that does not fit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net, images
from torch import Tensor, nn

from kfac_fast import KFAC

pytestmark = pytest.mark.usefixtures("one_thread")
State = dict[str, Any]


class Run:
    """A network in training; its batches depend on the step alone."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        steps = {"factor_update_steps": 3, "inverse_update_steps": 4}
        self.kfac = KFAC(self.model, **{**steps, **options})
        self.kfac.attach(self.optimizer)

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            torch.manual_seed(100 + self.kfac.steps)
            self.optimizer.zero_grad()
            outputs = self.model(images())
            if self.kfac.fisher != "empirical":
                self.kfac.update_curvature(outputs, loss="cross_entropy")
            F.cross_entropy(outputs, torch.randint(3, (5,))).backward()
            self.optimizer.step()
        return self

    def parts(self) -> tuple[nn.Module, torch.optim.Optimizer, KFAC]:
        return self.model, self.optimizer, self.kfac


def saved_and_loaded(state: State | list[State]) -> Any:
    """Through a file that may hold nothing but tensors and plain containers."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flat(state: State) -> dict[str, Any]:
    """Every leaf by its path."""
    leaves: dict[str, Any] = {}
    for key, value in state.items():
        inner = flat(value) if isinstance(value, dict) else {"": value}
        leaves.update({f"{key}/{path}": leaf for path, leaf in inner.items()})
    return leaves


def assert_equal_states(one: State, two: State) -> None:
    one, two = flat(one), flat(two)
    assert one.keys() == two.keys()
    for path, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, two[path]) and value.dtype == two[path].dtype, path
        else:
            assert value == two[path], path


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "kl-clip": {"kl_clip": 1e-3, "learning_rate": 0.05},
    "grafting": {"grafting": "adam"},
    "reduce-plain": {"approx": "reduce", "damping_mode": "plain"},
    "mc": {"fisher": "mc", "mc_samples": 2},
    "curvature-propagation": {"fisher": "curvature-propagation"},
    "schedules": {"damping": lambda step: 0.1 / (step + 1)},
}


@pytest.mark.parametrize("saved_at", [0, 3, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    options: dict[str, Any], saved_at: int
) -> None:
    whole = Run(**options).train(10)
    stopped, resumed = Run(**options).train(saved_at), Run(**options)
    states = saved_and_loaded([part.state_dict() for part in stopped.parts()])
    for part, state in zip(resumed.parts(), states, strict=True):
        part.load_state_dict(state)
    resumed.train(10 - saved_at)
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert_equal_states(whole.kfac.state_dict(), resumed.kfac.state_dict())


def test_a_loaded_state_is_the_saved_one() -> None:
    run = Run(grafting="adam").train(4)
    other = Run(grafting="adam")
    other.kfac.load_state_dict(saved_and_loaded(run.kfac.state_dict()))
    assert_equal_states(run.kfac.state_dict(), other.kfac.state_dict())
    assert run.kfac.steps == other.kfac.steps == 4


def test_a_state_is_a_snapshot() -> None:
    run = Run(grafting="adam").train(4)
    state = run.kfac.state_dict()
    kept = copy.deepcopy(state)
    run.train(4)
    assert_equal_states(state, kept)


def test_a_detached_preconditioner_still_saves_its_state() -> None:
    run = Run().train(4)
    state = run.kfac.state_dict()
    run.kfac.detach()
    assert_equal_states(run.kfac.state_dict(), state)


def test_a_state_before_the_first_batch_forgets_everything() -> None:
    fresh, run = Run().kfac.state_dict(), Run().train(4)
    run.kfac.load_state_dict(saved_and_loaded(fresh))
    assert_equal_states(run.kfac.state_dict(), fresh)
    assert "no factors yet" in run.kfac.summary()


def test_a_state_of_another_precision_is_converted() -> None:
    run = Run().train(4)
    model = Net().float()
    kfac = KFAC(model)
    kfac.load_state_dict(run.kfac.state_dict())
    F.cross_entropy(model(images().float()), torch.randint(3, (5,))).backward()
    kfac.step()
    mean = kfac.state_dict()["layers"]["head"]["input"]["mean"]
    expected = run.kfac.state_dict()["layers"]["head"]["input"]["mean"].float()
    assert kfac.steps == 5 and torch.equal(mean, expected)


def head_input(state: State) -> State:
    return state["layers"]["head"]["input"]


BAD_STATES: dict[str, tuple[Callable[[State], Any], str]] = {
    "no-version": (lambda s: s.pop("version"), "version must be 5, got None"),
    "version": (lambda s: s.update(version=1), "version must be 5, got 1"),
    "no-layers": (
        lambda s: s.pop("layers"),
        "state must hold approximations, layers, options, steps and version",
    ),
    "no-steps": (
        lambda s: s.pop("steps"),
        "state must hold approximations, layers, options, steps and version",
    ),
    "unknown-key": (
        lambda s: s.update(more=1),
        "state must hold approximations, layers, options, steps and version",
    ),
    "bad-steps": (lambda s: s.update(steps="many"), "many"),
    "layers-are-none": (lambda s: s.update(layers=None), "layers must be of .*, got None"),
    "layer-is-a-list": (lambda s: s["layers"].update(head=[]), r"head must hold parts, got \[\]"),
    "part-is-none": (lambda s: s["layers"]["head"].update(input=None), "head must hold parts"),
    "field-is-none": (lambda s: head_input(s).update(mean=None), "mean must be a tensor, got None"),
    "approximation": (
        lambda s: s["approximations"].update(head="reduce"),
        "approximation of 'head' must be 'expand', got 'reduce'",
    ),
    "layer-missing": (lambda s: s["layers"].pop("head"), "layers must be of .*'head'"),
    "unknown-layer": (lambda s: s["layers"].update(tail={}), "layers must be of .* got .*'tail'"),
    "part-missing": (
        lambda s: s["layers"]["head"].pop("gradient"),
        "head must hold .*'gradient', .* got .*'norm'",
    ),
    "field-missing": (lambda s: head_input(s).pop("mean"), "head.input must hold .*'mean'"),
    "unknown-field": (lambda s: head_input(s).update(more=0), "head.input must hold .*'more'"),
    "shape": (
        lambda s: head_input(s).update(mean=torch.eye(4)),
        r"head.input.mean must have shape \(5, 5\), got \(4, 4\)",
    ),
    "norm-shape": (
        lambda s: s["layers"]["head"]["norm"].update(second_moment=torch.ones(3, 4)),
        r"head.norm.second_moment must have shape \(3, 5\), got \(3, 4\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    change: Callable[[State], Any], message: str
) -> None:
    run = Run(grafting="adam").train(2)
    before = copy.deepcopy(run.kfac.state_dict())
    state = copy.deepcopy(Run(grafting="adam").train(5).kfac.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        run.kfac.load_state_dict(state)
    assert_equal_states(run.kfac.state_dict(), before)
    assert run.kfac.steps == 2


@pytest.mark.parametrize("state", [None, [], "state"])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="load_state_dict: state must be a dictionary, got"):
        KFAC(nn.Linear(2, 2)).load_state_dict(state)


@pytest.mark.parametrize("bias", [False, True])
def test_a_state_of_a_layer_with_other_features_is_refused(bias: bool) -> None:
    def trained(inputs: int, has_bias: bool) -> KFAC:
        model = nn.Linear(inputs, 2, bias=has_bias)
        kfac = KFAC(model)
        model(torch.randn(4, inputs)).square().mean().backward()
        kfac.step()
        return kfac

    other = trained(3, not bias) if bias else trained(4, bias)
    with pytest.raises(ValueError, match="input.mean must have shape"):
        trained(3, bias).load_state_dict(other.state_dict())
