"""Other libraries by themselves, on kfac_fast's backend, and beside ``KFAC``, timed in turn.

``make bench-peers`` installs the libraries into a folder of their own and runs it; ``make bench``
leaves it out. What is timed is in ``peer_cases.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median

import machine
import memory
import pytest
import torch
from bench_step import time_in_turn
from errors import check_ways, relative_error
from measure import rounds_in, served, times
from peer_calls import MAKERS, Call, Calls
from peer_cases import CASES, Case
from peer_networks import problem
from pytest_benchmark.fixture import BenchmarkFixture
from record import PeerRecord
from timers import timer_of

import kfac_fast

# A call is a pass of a network or more: more time is needed than for an operator.
TIMES_SECONDS = 8
FEWEST_ROUNDS, MOST_ROUNDS = 3, 25
MODULES = {"laplace-torch": "laplace"}


def _calls(case: Case, device: str) -> Calls:
    _, make = MAKERS[case.library, case.result]
    return make(problem(case.network, device))


def _arms(calls: Calls) -> dict[str, Call]:
    arms = {"library": calls.library, "ours": calls.ours, "KFAC": calls.kfac, "bare": calls.bare}
    return {name: call for name, call in arms.items() if call is not None}


def _result(call: Call) -> list[torch.Tensor]:
    """What a call gives that draws the same labels as others."""
    torch.manual_seed(0)
    return [tensor.clone() for tensor in call()]


def _error(calls: Calls) -> float:
    theirs = [tensor.double() for tensor in _result(calls.library)]
    return relative_error(_result(calls.ours), theirs)


def _timer(device: str) -> Callable[[Call], float]:
    """A timer that collects garbage before a call: libraries' operators hold on to their hooks."""
    timer = timer_of(device)

    def seconds(call: Call) -> float:
        gc.collect()
        return timer(call)

    return seconds


def peaks(case: Case, implementation: str | None) -> dict[str, float]:
    """The peaks in MB: what a call takes over what there was, and what ``KFAC`` keeps."""
    with kfac_fast.use(implementation) if implementation else nullcontext():
        calls = _calls(case, "cpu")
        found = {}
        if calls.made:
            found["result MB"] = sum(tensor.nbytes for tensor in calls.ours()) / 1e6
        prefixes = {"ours": "", "library": "library ", "KFAC": "KFAC ", "bare": "bare "}
        for arm, call in _arms(calls).items():
            growth = memory.least_peak_growth(call)
            held = calls.held() if arm == "KFAC" else 0
            found[f"{prefixes[arm]}peak MB"] = (growth + held) / 1e6
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_peer(
    case: Case,
    benchmark: BenchmarkFixture,
    pytestconfig: pytest.Config,
    device: str,
) -> None:
    if find_spec(MODULES.get(case.library, case.library)) is None:
        pytest.skip(f"{case.library} is not installed: make bench-peers installs it")
    calls = _calls(case, device)
    arms, error = _arms(calls), _error(calls)
    check_ways({str(case): error})
    timer = _timer(device)
    took = sum(timer(call) for call in arms.values())  # warms up, too
    given = TIMES_SECONDS * pytestconfig.getoption("seconds")
    rounds = rounds_in(given, took, FEWEST_ROUNDS, MOST_ROUNDS)
    seconds = time_in_turn(benchmark, arms, {}, timer, rounds)
    gradient = torch.empty(1, 1, device=device)
    implementation, _ = served(kfac_fast.explain("gram", gradient)) or ("none", None)
    beside = {f"{arm} ms": 1e3 * median(seconds[arm]) for arm in ("KFAC", "bare") if arm in arms}
    if not memory.missing(device):
        beside |= memory.in_new_process(peaks, case, pytestconfig.getoption("impl"))
    record = PeerRecord(
        op="peer",
        library=case.library,
        version=version(MAKERS[case.library, case.result][0]),
        result=case.result,
        shape=case.network,
        dtype="float32",
        implementation=implementation,
        **times(seconds["ours"], seconds["library"]),
        error=error,
        **machine.facts(device),
        beside=beside,
    )
    benchmark.extra_info.update(asdict(record))
