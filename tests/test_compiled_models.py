"""Compiled models: one graph, no compilation anew, and the factors of the eager model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from nets import Checkpointed, Net, PartlyCheckpointed, images, preconditioner
from plain_kfac import assert_covariances, assert_solved, covariances
from torch import Tensor, nn

from kfac_fast import KFAC

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What PyTorch's own compiler does, and hides outside of tests.
    pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("default:The .grad attribute"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(model: nn.Module, kfac: KFAC, run: Any, steps: int = 3) -> list[Tensor]:
    """Steps on fresh batches, and the gradients of the last one."""
    torch.manual_seed(1)
    for _ in range(steps):
        x, y = images(), torch.randint(3, (5,))
        model.zero_grad()
        outputs = run(x)
        if kfac.fisher not in ("empirical", "forward-only"):
            generator = torch.Generator().manual_seed(2)
            kfac.update_curvature(outputs, loss="cross_entropy", generator=generator)
        F.cross_entropy(outputs, y).backward()
        kfac.step()
    return [parameter.grad for parameter in model.parameters()]


def both(backend: str, **options: Any) -> None:
    """Compare a compiled run with an eager one."""
    results = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = Net(inplace=True)
        kfac = preconditioner(model, **options)
        run = torch.compile(model, backend=backend, fullgraph=True) if is_compiled else model
        with torch._dynamo.config.patch(error_on_recompile=True):
            gradients = train(model, kfac, run)
        results.append((covariances(kfac), gradients, kfac))
    (expected, eager_gradients, _), (_, gradients, kfac) = results
    assert len(expected) == 4
    assert_covariances(kfac, expected)
    for gradient, eager in zip(gradients, eager_gradients, strict=True):
        assert_solved(gradient, eager, condition=1e5)


@pytest.mark.parametrize(
    ("backend", "approx"), [("eager", "expand"), ("aot_eager", "expand"), ("inductor", "reduce")]
)
def test_a_compiled_model_has_the_factors_of_the_eager_one(backend: str, approx: str) -> None:
    both(backend, approx=approx, factor_update_steps=2)


@pytest.mark.parametrize(
    ("backend", "fisher"),
    [
        ("aot_eager", "mc"),
        ("inductor", "exact"),
        ("aot_eager", "curvature-propagation"),
        ("aot_eager", "forward-only"),
    ],
)
def test_every_fisher_is_that_of_the_eager_model(backend: str, fisher: str) -> None:
    with torch._functorch.config.patch(donated_buffer=False):
        both(backend, fisher=fisher, mc_samples=2)


def test_corrected_eigenvalues_are_those_of_the_eager_model() -> None:
    options = {"damping_mode": "exact", "eigenvalue_correction": True, "inverse_update_steps": 9}
    both("aot_eager", **options)


class Twice(nn.Module):
    """A layer that is called twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


@pytest.mark.parametrize("name", ["begin", "record"])
def test_a_graph_of_the_gpus_work_leaves_the_operators_out(name: str) -> None:
    tags = getattr(torch.ops.kfac_fast_capture, name).default.tags
    assert torch.Tag.cudagraph_unsafe in tags


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_two_calls_in_a_pass_are_two_calls(fisher: str) -> None:
    results = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = Twice()
        kfac = preconditioner(model, fisher=fisher, loss_terms_per_example=3)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if is_compiled else model
        with torch._functorch.config.patch(donated_buffer=False):
            for _ in range(2):  # two passes of a step
                outputs = run(torch.randn(4, 3, dtype=torch.float64))
                kfac.update_curvature(outputs, loss="mse")
                F.mse_loss(outputs, torch.zeros_like(outputs)).backward()
        kfac.step()
        results.append(kfac)
    assert_covariances(results[1], covariances(results[0]))


def test_a_compiled_part_of_a_model_is_captured_too() -> None:
    results = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = Net()
        kfac = preconditioner(model)
        if is_compiled:
            model.shared = torch.compile(model.shared, backend="aot_eager", fullgraph=True)
        F.cross_entropy(model(images()), torch.randint(3, (5,))).backward()
        kfac.step()
        results.append(kfac)
    assert_covariances(results[1], covariances(results[0]))


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact", "forward-only"])
def test_checkpointed_layers_are_in_one_graph_with_the_factors_of_the_eager_model(
    fisher: str,
) -> None:
    results = []
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,))
    for is_compiled in (False, True):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))
        model = Checkpointed(layers.double(), use_reentrant=False)
        kfac = preconditioner(model, fisher=fisher)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if is_compiled else model
        with torch._functorch.config.patch(donated_buffer=False):
            outputs = run(x)
            kfac.update_curvature(outputs, loss="cross_entropy")
            F.cross_entropy(outputs, y).backward()
        kfac.step()
        results.append(kfac)
    assert len(covariances(results[0])) == (2 if fisher == "forward-only" else 3)
    assert_covariances(results[1], covariances(results[0]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_checkpointed_call_counts_once_under_the_forward_only_fisher(backend: str) -> None:
    results = []
    x = torch.randn(5, 3, dtype=torch.float64)
    for is_compiled in (False, True):
        torch.manual_seed(1)
        model = PartlyCheckpointed(False if is_compiled else None)
        kfac = preconditioner(model, fisher="forward-only")
        run = torch.compile(model, backend=backend, fullgraph=True) if is_compiled else model
        run(x).square().mean().backward()
        kfac.step()
        results.append(kfac)
    assert_covariances(results[1], covariances(results[0]))


def test_evaluation_records_nothing() -> None:
    model = Net()
    kfac = preconditioner(model)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        run(images())
    run(images())  # without a backward pass
    assert not any(block.pending for block in kfac._blocks)


def test_a_detached_preconditioner_records_nothing_in_a_graph_that_was_compiled_with_it() -> None:
    model = Net()
    kfac = preconditioner(model)
    run = torch.compile(model, backend="aot_eager")
    outputs = run(images())
    kfac.detach()
    outputs.sum().backward()
    del kfac
    run(images()).sum().backward()


class Attends(nn.Module):
    """Attention of ``[N, S, 4]`` to a memory."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.key, self.value = (
            torch.randn(3, 6, options.get(size, 4)).double() for size in ("kdim", "vdim")
        )

    def forward(self, x: Tensor) -> Tensor:
        output, weights = self.attention(x, self.key, self.value)
        return output + weights.sum(-1, keepdim=True)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "itself": encoder,
    "memory": lambda: Attends(add_bias_kv=True),
    "other-sizes": lambda: Attends(kdim=3, vdim=5, bias=False),
}


def attend(make: Callable[[], nn.Module], fullgraph: bool, fisher: str) -> None:
    """Compare the factors of a compiled run and an eager one, of two steps."""
    results = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = make().double()
        kfac = preconditioner(model, fisher=fisher, damping=1.0)
        run = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        for _ in range(2):
            with torch._functorch.config.patch(donated_buffer=False):
                outputs = (run if is_compiled else model)(torch.randn(3, 5, 4).double())
                kfac.update_curvature(outputs, loss="mse")
                outputs.square().sum(dim=(1, 2)).mean().backward()
            kfac.step()
        results.append(covariances(kfac))
    assert len(results[0]) >= 4
    for name, pair in results[0].items():
        for ours, theirs in zip(results[1][name], pair, strict=True):
            assert_solved(ours, theirs)


# All kinds of attention and all Fishers: one decides on the calls, the other on the passes.
@pytest.mark.parametrize(
    ("name", "fisher"),
    [
        *(("itself", "empirical"), ("itself", "mc")),
        *(("memory", "forward-only"), ("memory", "exact")),
        *(("other-sizes", "empirical"), ("other-sizes", "exact")),
    ],
)
def test_attention_is_in_one_graph_with_the_factors_of_the_eager_model(
    name: str, fisher: str
) -> None:
    with torch._dynamo.config.patch(error_on_recompile=True):
        attend(ATTENTION[name], True, fisher)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_checkpointed_attention_breaks_the_graph_and_is_captured(fisher: str) -> None:
    attend(lambda: Checkpointed(encoder(), use_reentrant=False), False, fisher)
