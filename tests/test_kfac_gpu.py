"""KFAC on a device: the host never waits, a step may be a CUDA graph, states cross devices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host import waits_refused
from nets import Net, images, preconditioner
from plain_kfac import assert_covariances, assert_solved, covariances
from torch import Tensor, nn

from kfac_fast import KFAC

pytestmark = pytest.mark.gpu
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
OPTIONS: dict[str, dict[str, Any]] = {
    "factored": {},
    "plain": {"damping_mode": "plain"},
    "reduce": {"approx": "reduce"},
    "clipped": {"kl_clip": 1e-3, "learning_rate": 0.1},
    "grafted": {"grafting": "adam"},
    "refined": {"inverse_update_steps": 2, "refinement_steps": 1},
    "drawn labels": {"fisher": "mc"},
    "random signs": {"fisher": "curvature-propagation", "mc_samples": 2},
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def train_step(model: nn.Module, kfac: KFAC, x: Tensor, y: Tensor) -> None:
    model.zero_grad(set_to_none=False)
    outputs = model(x)
    if kfac.fisher != "empirical":
        kfac.update_curvature(outputs, loss="cross_entropy")
    F.cross_entropy(outputs, y).backward()
    kfac.step()


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return images().to("cuda", dtype), torch.randint(3, (5,)).cuda()


def assert_near(out: Tensor, expected: Tensor, condition: float = 1e3) -> None:
    """Check that two solutions of one system differ as its condition explains."""
    bound = 64 * torch.finfo(out.dtype).eps * condition * torch.linalg.vector_norm(expected)
    assert torch.linalg.vector_norm(out - expected) <= bound


@dtypes
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_host_does_not_wait(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = Net().to("cuda", dtype)
    kfac = preconditioner(model, **options)
    x, y = batch(dtype)
    for _ in range(2):  # plans and workspaces are made
        train_step(model, kfac, x, y)
    with waits_refused():
        for _ in range(3):
            train_step(model, kfac, x, y)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_and_steps_are_those_of_the_cpu(approx: str) -> None:
    on_cpu = Net()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x, y = images(), torch.randint(3, (5,))
    results = []
    for model, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        kfac = preconditioner(model, approx=approx)
        train_step(model, kfac, x.to(device), y.to(device))
        results.append(kfac)
    on_host = preconditioner(copy.deepcopy(on_cpu), approx=approx)
    on_host.load_state_dict(results[1].state_dict())
    assert_covariances(on_host, covariances(results[0]))
    for one, two in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        assert_solved(one.grad.cpu(), two.grad)


@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {"inverse_update_steps": 1000},
        {},
        {"approx": "reduce"},
        {"kl_clip": 1e-3, "learning_rate": 0.1},
        {"grafting": "adam"},
    ],
    ids=("update", "refresh", "reduce", "clipped", "grafted"),
)
def test_a_captured_step_goes_on_averaging(options: dict[str, Any], dtype: torch.dtype) -> None:
    batches = [batch(dtype) for _ in range(4)]
    captured = Net().to("cuda", dtype)
    eager = copy.deepcopy(captured)
    kfacs = [preconditioner(model, **options) for model in (captured, eager)]
    x, y = (tensor.clone() for tensor in batches[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train_step(captured, kfacs[0], x, y)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        train_step(eager, kfacs[1], *batches[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step(captured, kfacs[0], x, y)
    for inputs, labels in batches:
        x.copy_(inputs)
        y.copy_(labels)
        graph.replay()
        train_step(eager, kfacs[1], inputs, labels)
        for one, two in zip(captured.parameters(), eager.parameters(), strict=True):
            assert_near(one.grad, two.grad)
    found, expected = (covariances(kfac) for kfac in kfacs)
    for name, pair in expected.items():
        for own, other in zip(found[name], pair, strict=True):
            assert_near(own, other)
