"""Tests marked ``gpu`` are skipped, with that reason, where torch sees no CUDA device.

Those marked ``large`` too are skipped where its memory is too small.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kfac_fast import backends, ops

NATIVE = importlib.import_module("kfac_fast._C") if backends.EXTENSION_BUILT else None

# pytest-benchmark times nothing in a process that inherits this.
os.environ.pop("PYTEST_XDIST_WORKER", None)

LARGE_BYTES = 40e9


if os.environ.get("TRITON_INTERPRET") == "1":
    from faster_interpreter import make_faster

    make_faster()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = "needs a CUDA device: torch.cuda.is_available() is False"
    if torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
        if size >= LARGE_BYTES:
            return
        marked = [item for item in marked if item.get_closest_marker("large")]
        reason = (
            f"needs {LARGE_BYTES / 1e9:.0f} GB of the device's memory, which has {size / 1e9:.0f}"
        )
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What a large test has freed goes back to the device, which other processes may use."""
    if item.get_closest_marker("large"):
        torch.cuda.empty_cache()


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


@pytest.fixture
def inverted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each call of ``damped_inverse`` was given."""
    counts: list[int] = []
    invert = ops.damped_inverse

    def counted(matrices: Any, damping: Any) -> Any:
        counts.append(len(matrices))
        return invert(matrices, damping)

    monkeypatch.setattr(ops, "damped_inverse", counted)
    return counts
