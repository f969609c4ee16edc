"""Masks and segments: padded batches against unpadded ones, batches of graphs against a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Checkpointed, preconditioner
from plain_kfac import assert_covariances, assert_solved, covariances
from torch import Tensor, nn

from kfac_fast import KFAC

pytestmark = pytest.mark.usefixtures("one_thread")
approximations = pytest.mark.parametrize("approx", ["expand", "reduce"])
LENGTHS = (3, 5, 1, 4)
FEATURES = 3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class PerRow(nn.Module):
    """Linear layers and normalisations on each row; what follows adds rows up."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Sequential(
            nn.Linear(FEATURES, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2), nn.RMSNorm(2, 1e-3)
        )
        self.head = nn.Linear(2, 2)
        self.double()


def examples() -> list[Tensor]:
    return [torch.randn(length, FEATURES, dtype=torch.float64) for length in LENGTHS]


def weights() -> Tensor:
    return torch.randn(len(LENGTHS), 2, dtype=torch.float64)


def loop(xs: list[Tensor], w: Tensor, **options: Any) -> tuple[PerRow, KFAC]:
    """A step on one example at a time."""
    torch.manual_seed(1)
    model = PerRow()
    kfac = preconditioner(model, loss_reduction="sum", **options)
    for x, weight in zip(xs, w, strict=True):
        pooled = model.rows(x[None]).sum(1)
        (model.head(pooled).sin() * weight).sum().backward()
    kfac.step()
    return model, kfac


def assert_same_step(ours: tuple[PerRow, KFAC], theirs: tuple[PerRow, KFAC]) -> None:
    assert_covariances(ours[1], covariances(theirs[1]))
    for one, two in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        assert_solved(one.grad, two.grad)


@approximations
@pytest.mark.parametrize("damping_mode", ["factored", "exact"])
def test_a_padded_batch_with_a_mask_is_the_unpadded_one(approx: str, damping_mode: str) -> None:
    xs, w = examples(), weights()
    options = {"approx": approx, "damping_mode": damping_mode}
    padded = torch.nn.utils.rnn.pad_sequence(xs, batch_first=True, padding_value=7.0)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    torch.manual_seed(1)
    model = PerRow()
    kfac = preconditioner(model, loss_reduction="sum", **options)
    kfac.share_rows("^rows", mask=mask)
    pooled = model.rows(padded).masked_fill(~mask[..., None], 0).sum(1)
    (model.head(pooled).sin() * w).sum().backward()
    kfac.step()
    assert_same_step((model, kfac), loop(xs, w, **options))


def test_a_mask_leaves_padding_out_of_corrected_eigenvalues() -> None:
    models = []
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    for padding in (0.0, 9.0):
        torch.manual_seed(1)
        model = PerRow()
        options = {"damping_mode": "exact", "eigenvalue_correction": True}
        kfac = preconditioner(model, inverse_update_steps=9, loss_reduction="sum", **options)
        for _ in range(2):
            model.zero_grad()
            kfac.share_rows("rows", mask=mask)
            rows = model.rows(x.masked_fill(~mask[..., None], padding))
            # Gradients that reach the padding do not count either.
            (rows * torch.where(mask[..., None], 1, padding)).sum().backward()
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            kfac.step()
        models.append(model)
    for one, two in zip(*(m.rows.parameters() for m in models), strict=True):
        assert_solved(one.grad, two.grad)


@approximations
def test_a_batch_of_graphs_with_segments_is_a_loop_over_the_graphs(approx: str) -> None:
    xs, w = examples(), weights()
    graph = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    order = torch.randperm(len(graph))  # rows of a graph need not be neighbours
    nodes, graph = torch.cat(xs)[order], graph[order]
    torch.manual_seed(1)
    model = PerRow()
    kfac = preconditioner(model, loss_reduction="sum", approx=approx)
    kfac.share_rows("rows", segments=graph, num_segments=len(LENGTHS))
    pooled = torch.zeros(len(LENGTHS), 2).double().index_add(0, graph, model.rows(nodes))
    (model.head(pooled).sin() * w).sum().backward()
    kfac.step()
    assert_same_step((model, kfac), loop(xs, w, approx=approx))


@approximations
def test_a_mean_over_graphs_counts_graphs(approx: str) -> None:
    """The empirical Fisher of a mean over graphs divides by their number, not by that of nodes."""
    graph, nodes = torch.tensor([0, 0, 0, 1, 1]), torch.randn(5, FEATURES).double()
    results = []
    for reduction in ("mean", "sum"):
        torch.manual_seed(1)
        model = PerRow()
        kfac = preconditioner(model, loss_reduction=reduction, approx=approx)
        kfac.share_rows("rows", segments=graph, num_segments=2)
        pooled = torch.zeros(2, 2).double().index_add(0, graph, model.rows(nodes))
        loss = model.head(pooled).sin().sum(1)
        (loss.mean() if reduction == "mean" else loss.sum()).backward()
        kfac.step()
        results.append(covariances(kfac))
    for name, (*mean_inputs, mean_gradients) in results[0].items():
        *sum_inputs, sum_gradients = results[1][name]
        for one, two in zip(mean_inputs, sum_inputs, strict=True):
            assert_solved(one, two)
        assert_solved(2 * mean_gradients, sum_gradients)


PROJECTIONS = {"q_proj|out_proj": 0, "k_proj|v_proj": 1}


@approximations
@pytest.mark.parametrize("eigenvalue_correction", [False, True])
@pytest.mark.parametrize("keys", [3, 6])  # as many as examples, or more
def test_attentions_mask_has_the_shape_of_its_input(
    keys: int, eigenvalue_correction: bool, approx: str
) -> None:
    """Wherever its batch is: two layouts of one batch."""
    mode = {"damping_mode": "exact", "eigenvalue_correction": True, "inverse_update_steps": 9}
    query, memory = (torch.randn(3, n, FEATURES, dtype=torch.float64) for n in (4, keys))
    masks = torch.rand(3, 4) < 0.6, torch.rand(3, keys) < 0.6
    results = []
    for batch_first in (True, False):
        torch.manual_seed(1)
        module = nn.MultiheadAttention(FEATURES, 1, batch_first=batch_first).double()
        options = mode if eigenvalue_correction else {}
        kfac = preconditioner(module, approx=approx, loss_reduction="sum", **options)
        for _ in range(2):
            for pattern, which in PROJECTIONS.items():
                mask = masks[which] if batch_first else masks[which].mT
                kfac.share_rows(pattern, mask=mask)
            x, y = (t if batch_first else t.transpose(0, 1) for t in (query, memory))
            output = module(x, y, y)[0]
            output = output if batch_first else output.transpose(0, 1)
            (output.sin() * query).sum().backward()
            kfac.step()
        results.append(kfac)
    assert_covariances(results[1], covariances(results[0]))
    if eigenvalue_correction:
        for one, two in zip(*(kfac._blocks for kfac in results), strict=True):
            assert_solved(two.correction.mean, one.correction.mean)


@approximations
def test_a_mask_of_attention_without_a_batch_is_that_of_one_example(approx: str) -> None:
    x, mask = torch.randn(5, FEATURES, dtype=torch.float64), torch.arange(5) < 3
    results = []
    for batched in (True, False):
        torch.manual_seed(1)
        module = nn.MultiheadAttention(FEATURES, 1, batch_first=True).double()
        kfac = preconditioner(module, approx=approx, loss_reduction="sum")
        kfac.share_rows("proj", mask=mask[None] if batched else mask)
        given = x[None] if batched else x
        module(given, given, given)[0].sin().sum().backward()
        kfac.step()
        results.append(kfac)
    assert_covariances(results[1], covariances(results[0]))


def test_projections_with_one_mask_share_their_covariance() -> None:
    module = nn.MultiheadAttention(FEATURES, 1)
    kfac = preconditioner(module)
    kfac.share_rows("proj", mask=torch.tensor([[True, True], [True, False]]))
    x = torch.randn(2, 2, FEATURES)
    module(x, x, x)[0].sin().sum().backward()
    first, *others = (block._sums[0][0] for block in kfac._blocks[:3])
    assert all(other is first for other in others)


def test_sharing_ends_with_the_step() -> None:
    model = PerRow()
    kfac = preconditioner(model, approx="reduce", loss_reduction="sum")
    x = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    for masked in (True, False):
        if masked:
            kfac.share_rows("rows", mask=torch.tensor([[True, False, False]] * 2))
        model.rows(x).sum().backward()
        kfac.step()
    expected = preconditioner(twin := PerRow(), approx="reduce", loss_reduction="sum")
    twin.load_state_dict(model.state_dict())
    twin.rows(x).sum().backward()
    expected.step()
    assert_solved(
        kfac._blocks[0].factors[0].mean * (1 - 0.95**2),
        0.05 * covariances(expected)["rows.0"][0][0] + 0.05 * 0.95 * masked_covariance(x),
    )


RUNS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "compiled": lambda model: torch.compile(model, backend="aot_eager"),
    "recomputed": lambda model: Checkpointed(model, use_reentrant=False),
    "re-entrant": lambda model: Checkpointed(model, use_reentrant=True),
    "recomputed-compiled": lambda model: Checkpointed(
        torch.compile(model, backend="aot_eager"), use_reentrant=False
    ),
}


@pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("default:The .grad attribute")
@pytest.mark.parametrize("stated", [(0, 1), (1,)], ids=["both", "second"])
@pytest.mark.parametrize("name", RUNS)
def test_each_of_several_passes_has_its_own_mask(name: str, stated: tuple[int, ...]) -> None:
    """Also where its calls are taken down in the backward pass, after all of the masks."""
    masks = torch.rand(2, 5, 4) < 0.5
    xs = torch.randn(2, 5, 4, FEATURES, dtype=torch.float64, requires_grad=True)
    results = []
    for change in (lambda model: model, RUNS[name]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(FEATURES, 2)).double()
        kfac = preconditioner(model, accumulation_steps=2)
        run, outputs = change(model), []
        for index, (x, mask) in enumerate(zip(xs, masks, strict=True)):
            if index in stated:
                kfac.share_rows("0", mask=mask)
            outputs.append(run(x))
        (outputs[0] - outputs[1]).square().sum().backward()
        kfac.step()
        results.append(kfac)
    torch.compiler.reset()
    assert_covariances(results[1], covariances(results[0]))


def masked_covariance(x: Tensor) -> Tensor:
    """Of the first of each example's rows."""
    rows = torch.cat([x[:, 0], torch.ones(len(x), 1).double()], 1)
    return rows.mT @ rows / len(x)


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("nowhere", {}, "pattern must be found .* got 'nowhere', found in none"),
        ("^0$", {}, r"pattern must be found .* got '\^0\$', found in \['0'\]"),
        ("1", {"segments": torch.zeros(3, dtype=torch.int64)}, "segments must come with num_segm"),
        ("1", {"num_segments": 3}, "segments must come with num_segments"),
    ],
)
def test_bad_sharing_is_refused(pattern: str, options: dict[str, Any], message: str) -> None:
    kfac = KFAC(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=f"share_rows: {message}"):
        kfac.share_rows(pattern, **options)


def test_segments_are_refused_with_corrected_eigenvalues() -> None:
    kfac = KFAC(nn.Linear(2, 2), damping_mode="exact", eigenvalue_correction=True)
    with pytest.raises(ValueError, match="segments must be None with eigenvalue_correction"):
        kfac.share_rows("", segments=torch.zeros(3, dtype=torch.int64), num_segments=1)


# Micro-batches, each with a mask of its own


@pytest.mark.parametrize("refilled", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_each_micro_batch_has_its_own_mask(refilled: bool, inference: bool) -> None:
    model = nn.Linear(FEATURES, 2).double()
    kfac = preconditioner(model, accumulation_steps=4)
    x = torch.randn(5, 4, FEATURES, dtype=torch.float64)
    masks = [torch.rand(5, 4) < 0.5 for _ in range(4)]
    with torch.inference_mode(inference):
        buffer = masks[0].clone()
    for mask in masks:
        with torch.inference_mode(inference):
            own = buffer.copy_(mask) if refilled else mask.clone()
        kfac.share_rows("", mask=own)
        (model(x).square()[mask].sum() / 4).backward()
        del own  # whose address the next one may have
    kfac.step()
    rows = torch.cat([x[mask] for mask in masks])
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    assert_solved(kfac._blocks[0].factors[0].mean, rows.T @ rows / len(rows))
