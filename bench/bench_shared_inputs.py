"""Training steps of q, k and v: one input covariance for all of them, or one for each.

Here the other side is kfac_fast itself, or its pure-PyTorch version, on three equal tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from baselines import Ways
from measure import Call, Case, poisoned
from shapes import Rows
from torch import Tensor, nn

import kfac_fast

STEPS = {
    "vit-b16-q-k-v-step": Rows((8, 197), 768, bias=True),
    "small-q-k-v-step": Rows((2, 5), 8, bias=True),
}
OPERATORS = {"expand": "gram", "reduce": "shared_gram"}


class Projections(nn.Module):
    def __init__(self, features: int, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(features, features, bias) for _ in range(3))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return self.q(q), self.k(k), self.v(v)


class Training:
    """Steps whose factors are those of the last batch, in the precision of its inputs."""

    def __init__(self, rows: Rows, approx: str, device: str) -> None:
        model = Projections(rows.features, rows.bias).to(device)
        # One refresh of the inverses, in the first step, which is not timed.
        steps = {"factor_update_steps": 1, "inverse_update_steps": 10**9}
        self._pairs = {}
        for dtype in (torch.float32, torch.float64):
            twin = copy.deepcopy(model).to(dtype)
            kfac = kfac_fast.KFAC(twin, approx=approx, factor_decay=0, **steps)
            self._pairs[dtype] = twin, kfac
        self._gradient = torch.randn(*rows.leading, rows.features, device=device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """The covariances of inputs and of output gradients after a step."""
        model, kfac = self._pairs[q.dtype]
        outputs = model(q, k, v)
        torch.autograd.backward(outputs, [self._gradient.to(q.dtype)] * len(outputs))
        model.zero_grad()  # leaves the step nothing to precondition
        kfac.step()
        factors = kfac.state_dict()["layers"]
        return [factors[name][side]["mean"] for name in "qkv" for side in ("input", "gradient")]


@dataclass(frozen=True)
class Step(Case):
    """A training step in place of an operator's call.

    Its ``op`` is the operator that forms the inputs' covariance, ``out`` that operator's result;
    no step writes to it.
    """

    training: Training = field(kw_only=True)

    def call(self, arguments: Sequence[Any], out: Tensor | list[Tensor]) -> Call:
        """A step that feeds one tensor to all projections."""
        return partial(self.training, *arguments, *arguments, *arguments)


def _apart(training: Training, x: Tensor) -> Ways:
    """Ways that feed each projection a tensor of its own."""
    copies = [x.clone() for _ in range(3)]

    def reference(out: Tensor) -> list[Tensor]:
        with kfac_fast.use("reference"):
            return training(*copies)

    def three_tensors(out: Tensor) -> list[Tensor]:
        return training(*copies)

    for way in (three_tensors, reference):
        way.inputs = copies  # type: ignore[attr-defined]
    return {"three tensors": three_tensors, "reference": reference}


def _flops(rows: Rows, x: Tensor, approx: str) -> int:
    """Of the outputs, the weights' gradients, one input covariance, three of output gradients."""
    count, d, size = x.numel() // rows.features, rows.features, rows.features + rows.bias
    summed = 0 if approx == "expand" else 4 * x.numel()
    terms = count if approx == "expand" else len(x)
    return 3 * 4 * count * d * d + summed + terms * (size * (size + 1) + 3 * d * (d + 1))


@pytest.mark.parametrize("approx", OPERATORS)
@pytest.mark.parametrize("shape", STEPS)
def bench_shared_inputs(
    shape: str, approx: str, compare: Callable[[Case], None], device: str
) -> None:
    rows = STEPS[shape]
    x = torch.randn(*rows.leading, rows.features, device=device)
    size = rows.features + rows.bias
    training = Training(rows, approx, device)
    options = {"bias": rows.bias}
    out = poisoned(size, size, device=device)
    ways, flops = _apart(training, x), _flops(rows, x, approx)
    compare(Step(OPERATORS[approx], shape, (x,), options, out, ways, flops, training=training))
