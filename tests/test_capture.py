"""What the hooks take down, and what they leave alone: gradients, copies, bad batches, the host."""

from __future__ import annotations

import copy
import functools
import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host import never_waits
from nets import Checkpointed, Net, PartlyCheckpointed, images, preconditioner, train_step
from oracle import bits
from plain_kfac import Call, assert_covariances, covariances, factors, plain_covariances, record
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kfac_fast import KFAC, capture
from kfac_fast.layers.linear import LinearLayer

pytestmark = pytest.mark.usefixtures("one_thread")
fishers = pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_in_place_activations_change_no_bit() -> None:
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = Net(inplace)
        kfac = preconditioner(model)
        F.cross_entropy(model(images()), torch.tensor([0, 1, 2, 0, 1])).backward()
        kfac.step()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_activations_give_the_same_factors(use_reentrant: bool) -> None:
    net, x, y = Net(), images().requires_grad_(), torch.randint(3, (5,))
    expected = plain_covariances(net, lambda: F.cross_entropy(net(x), y), "expand", 5, "mean")
    model = Checkpointed(net, use_reentrant)
    kfac = preconditioner(model)
    F.cross_entropy(model(x), y).backward()
    kfac.step()
    assert_covariances(kfac, {f"net.{name}": pair for name, pair in expected.items()})


class Attends(nn.Module):
    """Attention of ``[N, S, 3]`` to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@fishers
@pytest.mark.parametrize("eigenvalue_correction", [False, True])
def test_a_checkpointed_part_keeps_no_input_between_its_passes(
    eigenvalue_correction: bool, fisher: str
) -> None:
    """Nor does it change a bit, also on steps that capture nothing."""
    mode = "exact" if eigenvalue_correction else "factored"
    options = {"damping_mode": mode, "eigenvalue_correction": eigenvalue_correction}
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Tanh(), Attends(), nn.Tanh())
        layers.append(nn.Linear(3, 4))
        model = Checkpointed(layers, use_reentrant=False) if checkpointed else layers
        kfac = preconditioner(model, fisher=fisher, factor_update_steps=2, **options)
        for _ in range(4):
            alive: list[weakref.ref[torch.UntypedStorage]] = []

            def note(module: nn.Module, inputs: tuple[Tensor], alive: list[Any] = alive) -> None:
                alive.append(weakref.ref(inputs[0].untyped_storage()))

            hooks = [layer.register_forward_pre_hook(note) for layer in layers[1:]]
            outputs, y = model(torch.randn(5, 2, 3)).mT, torch.randint(4, (5, 2))
            for hook in hooks:
                hook.remove()
            assert any(input() is not None for input in alive) != checkpointed
            model.zero_grad()
            if fisher != "empirical":
                kfac.update_curvature(outputs, loss="cross_entropy")
            F.cross_entropy(outputs, y).backward()
            kfac.step()
        parts = [part for block in kfac._blocks for part in block.parts().values()]
        tensors = [getattr(part, field) for part in parts for field in part.STATE]
        results.append([*tensors, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(bits(one), bits(other))


def save_products(context: Any, operator: Any, *args: Any, **named: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    if operator.overloadpacket in products:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def save_most(context: Any, operator: Any, *args: Any, **named: Any) -> CheckpointPolicy:
    if operator is torch.ops.aten.tanh.default:
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


def save_all(context: Any, operator: Any, *args: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


EKFAC = {"damping_mode": "exact", "eigenvalue_correction": True}
NETS = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)),
    "norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6)),
    "stored": lambda: Stored(checkpointed=False),
    "transformer": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("options", [{}, EKFAC, {"fisher": "mc"}], ids=["kfac", "ekfac", "mc"])
@pytest.mark.parametrize("policy", [save_products, save_most, save_all])
@pytest.mark.parametrize("net", NETS)
def test_a_selective_checkpoint_saves_none_of_ours(
    net: str, policy: Any, options: dict[str, Any]
) -> None:
    """Gradients and factors are those without it, bit for bit."""
    results = []
    for selective in (False, True):
        torch.manual_seed(0)
        model = NETS[net]().double()
        kfac = preconditioner(model, **options)
        for _ in range(2):
            x = torch.randn(2, 3, 6, dtype=torch.float64)
            model.zero_grad()
            if selective:
                contexts = functools.partial(create_selective_checkpoint_contexts, policy)
                outputs = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
            else:
                outputs = model(x)
            if "fisher" in options:
                kfac.update_curvature(outputs.mT, loss="mse")
                outputs = model(x)  # such a part may be passed once
            outputs.square().mean().backward()
            raw = [parameter.grad.clone() for parameter in model.parameters()]
            kfac.step()
        factors = [factor.mean for block in kfac._blocks for factor in block.factors]
        results.append([*raw, *factors])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_call_counts_once_under_the_forward_only_fisher(use_reentrant: bool) -> None:
    x, results = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), []
    for way in (None, use_reentrant):
        torch.manual_seed(1)
        model = PartlyCheckpointed(way)
        kfac = preconditioner(model, fisher="forward-only")
        model(x).square().mean().backward()
        kfac.step()
        results.append(kfac)
    assert_covariances(results[1], covariances(results[0]))


def test_hooks_that_leave_between_the_passes_of_a_checkpointed_part_are_missed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with preconditioner(model):
        outputs = checkpoint(model, torch.randn(5, 3), use_reentrant=False)
    with pytest.raises(CheckpointError, match="different number of tensors"):
        outputs.sum().backward()


class Stored(nn.Module):
    """Offloads what it saves, maybe in a part that is recomputed.

    Args:
        checkpointed: It is.
    """

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)).double()
        self.checkpointed = checkpointed

    def stored(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            x = self.layers(x)
        return x.tanh()  # which has the part run again

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.stored, x, use_reentrant=False)
        return self.stored(x)


@pytest.mark.parametrize("fisher", ["empirical", "forward-only", "mc"])
def test_hooks_of_others_inside_of_a_checkpointed_part_do_not_hide_it(fisher: str) -> None:
    x, results = torch.randn(5, 6, dtype=torch.float64), []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = Stored(checkpointed)
        kfac = preconditioner(model, fisher=fisher)
        outputs = model(x)
        if fisher == "mc":
            kfac.update_curvature(outputs, loss="mse")
        outputs.square().sum(1).mean().backward()
        assert not kfac._capture.calls
        kfac.step()
        results.append([factor.mean for block in kfac._blocks for factor in block.factors])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


class Rerun(torch.autograd.Function):
    """A checkpoint that somebody wrote, as PyTorch's with ``use_reentrant=True``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            outputs = ctx.function(x)
        outputs.backward(*gradients)
        return x.grad, None


def test_hooks_of_others_around_the_backward_pass_hide_no_call() -> None:
    model, x = nn.Linear(3, 3).double(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for rerun in (False, True):
        with preconditioner(model) as kfac:
            outputs = Rerun.apply(x, model) if rerun else model(x)
            with torch.autograd.graph.save_on_cpu():
                outputs.square().sum(1).mean().backward()
            kfac.step()
        results.append(covariances(kfac)[""])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_hooks_of_others_may_be_methods_of_tensors() -> None:
    model, x, results = nn.LayerNorm(3), torch.randn(5, 3), []
    for pack, unpack in ((lambda t: t, lambda t: t), (torch.Tensor.double, torch.Tensor.float)):
        with (
            preconditioner(model) as kfac,
            torch.autograd.graph.saved_tensors_hooks(pack, unpack),
        ):
            model(x).square().sum(1).mean().backward()
            kfac.step()
        results.append([factor.mean for block in kfac._blocks for factor in block.factors])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_recomputed_pass_leaves_no_call_waiting(fisher: str) -> None:
    """Each would hold what was recomputed until the step's end."""
    model = Checkpointed(Net(), use_reentrant=False)
    kfac = preconditioner(model, fisher=fisher)
    outputs = model(images())
    kfac.update_curvature(outputs, loss="cross_entropy")
    outputs.square().mean().backward()
    assert kfac._capture.calls == []


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact", "forward-only"])
def test_gradients_are_untouched_before_the_step(fisher: str) -> None:
    model, x, y = Net(), images(), torch.randint(3, (5,))
    F.cross_entropy(model(x), y).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    kfac = preconditioner(model, fisher=fisher)
    outputs = model(x)
    kfac.update_curvature(outputs, loss="cross_entropy")
    assert all(parameter.grad is None for parameter in model.parameters())
    F.cross_entropy(outputs, y).backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(bits(parameter.grad), bits(grad))


def normalized() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def test_inputs_are_let_go_in_the_backward_pass() -> None:
    """Not when autograd drops the graph, at its end."""
    model, x = normalized(), torch.randn(5, 3, requires_grad=True)
    kfac = preconditioner(model)
    inputs: list[weakref.ref[Tensor]] = []
    model[1].register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    loss = F.cross_entropy(model(x), torch.randint(3, (5,)))
    assert inputs[0]() is not None
    there: list[bool] = []
    x.register_hook(lambda gradient: there.append(inputs[0]() is not None))
    loss.backward()
    assert there == [False]
    kfac.step()


class Around(nn.Sequential):
    """What a model may do to its layers' inputs."""

    def __init__(self, way: str) -> None:
        super().__init__(*normalized())
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "checkpoint":
            return checkpoint(super().forward, x, use_reentrant=False)
        if self.way == "views":
            return self[2](self[1](self[0](x[:, None].transpose(0, 1)).transpose(0, 1)[:, 0]))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.way == "autocast"):
            return super().forward(x).float()


@pytest.mark.parametrize("way", ["plain", "checkpoint", "views", "autocast"])
@pytest.mark.parametrize("eigenvalue_correction", [False, True])
def test_a_graph_may_be_passed_again(eigenvalue_correction: bool, way: str) -> None:
    """A second pass adds its gradients, of the terms that are counted."""
    mode = "exact" if eigenvalue_correction else "factored"
    options = {"damping_mode": mode, "eigenvalue_correction": eigenvalue_correction}
    model, x, y = Around(way), torch.randn(5, 3), torch.randint(3, (5,))
    results = []
    for passes in (1, 2):
        with preconditioner(model, **options) as kfac:
            for _ in range(2):
                loss = F.cross_entropy(model(x), y)
                for i in range(passes):
                    loss.backward(retain_graph=i + 1 < passes)
                kfac.step()
            results.append(kfac.state_dict()["layers"])
    once, twice = results
    assert torch.equal(twice["1"]["joint"]["mean"], 2 * once["1"]["joint"]["mean"])
    if eigenvalue_correction:
        for name in ("0", "1", "2"):
            correction = twice[name]["correction"]["mean"]
            torch.testing.assert_close(correction, 2 * once[name]["correction"]["mean"])


def test_a_backward_pass_in_two_parts_counts_once() -> None:
    model, x, y = normalized(), torch.randn(5, 3), torch.randint(3, (5,))
    results = []
    for split in (False, True):
        with preconditioner(model) as kfac:
            hidden = model[1](model[0](x))
            loss = F.cross_entropy(model[2](hidden), y)
            if split:
                hidden.backward(*torch.autograd.grad(loss, hidden))
            else:
                loss.backward()
            kfac.step()
            results.append(kfac.state_dict()["layers"]["1"]["joint"]["mean"])
    assert torch.equal(*results)


def test_a_forward_pass_alone_keeps_nothing_alive() -> None:
    """An input that its layer's output is added to would own the graph that owns it."""
    model = nn.Sequential(nn.Linear(4, 4))
    kfac = preconditioner(model, damping_mode="exact", eigenvalue_correction=True)
    F.cross_entropy(model(torch.randn(5, 4)), torch.randint(4, (5,))).backward()
    kfac.step()
    x = torch.randn(5, 4, requires_grad=True) * 1
    known = weakref.ref(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x += model(x)
    del x
    kfac.step()
    gc.collect()
    assert known() is None


def test_a_layer_that_took_no_part_keeps_its_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    kfac = preconditioner(model)
    model[1].weight.grad = torch.ones(2, 2)
    model[0](torch.randn(5, 3)).square().mean().backward()
    kfac.step()
    assert torch.equal(model[1].weight.grad, torch.ones(2, 2))
    assert model[1].bias.grad is None
    assert kfac.summary().count("no factors yet") == 1


@pytest.mark.parametrize("kl_clip", [None, 1e-3])
def test_gradients_of_another_model_are_refused(kl_clip: float | None) -> None:
    model = nn.Linear(3, 2)
    kfac = preconditioner(model, kl_clip=kl_clip, learning_rate=0.1)
    model.weight.grad = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="must come from the model given to KFAC, got no pass"):
        kfac.step()
    assert torch.equal(model.weight.grad, torch.ones(2, 3)) and kfac.steps == 0


def test_a_step_without_gradients_changes_nothing() -> None:
    kfac = preconditioner(nn.Linear(3, 2), kl_clip=1e-3, learning_rate=0.1)
    kfac.step()
    assert kfac.steps == 1


def test_a_backward_pass_to_be_differentiated_again_is_not_captured() -> None:
    model = nn.Linear(3, 2)
    kfac = preconditioner(model)
    loss = model(torch.randn(4, 3)).square().mean()
    torch.autograd.grad(loss, model.weight, create_graph=True)
    assert not kfac._blocks[0].pending
    loss.backward()
    assert kfac._blocks[0].pending


def test_flattened_tokens_are_no_examples() -> None:
    """A layer on ``[N * S, D]`` and one on ``[N, S, D]`` see the same loss."""

    class Tokens(nn.Module):
        def __init__(self, flat: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.flat, self.first = flat, nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.first(x.flatten(0, 1) if self.flat else x)
            return rows.unflatten(0, x.shape[:2]) if self.flat else rows

    x, gradient_factors = torch.randn(4, 5, 3), []
    for flat in (False, True):
        model = Tokens(flat)
        kfac = preconditioner(model)
        model(x).sum(1).square().mean(0).sum().backward()
        kfac.step()
        gradient_factors.append(kfac._blocks[0].factors[1].mean)
    assert torch.equal(*gradient_factors)


def test_layers_may_be_called_by_themselves_and_by_keyword() -> None:
    """Each call is then a pass of its own; an evaluation of the whole model in between is none."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    twin = copy.deepcopy(model)
    kfac = preconditioner(model, factor_decay=0, accumulation_steps=2)
    for by_layers in (False, True, True):
        model.zero_grad()
        with torch.no_grad():
            model(torch.randn(2, 3, dtype=torch.float64))
        calls: dict[str, list[Call]] = {"0": [], "2": []}
        for _ in range(2):
            x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
            recorded = record(twin, lambda x=x, y=y: F.cross_entropy(twin(x), y, reduction="sum"))
            for name, (call,) in recorded.items():
                calls[name].append(call)
            outputs = model[2](input=model[0](input=x).tanh()) if by_layers else model(x)
            (F.cross_entropy(outputs, y) / 2).backward()
        kfac.step()
        assert_covariances(kfac, {name: factors(of, "expand", 10) for name, of in calls.items()})


def test_layers_that_are_frozen_later_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    kfac = preconditioner(model)
    model[0].requires_grad_(False)
    model(torch.randn(5, 3)).square().mean().backward()
    kfac.step()
    assert list(covariances(kfac)) == ["1"] and model[0].weight.grad is None


def test_a_deep_copy_of_the_model_feeds_nothing_to_the_preconditioner() -> None:
    model = Net()
    kfac = preconditioner(model)
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(images()), torch.randint(3, (5,))).backward()
    kfac.step()
    assert covariances(kfac) == {}


def test_drawn_labels_keep_no_gradient_but_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch, and layers behind one another: gradients are made use of as they pass."""
    alive: list[weakref.ref[Tensor]] = []
    formed, most = LinearLayer.gradient_gram, []

    def gradient_gram(layer: LinearLayer, gradient: Tensor, *args: Any) -> Tensor:
        alive.append(weakref.ref(gradient))
        most.append(sum(reference() is not None for reference in alive))
        return formed(layer, gradient, *args)

    monkeypatch.setattr(LinearLayer, "gradient_gram", gradient_gram)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(8)))
    kfac = preconditioner(model, fisher="mc")
    kfac.update_curvature(model(torch.randn(5, 3)), loss="mse")
    assert len(most) == 8 and max(most) <= 2


def factor_bits(kfac: KFAC) -> list[Tensor]:
    tensors = [
        tensor
        for block in kfac._blocks
        for factor, inverse in zip(block.factors, block.inverses, strict=True)
        for tensor in (factor.mean, factor.weight, inverse.matrix)
    ]
    return [bits(tensor) for tensor in tensors]


@fishers
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_batch_leaves_every_factor_as_it_was(value: float, fisher: str) -> None:
    models = []
    for bad_batch in (False, True):
        torch.manual_seed(0)
        model = Net()
        kfac = preconditioner(model, fisher=fisher)
        for step in range(3):
            x, y = images(), torch.randint(3, (5,))
            state = torch.get_rng_state()
            if bad_batch and step == 1:
                before = factor_bits(kfac)
                bad = x.clone()
                bad[2, 1, 3, 3] = value
                train_step(model, kfac, bad, y)
                assert all(
                    torch.equal(*pair) for pair in zip(before, factor_bits(kfac), strict=True)
                )
                torch.set_rng_state(state)
            train_step(model, kfac, x, y)
        models.append((model, kfac))
    for clean, disturbed in zip(*(model.parameters() for model, _ in models), strict=True):
        assert torch.equal(bits(clean.grad), bits(disturbed.grad))
    assert models[1][1].summary().count("updates skipped 2") == 4


@pytest.mark.parametrize(
    "options",
    [{}, {"kl_clip": 1e-3, "learning_rate": 0.1}, {"grafting": "adam"}, {"damping_mode": "plain"}],
    ids=str,
)
@fishers
def test_the_host_never_waits_for_the_device(fisher: str, options: dict[str, Any]) -> None:
    model = Net()
    kfac = preconditioner(model, fisher=fisher, approx="reduce", **options)
    for bad in (False, True, False):
        x = images()
        if bad:
            x[0, 0, 0, 0] = math.nan
        model.zero_grad()
        with never_waits():
            outputs = model(x)
            if fisher != "empirical":
                kfac.update_curvature(outputs, loss="cross_entropy")
            F.cross_entropy(outputs, torch.tensor([0, 1, 2, 0, 1])).backward()
            kfac.step()
    assert "updates skipped 2" in kfac.summary()


def test_the_guard_against_waiting_sees_it() -> None:
    with never_waits(), pytest.raises(AssertionError, match="waits"):
        torch.ones(()).item()


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_nothing_of_a_step_waits_for_the_garbage_collector(fisher: str) -> None:
    """A cycle through the graph would hold its activations until then."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    kfac = preconditioner(model, fisher=fisher)
    gc.collect()
    gc.disable()
    try:
        outputs = model(torch.randn(5, 3))
        if fisher == "mc":
            kfac.update_curvature(outputs, loss="mse")
        outputs.square().mean().backward()
        kfac.step()
        del outputs
        assert not [each for each in gc.get_objects() if type(each) is capture.Call]
    finally:
        gc.enable()
