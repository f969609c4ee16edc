"""Layers that are fed one tensor form one sum of its outer products, and only where it is equal."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from nets import preconditioner
from oracle import bits
from plain_kfac import assert_solved, covariances
from torch import Tensor, nn

from kfac_fast import KFAC, ops
from kfac_fast.blocks import Sum
from kfac_fast.input_grams import InputGrams
from kfac_fast.layers import RULES, Layer, LinearLayer

pytestmark = pytest.mark.usefixtures("one_thread")
approximations = pytest.mark.parametrize("approx", ["expand", "reduce"])
fishers = pytest.mark.parametrize("fisher", ["empirical", "mc"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operators that have formed sums, in order; those of output gradients are in it too."""
    names: list[str] = []

    def counted(name: str, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: (names.append(name), operator(*args, **options))[1]

    for name in ("gram", "shared_gram", "conv_expand_gram", "conv_reduce_gram"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return names


class Attention(nn.Module):
    """Self-attention and a head, ``[N, S, 4]`` to ``[N, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.head((q @ k.mT).softmax(-1) @ v).mean(1)


class Branches(nn.Module):
    """Convolutions side by side, the first two of one geometry, ``[N, 2, 6, 6]`` to ``[N, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.same, self.wide = (
            nn.Conv2d(2, channels, size, padding=size // 2)
            for channels, size in ((3, 3), (5, 3), (3, 5))
        )
        self.head = nn.Conv2d(11, 3, 6)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.one(x), self.same(x), self.wide(x)]
        return self.head(torch.cat(branches, 1).tanh()).flatten(1)


def tokens(examples: int = 5) -> Tensor:
    return torch.randn(examples, 6, 4)


def curvature(kfac: KFAC, outputs: Tensor) -> None:
    if kfac.fisher == "mc":
        kfac.update_curvature(outputs, loss="cross_entropy")


def loss_of(outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs, torch.arange(len(outputs)) % 3)


# How often


@fishers
@approximations
def test_q_k_and_v_form_one_sum(formed: list[str], approx: str, fisher: str) -> None:
    model = Attention()
    kfac = preconditioner(model, approx=approx, fisher=fisher)
    for _ in range(2):
        formed.clear()
        outputs = model(tokens())
        # One of the tokens, one of what goes into the head.
        assert formed == ["gram" if approx == "expand" else "shared_gram"] * 2
        curvature(kfac, outputs)
        loss_of(outputs).backward()
        kfac.step()


@approximations
def test_branches_of_one_geometry_form_one_sum(formed: list[str], approx: str) -> None:
    model = Branches()
    kfac = preconditioner(model, approx=approx)
    loss_of(model(torch.randn(5, 2, 6, 6))).backward()
    kfac.step()
    assert formed.count(f"conv_{approx}_gram") == 3  # the first two, the third, the head


@fishers
@pytest.mark.filterwarnings("default:The .grad attribute")  # torch's compiler hides these
@pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning")
def test_compiled_models_form_one_sum(formed: list[str], fisher: str) -> None:
    results, counts = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Attention()
        kfac = preconditioner(model, fisher=fisher)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        formed.clear()
        with torch._functorch.config.patch(donated_buffer=False):
            outputs = run(tokens())
            curvature(kfac, outputs)
            loss_of(outputs).backward()
        counts.append(sorted(formed))
        kfac.step()
        results.append(bits_of(model, kfac))
    assert counts[0] == counts[1]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_step_forgets_the_sums(formed: list[str]) -> None:
    model, x = Attention(), tokens()
    kfac = preconditioner(model)
    for _ in range(2):
        formed.clear()
        outputs = model(x)
        assert formed == ["gram"] * 2
        loss_of(outputs).backward()
        kfac.step()


# The same results


def micro_batches(model: nn.Module, kfac: KFAC) -> None:
    for _ in range(2):
        outputs = model(tokens())
        curvature(kfac, outputs)
        loss_of(outputs).backward()


def evaluation_in_between(model: nn.Module, kfac: KFAC) -> None:
    x = tokens()
    outputs = model(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(x)
    curvature(kfac, outputs)
    loss_of(outputs).backward()


def forward_passes_first(model: nn.Module, kfac: KFAC) -> None:
    x = tokens()
    passes = [model(x), model(tokens()), model(x)]
    for outputs in passes:
        curvature(kfac, outputs)
        loss_of(outputs).backward()


def layers_called_twice(model: nn.Module, kfac: KFAC) -> None:
    x = tokens()
    outputs = model.head(
        model.q(x) + model.k(x) * model.q(x) + model.v(x.flatten(0, 1)).view(x.shape)
    )
    curvature(kfac, outputs.mean(1))
    loss_of(outputs.mean(1)).backward()


def autocast(model: nn.Module, kfac: KFAC) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(tokens())
    curvature(kfac, outputs.float())
    loss_of(outputs.float()).backward()


def formed_apart(grams: InputGrams, layer: Layer, x: Tensor, output: Tensor) -> Sum:
    return layer.input_gram(x.detach(), output)


def bits_of(model: nn.Module, kfac: KFAC) -> list[Tensor]:
    """Factors and preconditioned gradients."""
    pairs = covariances(kfac)
    assert pairs.keys() == {"q", "k", "v", "head"}
    factors = [factor for pair in pairs.values() for factor in pair]
    return [bits(x) for x in [*factors, *(parameter.grad for parameter in model.parameters())]]


@fishers
@approximations
@pytest.mark.parametrize(
    "batches",
    [micro_batches, evaluation_in_between, forward_passes_first, layers_called_twice, autocast],
    ids=lambda function: function.__name__,
)
def test_sharing_changes_no_bit(
    batches: Callable[[nn.Module, KFAC], None],
    approx: str,
    fisher: str,
    monkeypatch: pytest.MonkeyPatch,
    formed: list[str],
) -> None:
    results, counts = [], []
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(InputGrams, "of", formed_apart)
        torch.manual_seed(0)
        model = Attention()
        kfac = preconditioner(model, approx=approx, fisher=fisher, mc_samples=2)
        formed.clear()
        for _ in range(2):
            model.zero_grad()
            batches(model, kfac)
            kfac.step()
        results.append(bits_of(model, kfac))
        counts.append(len(formed))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert counts[0] < counts[1]


def test_nobody_writes_to_a_shared_sum() -> None:
    model = Attention()
    kfac = preconditioner(model)
    loss_of(model(tokens())).backward()
    shared = [block._sums[0][0] for block in kfac._blocks[:3]]
    assert shared[0] is shared[1] is shared[2]
    before = shared[0].clone()
    loss_of(model(tokens())).backward()
    kfac.step()
    assert torch.equal(shared[0], before)


# The same tensor


def pair(**options: Any) -> tuple[nn.ModuleList, KFAC]:
    """Two linear layers whose calls wait, so that their sums can be told."""
    model = nn.ModuleList(nn.Linear(4, 4, **options) for _ in range(2))
    return model, preconditioner(model, fisher="mc")


def sums(kfac: KFAC) -> list[Tensor]:
    return [call.inputs[0] for call in kfac._capture.calls]


def expected(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer's sum, formed on its own."""
    return LinearLayer("layer", module, "expand").input_gram(x, x)[0]


def assert_sums(kfac: KFAC, results: Iterable[Tensor]) -> None:
    assert all(torch.equal(*both) for both in zip(sums(kfac), results, strict=True))


def write_in_inference_mode(x: Tensor) -> None:
    with torch.inference_mode():
        x.mul_(2)


def assign_memory(x: Tensor) -> None:
    x.data = torch.randn_like(x)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in-place": lambda x: x.add_(1),
    "into-a-view": lambda x: x[0].zero_(),
    "into-a-detached-one": lambda x: x.detach().mul_(2),
    "as-a-result": lambda x: torch.add(x, 1, out=x),
    "in-inference-mode": write_in_inference_mode,
    "other-memory": assign_memory,
}


@pytest.mark.parametrize("fed", [lambda x: x, lambda x: x.flatten(0, 1)], ids=["tensor", "view"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_between_two_calls_makes_two_sums(
    write: Callable[[Tensor], Any], fed: Callable[[Tensor], Tensor]
) -> None:
    (first, second), kfac = pair()
    x = tokens()
    first(fed(x))
    before = expected(first, fed(x.clone()))
    write(x)
    second(fed(x))
    after = expected(second, fed(x.clone()))
    assert not torch.equal(before, after)
    assert_sums(kfac, (before, after))


def test_versions_of_two_counters_are_not_compared() -> None:
    """``x.data`` is the same memory, whose writes it counts from zero."""
    (first, second), kfac = pair()
    x = tokens()
    data = x.data
    first(x)
    x.add_(1)
    assert data._version == 0
    second(data)
    assert torch.equal(sums(kfac)[1], expected(second, x))


@pytest.mark.parametrize("assign", [False, True])
def test_memory_that_is_used_again_holds_another_tensor(assign: bool) -> None:
    (layer, _), kfac = pair()
    x, memory = torch.empty(5, 4), np.empty((5, 4), dtype=np.float32)
    for value in range(1, 51):
        memory[:] = value
        filled = torch.from_numpy(memory)  # a new tensor and storage where the last ones were
        if assign:
            x.data = filled
        else:
            x = filled
        del filled
        layer(x)
        assert x.data_ptr() == memory.ctypes.data
        assert float(kfac._capture.calls.pop().inputs[0][0, 0]) == 5 * value**2


SAME: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tensor": (lambda x: x, lambda x: x),
    "tensor-and-view": (lambda x: x, lambda x: x[:]),
    "flat": (lambda x: x.flatten(0, 1), lambda x: x.view(-1, 4)),
    "slices": (lambda x: x[1:, 2:], lambda x: x[1:][:, 2:]),
    "chunks": (lambda x: x.chunk(2, 1)[1], lambda x: x.split(3, 1)[1]),
}
OTHER: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "offset": (lambda x: x[0], lambda x: x[1]),
    "shape": (lambda x: x[:3], lambda x: x[:2]),
    "strides": (lambda x: x[:, :4], lambda x: x[:, :4].mT),
    "negative": (lambda x: x, torch._neg_view),
    "copy": (lambda x: x, Tensor.clone),
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_views_share_where_they_read_the_same(name: str) -> None:
    model, kfac = pair()
    x = tokens()
    fed = [view(x) for view in (SAME | OTHER)[name]]
    for layer, view in zip(model, fed, strict=True):
        layer(view)
    one, other = sums(kfac)
    assert (one is other) == (name in SAME)
    assert_sums(kfac, map(expected, model, fed))


def test_views_of_what_only_they_hold_share() -> None:
    model, kfac = pair()
    view = (tokens() * 2).flatten(0, 1)
    gc.collect()
    for layer in model:
        layer(view)
    one, other = sums(kfac)
    assert one is other


def test_bits_read_as_another_dtype_do_not_share() -> None:
    dtypes = torch.bfloat16, torch.float16
    model = nn.ModuleList(nn.Linear(4, 4, dtype=dtype) for dtype in dtypes)
    kfac = preconditioner(model, fisher="mc")
    x = tokens().bfloat16()
    fed = [x.view(dtype) for dtype in dtypes]
    for layer, view in zip(model, fed, strict=True):
        layer(view)
    assert_sums(kfac, map(expected, model, fed))


def test_a_tensor_whose_writes_are_not_counted_is_not_shared() -> None:
    model, kfac = pair()
    with torch.inference_mode():
        x = tokens()
    results = []
    for layer in model:
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        results.append(expected(layer, x.clone()))
        with torch.inference_mode():
            x.add_(1)
    assert_sums(kfac, results)


def test_a_function_transform_runs_as_without_sharing() -> None:
    model, x = Attention(), tokens()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(model, parameters, (x,)))

    grads = torch.func.grad(loss)(parameters)
    preconditioner(model)
    for name, grad in torch.func.grad(loss)(parameters).items():
        assert torch.equal(grad, grads[name])


# The same rule

CONV = {"out_channels": 6, "kernel_size": 3, "padding": 1}
LIKE_CONV = ({"out_channels": 2}, {"padding": "same"}, {"padding": (1, 1)})
UNLIKE_CONV = (
    {"bias": False},
    {"kernel_size": 1},
    {"kernel_size": (3, 1)},
    {"padding": 0},
    {"padding": 2},
    {"padding": 2, "dilation": 2},
    {"padding_mode": "reflect"},
    {"stride": 2},
    {"groups": 2},
)


def convolution(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, **{**CONV, **options})


def frozen_bias() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    return layer


MODULES = [
    *((convolution(), convolution(**options), True) for options in LIKE_CONV),
    *((convolution(), convolution(**options), False) for options in UNLIKE_CONV),
    (nn.Linear(4, 4), nn.Linear(4, 2), True),
    (nn.Linear(4, 4), nn.Linear(4, 4, bias=False), False),
    (frozen_bias(), nn.Linear(4, 4, bias=False), True),
    (nn.Conv2d(4, 2, 1), nn.ConvTranspose2d(4, 2, 1), False),
    (nn.ConvTranspose2d(4, 2, 3), nn.ConvTranspose2d(4, 3, 3), True),
    (nn.ConvTranspose2d(4, 2, 3), nn.ConvTranspose2d(4, 2, 3, padding=1), False),
    (
        nn.ConvTranspose2d(4, 2, 3, stride=2),
        nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1),
        False,
    ),
]


@approximations
@pytest.mark.parametrize(("first", "second", "alike"), MODULES, ids=str)
def test_layers_share_where_they_form_the_same(
    first: nn.Module, second: nn.Module, alike: bool, approx: str
) -> None:
    model = nn.ModuleList([first, second])
    x = torch.randn(3, 4, 5, 4)
    with preconditioner(model, approx=approx, fisher="mc") as kfac:
        outputs = [layer(x) for layer in model]
        results = [call.inputs for call in kfac._capture.calls]
    assert (results[0] is results[1]) == alike
    for module, output, (out, count) in zip(model, outputs, results, strict=True):
        result, terms = RULES[type(module)]("layer", module, approx).input_gram(x, output)
        assert torch.equal(out, result) and count == terms


def test_a_transposed_convolutions_output_size_is_part_of_its_rule() -> None:
    model = nn.ModuleList(nn.ConvTranspose2d(4, 2, 3, stride=2) for _ in range(3))
    kfac = preconditioner(model, fisher="mc")
    x = torch.randn(3, 4, 5, 4)
    for layer, size in zip(model, [(11, 9), (12, 9), (11, 9)], strict=True):
        layer(x, output_size=size)
    first, second, third = sums(kfac)
    assert first is third and not torch.equal(first, second)


def test_the_approximation_is_part_of_the_rule() -> None:
    for module, x in ((nn.Linear(4, 2), tokens()), (convolution(), torch.randn(3, 4, 5, 4))):
        rule, output = RULES[type(module)], module(x)
        keys = {rule("layer", module, approx).input_key(output) for approx in ("expand", "reduce")}
        assert len(keys) == 2


@pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("refill", ["data", "numpy"])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_input_that_is_refilled_between_passes_is_another(refill: str, compiled: bool) -> None:
    """Autograd does not count these writes."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    kfac = preconditioner(model, accumulation_steps=3)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    batches = torch.randn(3, 5, 3, dtype=torch.float64)
    memory = np.empty((5, 3))
    x = torch.from_numpy(memory)
    for batch in batches:
        if refill == "data":
            x.data.copy_(batch)
        else:
            memory[:] = batch.numpy()
        (run(x).square().sum() / 3).backward()
    kfac.step()
    rows = F.pad(batches.flatten(0, 1), (0, 1), value=1.0)
    assert_solved(kfac._blocks[0].factors[0].mean, rows.T @ rows / len(rows))


# Memory


@fishers
def test_no_activation_is_kept(fisher: str) -> None:
    """Autograd needs the activation's bfloat16 copy only, until the backward pass."""
    model, x = Attention(), tokens()
    kfac = preconditioner(model, fisher=fisher)
    activation = x * 2
    seen = weakref.ref(activation)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(activation).float()
    assert len(kfac._capture._input_grams._latest) == 2
    del activation
    assert seen() is None
    curvature(kfac, outputs)
    loss_of(outputs).backward()
    del outputs
    assert not kfac._capture._input_grams._latest


def test_nothing_but_the_tensor_keeps_its_sums() -> None:
    grams, x, kept = InputGrams(), tokens(), nn.Identity()
    grams._sums_of(x)["key"] = kept
    seen = weakref.ref(kept)
    del kept
    assert seen() is not None
    gc.disable()
    try:
        del grams
        assert seen() is None
    finally:
        gc.enable()


def test_only_the_latest_sum_of_a_buffer_is_kept() -> None:
    (layer, _), kfac = pair()
    x = tokens()
    for _ in range(3):
        layer(x.normal_())
    (state,) = kfac._capture._input_grams._latest.values()
    assert len(state.sums) == 1
