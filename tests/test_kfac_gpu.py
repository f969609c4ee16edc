"""KFAC on a device: the host never waits, a step may be a CUDA graph, states cross devices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net, images, preconditioner
from plain_kfac import assert_covariances, assert_solved, covariances
from torch import Tensor, nn

from kfac_fast import KFAC

pytestmark = pytest.mark.gpu
OPTIONS: dict[str, dict[str, Any]] = {
    "factored": {},
    "plain": {"damping_mode": "plain"},
    "reduce": {"approx": "reduce"},
    "clipped": {"kl_clip": 1e-3, "learning_rate": 0.1},
    "grafted": {"grafting": "adam"},
    "refined": {"inverse_update_steps": 2, "refinement_steps": 1},
    "drawn labels": {"fisher": "mc"},
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def train_step(model: nn.Module, kfac: KFAC, x: Tensor, y: Tensor) -> None:
    model.zero_grad(set_to_none=False)
    outputs = model(x)
    if kfac.fisher == "mc":
        kfac.update_curvature(outputs, loss="cross_entropy")
    F.cross_entropy(outputs, y).backward()
    kfac.step()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_host_does_not_wait(options: dict[str, Any]) -> None:
    model = Net().cuda()
    kfac = preconditioner(model, **options)
    x, y = images().cuda(), torch.randint(3, (5,)).cuda()
    train_step(model, kfac, x, y)  # plans and workspaces are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train_step(model, kfac, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


def test_a_captured_step_goes_on_averaging() -> None:
    batches = [(images().cuda(), torch.randint(3, (5,)).cuda()) for _ in range(4)]
    captured = Net().cuda()
    eager = copy.deepcopy(captured)
    kfacs = [preconditioner(model, inverse_update_steps=1000) for model in (captured, eager)]
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
            assert_solved(one.grad.cpu(), two.grad.cpu())
    found, expected = (covariances(kfac) for kfac in kfacs)
    for name, pair in expected.items():
        for own, other in zip(found[name], pair, strict=True):
            assert_solved(own.cpu(), other.cpu())
