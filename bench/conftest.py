"""Microbenchmarks of every operator against the fastest plain PyTorch, timed in turn.

``make bench`` runs them all; ``bench/README.md`` has the rest.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import memory
import pytest
import torch
from measure import Case, measure
from pytest_benchmark.fixture import BenchmarkFixture

import kfac_fast

collect_ignore = ["bench_peers.py"]  # but for make bench-peers, which names it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--impl", help="serve every operator by this implementation")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    parser.addoption(
        "--seconds", type=float, default=1.0, help="about how long to time each benchmark"
    )
    parser.addoption(
        "--append-records", type=Path, help="append each record to this file as its benchmark ends"
    )


def pytest_report_header(config: pytest.Config) -> str:
    missing = memory.missing(config.getoption("device"))
    return f"peak memory: {f'not measured, {missing}' if missing else 'measured'}"


@pytest.fixture
def device(pytestconfig: pytest.Config) -> str:
    return pytestconfig.getoption("device")


@pytest.fixture(autouse=True)
def settings(pytestconfig: pytest.Config) -> Iterator[None]:
    """Equal inputs in every run, no garbage collection in between, the implementation asked for."""
    torch.manual_seed(0)
    gc.collect()
    gc.disable()
    name = pytestconfig.getoption("impl")
    if name is None:
        yield
    else:
        with kfac_fast.use(name):
            yield
    gc.enable()


@pytest.fixture(autouse=True)
def appended(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Iterator[None]:
    """Keeps the record of a benchmark even if the run is killed later.

    Operators' peaks come too late for it. The JSON of pytest-benchmark is written when all is done.
    """
    yield
    path = pytestconfig.getoption("append_records")
    if path is not None and benchmark.extra_info:
        with path.open("a") as file:
            file.write(json.dumps(benchmark.extra_info) + "\n")


@pytest.fixture(scope="session")
def afterwards() -> Iterator[list[Callable[[], None]]]:
    """What is left to do when all is timed."""
    calls: list[Callable[[], None]] = []
    yield calls
    for call in calls:
        call()


@pytest.fixture
def compare(
    benchmark: BenchmarkFixture,
    pytestconfig: pytest.Config,
    device: str,
    afterwards: list[Callable[[], None]],
) -> Callable[[Case], None]:
    """Benchmark a case: choose its baseline, check its errors, time it."""
    seconds = pytestconfig.getoption("seconds")
    return partial(measure, benchmark, afterwards, device=device, seconds=seconds)
