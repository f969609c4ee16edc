"""Steps that a gradient scaler skips, batches that are not finite, and half precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host import never_waits
from nets import (
    DAMPING,
    LAYER_NAMES,
    Checkpointed,
    Net,
    PartlyCheckpointed,
    images,
    preconditioner,
)
from oracle import assert_same, assert_within_budget
from plain_kfac import (
    Call,
    assert_covariances,
    assert_solved,
    condition,
    covariances,
    damp,
    factors,
    grad_matrices,
    plain_covariances,
    record,
    solve,
)
from torch import Tensor, nn

from kfac_fast import KFAC, steps
from kfac_fast.host_copy import HostCopy

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What PyTorch's own compiler does, and hides outside of tests.
    pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def equal_states(one: KFAC, two: KFAC) -> bool:
    """Whether all parts of both are the same, bit for bit."""
    states = [kfac.state_dict()["layers"] for kfac in (one, two)]
    tensors = [
        {
            (layer, part, field): tensor
            for layer, parts in state.items()
            for part, fields in parts.items()
            for field, tensor in fields.items()
        }
        for state in states
    ]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items()
    )


# A first batch that is not finite


def bad_step(kfac: KFAC, bad: str) -> None:
    """A step without finite gradients of all layers, or of those below the head, or of none."""
    model, y = kfac.model, torch.randint(3, (5,))

    def overflow(module: nn.Module, inputs: tuple[Tensor]) -> None:
        inputs[0].register_hook(infinite if bad == "below" else torch.clone)

    hook = model.head.register_forward_pre_hook(overflow)
    outputs = model(images())
    hook.remove()
    labels = torch.full_like(y, -100) if bad == "ignored" else y
    kfac.update_curvature(outputs, loss="cross_entropy", targets=labels)
    (F.cross_entropy(outputs, labels) * (math.inf if bad == "loss" else 1)).backward()
    kfac.step()


def good_step(kfac: KFAC) -> dict[str, Tensor]:
    """A step on a finite batch; the raw gradient of each layer."""
    kfac.model.zero_grad()
    y = torch.randint(3, (5,))
    outputs = kfac.model(images())
    kfac.update_curvature(outputs, loss="cross_entropy", targets=y)
    F.cross_entropy(outputs, y).backward()
    raw = {name: grad_matrices(kfac.model.get_submodule(name)) for name in LAYER_NAMES}
    kfac.step()
    return raw


BAD = [("empirical", "loss"), ("empirical", "below"), ("empirical", "ignored"), ("mc", "ignored")]
INTERVALS = {"factor_update_steps": 2, "inverse_update_steps": 100}


@pytest.mark.parametrize(("fisher", "bad"), BAD)
def test_the_first_finite_batch_does_not_wait_for_the_next_refresh(fisher: str, bad: str) -> None:
    """The inverses of factors that have seen none are identities; later batches have to wait."""
    refreshed: list[bool] = []
    kfac = preconditioner(
        Net(), fisher=fisher, callback=lambda r: refreshed.append(r.refreshed), **INTERVALS
    )
    bad_step(kfac, bad)
    good_step(kfac)
    raw = good_step(kfac)
    for name, pair in covariances(kfac).items():
        step = grad_matrices(kfac.model.get_submodule(name))
        assert_solved(step, solve(raw[name], damp(pair, DAMPING)))
    for _ in range(4):
        good_step(kfac)
    assert refreshed == [True, False, True, False, False, False, False]


def test_eigenbases_do_not_wait_either() -> None:
    kfac = preconditioner(Net(), damping_mode="exact", **INTERVALS)
    bad_step(kfac, "below")
    good_step(kfac)
    good_step(kfac)
    for block in kfac._blocks:
        for basis, factor in zip(block.bases, block.factors, strict=True):
            rotated = basis.vectors * basis.values[..., None, :]
            assert_solved(rotated @ basis.vectors.mT, factor.mean)


def test_a_layer_without_finite_batches_does_not_refresh_the_others_time_and_again() -> None:
    refreshed: list[bool] = []
    kfac = preconditioner(Net(), callback=lambda r: refreshed.append(r.refreshed), **INTERVALS)
    for _ in range(6):
        bad_step(kfac, "below")
    assert refreshed == [True] + 5 * [False]


class LateCopy(HostCopy):
    """A number that arrives when the next one is asked for, as from a device that is behind."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def send(self, number: Tensor) -> None:
        super().send(number)
        self.asked = False

    def read(self) -> int | None:
        arrived, self.asked = self.asked, True
        return super().read() if arrived else None


def test_a_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refresh comes an update later, when the host knows of the first finite batch."""
    monkeypatch.setattr(steps, "HostCopy", LateCopy)
    refreshed: list[bool] = []
    kfac = preconditioner(
        Net(), inverse_update_steps=100, callback=lambda r: refreshed.append(r.refreshed)
    )
    with never_waits():
        bad_step(kfac, "loss")
        for _ in range(7):
            good_step(kfac)
    assert refreshed.count(True) == 2 and refreshed[0] and any(refreshed[2:5])


def test_a_resumed_run_knows_what_came_too_early() -> None:
    runs = [preconditioner(Net(), **INTERVALS) for _ in range(2)]
    bad_step(runs[0], "below")
    runs[1].model.load_state_dict(runs[0].model.state_dict())
    runs[1].load_state_dict(runs[0].state_dict())
    for kfac in runs:
        torch.manual_seed(1)
        for _ in range(3):
            good_step(kfac)
    assert equal_states(*runs)


# A step that is skipped


def infinite(gradient: Tensor) -> Tensor:
    return torch.full_like(gradient, math.inf)


class Loop:
    """Training with an attached preconditioner and a scaler, on batches of 4 to 8 examples.

    Args:
        clears: Called between forward and backward pass, or before both, to clear ``.grad``.
        clears_late: Which of the two.
        compiled: The model is.
        micro_batches: Of a batch.
    """

    def __init__(
        self,
        clears: Callable[[Loop], None] = lambda loop: loop.optimizer.zero_grad(),
        clears_late: bool = False,
        compiled: bool = False,
        micro_batches: int = 1,
    ) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.run = torch.compile(self.model, backend="aot_eager") if compiled else self.model
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.clears, self.clears_late, self.micro_batches = clears, clears_late, micro_batches
        self.kfac = preconditioner(
            self.model,
            loss_scale=lambda step: self.scaler.get_scale(),
            accumulation_steps=micro_batches,
        )
        self.kfac.attach(self.optimizer)

    def train(self, seed: int, overflows: str | None = None) -> None:
        """One step on a batch; all gradients may overflow, or only that of a weight."""
        torch.manual_seed(seed)
        factor = math.inf if overflows == "loss" else 1.0
        for index in range(self.micro_batches):
            x, y = images(4), torch.randint(3, (4,))
            if index == 0 and not self.clears_late:
                self.clears(self)
            outputs = self.run(x)
            if index == 0 and self.clears_late:
                self.clears(self)
            hook = self.model.shared.weight.register_hook(
                infinite if overflows == "weight" else torch.clone
            )
            self.scaler.scale(factor * F.cross_entropy(outputs, y) / self.micro_batches).backward()
            hook.remove()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def clear_each(loop: Loop) -> None:
    for parameter in loop.model.parameters():
        parameter.grad = None


LOOPS = {
    "optimizer": {},
    "model": {"clears": lambda loop: loop.model.zero_grad()},
    "each": {"clears": clear_each},
    "late": {"clears_late": True},
    "accumulated": {"micro_batches": 3},
    "compiled": {"compiled": True},
}


# A loop, whether the first batch is the skipped one, and what overflows; compiled loops are slow.
SKIPS = [
    (loop, first, overflows)
    for loop, first, overflows in product(LOOPS, (True, False), ("loss", "weight"))
    if loop != "compiled" or first == (overflows == "loss")
]


@pytest.mark.parametrize(("loop", "first", "overflows"), SKIPS)
def test_a_batch_whose_step_is_skipped_leaves_no_trace(
    loop: str, first: bool, overflows: str
) -> None:
    """The run is that without the batch, bit for bit: the scale is a power of two."""
    plain, disturbed = Loop(**LOOPS[loop]), Loop(**LOOPS[loop])
    for seed in (1, 2, 3):
        if first == (seed == 1):
            disturbed.train(10 + seed, overflows)
        for run in (plain, disturbed):
            run.train(seed)
    assert disturbed.scaler.get_scale() < plain.scaler.get_scale()
    assert disturbed.kfac.steps == plain.kfac.steps == 3
    assert equal_states(disturbed.kfac, plain.kfac)
    pairs = zip(disturbed.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    torch.compiler.reset()


class Experts(nn.Module):
    """Examples go to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
        self.double()

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.experts[expert](x)


def test_a_layer_that_the_next_batch_does_not_reach_forgets_the_skipped_one_too() -> None:
    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = preconditioner(model)
    kfac.attach(optimizer)
    for expert in (0, 1):
        optimizer.zero_grad()
        model(torch.randn(5, 3).double(), expert).square().mean().backward()
    optimizer.step()
    assert [len(block.factors) for block in kfac._blocks] == [0, 2]


def test_a_layer_that_forgot_a_skipped_batch_counts_its_next_one() -> None:
    """Batches have numbers in each step, and may have that of the skipped one."""
    kfacs = []
    for skips in (False, True):
        torch.manual_seed(0)
        model = Experts()
        batches = [torch.randn(5, 3).double() for _ in range(3)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kfac = preconditioner(model)
        kfac.attach(optimizer)
        if skips:
            model(batches[2], 0).square().mean().backward()
        for expert, x in ((1, batches[0]), (0, batches[1])):
            optimizer.zero_grad()
            model(x, expert).square().mean().backward()
            optimizer.step()
        kfacs.append(kfac)
    assert equal_states(*kfacs)


class FailedError(Exception):
    """Of a backward pass."""


def failing(gradient: Tensor) -> Tensor:
    raise FailedError


def test_a_backward_pass_that_fails_on_its_way_leaves_no_trace() -> None:
    """Nor if the graph is passed again."""
    kfacs = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kfac = preconditioner(model)
        kfac.attach(optimizer)
        outputs = model(images())
        loss = F.cross_entropy(outputs, torch.randint(3, (5,)))
        if fails:
            hook = model.grouped.weight.register_hook(failing)
            with pytest.raises(FailedError):
                loss.backward(retain_graph=True)
            hook.remove()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kfacs.append(kfac)
    assert equal_states(*kfacs)


def test_a_pass_whose_gradients_are_cleared_leaves_the_next_one_of_its_graph_whole() -> None:
    """As in a loop over tasks that have gradients of their own, and a step along their sum."""
    kfacs = []
    for tasks in (1, 2):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kfac = preconditioner(model)
        kfac.attach(optimizer)
        outputs, y = model(images()), torch.randint(3, (5,))
        losses = [outputs.square().sum(1).mean(), F.cross_entropy(outputs, y)]
        for loss in losses[-tasks:]:
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
        optimizer.step()
        kfacs.append(kfac)
    assert all(int(factor.skipped) == 0 for block in kfacs[1]._blocks for factor in block.factors)
    assert equal_states(*kfacs)


def test_a_reentrant_checkpoint_does_not_part_the_pass_around_it() -> None:
    """The layer is called behind it and in front of it, too."""
    kfacs = []
    for attach in (False, True):
        torch.manual_seed(0)
        model = PartlyCheckpointed(use_reentrant=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kfac = preconditioner(model)
        if attach:
            kfac.attach(optimizer)
        model(model.bent(torch.randn(5, 3).double())).square().mean().backward()
        if not attach:
            kfac.step()
        optimizer.step()
        kfacs.append(kfac)
    assert equal_states(*kfacs)


def accumulated(model: nn.Module) -> None:
    for _ in range(2):
        F.cross_entropy(model(images()), torch.randint(3, (5,))).backward()


def in_one_pass(model: nn.Module) -> None:
    sum(F.cross_entropy(model(images()), torch.randint(3, (5,))) for _ in range(2)).backward()


def twice_through_one_graph(model: nn.Module) -> None:
    outputs = model(images())
    F.cross_entropy(outputs, torch.randint(3, (5,))).backward(retain_graph=True)
    outputs.square().mean().backward()


def recomputed(model: nn.Module, use_reentrant: bool) -> None:
    run = Checkpointed(model, use_reentrant=use_reentrant)
    losses = [run(images().requires_grad_()).square().mean() for _ in range(2)]
    sum(losses).backward()


def of_two_parts(model: nn.Module) -> None:
    loss = F.cross_entropy(model(images()), torch.randint(3, (5,)))
    loss.backward(inputs=[model.head.weight], retain_graph=True)
    loss.backward(inputs=[p for p in model.parameters() if p is not model.head.weight])


PASSES = {
    "accumulated": accumulated,
    "in one pass": in_one_pass,
    "twice through one graph": twice_through_one_graph,
    "recomputed": lambda model: recomputed(model, False),
    "recomputed, reentrant": lambda model: recomputed(model, True),
    "of two parts": of_two_parts,
}


@pytest.mark.parametrize("passes", PASSES)
def test_all_passes_of_one_step_count_in_an_attached_run(passes: str) -> None:
    """As they do if the step is called by hand."""
    kfacs = []
    for attach in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kfac = preconditioner(model)
        if attach:
            kfac.attach(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            PASSES[passes](model)
            if not attach:
                kfac.step()
            optimizer.step()
        kfacs.append(kfac)
    assert equal_states(*kfacs)


def test_factors_that_are_formed_by_hand_outlive_the_gradients() -> None:
    """Those of many batches, without memory for their gradients."""
    model, kfacs = Net(), []
    batches = [(images(), torch.randint(3, (5,))) for _ in range(2)]
    for clears in (False, True):
        with preconditioner(model) as kfac:
            model.zero_grad()
            for x, y in batches:
                F.cross_entropy(model(x), y).backward()
                if clears:
                    model.zero_grad()
            kfac.step()
            kfacs.append(kfac)
    assert_covariances(kfacs[0], covariances(kfacs[1]))


CLIP = {"kl_clip": 1e-3, "learning_rate": 0.1}
LENGTHS = {"none": {}, "clip": CLIP, "graft": {"grafting": "adam"}}


def scaled_step(fused: bool, unscales: bool, **options: Any) -> list[Tensor]:
    """Weights after one step of a scaler and an optimizer that may scale back the gradients."""
    torch.manual_seed(0)
    model, scaler = nn.Linear(4, 3).double(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    kfac = preconditioner(model, loss_scale=lambda step: scaler.get_scale(), **options)
    kfac.attach(optimizer)
    scaler.scale(
        F.cross_entropy(model(torch.randn(5, 4).double()), torch.randint(3, (5,)))
    ).backward()
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("options", LENGTHS.values(), ids=LENGTHS)
def test_a_fused_optimizer_takes_the_same_step(options: dict[str, Any]) -> None:
    """It undoes the scale by itself, but a step's length is that of gradients without one."""
    expected = scaled_step(False, False, **options)
    for out, weight in zip(scaled_step(True, True, **options), expected, strict=True):
        assert_same(out, weight)
    if options:
        with pytest.raises(RuntimeError, match=r"call scaler.unscale_\(optimizer\) before"):
            scaled_step(True, False, **options)
        return
    for out, weight in zip(scaled_step(True, False), expected, strict=True):
        assert_same(out, weight)


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_counts_where_the_optimizer_skips_by_itself(fused: bool) -> None:
    """As a batch that was left out; the weights stay as they were."""
    model, scaler = nn.Linear(4, 3), torch.amp.GradScaler("cpu")
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    kfac = preconditioner(model, loss_scale=lambda step: scaler.get_scale())
    kfac.attach(optimizer)
    scaler.scale(math.inf * model(torch.randn(5, 4)).square().mean()).backward()
    scaler.step(optimizer)
    skipped = [int(factor.skipped) for factor in kfac._blocks[0].factors]
    assert (kfac.steps, skipped) == ((1, [0, 1]) if fused else (0, []))
    assert torch.equal(model.weight, before)


# Half precision


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_float16_under_autocast_with_a_scaler(approx: str, attach: bool) -> None:
    """Scales are tried until nothing overflows; then the factors are no worse than unscaled ones.

    These are sums in float32 of what autocast computes in float16.
    """
    model, x, y = Net().float(), images(), torch.randint(3, (5,))
    double, twin = copy.deepcopy(model).double(), copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = preconditioner(model, approx=approx, loss_scale=lambda step: scaler.get_scale())
    if attach:
        kfac.attach(optimizer)
    scale = math.inf
    while scaler.get_scale() < scale:  # it has seen an overflow
        scale = scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            outputs = model(x.float())
        scaler.scale(F.cross_entropy(outputs.float(), y)).backward()
        scaler.unscale_(optimizer)
        raw = {name: grad_matrices(model.get_submodule(name)) for name in LAYER_NAMES}
        if not attach:
            kfac.step()
        scaler.step(optimizer)
        scaler.update()
    assert outputs.dtype == torch.float16 and 1 < scale < 2.0**24
    assert kfac.steps == (1 if attach else 25 - int(math.log2(scale)))
    exact = plain_covariances(double, lambda: F.cross_entropy(double(x), y), approx, 5, "mean")
    with torch.autocast("cpu", torch.float16):
        calls = record(twin, lambda: F.cross_entropy(twin(x.float()).float(), y))
    for name, of in calls.items():
        wide = [Call(call.rows.float(), 5.0 * call.gradients.float()) for call in of]
        unscaled = factors(wide, approx, 5)
        for out, theirs, ref64 in zip(covariances(kfac)[name], unscaled, exact[name], strict=True):
            assert_within_budget(out, theirs, ref64)
        pair = tuple(matrix.double() for matrix in covariances(kfac)[name])
        damped = damp(pair, DAMPING)
        step, expected = grad_matrices(model.get_submodule(name)), solve(raw[name].double(), damped)
        assert step.dtype == torch.float32
        error = torch.linalg.vector_norm(step - expected) / torch.linalg.vector_norm(expected)
        assert error <= 64 * torch.finfo(torch.float32).eps * condition(damped)
