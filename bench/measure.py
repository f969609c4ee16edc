"""One benchmark: choose the baseline, check the errors, time both in turn, make the record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import machine
import pytest
import torch
from baselines import Ways
from pytest_benchmark.fixture import BenchmarkFixture
from record import Record
from timers import Timer, timer_of
from torch import Tensor

import kfac_fast

Call = Callable[[], Any]

RATIO_FROM_MS = 0.2  # below this time of the baseline the added time counts, not the ratio
WRONG_ABOVE = 1e-3  # relative to float64: a way that is this far off computes something else


@dataclass(frozen=True)
class Case:
    """A call to benchmark.

    Attributes:
        op: Name of the operator.
        shape: Name of the shape.
        arguments: The operator's positional arguments.
        options: Its keyword arguments but ``out``.
        out: What ``out`` holds at the start; never written.
        ways: The ways to the same result in plain PyTorch.
        flops: Operations of the definition, symmetry used.
    """

    op: str
    shape: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    out: Tensor | list[Tensor]
    ways: Ways
    flops: int

    def run(self, arguments: Sequence[Any], out: Tensor | list[Tensor]) -> Any:
        """Call the public operator."""
        return getattr(kfac_fast, self.op)(*arguments, **self.options, out=out)


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


# Errors


def _norms(x: Tensor) -> Tensor:
    """Frobenius and max norm of each matrix in a stack, ``[2, stack]``."""
    flat = x.reshape(math.prod(x.shape[:-2]), -1)
    return torch.stack([torch.linalg.vector_norm(flat, p, dim=-1) for p in (2, math.inf)])


def relative_error(results: Sequence[Tensor], oracle: Sequence[Tensor]) -> float:
    """Largest error of a matrix relative to float64 in the Frobenius norm."""
    pairs = zip(results, oracle, strict=True)
    return max(float((_norms(out.double() - ref)[0] / _norms(ref)[0]).max()) for out, ref in pairs)


def check_budget(
    results: Sequence[Tensor], baseline: Sequence[Tensor], oracle: Sequence[Tensor]
) -> None:
    """Fail if a matrix of ``results`` is too far from float64.

    The bound is ``2 |baseline - ref64| + 4 eps |ref64|`` in the Frobenius and in the max norm.
    """
    for i, (out, theirs, ref) in enumerate(zip(results, baseline, oracle, strict=True)):
        error = _norms(out.double() - ref)
        budget = 2 * _norms(theirs.double() - ref) + 4 * torch.finfo(out.dtype).eps * _norms(ref)
        if not (error <= budget).all():
            pytest.fail(f"result {i}: the error {error.tolist()} is over {budget.tolist()}")


# Times


def _interleaved(calls: dict[str, Call], timer: Timer, seconds: float) -> dict[str, float]:
    """Best time of each call, over at most 5 rounds and about ``seconds``."""
    best = dict.fromkeys(calls, math.inf)
    spent = 0.0
    for _ in range(5):
        for name, call in calls.items():
            best[name] = min(best[name], taken := timer(call))
            spent += taken
        if spent > seconds:
            break
    return best


def _quantiles(seconds: list[float]) -> list[float]:
    """20th, 50th and 80th percentile in milliseconds."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return (1e3 * torch.tensor(seconds, dtype=torch.float64).quantile(points)).tolist()


def _time_in_turn(
    benchmark: BenchmarkFixture, ours: Call, baseline: Call, timer: Timer, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of ours and of the baseline, one call of each in every round.

    pytest-benchmark's own statistics are of ours; on a GPU they include its timer's work.
    """
    our_seconds: list[float] = []
    baseline_seconds: list[float] = []
    benchmark.pedantic(
        lambda: our_seconds.append(timer(ours)),
        setup=lambda: baseline_seconds.append(timer(baseline)),
        rounds=rounds,
    )
    return our_seconds, baseline_seconds


def _implementation(case: Case) -> str:
    """Name of the implementation that serves the call; skips the benchmark if there is none."""
    explanation = kfac_fast.explain(case.op, *case.arguments, **case.options, out=case.out)
    last = explanation.rpartition("\n")[2]
    if not last.endswith("serves this call"):
        pytest.skip(explanation or f"{case.op} has no such implementation on this device")
    return last.split()[3]


def _bytes(value: Any) -> int:
    sizes: list[int] = []
    map_tensors(lambda tensor: sizes.append(tensor.nbytes), value)
    return sum(sizes)


def _speed(case: Case, device: str, seconds: float) -> dict[str, float]:
    """The record's rates for a call that took ``seconds``."""
    dtypes = {torch.float32, results_of(case.arguments)[0].dtype}
    matrix_rate = max(machine.product_rate(device, dtype) for dtype in dtypes)
    moved = _bytes(case.arguments) + _bytes(case.out)
    floor = max(case.flops / matrix_rate, moved / machine.copy_rate(device))
    return {
        "gflop": case.flops / 1e9,
        "gflop_per_s": case.flops / 1e9 / seconds,
        "gb_per_s": moved / 1e9 / seconds,
        "percent_of_floor": 100 * floor / seconds,
    }


def _times(ours: list[float], baseline: list[float]) -> dict[str, Any]:
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


def measure(benchmark: BenchmarkFixture, case: Case, device: str, seconds: float) -> None:
    """Benchmark a case for about ``seconds``; its record goes into the JSON's ``extra_info``."""
    implementation = _implementation(case)
    with kfac_fast.use("reference"):
        oracle = results_of(case.run(*map_tensors(Tensor.double, (case.arguments, case.out))))
    ours = partial(case.run, case.arguments, map_tensors(Tensor.clone, case.out))
    ways = {
        name: partial(way, map_tensors(Tensor.clone, case.out)) for name, way in case.ways.items()
    }

    # These calls also warm up. A running average changes with every call: compare the first.
    our_results = results_of(map_tensors(Tensor.clone, ours()))
    results = {name: results_of(map_tensors(Tensor.clone, way())) for name, way in ways.items()}
    errors = {name: relative_error(result, oracle) for name, result in results.items()}
    wrong = [name for name, error in errors.items() if not error < WRONG_ABOVE]
    assert not wrong, f"{case.op} is not what these ways compute: {wrong}"

    timer = timer_of(device)
    best = _interleaved(ways, timer, seconds / 2)
    name = min(best, key=best.__getitem__)
    check_budget(our_results, results[name], oracle)

    rounds = min(max(round(seconds / (best[name] + timer(ours))), 5), 500)
    our_seconds, baseline_seconds = _time_in_turn(benchmark, ours, ways[name], timer, rounds)
    record = Record(
        op=case.op,
        shape=case.shape,
        dtype=str(results_of(case.arguments)[0].dtype).removeprefix("torch."),
        implementation=implementation,
        baseline=name,
        **_times(our_seconds, baseline_seconds),
        error=relative_error(our_results, oracle),
        baseline_error=errors[name],
        **_speed(case, device, median(our_seconds)),
        **machine.facts(device),
    )
    benchmark.extra_info.update(asdict(record))
