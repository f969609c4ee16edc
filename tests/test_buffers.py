"""Sums are formed in the memory of those before, and nobody can tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import Net, classes, images, preconditioner
from plain_kfac import covariances
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kfac_fast import KFAC, ops
from kfac_fast.blocks import Block
from kfac_fast.buffers import MOST_BYTES, Buffers

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_memory_is_lent_to_one_at_a_time() -> None:
    buffers, like = Buffers(), torch.zeros(1)
    assert buffers.take("a", like) is None and buffers.nbytes == 0
    first = buffers.lend("a", torch.zeros(3))
    memory = first.data_ptr()
    assert buffers.take("a", like) is None
    del first
    assert buffers.nbytes == 12 and buffers.take("b", like) is None
    again = buffers.take("a", like)
    assert again is not None and again.data_ptr() == memory
    assert buffers.take("a", like) is None and buffers.nbytes == 0


def test_a_view_holds_the_memory() -> None:
    buffers = Buffers()
    lent = buffers.lend("a", torch.zeros(3))
    view = lent[1:]
    del lent
    assert buffers.take("a", view) is None
    del view
    assert buffers.take("a", torch.zeros(1)) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_of_another_dtype_is_dropped(dtype: torch.dtype) -> None:
    buffers = Buffers()
    buffers.lend("a", torch.zeros(3))
    found = buffers.take("a", torch.zeros(1, dtype=dtype))
    assert (found is None) == (dtype == torch.float64)
    assert buffers.nbytes == 0


def test_each_key_keeps_one_sum_and_no_large_one() -> None:
    buffers = Buffers()
    for size in (1, 1, MOST_BYTES // 4, MOST_BYTES // 4 + 1):
        held = [buffers.lend(str(size), torch.empty(size)) for _ in range(3)]
        del held
    assert buffers.nbytes == 4 + MOST_BYTES
    lent = buffers.lend("1", torch.empty(1))
    buffers.clear()
    del lent
    assert buffers.nbytes == 0


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of all sums, in order."""
    addresses: list[int] = []

    def noted(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Tensor, out: Tensor | None = None, **options: object) -> Tensor:
            if out is not None:
                out.fill_(torch.nan)  # whatever is left in it
                addresses.append(out.data_ptr())
            return operator(*args, out=out, **options)

        return run

    for name in ("gram", "shared_gram", "conv_expand_gram", "conv_reduce_gram"):
        monkeypatch.setattr(ops, name, noted(getattr(ops, name)))
    return addresses


def batch(model: nn.Module, kfac: KFAC, retain_graph: bool = False) -> Tensor:
    outputs = model(images())
    if kfac.fisher == "mc":
        kfac.update_curvature(outputs, loss="cross_entropy")
    loss = cross_entropy(outputs, classes(outputs))
    loss.backward(retain_graph=retain_graph)
    return loss


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_steps_form_their_sums_where_the_last_ones_were(
    formed: list[int], approx: str, fisher: str
) -> None:
    model = Net()
    kfac = preconditioner(model, approx=approx, fisher=fisher)
    batch(model, kfac)
    kfac.step()
    seen = []
    for _ in range(2):
        formed.clear()
        batch(model, kfac)
        kfac.step()
        assert len(formed) >= 2 * LAYERS
        seen.append(set(formed))
    assert seen[0] == seen[1]
    held = kfac.memory()["sums"]
    assert held > 0
    kfac.detach()
    assert kfac.memory()["sums"] == 0


def steps(model: nn.Module, kfac: KFAC) -> None:
    for _ in range(3):
        batch(model, kfac)
        kfac.step()


def micro_batches(model: nn.Module, kfac: KFAC) -> None:
    for _ in range(2):
        for _ in range(3):
            batch(model, kfac)
        kfac.step()


def losses_that_are_kept(model: nn.Module, kfac: KFAC) -> None:
    losses = []
    for _ in range(3):
        losses.append(batch(model, kfac))
        kfac.step()


def an_old_graph_again(model: nn.Module, kfac: KFAC) -> None:
    old = batch(model, kfac, retain_graph=True)
    kfac.step()
    batch(model, kfac)
    old.backward()
    kfac.step()


def a_backward_pass_in_the_next_step(model: nn.Module, kfac: KFAC) -> None:
    batch(model, kfac)
    outputs = model(images())
    kfac.step()
    batch(model, kfac)
    cross_entropy(outputs, classes(outputs)).backward()
    kfac.step()


def a_batch_that_is_not_finite(model: nn.Module, kfac: KFAC) -> None:
    batch(model, kfac)
    kfac.step()
    model(images() * torch.inf).sum().backward()
    kfac.step()
    batch(model, kfac)
    kfac.step()


def steps_that_fail(model: nn.Module, kfac: KFAC) -> None:
    batch(model, kfac)
    kfac.step()
    batch(model, kfac)
    kfac.damping = -1.0
    with pytest.raises(ValueError, match="damping"):
        kfac.step()
    kfac.damping = 0.1
    batch(model, kfac)
    kfac.step()


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    "run",
    [
        steps,
        micro_batches,
        losses_that_are_kept,
        an_old_graph_again,
        a_backward_pass_in_the_next_step,
        a_batch_that_is_not_finite,
        steps_that_fail,
    ],
)
def test_factors_are_those_of_sums_in_new_memory(
    run: Callable[[nn.Module, KFAC], None],
    approx: str,
    formed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for reuses in (True, False):
        if not reuses:
            monkeypatch.setattr(Buffers, "take", lambda buffers, key, like: None)
            monkeypatch.setattr(Block, "memory_for", lambda block, gradient: None)
        torch.manual_seed(0)
        formed.clear()
        model = Net()
        kfac = preconditioner(model, approx=approx)
        run(model, kfac)
        assert bool(formed) == reuses
        results.append([factor for pair in covariances(kfac).values() for factor in pair])
    assert all(torch.equal(*both) for both in zip(*results, strict=True))
    assert all(factor.isfinite().all() for factor in results[0])
