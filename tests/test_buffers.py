"""Sums are formed in the memory of those before, and nobody can tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import Net, classes, images, preconditioner
from plain_kfac import covariances
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy

from kfac_fast import KFAC
from kfac_fast.blocks import Block
from kfac_fast.buffers import MOST_BYTES, Buffers

pytestmark = pytest.mark.usefixtures("one_thread")


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


class Text(nn.Module):
    """Embedded tokens, attention, normalisation, a layer called twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.float()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, S]`` to ``[N, 3]``."""
        x = self.embedding(x)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(self.twice(self.twice(x).tanh()).mean(1))


class Flat(nn.Sequential):
    """Embedded tokens and a head."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(24, 3))


class Pixels(nn.Module):
    """Channels that are normalised, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.norm = nn.BatchNorm2d(2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """As :class:`Net`."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(self.norm(x)).double()


def tokens() -> Tensor:
    return torch.randint(7, (5, 6))


INPUTS: dict[type[nn.Module], Callable[[], Tensor]] = {
    Net: images,
    Pixels: images,
    Text: tokens,
    Flat: tokens,
}


@pytest.fixture
def reused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of all memory that sums were formed in anew, in order; NaN was left there."""
    addresses: list[int] = []

    def noted(find: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def run(*args: object) -> Tensor | None:
            found = find(*args)
            if found is not None:
                found.fill_(torch.nan)
                addresses.append(found.data_ptr())
            return found

        return run

    monkeypatch.setattr(Buffers, "take", noted(Buffers.take))
    monkeypatch.setattr(Block, "memory_for", noted(Block.memory_for))
    return addresses


def batch(model: nn.Module, kfac: KFAC, retain_graph: bool = False) -> Tensor:
    outputs = model(INPUTS[type(model)]())
    if kfac.fisher not in ("empirical", "forward-only"):
        kfac.update_curvature(outputs, loss="cross_entropy")
    loss = cross_entropy(outputs, classes(outputs))
    loss.backward(retain_graph=retain_graph)
    return loss


@pytest.mark.parametrize("fisher", ["empirical", "mc", "curvature-propagation", "forward-only"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_steps_form_their_sums_where_the_last_ones_were(
    reused: list[int], approx: str, fisher: str
) -> None:
    model = Net()
    kfac = preconditioner(model, approx=approx, fisher=fisher)
    seen = []
    for _ in range(3):
        reused.clear()
        batch(model, kfac)
        kfac.step()
        seen.append(set(reused))
    assert not seen[0] and len(seen[1]) == 8 and seen[1] == seen[2]
    sums = sum(factor.mean.nbytes for block in kfac._blocks for factor in block.factors)
    assert kfac.memory()["sums"] == sums
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
    outputs = model(INPUTS[type(model)]())
    kfac.step()
    batch(model, kfac)
    cross_entropy(outputs, classes(outputs)).backward()
    kfac.step()


def a_batch_that_is_not_finite(model: nn.Module, kfac: KFAC) -> None:
    batch(model, kfac)
    kfac.step()
    (model(INPUTS[type(model)]()) * torch.inf).sum().backward()
    if kfac.fisher == "empirical":
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


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [Net, Pixels, Text])
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
    kind: type[nn.Module],
    approx: str,
    fisher: str,
    reused: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for reuses in (True, False):
        if not reuses:
            monkeypatch.setattr(Buffers, "take", lambda buffers, key, like: None)
            monkeypatch.setattr(Block, "memory_for", lambda block, gradient: None)
        torch.manual_seed(0)
        reused.clear()
        model = kind()
        kfac = preconditioner(model, approx=approx, fisher=fisher)
        run(model, kfac)
        assert bool(reused) == reuses
        results.append([factor for pair in covariances(kfac).values() for factor in pair])
    assert all(torch.equal(*both) for both in zip(*results, strict=True))
    assert all(factor.isfinite().all() for factor in results[0])


def test_an_embedding_that_has_grown_has_new_memory() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    kfac = preconditioner(model)
    model(torch.tensor([2, 0]))
    model[0].weight = nn.Parameter(torch.randn(5, 2))
    model[0].num_embeddings = 5
    model(torch.tensor([2, 4])).square().mean().backward()
    kfac.step()
    assert kfac._blocks[0].factors[0].mean.tolist() == [0, 0, 0.5, 0, 0.5]


@pytest.mark.parametrize("kind", [Net, Flat, Text])
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_traced_pass_has_no_memory_of_ours(kind: type[nn.Module], mode: str) -> None:
    """What a tracer has seen as a constant is written to whenever its graph runs."""
    results = []
    for traces in (False, True):
        torch.manual_seed(0)
        model, inputs = kind(), INPUTS[kind]
        kfac = preconditioner(model)
        batch(model, kfac)
        kfac.step()
        x, more = inputs(), inputs()
        if traces:
            trace = make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        batch(model, kfac)
        kfac.step()
        outputs = model(x)
        if traces:
            with torch.no_grad():
                trace(more)
        cross_entropy(outputs, classes(outputs)).backward()
        kfac.step()
        results.append([factor for pair in covariances(kfac).values() for factor in pair])
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


@pytest.mark.parametrize("kind", [Net, Flat, Text])
@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("inside", [True, False], ids=["mode", "tensors"])
def test_a_pass_of_fake_tensors_leaves_no_memory(
    kind: type[nn.Module], steps_before: int, inside: bool
) -> None:
    model = kind()
    kfac = preconditioner(model)
    for _ in range(steps_before):
        batch(model, kfac)
        kfac.step()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    if inside:
        with mode:
            model(INPUTS[kind]())
    else:
        weights = {name: mode.from_tensor(weight) for name, weight in model.named_parameters()}
        functional_call(model, weights, mode.from_tensor(INPUTS[kind]()))
    batch(model, kfac)
    kfac.step()
    factors = [factor for pair in covariances(kfac).values() for factor in pair]
    assert all(type(factor) is Tensor and factor.isfinite().all() for factor in factors)
