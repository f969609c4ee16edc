"""Fisher types: the preconditioner's gradient covariances against the Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from host import never_waits
from loss_cases import LOSS_CASES, LossCase
from nets import Net, classes, images, preconditioner
from oracle import assert_same
from plain_kfac import assert_covariances, assert_solved, covariances, plain_covariances
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.losses import LOSSES

pytestmark = pytest.mark.usefixtures("one_thread")
cases = pytest.mark.parametrize("case", LOSS_CASES.values(), ids=LOSS_CASES)
approximations = pytest.mark.parametrize("approx", ["expand", "reduce"])
drawn = pytest.mark.parametrize(
    ("fisher", "name"),
    [*(("mc", name) for name in LOSSES), ("curvature-propagation", "cross_entropy")],
)
FISHERS = ["mc", "exact", "curvature-propagation"]
backpropagating = pytest.mark.parametrize("fisher", FISHERS)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Mixer(nn.Module):
    """Positive entries ``[N, 4, 2]`` of tokens ``[N, 2, 3]`` that see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 4)
        self.register_buffer("mix", torch.tensor([[0.7, 0.6], [-0.4, 0.9]]))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.last(self.mix @ self.first(x).tanh()).mT) + 0.3


def tokens(examples: int = 5) -> Tensor:
    return torch.randn(examples, 2, 3, dtype=torch.float64)


def divisor(case: LossCase, f: Tensor, targets: Tensor, reduction: str) -> float:
    """What the loss divides the sum of its terms by."""
    if reduction == "sum":
        return 1.0
    return float(case.loss(f, targets, "sum") / case.loss(f, targets, "mean"))


def gauss_newton(
    model: Mixer, x: Tensor, case: LossCase, targets: Tensor, approx: str, reduction: str
) -> dict[str, Tensor]:
    """Of each layer, the sum of the diagonal blocks of ``J^T H J`` in its outputs."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda m, i, output, name=name: seen.update({name: output}))
        for name, layer in model.named_children()
    ]
    f = model(x)
    for hook in hooks:
        hook.remove()
    h = case.hessian(f, targets) / divisor(case, f.detach(), targets, reduction)
    rows = [
        torch.autograd.grad(entry, list(seen.values()), retain_graph=True) for entry in f.flatten()
    ]
    blocks = {}
    for name, of_layer in zip(seen, zip(*rows, strict=True), strict=True):
        j = torch.stack(of_layer)  # [entries, N, S, out]
        j = j.flatten(1, 2) if approx == "expand" else j.sum(2)
        blocks[name] = torch.einsum("fro,fg,grp->op", j, h, j)
    return blocks


def curvature_step(
    model: nn.Module, kfac: KFAC, case: LossCase, x: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Each layer's gradient covariance after an update without a training loss."""
    module = case.module(reduction=kfac.loss_reduction)
    kfac.update_curvature(case.outputs(model(x)), loss=module, targets=targets)
    kfac.step()
    return gradient_covariances(kfac)


def gradient_covariances(kfac: KFAC) -> dict[str, Tensor]:
    return {name: g[0] for name, (_, g) in covariances(kfac).items()}


@cases
@approximations
@reductions
def test_the_exact_covariance_is_the_gauss_newton_matrix(
    case: LossCase, approx: str, reduction: str
) -> None:
    model, x = Mixer(), tokens()
    targets = case.targets(model(x).detach())
    expected = gauss_newton(model, x, case, targets, approx, reduction)
    kfac = preconditioner(model, fisher="exact", approx=approx, loss_reduction=reduction)
    for name, g in curvature_step(model, kfac, case, x, targets).items():
        assert_same(g, expected[name])


@drawn
def test_the_sampled_covariance_converges_to_the_exact_one_at_the_monte_carlo_rate(
    fisher: str, name: str
) -> None:
    """16 times the draws make a quarter of the error.

    From seed to seed the ratio deviates by up to 0.5 from 4. Without averaging it would be 1, and
    with the wrong power of the number of draws 16.
    """
    case = next(case for case in LOSS_CASES.values() if case.name == name)
    model, x = Mixer(), tokens()
    targets = case.targets(model(x).detach())
    with preconditioner(model, fisher="exact") as kfac:
        exact = curvature_step(model, kfac, case, x, targets)
    errors = []
    for samples in (2, 32):
        options = {"fisher": fisher, "mc_samples": samples, "factor_decay": 0}
        kfac = preconditioner(model, **options)
        draws = [curvature_step(model, kfac, case, x, targets)["last"] for _ in range(40)]
        kfac.detach()
        deviation = torch.stack(draws) - exact["last"]
        errors.append(float(deviation.square().mean().sqrt()))
    assert errors[0] < exact["last"].norm() and 2.7 < errors[0] / errors[1] < 6


@drawn
@pytest.mark.parametrize("mc_samples", [1, 4])
def test_the_sampled_covariance_is_unbiased_in_the_number_of_samples(
    fisher: str, name: str, mc_samples: int
) -> None:
    """Many updates; within five standard errors."""
    case = next(case for case in LOSS_CASES.values() if case.name == name)
    model, x = Mixer(), tokens()
    targets = case.targets(model(x).detach())
    with preconditioner(model, fisher="exact") as kfac:
        exact = curvature_step(model, kfac, case, x, targets)
    kfac = preconditioner(model, fisher=fisher, mc_samples=mc_samples, factor_decay=0)
    draws = torch.stack(
        [curvature_step(model, kfac, case, x, targets)["first"] for _ in range(300)]
    )
    deviation = (draws.mean(0) - exact["first"]).abs()
    assert (deviation <= 5 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all()


@pytest.mark.parametrize("name", ["mse", "bce_with_logits"])
def test_random_signs_of_a_single_column_give_the_exact_covariance(name: str) -> None:
    """Of every example, bit for bit."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), tokens()[:, 0]
    results = []
    for fisher in ("exact", "curvature-propagation"):
        kfac = preconditioner(model, fisher=fisher, mc_samples=1)
        kfac.update_curvature(model(x), loss=name)
        kfac.step()
        kfac.detach()
        results.append(gradient_covariances(kfac))
    for layer, g in results[0].items():
        assert torch.equal(g, results[1][layer])


@pytest.mark.parametrize("fisher", ["mc", "curvature-propagation"])
def test_a_generator_alone_decides_what_is_drawn(fisher: str) -> None:
    model, x, results = Mixer(), tokens(), []
    state = torch.get_rng_state()
    for seed in (3, 3, 4):
        with preconditioner(model, fisher=fisher, mc_samples=2) as kfac:
            generator = torch.Generator().manual_seed(seed)
            kfac.update_curvature(model(x), loss="cross_entropy", generator=generator)
            kfac.step()
            results.append(gradient_covariances(kfac)["first"])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(torch.get_rng_state(), state)


# Sums and means


@cases
@reductions
def test_unequal_micro_batches_have_the_exact_curvature_of_one_batch(
    case: LossCase, reduction: str
) -> None:
    model, x = Mixer(), tokens(9)
    f = model(x).detach()
    targets, sizes = case.targets(f), [5, 1, 3]
    results = []
    for split in ([9], sizes):
        kfac = preconditioner(model, fisher="exact", loss_reduction=reduction)
        module = case.module(reduction=reduction)
        for inputs, labels in zip(x.split(split), targets.split(split), strict=True):
            kfac.update_curvature(case.outputs(model(inputs)), loss=module, targets=labels)
        kfac.step()
        kfac.detach()
        results.append(kfac)
    assert_covariances(results[1], covariances(results[0]))


@cases
@approximations
def test_the_empirical_fisher_divides_by_the_terms_that_are_counted(
    case: LossCase, approx: str
) -> None:
    """Means over micro-batches of other numbers of terms make the covariance of one batch."""
    model, x = Mixer(), tokens(9)
    f = model(x).detach()
    targets, sizes = case.targets(f), [5, 1, 3]
    terms = round(divisor(case, f, targets, "mean"), 9)
    expected = plain_covariances(
        model, lambda: case.loss(model(x), targets, "sum") / terms, approx, terms, "mean"
    )
    kfac = preconditioner(model, approx=approx, accumulation_steps=3)
    for inputs, labels in zip(x.split(sizes), targets.split(sizes), strict=True):
        f = model(inputs)
        kfac.update_curvature(case.outputs(f), loss=case.module(reduction="mean"), targets=labels)
        (case.loss(f, labels, "mean") / 3).backward()
    kfac.step()
    assert_covariances(kfac, expected)


def test_terms_are_counted_for_each_forward_pass() -> None:
    """Two passes come first, then both backward passes."""
    case = LOSS_CASES["ignored"]
    model, x = Mixer(), tokens(9)
    targets = case.targets(model(x).detach())
    results = []
    for split in ([9], [2, 7]):
        losses, kfac = [], preconditioner(model, accumulation_steps=len(split))
        for inputs, labels in zip(x.split(split), targets.split(split), strict=True):
            f = model(inputs)
            kfac.update_curvature(f, loss=case.module(), targets=labels)
            losses.append(case.loss(f, labels, "mean") / len(split))
        for loss in losses:
            loss.backward()
        kfac.step()
        kfac.detach()
        results.append(kfac)
    assert_covariances(results[1], covariances(results[0]))


def test_a_step_without_a_count_takes_the_batch_size() -> None:
    model, x, y = Net(), images(), torch.tensor([0, 1, 2, -100, -100])
    kfac = preconditioner(model, factor_decay=0)
    for counted in (True, False):
        f = model(x)
        if counted:
            kfac.update_curvature(f, loss="cross_entropy", targets=y)
        F.cross_entropy(f, y).backward()
        kfac.step()
    expected = plain_covariances(model, lambda: F.cross_entropy(model(x), y), "expand", 5, "mean")
    assert_covariances(kfac, expected)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@reductions
def test_examples_whose_labels_are_ignored_are_as_if_not_there(fisher: str, reduction: str) -> None:
    model, x, y = Mixer(), tokens(), torch.randint(4, (5, 2))
    y[[1, 4]] = -100
    module = nn.CrossEntropyLoss(reduction=reduction)
    results = []
    for examples in ([0, 1, 2, 3, 4], [0, 2, 3]):
        kfac = preconditioner(model, fisher=fisher, loss_reduction=reduction)
        f, labels = model(x[examples]), y[examples]
        kfac.update_curvature(f, loss=module, targets=labels)
        module(f, labels).backward()
        kfac.step()
        kfac.detach()
        results.append(gradient_covariances(kfac))
    for name in results[0]:
        assert_same(*(result[name] for result in results))


@reductions
def test_corrected_eigenvalues_are_those_without_the_ignored_examples(reduction: str) -> None:
    """In the eigenbases of a first batch that both runs share."""
    model, x, y = Mixer(), tokens(), torch.randint(4, (5, 2))
    module = nn.CrossEntropyLoss(reduction=reduction)
    options = {"damping_mode": "exact", "eigenvalue_correction": True, "inverse_update_steps": 9}
    results = []
    for examples in ([0, 1, 2, 3, 4], [0, 2, 3]):
        kfac = preconditioner(model, loss_reduction=reduction, **options)
        ignored = y.index_fill(0, torch.tensor([1, 4]), -100)
        for labels, of in ((y, [0, 1, 2, 3, 4]), (ignored, examples)):
            f = model(x[of])
            kfac.update_curvature(f, loss=module, targets=labels[of])
            module(f, labels[of]).backward()
            kfac.step()
        kfac.detach()
        results.append([block.correction.mean.clone() for block in kfac._blocks])
    for pair in zip(*results, strict=True):
        assert_same(*pair)


@pytest.mark.parametrize("fisher", ["empirical", *FISHERS])
def test_a_batch_whose_labels_are_all_ignored_is_skipped(fisher: str) -> None:
    model = Mixer()
    kfac = preconditioner(model, fisher=fisher)
    y, results = torch.randint(4, (5, 2)), []
    for labels in (y, torch.full_like(y, -100)):
        with never_waits():
            f = model(tokens())
            kfac.update_curvature(f, loss="cross_entropy", targets=labels)
            F.cross_entropy(f, labels).backward()
            kfac.step()
        results.append(gradient_covariances(kfac))
    for name in results[0]:
        assert torch.equal(*(result[name] for result in results))
    assert kfac.summary().count("updates skipped 1") == 2


# Scaled losses


class Scaler(torch.amp.GradScaler):
    """Loss scales that change at every step, as they do after overflows."""

    def __init__(self, scales: Sequence[float]) -> None:
        super().__init__("cpu", init_scale=scales[0])
        self.scales = list(scales[1:])

    def next(self) -> None:
        self.update(self.scales.pop(0) if self.scales else 1.0)


def train_scaled(fisher: str, scales: Sequence[float]) -> tuple[KFAC, list[Tensor]]:
    """Factors and weights after steps on cross entropy that is scaled by these numbers."""
    torch.manual_seed(0)
    model, scaler = Net(), Scaler(scales)
    kfac = preconditioner(model, fisher=fisher, loss_scale=lambda step: scaler.get_scale())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in scales:
        optimizer.zero_grad()
        f = model(images())
        if fisher == "exact":
            kfac.update_curvature(f, loss="cross_entropy")
        scaler.scale(F.cross_entropy(f, torch.randint(3, (5,)))).backward()
        scaler.unscale_(optimizer)
        kfac.step()
        scaler.step(optimizer)
        scaler.next()
    return kfac, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_a_changing_loss_scale_changes_nothing(fisher: str) -> None:
    """Powers of two, so that not a single bit may differ."""
    plain, weights = train_scaled(fisher, [1.0] * 6)
    scaled, scaled_weights = train_scaled(fisher, [2.0**16, 2.0**10, 2.0**-3] * 2)
    for pair in zip(weights, scaled_weights, strict=True):
        assert torch.equal(*pair)
    for name, pairs in covariances(plain).items():
        for pair in zip(pairs, covariances(scaled)[name], strict=True):
            assert torch.equal(*pair)


def test_every_pass_has_its_own_loss_scale() -> None:
    """Also where the model's layers are called by themselves, one pass a step."""
    model, scale = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)).double(), [1.0]
    results = []
    for scales in ([1.0] * 4, [2.0**9, 2.0**-3, 2.0**5, 2.0**2]):
        torch.manual_seed(1)
        kfac = preconditioner(model, accumulation_steps=2, loss_scale=lambda step: scale[0])
        for index, scale[0] in enumerate(scales):
            x, y = torch.randn(5, 3).double(), torch.randint(3, (5,))
            outputs = model(x) if index < 2 else model[1](model[0](x))
            (scale[0] * F.cross_entropy(outputs, y) / 2).backward()
            if index > 0:
                kfac.step()
        kfac.detach()
        results.append(gradient_covariances(kfac))
    for name in results[0]:
        assert torch.equal(*(result[name] for result in results))


def test_an_overflow_costs_one_step_and_leaves_no_trace() -> None:
    """The gradients overflow at the second step, which counts as one without a batch."""
    model, x, y = Net(), images(), torch.randint(3, (5,))
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    scaler, optimizer = Scaler([4.0]), torch.optim.SGD(model.parameters(), lr=0.0)
    kfac = preconditioner(model, loss_scale=lambda step: scaler.get_scale())
    results = []
    for factor in (1.0, torch.finfo(torch.float64).max, 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * F.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        kfac.step()
        scaler.step(optimizer)
        scaler.update()
        results.append(covariances(kfac))
    assert scaler.get_scale() == 2.0  # it has seen the overflow
    for name, pair in results[0].items():
        for later in results[1:]:
            assert_solved(later[name][1], pair[1])
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)
    assert kfac.summary().count("updates skipped 1") == 4


def test_the_scale_is_read_once_a_pass() -> None:
    """A gradient scaler's makes the host wait."""
    steps: list[int] = []

    def loss_scale(step: int) -> float:
        steps.append(step)
        return 2.0

    model = Net()
    kfac = preconditioner(model, loss_scale=loss_scale)
    for _ in range(2):
        steps.clear()
        (2 * F.cross_entropy(model(images()), torch.randint(3, (5,)))).backward()
        assert steps == [kfac.steps]
        kfac.step()


# Forward only


@approximations
@reductions
def test_the_forward_only_covariances_are_identities(approx: str, reduction: str) -> None:
    """Two micro-batches of other sizes, of a network with a grouped convolution."""
    model, x = Net(), images(7)
    y = torch.randint(3, (7,))
    expected = plain_covariances(model, lambda: F.cross_entropy(model(x), y), approx, 7, "mean")
    kfac = preconditioner(
        model, fisher="forward-only", approx=approx, loss_reduction=reduction, factor_decay=0.5
    )
    for _ in range(2):
        for batch in x.split([5, 2]):
            model(batch)
        kfac.step()
    actual = covariances(kfac)
    assert actual.keys() == expected.keys()
    for name, (a, g) in expected.items():
        assert_solved(actual[name][0], a)
        assert_same(actual[name][1], torch.eye(g.shape[-1]).double().expand_as(g))


def test_the_forward_only_fisher_asks_for_nothing_but_a_forward_pass() -> None:
    model = Net()
    kfac = preconditioner(model, fisher="forward-only")
    with torch.no_grad():
        model(images())
    assert not any(block.pending for block in kfac._blocks)
    with never_waits():
        f = model(images())
        kfac.update_curvature(f, loss="cross_entropy")  # so that a loop serves every Fisher
        F.cross_entropy(f, torch.tensor([0, 1, 2, 0, 1])).backward()
        kfac.step()
    assert len(covariances(kfac)) == 4


def test_the_forward_only_fisher_leaves_alone_what_has_no_inputs_of_its_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm = nn.Embedding(6, 3), nn.LayerNorm(3)
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
            self.two.weight, self.two.bias = self.one.weight, self.one.bias
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(self.norm(self.words(x))).tanh())

    model, x = Tied(), torch.randint(6, (5, 4))
    kfac = preconditioner(model, fisher="forward-only")
    model(x)
    kfac.step()
    assert "norm: left alone, its only factor needs gradients" in kfac.summary()
    words, tied = kfac._blocks
    counts = torch.bincount(x.flatten(), minlength=6).double()
    assert_same(words.factors[0].mean, counts / 20)
    hidden = model.norm(model.words(x)).detach().flatten(0, 1)
    rows = torch.cat([hidden, model.one(hidden).detach().tanh()])
    rows = torch.cat([rows, rows.new_ones(40, 1)], 1)
    assert_same(tied.factors[0].mean, rows.mT @ rows / 40)
    for block in (words, tied):
        assert_same(block.factors[1].mean, torch.eye(3).double())


class Unasked:
    """A loss that nobody may ask for anything."""

    def terms(self, outputs: Tensor, targets: Tensor | None) -> int:
        raise AssertionError

    def sample(
        self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        raise AssertionError

    def root(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        raise AssertionError


@pytest.mark.parametrize("fisher", ["empirical", *FISHERS, "forward-only"])
def test_the_loss_is_asked_only_when_it_matters(fisher: str) -> None:
    """Not on steps that update no factors, and never by the forward-only Fisher."""
    model = Net()
    kfac = KFAC(model, fisher=fisher, factor_update_steps=2)
    for step in range(3):
        due = step % 2 == 0 and fisher != "forward-only"
        kfac.update_curvature(model(images()), loss="cross_entropy" if due else Unasked())
        kfac.step()


# One's own loss


class Poisson:
    """Poisson likelihood of log rates."""

    def terms(self, outputs: Tensor, targets: Tensor | None) -> int:
        return outputs.numel()

    def sample(
        self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        labels = torch.poisson(outputs.detach().exp(), generator)
        return F.poisson_nll_loss(outputs, labels, reduction="sum")

    def root(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        return ((outputs.detach() / 2).exp() * outputs).flatten(1)


def test_ones_own_loss() -> None:
    model, x = Mixer(), tokens()
    poisson = LossCase(None, cast(Any, nn.PoissonNLLLoss), torch.zeros_like)
    expected = gauss_newton(model, x, poisson, torch.zeros(5, 4, 2).double(), "expand", "mean")
    kfac = preconditioner(model, fisher="exact")
    kfac.update_curvature(model(x), loss=Poisson())
    kfac.step()
    for name, g in gradient_covariances(kfac).items():
        assert_same(g, expected[name])


@backpropagating
def test_outputs_without_a_graph_are_refused(fisher: str) -> None:
    model = Net()
    kfac = preconditioner(model, fisher=fisher)
    outputs = model(images()).detach()
    with pytest.raises(RuntimeError, match="^update_curvature: outputs must be those of a forward"):
        kfac.update_curvature(outputs, loss="cross_entropy")


@backpropagating
def test_labels_that_are_learned_are_constants(fisher: str) -> None:
    results = []
    for learned in (False, True):
        torch.manual_seed(0)
        model = Net()
        kfac = preconditioner(model, fisher=fisher)
        outputs = model(images())
        labels = outputs.softmax(1)
        weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
        targets = labels if learned else labels.detach()
        kfac.update_curvature(outputs, loss=weighted, targets=targets)
        weighted(outputs, targets.detach()).backward()
        kfac.step()
        results.append([factor for pair in covariances(kfac).values() for factor in pair])
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_a_batch_without_examples_changes_no_factor(fisher: str, reduction: str) -> None:
    model = Net()
    kfac = preconditioner(model, fisher=fisher, loss_reduction=reduction)
    for examples in (5, 0):
        outputs = model(images(examples))
        if fisher == "mc":
            kfac.update_curvature(outputs, loss="cross_entropy")
        cross_entropy = nn.CrossEntropyLoss(reduction="sum")
        cross_entropy(outputs, classes(outputs)).backward()
        kfac.step()
        if examples:
            before = [f.clone() for pair in covariances(kfac).values() for f in pair]
    after = [factor for pair in covariances(kfac).values() for factor in pair]
    assert all(torch.equal(*both) for both in zip(before, after, strict=True))
