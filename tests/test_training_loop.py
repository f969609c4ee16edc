"""The preconditioner beside an optimizer: schedules, attaching, options, and what it buys."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host import never_waits
from nets import DAMPING, Net, images, preconditioner, train_step
from oracle import assert_same
from plain_kfac import assert_solved, covariances, plain_covariances
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.factors import Factor
from kfac_fast.inverses import Inverse

pytestmark = pytest.mark.usefixtures("one_thread")
fishers = pytest.mark.parametrize("fisher", ["empirical", "mc"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def head(kfac: KFAC) -> tuple[Factor, Inverse]:
    """The input's side of the last layer."""
    return kfac._blocks[-1].factors[0], kfac._blocks[-1].inverses[0]


def updates(kfac: KFAC, model: Net, steps: int) -> tuple[list[int], list[int]]:
    """The steps at which the running average moved, and at which the inverse was refreshed."""
    moved, refreshed = [], []
    total, version = None, -1
    for step in range(steps):
        train_step(model, kfac, images(), torch.randint(3, (5,)))
        factor, own = head(kfac)
        if total is None or not torch.equal(factor.mean, total):
            moved.append(step)
        if own.matrix._version != version:
            refreshed.append(step)
        total, version = factor.mean.clone(), own.matrix._version
    return moved, refreshed


@fishers
def test_factors_and_inverses_are_updated_at_their_own_intervals(fisher: str) -> None:
    model = Net()
    kfac = KFAC(model, fisher=fisher, factor_update_steps=3, inverse_update_steps=2)
    assert updates(kfac, model, 8) == ([0, 3, 6], [0, 2, 4, 6])


def test_intervals_may_be_functions_of_the_step() -> None:
    model = Net()
    options = {
        "factor_update_steps": lambda step: 1 if step < 3 else 4,
        "inverse_update_steps": lambda step: 5 if step < 5 else 2.0,
    }
    assert updates(KFAC(model, **options), model, 10) == ([0, 1, 2, 4, 8], [0, 6, 8])


def test_the_first_factors_of_a_layer_are_inverted_at_once() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    kfac = KFAC(model, factor_update_steps=1, inverse_update_steps=100)
    for layer in model:
        layer(torch.randn(5, 3)).square().mean().backward()
        kfac.step()
    for block in kfac._blocks:
        assert not torch.equal(block.inverses[0].matrix, torch.eye(4))


def test_the_damping_and_the_decay_may_be_functions_of_the_step() -> None:
    model = nn.Linear(3, 2, dtype=torch.float64)
    decays, dampings = [0.5, 0.9, 0.0], [0.1, 1.0, 10.0]
    options = {"damping": dampings.__getitem__, "factor_decay": decays.__getitem__}
    kfac = KFAC(
        model, damping_mode="plain", factor_update_steps=1, inverse_update_steps=1, **options
    )
    weight = 0.0
    for decay, damping in zip(decays, dampings, strict=True):
        model(torch.randn(5, 3, dtype=torch.float64)).square().mean().backward()
        kfac.step()
        weight = decay * weight + 1 - decay
        factor, inverse = head(kfac)
        assert float(factor.weight) == pytest.approx(weight, rel=1e-14)
        damped = factor.mean + damping * torch.eye(4).double()
        assert_solved(inverse.matrix, torch.linalg.inv(damped))


def test_the_clip_may_be_a_function_of_the_step() -> None:
    norms = []
    for scale in (lambda step: 1e-4 / 4**step, 1e-4):
        torch.manual_seed(0)
        model = Net()
        kfac = preconditioner(model, kl_clip=scale, learning_rate=0.3)
        for _ in range(2):
            train_step(model, kfac, images(), torch.randint(3, (5,)))
        norms.append(torch.linalg.vector_norm(model.head.weight.grad))
    assert_solved(2 * norms[0], norms[1])


@fishers
def test_steps_that_update_no_factors_take_nothing_down(fisher: str) -> None:
    model = Net()
    kfac = KFAC(model, fisher=fisher, factor_update_steps=2)
    train_step(model, kfac, images(), torch.randint(3, (5,)))
    outputs = model(images())
    if fisher == "mc":
        kfac.update_curvature(outputs, loss="cross_entropy")
    outputs.sum().backward()
    assert not kfac._capture.calls and not any(block.pending for block in kfac._blocks)
    kfac.step()


@fishers
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_forward_pass_alone_leaves_no_trace(mode: Callable[[], Any], fisher: str) -> None:
    """Without gradients, or with them but without a backward pass."""
    model, x, y = Net(), images(), torch.randint(3, (5,))
    expected = plain_covariances(model, lambda: F.cross_entropy(model(x), y), "expand", 5, "mean")
    kfac = preconditioner(model, fisher=fisher)
    with mode():
        model(images())
    outputs = model(x)
    if fisher == "mc":
        kfac.update_curvature(outputs, loss="cross_entropy")
    with mode():
        model(images())
    F.cross_entropy(outputs, y).backward()
    kfac.step()
    assert not kfac._capture.calls
    for name, pair in covariances(kfac).items():
        assert_solved(pair[0], expected[name][0])
        if fisher == "empirical":
            assert_solved(pair[1], expected[name][1])


@pytest.mark.parametrize("together", [False, True])
def test_sampled_curvature_adds_up_over_forward_passes(together: bool) -> None:
    """Each pass may be followed by its update, or all passes may come first."""
    model, batches = Net(), [images(3), images(4)]
    x, y = torch.cat(batches), torch.randint(3, (7,))
    expected = plain_covariances(model, lambda: F.cross_entropy(model(x), y), "expand", 7, "mean")
    kfac = preconditioner(model, fisher="mc")
    if together:
        for outputs in [model(batch) for batch in batches]:
            kfac.update_curvature(outputs, loss="cross_entropy")
    else:
        for batch in batches:
            kfac.update_curvature(model(batch), loss="cross_entropy")
    terms = [block._sums[1][1] for block in kfac._blocks]
    kfac.step()
    assert terms == [7] * 4
    for name, pair in covariances(kfac).items():
        assert_solved(pair[0], expected[name][0])


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_forgotten_update_of_the_curvature_is_an_error_and_can_be_made_up_for(
    fisher: str,
) -> None:
    model = Net()
    kfac = preconditioner(model, fisher=fisher)
    outputs = model(images())
    with pytest.raises(RuntimeError, match=rf"fisher='{fisher}' needs update_curvature\(\)"):
        kfac.step()
    with pytest.raises(ValueError, match="loss must be one of"):
        kfac.update_curvature(outputs, loss="hinge")
    kfac.update_curvature(outputs, loss="mse")
    kfac.step()
    assert kfac.steps == 1 and len(covariances(kfac)) == 4


def test_the_curvatures_generator_decides_the_labels() -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = Net()
        kfac = preconditioner(model, fisher="mc")
        generator = torch.Generator().manual_seed(seed)
        kfac.update_curvature(model(images()), loss="cross_entropy", generator=generator)
        kfac.step()
        results.append(covariances(kfac)["head"][1])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attaching_is_calling_step_before_the_optimizer(name: str) -> None:
    weights = []
    for attach in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = OPTIMIZERS[name](model.parameters())
        kfac = preconditioner(model)
        if attach:
            kfac.attach(optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(images()), torch.randint(3, (5,))).backward()
            if not attach:
                kfac.step()
            optimizer.step()
        assert kfac.steps == 4
        weights.append(list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_is_the_optimizers_own(name: str) -> None:
    """It is added to the preconditioned gradient, or apart from it; never preconditioned."""
    model, lr, decay = Net(), 0.05, 0.3
    twin = copy.deepcopy(model)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    optimizer = kind(model.parameters(), lr=lr, weight_decay=decay)
    old = [parameter.detach().clone() for parameter in model.parameters()]
    x, y, hand = images(), torch.randint(3, (5,)), preconditioner(twin)
    preconditioner(model).attach(optimizer)
    for net in (twin, model):
        F.cross_entropy(net(x), y).backward()
    hand.step()
    optimizer.step()
    for out, weight, own in zip(model.parameters(), old, twin.parameters(), strict=True):
        step = own.grad if name == "sgd" else own.grad / (own.grad.abs() + 1e-8)
        assert_same(out.detach(), (1 - lr * decay) * weight - lr * step)


def test_one_optimizer_at_a_time_is_attached_and_it_must_hold_a_parameter() -> None:
    model = Net()
    kfac = KFAC(model)
    with pytest.raises(ValueError, match="optimizer must hold a preconditioned parameter"):
        kfac.attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    kfac.attach(torch.optim.SGD(model.head.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="the only one attached, got a second"):
        kfac.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_attached_optimizer_takes_no_closure() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = KFAC(model)
    kfac.attach(optimizer)
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(RuntimeError, match="without a closure"):
            call()
    optimizer.step(None)
    assert kfac.steps == 1


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    modules = [
        len(hooks)
        for module in model.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    ]
    return sum(modules) + len(optimizer._optimizer_step_pre_hooks)


@pytest.mark.parametrize("way", ["detach", "with", "error"])
def test_detaching_leaves_no_hook_and_plain_gradients(way: str) -> None:
    model, x, y = Net(), images(), torch.randint(3, (5,))
    F.cross_entropy(model(x), y).backward()
    plain = [parameter.grad for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kfac = KFAC(model)
    kfac.attach(optimizer)
    assert hooks_of(model, optimizer) > 0
    if way == "detach":
        kfac.detach()
        kfac.detach()
    elif way == "with":
        with kfac as entered:
            assert entered is kfac
    else:
        with pytest.raises(KeyError), kfac:
            raise KeyError
    assert hooks_of(model, optimizer) == 0
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for parameter, grad in zip(model.parameters(), plain, strict=True):
        assert torch.equal(parameter.grad, grad)
    assert kfac.steps == 0 and kfac.state_dict()["layers"]["head"] == {}


def test_a_step_after_detaching_is_refused() -> None:
    kfac = preconditioner(Net())
    kfac.detach()
    with pytest.raises(RuntimeError, match="KFAC.step: the model must be hooked, got a call after"):
        kfac.step()


def test_a_schedule_out_of_bounds_stops_the_step_before_any_change() -> None:
    model = Net()
    kfac = preconditioner(model, damping=lambda step: -1.0 if step else 1e-2)
    train_step(model, kfac, images(), torch.randint(3, (5,)))
    parts = [part for block in kfac._blocks for part in block.parts().values()]
    before = [[getattr(part, field).clone() for field in part.STATE] for part in parts]
    with pytest.raises(ValueError, match="damping must be in .* got -1.0 at step 1"):
        train_step(model, kfac, images(), torch.randint(3, (5,)))
    assert kfac.steps == 1
    after = [[getattr(part, field) for field in part.STATE] for part in parts]
    assert all(
        torch.equal(a, b)
        for old, new in zip(before, after, strict=True)
        for a, b in zip(old, new, strict=True)
    )


def test_several_preconditioners_may_share_a_model() -> None:
    """One for the convolutions and one for the rest equal one for all."""
    models = []
    for split in (False, True):
        torch.manual_seed(0)
        model = Net()
        parts = [["Conv"], ["Linear"]] if split else [[]]
        kfacs = [preconditioner(model, skip=skip) for skip in parts]
        F.cross_entropy(model(images()), torch.randint(3, (5,))).backward()
        for kfac in kfacs:
            kfac.step()
        models.append(model)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert_solved(two.grad, one.grad)


def test_a_second_preconditioner_has_its_own_intervals() -> None:
    """Both attached to one optimizer, beside one for all layers with the intervals of either."""
    model, kfacs = Net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for skip, interval in (["Conv"], 2), (["Linear"], 3), ([], 2), ([], 3):
        kfacs.append(preconditioner(model, skip=skip, factor_update_steps=interval))
    for kfac in kfacs[:2]:
        kfac.attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.randint(3, (5,))).backward()
        optimizer.step()
        for kfac in kfacs[2:]:
            kfac.step()
    for part, whole in zip(kfacs[:2], kfacs[2:], strict=True):
        for name, pair in covariances(part).items():
            for own, other in zip(pair, covariances(whole)[name], strict=True):
                assert torch.equal(own, other)
    assert [len(covariances(kfac)) for kfac in kfacs] == [2, 2, 4, 4]


def test_the_summary_names_every_module_with_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2), nn.Linear(2, 2))
    model[3].weight.requires_grad_(False)
    kfac = KFAC(model, skip=["^0$"])
    model(torch.randn(4, 2)).square().mean().backward()
    kfac.step()
    assert kfac.summary().splitlines() == [
        "K-FAC expand, empirical Fisher, 1 steps",
        "  1: LayerNorm  joint [3, 2, 2]  updates skipped 0  inverses failed 0",
        "  2: Linear  input [4, 4]  gradient [2, 2]  updates skipped 0  inverses failed 0",
        "  3: Linear, bias alone  input [1, 1]  gradient [2, 2]  "
        "updates skipped 0  inverses failed 0",
        "  0: left alone, skipped by pattern '^0$'",
        "  MiB: factors 0.0, inverses 0.0, norms 0.0, sums 0.0",
    ]
    expected = [*model[1].parameters(), *model[2].parameters(), model[3].bias]
    assert [id(p) for p in kfac.parameters()] == [id(p) for p in expected]


def test_a_failed_inverse_is_counted_in_the_summary() -> None:
    model = nn.Linear(2, 3, dtype=torch.float64)
    kfac = preconditioner(model, damping=0.0)
    model(torch.zeros(4, 2, dtype=torch.float64)).square().sum().backward()
    kfac.step()
    assert "inverses failed 2" in kfac.summary()
    assert torch.equal(head(kfac)[1].matrix, torch.eye(3).double())


def test_failed_inverses_are_warned_of_once_at_the_next_refresh() -> None:
    model = nn.Linear(2, 3, dtype=torch.float64)
    kfac = preconditioner(model, damping=0.0)

    def step() -> None:
        model(torch.zeros(4, 2, dtype=torch.float64)).square().sum().backward()
        with never_waits():
            kfac.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    with pytest.warns(RuntimeWarning, match="KFAC: 2 matrices could not be inverted"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"approx": "sum"}, r"approx must be one of \('expand', 'reduce'\), got 'sum'"),
    ({"fisher": "type-2"}, r"fisher must be one of \('empirical', 'mc', 'exact', .*, got 'type-2'"),
    ({"loss_reduction": "none"}, r"loss_reduction must be one of .*, got 'none'"),
    ({"damping_mode": None}, "damping_mode must be one of .*, got None"),
    ({"grafting": "sgd"}, r"grafting must be one of \(None, 'adam'\), got 'sgd'"),
    ({"loss_terms_per_example": 0}, "loss_terms_per_example must be an int from 1, got 0"),
    ({"accumulation_steps": -1}, "accumulation_steps must be an int from 1, got -1"),
    ({"accumulation_steps": 1.5}, "accumulation_steps must be an int from 1, got 1.5"),
    ({"mc_samples": 0}, "mc_samples must be an int from 1, got 0"),
    ({"damping": -1e-3}, r"damping must be in \[0, inf\), got -0.001 at step 0"),
    ({"damping": math.nan}, r"damping must be in \[0, inf\), got nan"),
    ({"damping": math.inf}, r"damping must be in \[0, inf\), got inf"),
    ({"damping": None}, r"damping must be in \[0, inf\), got None"),
    ({"damping": "1"}, r"damping must be in \[0, inf\), got '1'"),
    ({"damping": lambda step: -1.0}, r"damping must be in \[0, inf\), got -1.0 at step 0"),
    ({"factor_decay": 1.0}, r"factor_decay must be in \[0, 1\), got 1.0"),
    ({"factor_decay": -0.1}, r"factor_decay must be in \[0, 1\), got -0.1"),
    ({"factor_update_steps": 0}, r"factor_update_steps must be in \[1, inf\), got 0"),
    ({"inverse_update_steps": 0.5}, r"inverse_update_steps must be in \[1, inf\), got 0.5"),
    ({"kl_clip": 0.0, "learning_rate": 0.1}, r"kl_clip must be in \[1e-30, inf\), got 0.0"),
    (
        {
            "fisher": "forward-only",
            "damping_mode": "exact",
            "eigenvalue_correction": True,
        },
        "eigenvalue_correction must be False with fisher 'forward-only'",
    ),
    ({"loss_scale": 0.0}, r"loss_scale must be in \[1e-30, inf\), got 0.0"),
    ({"kl_clip": 1e-3}, "learning_rate must be positive and finite for kl_clip, got None"),
    *(
        (
            {"kl_clip": 1e-3, "learning_rate": rate},
            f"learning_rate must be positive .*, got {rate!r}",
        )
        for rate in (0.0, math.inf, math.nan, "0.1")
    ),
    (
        {"kl_clip": 1e-3, "learning_rate": lambda step: 0.0},
        r"learning_rate must be in \[1e-30, inf\), got 0.0 at step 0",
    ),
    ({"kl_clip": 1.0, "learning_rate": 0.1, "grafting": "adam"}, "kl_clip must be None with graft"),
    ({"damping_mode": "exact", "damping": 0.0}, "damping must be positive with damping_mode"),
    (
        {"damping_mode": "exact", "layer_options": {"head": {"damping": 0}}},
        "damping must be positive with damping_mode 'exact'",
    ),
    ({"eigenvalue_correction": True}, "eigenvalue_correction must be False unless damping_mode"),
    (
        {"damping_mode": "exact", "refinement_steps": 1},
        "refinement_steps must be 0 with damping_mode 'exact'",
    ),
    ({"refinement_steps": -1}, "refinement_steps must be an int from 0, got -1"),
    ({"skip": ["nothing"]}, "skip must match modules with parameters, got 'nothing'"),
    ({"skip": "head"}, "skip must be a sequence of patterns, got the string 'head'"),
    ({"skip": ["Linear", "Conv"]}, "model must have a layer to precondition, got none"),
]


@pytest.mark.parametrize(
    ("options", "message"), BAD_OPTIONS, ids=[message[:40] for _, message in BAD_OPTIONS]
)
def test_a_bad_option_is_refused_and_leaves_no_hook(options: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=f"^KFAC: {message}"):
        KFAC(model, **options)
    assert hooks_of(model, torch.optim.SGD(model.parameters(), lr=0.1)) == 0


def test_a_schedule_is_checked_at_every_step() -> None:
    model = Net()
    kfac = preconditioner(model, damping=lambda step: DAMPING - step)
    train_step(model, kfac, images(), torch.randint(3, (5,)))
    with pytest.raises(ValueError, match=r"damping must be in \[0, inf\), got -0.95 at step 1"):
        train_step(model, kfac, images(), torch.randint(3, (5,)))


def badly_scaled_regression() -> tuple[Tensor, Tensor]:
    """Nonlinear targets of inputs whose directions differ in scale by a factor of 100."""
    x = torch.randn(256, 8)
    y = torch.stack([(2 * x[:, i]).sin() + 0.5 * x[:, i + 1] for i in range(4)], 1)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    return x * torch.logspace(0, -2, 8) @ rotation, y


def trained_loss(steps: int, rate: float, **options: Any) -> float:
    """Training loss of a small network after steps of SGD with momentum."""
    torch.manual_seed(0)
    x, y = badly_scaled_regression()
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    kfac = KFAC(model, **options) if options else None
    if kfac is not None:
        kfac.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(x)
        if kfac is not None and kfac.fisher == "mc":
            kfac.update_curvature(outputs, loss="mse")
        F.mse_loss(outputs, y).backward()
        optimizer.step()
    return float(F.mse_loss(model(x), y).detach())


@fishers
def test_sixty_steps_reach_less_than_half_the_loss_of_tuned_sgd(fisher: str) -> None:
    """Momentum SGD at its best learning rate; from 1.5 on it diverges."""
    tuned = min(trained_loss(60, rate) for rate in (0.2, 0.4, 0.6, 0.8, 1.0))
    steps = {"factor_update_steps": 2, "inverse_update_steps": 2}
    options = {"fisher": fisher, "loss_terms_per_example": 4, "damping": 3e-3, **steps}
    loss = trained_loss(60, 0.3, kl_clip=0.02, learning_rate=0.3, **options)
    assert loss < 0.5 * tuned < tuned < 0.5 * trained_loss(0, 0.3)
