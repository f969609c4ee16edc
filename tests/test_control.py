"""What a user turns and reads: options of single layers, precision, reports, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import DAMPING, LAYER_NAMES, Net, images, preconditioner, train_step
from plain_kfac import (
    assert_covariances,
    assert_solved,
    covariances,
    damp,
    grad_matrices,
    plain_covariances,
    solve,
)
from torch import Tensor, nn

from kfac_fast import KFAC, StepReport

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def step_with(model: Net, **options: Any) -> tuple[KFAC, dict[str, Tensor]]:
    """A step, and the raw gradients before it."""
    kfac = preconditioner(model, **options)
    torch.manual_seed(2)
    F.cross_entropy(model(images()), torch.randint(3, (5,))).backward()
    raw = {name: grad_matrices(model.get_submodule(name)) for name in LAYER_NAMES}
    kfac.step()
    return kfac, raw


@pytest.mark.parametrize("damping_mode", ["factored", "plain", "exact"])
def test_a_layer_may_have_its_own_damping(damping_mode: str) -> None:
    model = Net()
    own = {"strided|shared": {"damping": 2.0}, "shared": {"damping": lambda step: 7.0 + step}}
    kfac, raw = step_with(model, damping_mode=damping_mode, layer_options=own)
    for name, pair in covariances(kfac).items():
        damping = {"strided": 2.0, "shared": 7.0}.get(name, DAMPING)
        if damping_mode == "exact":
            blocks = [torch.kron(g, a) for a, g in zip(*pair, strict=True)]
            damped = [block + damping * torch.eye(len(block)).double() for block in blocks]
            vectors = [v.flatten() for v in raw[name]]
            solved = map(torch.linalg.solve, damped, vectors)
            expected = torch.stack(list(solved)).reshape(raw[name].shape)
        else:
            expected = solve(raw[name], damp(pair, damping, damping_mode))
        assert_solved(grad_matrices(model.get_submodule(name)), expected)


def test_a_layer_may_have_its_own_approximation_and_decay() -> None:
    model, y = Net(), torch.randint(3, (5,))
    x = images()
    plain = {
        approx: plain_covariances(model, lambda: F.cross_entropy(model(x), y), approx, 5, "mean")
        for approx in ("expand", "reduce")
    }
    options = {"grouped": {"approx": "reduce"}, "head": {"factor_decay": 0.5}}
    kfac = preconditioner(model, layer_options=options)
    F.cross_entropy(model(x), y).backward()
    kfac.step()
    assert_covariances(kfac, {**plain["expand"], "grouped": plain["reduce"]["grouped"]})
    weights = {b.layer.name: float(b.factors[0].weight) for b in kfac._blocks}
    assert weights == pytest.approx({**dict.fromkeys(LAYER_NAMES, 0.05), "head": 0.5})


def test_tied_layers_have_the_approximation_of_one_of_them() -> None:
    results, x = [], torch.randn(5, 4, 3, dtype=torch.float64)
    for options in ({"approx": "reduce"}, {"layer_options": {"^1$": {"approx": "reduce"}}}):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
        model[1].weight, model[1].bias = model[0].weight, model[0].bias
        kfac = preconditioner(model, **options)
        model(x).square().mean().backward()
        kfac.step()
        results.append(covariances(kfac))
    assert_covariances(kfac, results[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nowhere": {"damping": 1.0}}, "layer_options must match preconditioned layers, got 'now"),
        ({"head": {"kl_clip": 1.0}}, "layer_options must hold .*, got .'kl_clip': 1.0. for 'head'"),
        ({"head": "expand"}, "layer_options must hold values of .*, got 'expand' for 'head'"),
        ({"head": {"approx": "sum"}}, "approx must be one of .*, got 'sum'"),
        ({"head": {"damping": -1.0}}, r"damping must be in \[0, inf\), got -1.0 at step 0"),
    ],
)
def test_bad_options_of_layers_are_refused(options: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=f"KFAC: {message}"):
        KFAC(model, layer_options=options)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("damping_mode", ["factored", "exact"])
def test_factors_of_float32_layers_may_be_float64(damping_mode: str) -> None:
    model = Net().float()
    kfac = preconditioner(model, factor_dtype=torch.float64, damping_mode=damping_mode)
    F.cross_entropy(model(images().float()), torch.randint(3, (5,))).backward()
    kfac.step()
    for block in kfac._blocks:
        tensors = [getattr(part, field) for part in block.parts().values() for field in part.STATE]
        assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}
        assert block.layer.parameters()[0].grad.dtype == torch.float32
    other = preconditioner(Net().float(), factor_dtype=torch.float64, damping_mode=damping_mode)
    other.load_state_dict(kfac.state_dict())
    for one, two in zip(kfac._blocks, other._blocks, strict=True):
        assert torch.equal(one.factors[0].mean, two.factors[0].mean)


def test_other_dtypes_of_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="factor_dtype must be one of .*, got torch.bfloat16"):
        KFAC(Net(), factor_dtype=torch.bfloat16)


def test_a_callback_is_told_what_each_step_did() -> None:
    reports: list[StepReport] = []
    model = Net()
    kfac = KFAC(
        model,
        damping=lambda step: 0.1 + step,
        factor_update_steps=2,
        inverse_update_steps=3,
        kl_clip=1e-3,
        learning_rate=0.5,
        callback=reports.append,
    )
    for step in range(4):
        x = images()
        if step == 2:
            x[0, 0, 0, 0] = torch.nan
        model.zero_grad()
        F.cross_entropy(model(x), torch.randint(3, (5,))).backward()
        raw = [p.grad.clone() for p in model.parameters()]
        kfac.step()
        products = [(g * p.grad).sum() for g, p in zip(raw, model.parameters(), strict=True)]
        report = reports[-1]
        if step != 2:
            assert report.clip_scale is not None and report.inner_product is not None
            assert 0 < report.clip_scale < 1
            expected = report.clip_scale * report.inner_product
            assert float(sum(products)) == pytest.approx(float(expected), rel=1e-9)
    assert [r.step for r in reports] == [0, 1, 2, 3]
    assert [r.damping for r in reports] == [0.1, 1.1, 2.1, 3.1]
    assert [r.updated for r in reports] == [True, False, True, False]
    assert [r.refreshed for r in reports] == [True, False, False, True]
    assert [int(r.skipped) for r in reports] == [0, 0, 8, 8]  # both factors of the four layers
    assert [int(r.failed) for r in reports] == [0] * 4


def test_a_report_without_a_clip_or_a_gradient_has_none() -> None:
    reports: list[StepReport] = []
    model = Net()
    kfac = preconditioner(model, callback=reports.append)
    kfac.step()
    assert reports[0].clip_scale is None and reports[0].inner_product is None
    train_step(model, kfac, images(), torch.randint(3, (5,)))
    assert reports[1].clip_scale is None and reports[1].inner_product is not None


def test_condition_numbers_are_those_of_the_damped_factors() -> None:
    model = Net()
    kfac, _ = step_with(model, damping_mode="plain")
    numbers = kfac.condition_numbers()
    for name, pair in covariances(kfac).items():
        for own, damped in zip(numbers[name], damp(pair, DAMPING, "plain"), strict=True):
            assert_solved(own.reshape(-1), torch.linalg.cond(damped))
    exact, _ = step_with(Net(), damping_mode="exact", damping=1.0)
    assert preconditioner(nn.Linear(2, 2)).condition_numbers() == {}
    for name, pair in covariances(exact).items():
        for own, factor in zip(exact.condition_numbers()[name], pair, strict=True):
            values = torch.linalg.eigvalsh(factor)
            full = values[:, 0] > 1e-12 * values[:, -1]
            assert_solved(own.reshape(-1)[full], (values[:, -1] / values[:, 0])[full], 1e12)


def test_memory_counts_what_is_held_between_steps() -> None:
    model = nn.Linear(3, 2)
    kfac = preconditioner(model, grafting="adam")
    assert kfac.memory() == {"factors": 0, "inverses": 0, "norms": 0, "sums": 0}
    model(torch.randn(5, 3)).square().mean().backward()
    kfac.step()
    floats = 4 * (4 * 4 + 2 * 2)
    assert kfac.memory() == {
        "factors": floats + 2 * (4 + 8),  # weight, skipped
        "inverses": floats + 2 * (8 + 8),  # failed, raised
        "norms": 4 * 2 * 4 + 4,
        "sums": floats,
    }
    assert kfac.summary().endswith("\n  MiB: factors 0.0, inverses 0.0, norms 0.0, sums 0.0")


def test_a_schedule_may_give_numpys_numbers() -> None:
    kfac, _ = step_with(
        Net(), damping=lambda step: np.float32(0.5), inverse_update_steps=np.int64(2)
    )
    plain, _ = step_with(Net(), damping=0.5, inverse_update_steps=2)
    assert kfac._dampings(kfac._blocks) == plain._dampings(plain._blocks) and kfac.steps == 1


def test_a_layer_whose_weight_is_computed_later_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    kfac = preconditioner(model)
    nn.utils.parametrizations.weight_norm(model[0])
    model[1].weight.requires_grad_(False)
    summary = kfac.summary()
    assert "left alone since, its weight is computed from other parameters" in summary
    assert "left alone since, its weight is frozen" in summary


def test_a_default_device_changes_nothing() -> None:
    """Numbers on their way to the host are on the host."""
    expected, _ = step_with(Net())
    torch.set_default_device("meta")
    try:
        model = Net().to_empty(device="cpu")
        for own, other in zip(model.parameters(), Net.parameters(expected.model), strict=True):
            own.data.copy_(other)
        with torch.device("cpu"):
            x, y = images(), torch.randint(3, (5,))
        kfac = preconditioner(model, callback=lambda report: None)
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()
            kfac.step()
    finally:
        torch.set_default_device(None)
    assert kfac.steps == 2 and kfac._refreshes._failed.read() == 0


def test_the_summary_says_what_is_trained_since() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
    )
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    kfac = preconditioner(model)
    assert "since" not in kfac.summary()
    assert "0: left alone, its weight is frozen" in kfac.summary()
    model.requires_grad_()
    lines = {line.strip().partition(":")[0]: line for line in kfac.summary().splitlines()[1:]}
    since = "trained since KFAC was made: make a new one"
    assert lines["0"].endswith(f"left alone, weight and bias {since}")
    assert lines["1"].endswith(f"  bias {since}")
    assert lines["2"].endswith(f"  weight {since}") and lines["3"].endswith(f"  weight {since}")
    assert "since" not in lines["4"] and "since" not in preconditioner(model).summary()
