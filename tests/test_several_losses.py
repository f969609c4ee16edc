"""Several losses of one forward pass: the sum of their curvatures, in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch._functorch.config
from host import never_waits
from nets import preconditioner
from oracle import assert_same
from plain_kfac import assert_covariances, assert_solved, covariances, plain_covariances
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.losses import LOSSES, WeightedSum

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What PyTorch's own compiler does, and hides outside of tests.
    pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("default:The .grad attribute"),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Heads(nn.Module):
    """A trunk with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).tanh()
        return self.one(hidden), self.two(hidden)


class Both:
    """Mean cross entropy of the first outputs, mean squared error of two entries of the second."""

    def terms(self, outputs: tuple[Tensor, Tensor], targets: Tensor | None) -> int:
        return len(outputs[0])

    def sample(
        self,
        outputs: tuple[Tensor, Tensor],
        targets: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        first = LOSSES["cross_entropy"]().sample(outputs[0], None, generator)
        return first + 0.5**0.5 * LOSSES["mse"]().sample(outputs[1], None, generator)

    def root(self, outputs: tuple[Tensor, Tensor], targets: Tensor | None) -> Tensor:
        first = LOSSES["cross_entropy"]().root(outputs[0], None)
        return torch.cat([first, 0.5**0.5 * LOSSES["mse"]().root(outputs[1], None)], 1)


def test_the_curvature_of_two_heads_is_the_sum_of_the_losses() -> None:
    model, x = Heads(), torch.randn(5, 3).double()
    results = []
    losses: list[tuple[Any, Any]] = [
        (Both(), lambda outputs: outputs),
        ("cross_entropy", lambda outputs: outputs[0]),
        ("mse", lambda outputs: outputs[1]),
    ]
    for loss, of in losses:
        with preconditioner(model, fisher="exact") as kfac:
            kfac.update_curvature(of(model(x)), loss=loss)
            kfac.step()
            results.append(covariances(kfac))
    both, first, second = results
    assert_solved(both["trunk"][0], first["trunk"][0])
    assert_solved(both["trunk"][1], first["trunk"][1] + second["trunk"][1])
    assert_solved(both["one"][1], first["one"][1])
    assert_solved(both["two"][1], second["two"][1])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_second_loss_of_layers_that_the_first_has_counted_is_refused(
    fisher: str, compiled: bool
) -> None:
    """Also where another pass lies between, and not in the next step."""
    model, x = Heads(), torch.randn(5, 3).double()
    kfac = preconditioner(model, fisher=fisher)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    with torch._functorch.config.patch(donated_buffer=False):
        for second in (0, 1):
            one, two = run(x)
            kfac.update_curvature(one, loss="cross_entropy")
            kfac.update_curvature(run(x)[0], loss="cross_entropy")
            message = "outputs that share layers must come in one call, got .* reaches '.*; .*Sum"
            with pytest.raises(RuntimeError, match=f"^update_curvature: {message}"):
                kfac.update_curvature((one, two)[second], loss="mse")
            kfac.step()
    torch.compiler.reset()


def test_losses_that_share_no_trained_layer_may_come_one_by_one() -> None:
    model, x = Heads(), torch.randn(5, 3).double()
    model.trunk.requires_grad_(False)
    results = []
    for apart in (False, True):
        with preconditioner(model, fisher="exact") as kfac:
            outputs = model(x)
            if apart:
                kfac.update_curvature(outputs[0], loss="cross_entropy")
                kfac.update_curvature(outputs[1], loss="mse")
            else:
                kfac.update_curvature(outputs, loss=Both())
            kfac.step()
            results.append(covariances(kfac))
    assert results[0].keys() == {"one", "two"}
    for name, pair in results[0].items():
        for ours, theirs in zip(pair, results[1][name], strict=True):
            assert_solved(ours, theirs)


# Weighted sums

Pair = tuple[Tensor, Tensor]
WEIGHTS = [0.7, 3.0, 0.4]
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
LABELS = {
    "counted": [[0, 2], [1, 1], [2, 0], [1, 2], [0, 0]],
    "some ignored": [[0, -100], [-100, -100], [2, 0], [1, 2], [-100, 0]],
    "all ignored": [[-100, -100]] * 5,
}
labelled = pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


class Tagger(nn.Module):
    """Logits ``[N, 3, S]`` of tokens ``[N, S, 3]``, and two entries of each example."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.tags, self.whole = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Pair:
        hidden = self.trunk(x).tanh()
        return self.tags(hidden).mT, self.whole(hidden.square().mean(1))


def tokens(examples: int = 5) -> Tensor:
    return torch.randn(examples, 2, 3, dtype=torch.float64)


def modules(reduction: str) -> list[Any]:
    """Of the tags, and two of the other entries."""
    options = {"reduction": reduction}
    return [
        nn.CrossEntropyLoss(CLASS_WEIGHTS, **options),
        nn.MSELoss(**options),
        nn.BCEWithLogitsLoss(**options),
    ]


def targets_of(labels: Any) -> tuple[Tensor, ...]:
    tags = torch.tensor(labels)
    return tags, torch.randn(len(tags), 2).double(), torch.rand(len(tags), 2).double()


def training_loss(outputs: Pair, targets: Sequence[Tensor], reduction: str) -> Tensor:
    """By PyTorch, whose mean over no labels is NaN and left out."""
    tags, whole = outputs
    total = outputs[1].new_zeros(())
    of = zip(WEIGHTS, modules(reduction), (tags, whole, whole), targets, strict=True)
    for weight, module, f, y in of:
        if not (y == -100).all():
            total = total + weight * module(f, y)
    return total


def gauss_newton(
    model: Tagger, x: Tensor, targets: Sequence[Tensor], reduction: str
) -> dict[str, Tensor]:
    """Of each layer, the sum of the diagonal blocks of ``J^T H J`` in its outputs."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda m, i, output, name=name: seen.update({name: output}))
        for name, layer in model.named_children()
    ]
    tags, whole = model(x)
    for hook in hooks:
        hook.remove()
    flat = torch.cat([tags.flatten(), whole.flatten()])

    def loss(entries: Tensor) -> Tensor:
        first, second = entries.split([tags.numel(), whole.numel()])
        outputs = first.reshape(tags.shape), second.reshape(whole.shape)
        return training_loss(outputs, targets, reduction)

    h = torch.autograd.functional.hessian(loss, flat.detach())
    rows = [
        torch.autograd.grad(
            entry, list(seen.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for entry in flat
    ]
    blocks = {}
    for name, of_layer in zip(seen, zip(*rows, strict=True), strict=True):
        j = torch.stack(of_layer)
        j = j.reshape(len(flat), -1, j.shape[-1])  # [entries, rows, out]
        blocks[name] = torch.einsum("fro,fg,grp->op", j, h, j)
    return blocks


def curvature_step(
    model: Tagger, kfac: KFAC, loss: Any, x: Tensor, targets: Any
) -> dict[str, Tensor]:
    """Each layer's gradient covariance after an update without a training loss."""
    tags, whole = model(x)
    kfac.update_curvature((tags, whole, whole), loss=loss, targets=targets)
    kfac.step()
    return {name: g[0] for name, (_, g) in covariances(kfac).items()}


@labelled
@reductions
def test_the_exact_covariance_is_the_gauss_newton_matrix_of_the_weighted_sum(
    reduction: str, labels: Any
) -> None:
    """Where no label counts, of the other losses; the numbers of terms are 10 and less, and 10."""
    model, x, targets = Tagger(), tokens(), targets_of(labels)
    kfac = preconditioner(model, fisher="exact", loss_reduction=reduction)
    loss = WeightedSum(modules(reduction), WEIGHTS)
    with never_waits():
        actual = curvature_step(model, kfac, loss, x, targets)
    for name, expected in gauss_newton(model, x, targets, reduction).items():
        assert_same(actual[name], expected)
    assert "updates skipped 1" not in kfac.summary()


@reductions
@pytest.mark.parametrize("fisher", ["mc", "curvature-propagation"])
def test_the_sampled_covariance_of_a_weighted_sum_is_unbiased(fisher: str, reduction: str) -> None:
    """Many updates; within five standard errors."""
    model, x, targets = Tagger(), tokens(), targets_of(LABELS["some ignored"])
    expected = gauss_newton(model, x, targets, reduction)["trunk"]
    kfac = preconditioner(model, fisher=fisher, loss_reduction=reduction, factor_decay=0)
    loss = WeightedSum(modules(reduction), WEIGHTS)
    draws = torch.stack(
        [curvature_step(model, kfac, loss, x, targets)["trunk"] for _ in range(300)]
    )
    deviation = (draws.mean(0) - expected).abs()
    assert (deviation <= 5 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all()


def test_names_without_weights_need_no_targets() -> None:
    model, x, names = Tagger(), tokens(), ["cross_entropy", "mse", "bce_with_logits"]
    results = []
    for losses, targets in [
        (WeightedSum(names), None),
        (WeightedSum(tuple(names), [1, 1, 1]), targets_of(LABELS["counted"])),
        (WeightedSum([LOSSES[name]() for name in names]), (None, None, None)),
    ]:
        with preconditioner(model, fisher="exact") as kfac:
            curvature_step(model, kfac, losses, x, targets)
            results.append(covariances(kfac))
    for other in results[1:]:
        for name, (_, g) in results[0].items():
            assert torch.equal(g, other[name][1])


@labelled
def test_a_sum_may_be_a_loss_of_another(labels: Any) -> None:
    model, x, (tags, *others) = Tagger(), tokens(), targets_of(labels)
    of_tags, squares, binary = modules("mean")
    inner = WeightedSum([of_tags, squares], [WEIGHTS[0] / 5, WEIGHTS[1] / 5])
    kfac = preconditioner(model, fisher="exact")
    f, whole = model(x)
    kfac.update_curvature(
        ((f, whole), whole),
        loss=WeightedSum([inner, binary], [5, WEIGHTS[2]]),
        targets=((tags, others[0]), others[1]),
    )
    kfac.step()
    for name, expected in gauss_newton(model, x, (tags, *others), "mean").items():
        assert_same(covariances(kfac)[name][1][0], expected)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_the_sum_of_one_loss_is_that_loss(fisher: str) -> None:
    model, x, y = Tagger(), tokens(), torch.tensor(LABELS["some ignored"])
    module, results = modules("mean")[0], []
    for is_sum in (False, True):
        loss, targets = (WeightedSum([module]), (y,)) if is_sum else (module, y)
        with preconditioner(model, fisher=fisher) as kfac:
            f = model(x)[0]
            outputs = (f,) if is_sum else f
            generator = torch.Generator().manual_seed(0)
            kfac.update_curvature(outputs, loss=loss, targets=targets, generator=generator)
            kfac.step()
            results.append([factor for pair in covariances(kfac).values() for factor in pair])
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


def test_micro_batches_count_by_the_most_terms_of_a_loss() -> None:
    """Where they have the same ratios, they are one batch."""
    model, x, targets = Tagger(), tokens(), targets_of(LABELS["counted"])
    results = []
    for split in ([5], [3, 2]):
        kfac = preconditioner(model, fisher="exact")
        batches = zip(x.split(split), *(y.split(split) for y in targets), strict=True)
        for inputs, *labels in batches:
            tags, whole = model(inputs)
            loss = WeightedSum(["cross_entropy", "mse", "bce_with_logits"], WEIGHTS)
            kfac.update_curvature((tags, whole, whole), loss=loss, targets=tuple(labels))
        kfac.step()
        kfac.detach()
        results.append(kfac)
    assert_covariances(results[1], covariances(results[0]))


@pytest.mark.parametrize(("classes", "terms"), [([0, 2], 10), ([1, 1], 20)], ids=str)
def test_the_empirical_fisher_takes_the_sum_for_a_mean_of_the_most_terms(
    classes: list[int], terms: int
) -> None:
    """The squared error has ten, the labels of the tags weigh 7.5 or 20."""
    model, x, targets = Tagger(), tokens(), targets_of([classes] * 5)
    kfac = preconditioner(model)
    tags, whole = outputs = model(x)
    loss = WeightedSum(modules("mean"), WEIGHTS)
    kfac.update_curvature((tags, whole, whole), loss=loss, targets=targets)
    training_loss(outputs, targets, "mean").backward()
    kfac.step()
    expected = plain_covariances(
        model, lambda: training_loss(model(x), targets, "mean"), "expand", terms, "mean"
    )
    assert_covariances(kfac, expected)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_batch_without_any_label_that_counts_is_skipped(fisher: str) -> None:
    model = Heads()
    loss, ignored = WeightedSum(["cross_entropy"] * 2), torch.full((5,), -100)
    with preconditioner(model, fisher=fisher) as kfac:
        for labels in (torch.zeros_like(ignored), ignored):
            with never_waits():
                outputs = model(torch.randn(5, 3).double())
                kfac.update_curvature(outputs, loss=loss, targets=(labels, labels))
                kfac.step()
        assert kfac.summary().count("updates skipped 1") == 3


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_learned_labels_of_a_sum_are_constants(fisher: str) -> None:
    results = []
    weighted = nn.CrossEntropyLoss(CLASS_WEIGHTS)
    for learned in (False, True):
        torch.manual_seed(0)
        model = Heads()
        kfac = preconditioner(model, fisher=fisher)
        one, two = model(torch.randn(5, 3).double())
        labels = one.softmax(1)
        targets = (labels if learned else labels.detach(), None)
        kfac.update_curvature((one, two), loss=WeightedSum([weighted, "mse"]), targets=targets)
        kfac.step()
        results.append([factor for pair in covariances(kfac).values() for factor in pair])
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


ONE, TWO = torch.ones(5, 3), torch.ones(5, 2)
REFUSED: list[tuple[Any, Any, Any, type[Exception], str]] = [
    (["mse", "mse"], ONE, None, TypeError, "outputs must be a tuple of 2, got Tensor"),
    (["mse", "mse"], (ONE,), None, TypeError, "outputs must be a tuple of 2, got 1"),
    (["mse", "mse"], (ONE, TWO), TWO, TypeError, "targets must be a tuple of 2, got Tensor"),
    (["mse", "mse"], (ONE, TWO), [ONE, TWO], TypeError, "targets must be a tuple of 2, got list"),
    (["mse", "mse"], (ONE, TWO), (ONE,), TypeError, "targets must be a tuple of 2, got 1"),
    (
        ["mse", "cross_entropy"],
        (ONE, TWO),
        (None, TWO[:, 0].long()[:3]),
        ValueError,
        r"targets must be \(5,\), got \(3,\)",
    ),
    (["mse", "nll"], (ONE, TWO), None, ValueError, "loss must be one of .*, got 'nll'"),
    (
        ["mse", nn.MSELoss(reduction="sum")],
        (ONE, TWO),
        None,
        ValueError,
        "loss must have the loss_reduction 'mean' of KFAC, got 'sum'",
    ),
]


@pytest.mark.parametrize(("losses", "outputs", "targets", "error", "message"), REFUSED)
def test_what_a_sum_does_not_take_is_refused(
    losses: Any, outputs: Any, targets: Any, error: type[Exception], message: str
) -> None:
    kfac = preconditioner(nn.Linear(3, 3), fisher="exact")
    with pytest.raises(error, match=f"^update_curvature: {message}"):
        kfac.update_curvature(outputs, loss=WeightedSum(losses), targets=targets)


def test_roots_of_other_examples_are_refused() -> None:
    model = Heads()
    kfac = preconditioner(model, fisher="exact")
    one, two = model(torch.randn(5, 3).double())
    message = r"^update_curvature: outputs must all be of the same examples, got \[5, 3\]"
    with pytest.raises(ValueError, match=message):
        kfac.update_curvature((one, two[:3]), loss=WeightedSum(["mse", "mse"]))


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, -0.1], [1.0, math.inf], [math.nan, 1.0], ["1", 1.0], []], ids=str
)
def test_weights_that_are_no_finite_numbers_from_zero_are_refused(weights: Any) -> None:
    message = "^WeightedSum: weights must be finite numbers from 0 for 2 losses, got "
    with pytest.raises(ValueError, match=message):
        WeightedSum(["mse", "mse"], weights)


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="^WeightedSum: losses must be one or more, got none"):
        WeightedSum([])
