"""One benchmark: choose the baseline, check the errors, time both in turn, make the record."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from statistics import median
from typing import Any

import machine
import memory
import pytest
import torch
from baselines import Ways
from errors import check_budget, check_ways, relative_error
from pytest_benchmark.fixture import BenchmarkFixture
from record import Record
from timers import Timer, timer_of
from torch import Tensor

import kfac_fast

Call = Callable[[], Any]

RATIO_FROM_MS = 0.2  # below this time of the baseline the added time counts, not the ratio
FEWEST_ROUNDS, MOST_ROUNDS = 5, 500
CLOSE = 1.2  # times the best time in the trial: which of two ways is faster, the rounds must say


@dataclass(frozen=True)
class Case:
    """A call to benchmark.

    Attributes:
        op: Name of the operator.
        shape: Name of the shape.
        arguments: The operator's positional arguments.
        options: Its keyword arguments but ``out``.
        out: What ``out`` holds at the start; never written.
        ways: The ways to the same result in plain PyTorch. One that reads other tensors than the
            arguments has them as its ``inputs``.
        flops: Operations of the definition, symmetry used.
        beside: Calls whose times are recorded beside ours, because a bar names them or is made of
            them. They take ``out`` like ways; their results are not looked at.
        peaks: Calls whose peak memory is recorded beside ours.
        compared: What of the floating-point results is compared with float64, where they are not
            unique.
        moved: Bytes that must be read or written; those of the arguments and the result if None.
    """

    op: str
    shape: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    out: Tensor | list[Tensor]
    ways: Ways
    flops: int
    beside: Ways = field(default_factory=dict, kw_only=True)
    peaks: Ways = field(default_factory=dict, kw_only=True)
    compared: Callable[[list[Tensor]], list[Tensor]] = field(default=list, kw_only=True)
    moved: int | None = field(default=None, kw_only=True)

    def call(self, arguments: Sequence[Any], out: Tensor | list[Tensor]) -> Call:
        """The call of the public operator."""
        return partial(getattr(kfac_fast, self.op), *arguments, **self.options, out=out)

    def bound(self, ways: Ways) -> dict[str, Call]:
        """Calls of ``ways``, each with a result of its own."""
        return {
            name: partial(way, map_tensors(Tensor.clone, self.out)) for name, way in ways.items()
        }


def poisoned(*shape: int, device: str) -> Tensor:
    """A float32 result full of NaN: whatever is left unwritten shows."""
    return torch.full(shape, math.nan, device=device)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to the tensors in it and in its lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return [map_tensors(function, entry) for entry in value]
    return value


def results_of(value: Any) -> list[Tensor]:
    """The floating-point tensors in an operator's or a way's result."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return [tensor for tensor in found if tensor.is_floating_point()]


def _first_call(call: Call, timer: Timer) -> tuple[list[Tensor], float]:
    """A copy of the result, for a running average changes with every call; and the seconds."""
    kept: list[Any] = []
    seconds = timer(lambda: kept.append(call()))
    return results_of(map_tensors(Tensor.clone, kept)), seconds


def _best_times(calls: dict[str, Call], timer: Timer, seconds: float) -> dict[str, float]:
    """The best time of each call over up to 5 rounds or about ``seconds``."""
    best = dict.fromkeys(calls, math.inf)
    spent = 0.0
    for _ in range(5):
        for name, call in calls.items():
            best[name] = min(best[name], taken := timer(call))
            spent += taken
        if spent > seconds:
            break
    return best


def _best(call: Call, timer: Timer, seconds: float) -> float:
    return _best_times({"": call}, timer, seconds)[""]


def _quantiles(seconds: list[float]) -> list[float]:
    """20th, 50th and 80th percentile in milliseconds."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return (1e3 * torch.tensor(seconds, dtype=torch.float64).quantile(points)).tolist()


def rounds_in(
    seconds: float, took: float, fewest: int = FEWEST_ROUNDS, most: int = MOST_ROUNDS
) -> int:
    """How many rounds that take ``took`` each fit into ``seconds``, within the bounds."""
    return min(max(round(seconds / took), fewest), most)


def turns(calls: dict[str, Call], timer: Timer, rounds: int, seconds: float) -> dict[str, int]:
    """In every how many rounds to time each call, so that all take about ``seconds`` together."""
    share = seconds / max(len(calls), 1)
    best = {name: _best(call, timer, share / 10) for name, call in calls.items()}
    return {name: max(rounds // rounds_in(share, took), 1) for name, took in best.items()}


def _time_in_turn(
    benchmark: BenchmarkFixture,
    ours: Call,
    others: dict[str, Call],
    every: dict[str, int],
    inputs: dict[str, Any],
    timer: Timer,
    rounds: int,
) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of ours and of the others, one call of each in a round.

    A call that is not ``every`` 1 sits out the rounds between. Each finds its ``inputs``, those of
    ours are under ``"ours"``, just read, whatever ran before it. pytest-benchmark's own statistics
    are of ours; on a GPU they include its timer's work.
    """
    our_seconds: list[float] = []
    their_seconds: dict[str, list[float]] = {name: [] for name in others}
    numbers = count()

    def time_the_others() -> None:
        number = next(numbers)
        for name, call in others.items():
            if number % every[name] == 0:
                map_tensors(torch.sum, inputs[name])
                their_seconds[name].append(timer(call))
        map_tensors(torch.sum, inputs["ours"])

    benchmark.pedantic(
        lambda: our_seconds.append(timer(ours)), setup=time_the_others, rounds=rounds
    )
    return our_seconds, their_seconds


SERVES = re.compile(r"^\w+ on \w+: (\w+) serves this call(?: by (.+))?$")


def served(explanation: str) -> tuple[str, str | None] | None:
    """The implementation that serves a call, and its way to do it; None if none does."""
    match = SERVES.match(explanation.rpartition("\n")[2])
    return match and (match[1], match[2])


def _implementation(case: Case) -> tuple[str, str | None]:
    """What serves the case, and its way; skips the benchmark if nothing does."""
    explanation = kfac_fast.explain(case.op, *case.arguments, **case.options, out=case.out)
    found = served(explanation)
    if found is None:
        pytest.skip(explanation or f"{case.op} has no such implementation here")
    return found


def _add_peaks(case: Case, ours: Call, info: dict[str, Any]) -> None:
    """Add the peaks in MB to a record: ours and those of ``case.peaks``."""
    calls = {"peak": ours} | {f"{name} peak": call for name, call in case.bound(case.peaks).items()}
    for name, call in calls.items():
        info["beside"][f"{name} MB"] = memory.peak_growth(call) / 1e6


def _bytes(value: Any) -> int:
    sizes: list[int] = []
    map_tensors(lambda tensor: sizes.append(tensor.nbytes), value)
    return sum(sizes)


def _speed(case: Case, device: str, seconds: float) -> dict[str, float]:
    """The record's rates for a call that took ``seconds``."""
    dtypes = {torch.float32, results_of(case.arguments)[0].dtype}
    matrix_rate = max(machine.product_rate(device, dtype) for dtype in dtypes)
    moved = case.moved or _bytes(case.arguments) + _bytes(case.out)
    floor = max(case.flops / matrix_rate, moved / machine.copy_rate(device))
    return {
        "gflop": case.flops / 1e9,
        "gflop_per_s": case.flops / 1e9 / seconds,
        "gb_per_s": moved / 1e9 / seconds,
        "percent_of_floor": 100 * floor / seconds,
    }


def times(ours: list[float], baseline: list[float]) -> dict[str, Any]:
    """The record's times, from the seconds of each round."""
    quantiles = ("p20_ms", "p50_ms", "p80_ms")
    our_ms, baseline_ms = _quantiles(ours), _quantiles(baseline)
    ratios = [theirs / own for theirs, own in zip(baseline, ours, strict=True)]
    short = baseline_ms[1] < RATIO_FROM_MS
    return {
        "rounds": len(ours),
        **dict(zip(quantiles, our_ms, strict=True)),
        **{f"baseline_{name}": ms for name, ms in zip(quantiles, baseline_ms, strict=True)},
        "ratio_of_medians": baseline_ms[1] / our_ms[1],
        "median_of_ratios": median(ratios),
        "added_us": 1e3 * (our_ms[1] - baseline_ms[1]) if short else None,
    }


def _oracle(case: Case) -> list[Tensor]:
    """The result by the pure-PyTorch version in float64."""
    with kfac_fast.use("reference"):
        exact = case.call(*map_tensors(Tensor.double, (case.arguments, case.out)))
        return case.compared(results_of(exact()))


def measure(
    benchmark: BenchmarkFixture,
    afterwards: list[Callable[[], None]],
    case: Case,
    device: str,
    seconds: float,
) -> None:
    """Benchmark a case for about ``seconds``; its record goes into the JSON's ``extra_info``.

    Peaks are read ``afterwards``, because reading them slows what is timed later.
    """
    implementation, way = _implementation(case)
    timer, oracle = timer_of(device), _oracle(case)
    ours = case.call(case.arguments, map_tensors(Tensor.clone, case.out))
    ways = case.bound(case.ways)

    # The first calls also warm up, and tell the ways that are too slow for a closer look.
    first = {name: _first_call(way, timer) for name, way in ways.items()}
    results = {name: case.compared(results) for name, (results, _) in first.items()}
    our_results = case.compared(_first_call(ours, timer)[0])
    errors = {name: relative_error(found, oracle) for name, found in results.items()}
    check_ways(errors)
    check_budget(our_results, results["reference"], oracle)

    limit = 2 * min(took for _, took in first.values()) + 0.01
    likely = {name: way for name, way in ways.items() if first[name][1] < limit}
    best = _best_times(likely, timer, seconds / 2)
    close = {name: took for name, took in best.items() if took < CLOSE * min(best.values())}
    rounds = rounds_in(seconds, min(close.values()) + _best(ours, timer, seconds / 10))
    beside = case.bound(case.beside)
    others = {name: ways[name] for name in close} | beside
    every = turns(beside, timer, rounds, seconds) | dict.fromkeys(close, 1)
    read = {
        n: getattr(way, "inputs", case.arguments) for n, way in (case.ways | case.beside).items()
    }
    read["ours"] = case.arguments
    our_seconds, theirs = _time_in_turn(benchmark, ours, others, every, read, timer, rounds)
    baseline = min(close, key=lambda name: median(theirs[name]))
    record = Record(
        op=case.op,
        shape=case.shape,
        dtype=str(results_of(case.arguments)[0].dtype).removeprefix("torch."),
        implementation=implementation,
        way=way,
        baseline=baseline,
        **times(our_seconds, theirs[baseline]),
        error=relative_error(our_results, oracle),
        baseline_error=errors[baseline],
        **_speed(case, device, median(our_seconds)),
        **machine.facts(device),
        beside={f"{name} ms": _quantiles(theirs[name])[1] for name in case.beside},
    )
    benchmark.extra_info.update(asdict(record))
    if case.peaks and not memory.missing(device):
        afterwards.append(partial(_add_peaks, case, ours, benchmark.extra_info))
