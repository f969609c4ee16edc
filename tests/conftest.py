"""Tests marked ``gpu`` are skipped, with that reason, where torch sees no CUDA device."""

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch

from kfac_fast import backends

NATIVE = importlib.import_module("kfac_fast._C") if backends.EXTENSION_BUILT else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules of many tiny tensors, where waiting for a second thread is most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=NATIVE.instruction_sets() if NATIVE else ["none"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every set of vector instructions that this processor has, in use."""
    if NATIVE is None:
        pytest.skip("the C++ extension is not built")
    before = NATIVE.instruction_set()
    NATIVE.use_instruction_set(request.param)
    yield request.param
    NATIVE.use_instruction_set(before)
