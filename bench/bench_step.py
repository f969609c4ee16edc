"""Training steps of whole networks: SGD alone, and behind K-FAC."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import count
from statistics import median
from typing import Literal, get_args

import machine
import memory
import pytest
import torch
import torch.nn.functional as F
from errors import check_ways, relative_error
from measure import rounds_in, served
from networks import NETWORKS
from pytest_benchmark.fixture import BenchmarkFixture
from record import StepRecord
from timers import timer_of
from torch import Tensor, nn

import kfac_fast

Kind = Literal["plain", "update", "refresh"]
# Of 100 steps with factors updated in every tenth, inverses refreshed in the first.
SHARES: dict[Kind, float] = {"plain": 0.90, "update": 0.09, "refresh": 0.01}
# A step takes longer than an operator, and a share of it is asked for: more than --seconds.
TIMES_SECONDS = 6
FEWEST_ROUNDS, MOST_ROUNDS = 9, 100  # of five, a slow step or two move the median
REFERENCE_EVERY = 4
PASSES = 100


class Training:
    """Steps of SGD on one batch. The learning rate is 0, so that they all compute the same.

    Args:
        model: Network, which is copied.
        inputs: The batch.
        approx: That of K-FAC; None for SGD alone.
        implementation: What serves K-FAC's operators; None for the preferred ones.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        approx: str | None = None,
        implementation: str | None = None,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.inputs = inputs
        self.targets = torch.arange(len(inputs), device=inputs.device) % 10
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)
        self.implementation = implementation
        self.kfac: kfac_fast.KFAC | None = None
        self._intervals = 1, 1
        if approx is not None:
            self.kfac = kfac_fast.KFAC(
                self.model,
                approx=approx,
                factor_update_steps=lambda step: self._intervals[0],
                inverse_update_steps=lambda step: self._intervals[1],
            )

    def passes(self, examples: int | None = None) -> None:
        """Forward and backward pass of some of the examples."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.inputs[:examples]), self.targets[:examples]).backward()

    def step(self, kind: Kind = "plain") -> None:
        """A step in which K-FAC has this to do."""
        never = 10**9
        self._intervals = {"plain": (never, never), "update": (1, never), "refresh": (1, 1)}[kind]
        with kfac_fast.use(self.implementation) if self.implementation else nullcontext():
            self.passes()
            if self.kfac is not None:
                self.kfac.step()
        self.optimizer.step()

    def factors(self) -> list[Tensor]:
        """The running averages of all layers."""
        layers = self.kfac.state_dict()["layers"].values()
        return [part["mean"] for layer in layers for part in layer.values() if "mean" in part]


def activation_bytes(training: Training) -> int:
    """Bytes that the forward pass keeps for the backward pass, the parameters left out."""
    sizes: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        training.passes()
    for parameter in training.model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def hooks_seconds(sgd: Training, ours: Training, timer: Callable[..., float]) -> float:
    """Seconds that hooks with nothing due add to the passes, by the best of many.

    They do the same whatever the batch, so it is two examples here, beside which they show.
    """
    ours.step("plain")  # leaves the intervals so that nothing is due
    best = {arm: math.inf for arm in (sgd, ours)}
    for _ in range(PASSES):
        for arm in best:
            best[arm] = min(best[arm], timer(partial(arm.passes, 2)))
    return best[ours] - best[sgd]


def time_in_turn(
    benchmark: BenchmarkFixture,
    calls: dict[str, Callable[[], None]],
    every: dict[str, int],
    timer: Callable[..., float],
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of each call, one of each in a round, or in ``every`` so many rounds.

    pytest-benchmark's own statistics are of a whole round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    numbers = count()

    def run_round() -> None:
        number = next(numbers)
        for name, call in calls.items():
            if number % every.get(name, 1) == 0:
                seconds[name].append(timer(call))

    benchmark.pedantic(run_round, rounds=rounds)
    return seconds


def ratios(seconds: dict[str, list[float]], side: str, every: dict[str, int]) -> dict[str, float]:
    """Medians over the rounds of each kind of step over SGD's in the same round.

    Args:
        seconds: Of ``"sgd"``, in every round, and of a side's kinds of step.
        side: ``"ours"`` or ``"reference"``.
        every: As of :func:`time_in_turn`.
    """
    found = {}
    for kind in SHARES:
        name = f"{side} {kind}"
        sgd = seconds["sgd"][:: every.get(name, 1)]
        found[kind] = median(own / alone for own, alone in zip(seconds[name], sgd, strict=True))
    return found


def at_intervals(kinds: dict[str, float]) -> float:
    """The mean of ratios by kind over 100 steps."""
    return sum(share * kinds[kind] for kind, share in SHARES.items())


def peak_above_sgd(shape: str, approx: str, implementation: str | None) -> int:
    """Bytes by which the peak of the dearest kind of step is above that of SGD's."""
    make, batch = NETWORKS[shape]
    model, inputs = make(), torch.randn(batch)
    arms = Training(model, inputs), Training(model, inputs, approx, implementation)
    sgd, ours = (memory.least_peak_growth(partial(arm.step, "refresh")) for arm in arms)
    return max(ours - sgd, 0)


@pytest.mark.parametrize("approx", get_args(kfac_fast.layers.Approximation))
@pytest.mark.parametrize("shape", NETWORKS)
def bench_step(
    shape: str,
    approx: str,
    benchmark: BenchmarkFixture,
    pytestconfig: pytest.Config,
    device: str,
) -> None:
    make, batch = NETWORKS[shape]
    model, inputs = make().to(device), torch.randn(batch, device=device)
    sgd = Training(model, inputs)
    ours = Training(model, inputs, approx)
    reference = Training(model, inputs, approx, "reference")
    for arm in (sgd, ours, reference):
        arm.step("refresh")  # warms up
    error = relative_error(ours.factors(), [f.double() for f in reference.factors()])
    check_ways({"ours": error})

    timer = timer_of(device)
    calls: dict[str, Callable[[], None]] = {"sgd": sgd.step}
    for side, arm in (("ours", ours), ("reference", reference)):
        calls |= {f"{side} {kind}": partial(arm.step, kind) for kind in SHARES}
    every = {name: REFERENCE_EVERY for name in calls if name.startswith("reference")}
    took = sum(timer(call) / every.get(name, 1) for name, call in calls.items())
    given = TIMES_SECONDS * pytestconfig.getoption("seconds")
    rounds = rounds_in(given, took, FEWEST_ROUNDS, MOST_ROUNDS)
    seconds = time_in_turn(benchmark, calls, every, timer, rounds)
    our_ratios, reference_ratios = (ratios(seconds, side, every) for side in ("ours", "reference"))
    sgd_ms = 1e3 * median(seconds["sgd"])
    gradient = torch.empty(1, 1, device=device)
    implementation, _ = served(kfac_fast.explain("gram", gradient)) or ("none", None)
    sizes = ours.kfac.memory()
    peak_mb = None
    if not memory.missing(device):
        named = shape, approx, pytestconfig.getoption("impl")
        peak_mb = memory.in_new_process(peak_above_sgd, *named) / 1e6
    record = StepRecord(
        op="step",
        shape=shape,
        approx=approx,
        dtype="float32",
        implementation=implementation,
        rounds=rounds,
        sgd_ms=sgd_ms,
        hooks_ms=1e3 * hooks_seconds(sgd, ours, timer),
        **{f"{kind}_ratio": ratio for kind, ratio in our_ratios.items()},
        intervals_ratio=at_intervals(our_ratios),
        reference_intervals_ratio=at_intervals(reference_ratios),
        reference_refresh_ratio=reference_ratios["refresh"],
        state_mb=(sizes["factors"] + sizes["inverses"]) / 1e6,
        activations_mb=activation_bytes(sgd) / 1e6,
        peak_mb=peak_mb,
        error=error,
        **machine.facts(device),
    )
    benchmark.extra_info.update(asdict(record))
