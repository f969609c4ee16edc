"""Losses against PyTorch's: Hessians by autograd, numbers of terms, and draws of labels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host import never_waits
from loss_cases import CLASS_WEIGHTS, LOSS_CASES, LossCase, entries
from oracle import assert_same
from torch import Tensor, nn

from kfac_fast.losses import LOSSES, MODULES, CrossEntropy, Loss, find_loss

pytestmark = pytest.mark.usefixtures("one_thread")
cases = pytest.mark.parametrize("case", LOSS_CASES.values(), ids=LOSS_CASES)
names = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def ours(case: LossCase) -> Loss[Any]:
    return find_loss(case.module(reduction="sum"), "sum")


def named_outputs(name: str, f: Tensor) -> Any:
    """Entries ``[N, *]`` as a loss of this name takes them."""
    return (f, f.abs() + 0.3) if name == "gaussian_nll" else f


def sampled_gradients(case: LossCase, f: Tensor, targets: Tensor, draws: int) -> Tensor:
    """Gradients of one example's loss on drawn labels, ``[draws, entries]``."""
    copies = f.expand(draws, *f.shape[1:]).clone().requires_grad_()
    labels = targets.expand(draws, *targets.shape[1:])
    total = ours(case).sample(case.outputs(copies), labels, None)
    return torch.autograd.grad(total, copies)[0].flatten(1)


@cases
def test_the_columns_of_the_root_make_the_hessian_of_the_training_loss(case: LossCase) -> None:
    f = entries(3, 4, 2)
    targets = case.targets(f)
    loss = ours(case)
    columns = torch.autograd.functional.jacobian(
        lambda x: loss.root(case.outputs(x), targets).sum(0), f
    ).flatten(2)  # [K, N, entries]
    blocks = torch.einsum("kni,knj->nij", columns, columns)
    expected = case.hessian(f, targets).reshape(3, 8, 3, 8)
    for example in range(3):
        assert_same(blocks[example], expected[example, :, example])


@cases
def test_the_root_of_an_example_depends_on_no_other_example(case: LossCase) -> None:
    f = entries(3, 4, 2)
    targets, loss = case.targets(f), ours(case)
    whole = loss.root(case.outputs(f), targets)
    for n in range(3):
        one = loss.root(case.outputs(f[n : n + 1]), targets[n : n + 1])
        assert_same(one[0], whole[n])


@cases
def test_the_sampled_gradients_have_mean_zero_and_the_hessian_for_covariance(
    case: LossCase,
) -> None:
    """Within five standard errors: one entry in a million would fail by chance."""
    f = entries(1, 4, 1)
    targets = case.targets(f)
    g = sampled_gradients(case, f, targets, 200_000)
    outer = g[:, :, None] * g[:, None, :]
    for draws, expected in ((outer, case.hessian(f, targets)), (g, torch.zeros(4).double())):
        standard_error = draws.std(0) / len(g) ** 0.5
        deviation = (draws.mean(0) - expected).abs()
        assert (deviation <= 5 * standard_error + 1e-12).all()


@cases
@pytest.mark.parametrize("shape", [(6, 4, 1), (3, 4, 5)], ids=str)
def test_the_terms_are_what_a_mean_loss_divides_by(case: LossCase, shape: tuple[int, ...]) -> None:
    f = entries(*shape)
    targets = case.targets(f)
    total, mean = (case.loss(f, targets, reduction) for reduction in ("sum", "mean"))
    terms = ours(case).terms(case.outputs(f), targets)
    assert float(terms) == pytest.approx(float(total / mean), rel=1e-12)


@cases
def test_no_method_makes_the_host_wait(case: LossCase) -> None:
    f = entries(3, 4, 2)
    targets, loss = case.targets(f), ours(case)
    with never_waits():
        outputs = case.outputs(f)
        loss.terms(outputs, targets)
        loss.sample(outputs, targets, None)
        loss.root(outputs, targets)


@names
@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3, 5)], ids=str)
def test_outputs_may_have_any_number_of_positions(name: str, shape: tuple[int, ...]) -> None:
    outputs = named_outputs(name, torch.randn(shape, dtype=torch.float64))
    loss = LOSSES[name]()
    assert loss.root(outputs, None).shape[0] == shape[0]
    assert loss.sample(outputs, None, None).shape == ()
    terms = math.prod(shape) // (4 if name == "cross_entropy" else 1)
    assert loss.terms(outputs, None) == terms


def test_classes_are_drawn_over_dimension_one() -> None:
    classes = torch.randint(4, (3, 5, 2))
    outputs = 1e3 * F.one_hot(classes, 4).double().movedim(-1, 1)
    assert CrossEntropy().sample(outputs, None, None) == 0


@names
def test_a_generator_alone_decides_the_labels(name: str) -> None:
    outputs = named_outputs(name, torch.randn(50, 4, dtype=torch.float64))
    loss, draws = LOSSES[name](), []
    state = torch.get_rng_state()
    for seed in (3, 3, 4):
        generator = torch.Generator().manual_seed(seed)
        draws.append(loss.sample(outputs, None, generator))
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert loss.sample(outputs, None, None) == draws[0]


@pytest.mark.parametrize("name", ["cross_entropy", "bce_with_logits"])
def test_rare_labels_are_drawn_from_bfloat16_outputs_as_often_as_they_should(name: str) -> None:
    draws, logit = 400_000, -7.0
    columns = [logit, 0.0] if name == "cross_entropy" else [logit]
    outputs = torch.tensor(columns, dtype=torch.bfloat16).expand(draws, -1).clone()
    total = LOSSES[name]().sample(outputs.requires_grad_(), None, None)
    (g,) = torch.autograd.grad(total, outputs)
    rare = int((g[:, 0] < 0).sum())  # the gradient is p - 1 where the label was drawn
    expected = draws * torch.tensor(logit).sigmoid()
    assert abs(rare - expected) < 5 * expected.sqrt()


@pytest.mark.parametrize("name", ["cross_entropy", "bce_with_logits"])
@pytest.mark.parametrize("logit", [-30.0, 30.0])
def test_certain_outputs_keep_their_small_curvature(name: str, logit: float) -> None:
    """``1 - p`` is zero in float32 there."""
    column = [logit, 0.0] if name == "cross_entropy" else [logit]
    f = torch.tensor([column], requires_grad=True)
    root = LOSSES[name]().root(f, None).sum(0)
    squares = [torch.autograd.grad(r, f, retain_graph=True)[0][0, 0] ** 2 for r in root]
    expected = math.exp(-30.0)  # p (1 - p)
    assert float(sum(squares)) == pytest.approx(expected, rel=1e-5, abs=0)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["sample", "root"])
def test_gradients_in_half_precision_are_rounded_once(
    case: LossCase, dtype: torch.dtype, method: str
) -> None:
    """They are those of the same outputs in float32."""
    f = entries(3, 4, 2).to(dtype)
    targets, loss, gradients = case.targets(f), ours(case), []
    for outputs in (f.clone().requires_grad_(), f.float().requires_grad_()):
        arguments = (
            case.outputs(outputs),
            targets.to(dtype) if targets.is_floating_point() else targets,
        )
        torch.manual_seed(3)
        if method == "sample":
            scalars = [loss.sample(*arguments, None)]
        else:
            scalars = list(loss.root(*arguments).sum(0))
        gradients.append([torch.autograd.grad(s, outputs, retain_graph=True)[0] for s in scalars])
    for half, single in zip(*gradients, strict=True):
        assert torch.equal(half, single.to(dtype))


def test_impossible_classes_have_no_curvature() -> None:
    f = torch.tensor([[0.3, -math.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    without = f.detach()[:, [0, 2]].requires_grad_()
    columns = torch.stack(
        [
            torch.autograd.grad(r, f, retain_graph=True)[0][0]
            for r in CrossEntropy().root(f, None)[0]
        ]
    )
    expected = torch.autograd.functional.jacobian(
        lambda x: CrossEntropy().root(x, None)[0], without
    )[:, 0]
    assert (columns[:, 1] == 0).all() and (columns[1] == 0).all()
    assert_same(columns[[0, 2]][:, [0, 2]], expected)


@names
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["sample", "root"])
def test_bad_outputs_give_bad_gradients_and_no_error(name: str, value: float, method: str) -> None:
    f = torch.randn(3, 4)
    f[1, 2] = value
    f.requires_grad_()
    loss = LOSSES[name]()
    with never_waits():
        outputs = named_outputs(name, f)
        scalar = (
            loss.sample(outputs, None, None)
            if method == "sample"
            else loss.root(outputs, None).sum()
        )
        (gradient,) = torch.autograd.grad(scalar, f)
    if math.isnan(value) and (name, method) != ("mse", "root"):
        assert not gradient[1].isfinite().all()
    assert gradient[[0, 2]].isfinite().all()


# Which loss


@pytest.mark.parametrize("name", LOSS_CASES)
def test_modules_carry_their_options_over(name: str) -> None:
    module = LOSS_CASES[name].module(reduction="mean")
    loss = find_loss(module, "mean")
    assert type(loss) is MODULES[type(module)]
    for option, value in vars(loss).items():
        assert value is getattr(module, option) or value == getattr(module, option)


@names
def test_a_name_stands_for_the_defaults_of_pytorchs_module(name: str) -> None:
    (module,) = (module() for module, kind in MODULES.items() if kind is LOSSES[name])
    assert vars(find_loss(name, "mean")) == vars(find_loss(module, "mean"))


class Subclass(nn.MSELoss):
    """It may compute anything."""


@pytest.mark.parametrize(
    "loss", ["nll", nn.L1Loss(), F.mse_loss, None, Subclass()], ids=lambda loss: type(loss).__name__
)
def test_an_unknown_loss_is_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"loss must be one of .*'mse'.*'MSELoss'.*Loss, got "):
        find_loss(loss, "mean")


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_another_reduction_than_that_of_kfac_is_refused(reduction: str) -> None:
    message = f"loss must have the loss_reduction 'mean' of KFAC, got '{reduction}'"
    with pytest.raises(ValueError, match=message):
        find_loss(nn.MSELoss(reduction=reduction), "mean")


REFUSED: list[tuple[nn.Module, Any, Tensor | None, type[Exception], str]] = [
    (nn.CrossEntropyLoss(), torch.ones(3), None, ValueError, r"\[N, C, \*positions\], got 1-d"),
    (nn.MSELoss(), torch.ones(()), None, ValueError, r"outputs must be \[N, \*\], got 0-d"),
    (nn.BCEWithLogitsLoss(), [1.0], None, TypeError, "outputs must be a tensor, got list"),
    (
        nn.CrossEntropyLoss(ignore_index=0),
        torch.ones(3, 2),
        None,
        ValueError,
        "targets must be given for weight and ignore_index, got None",
    ),
    (nn.CrossEntropyLoss(CLASS_WEIGHTS), torch.ones(3, 4), None, ValueError, "must be given for w"),
    (
        nn.CrossEntropyLoss(),
        torch.ones(3, 2, 5),
        torch.zeros(3, dtype=torch.int64),
        ValueError,
        r"targets must be \(3, 5\), got \(3,\)",
    ),
    (
        nn.CrossEntropyLoss(),
        torch.ones(3, 2, 5),
        torch.zeros(3, 5),
        ValueError,
        r"targets must be \(3, 2, 5\), got \(3, 5\)",
    ),
    (
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)),
        torch.ones(3, 2),
        None,
        ValueError,
        "targets must be given for pos_weight, got None",
    ),
    (
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)),
        torch.ones(3, 2),
        torch.ones(2),
        ValueError,
        r"targets must be \(3, 2\), got \(2,\)",
    ),
    (nn.GaussianNLLLoss(), torch.ones(3, 2), None, TypeError, "must be a tuple .*, got Tensor"),
    (
        nn.GaussianNLLLoss(),
        (torch.ones(3, 2), "1.0"),
        None,
        TypeError,
        "outputs must be a tensor, got str",
    ),
    (
        nn.GaussianNLLLoss(),
        (torch.ones(3, 2), torch.ones(1, 1)),
        None,
        ValueError,
        r"variance must have the mean's shape \(3, 2\), .* got \(1, 1\)",
    ),
    (
        nn.GaussianNLLLoss(),
        (torch.ones(3, 2), torch.ones(1, 2, requires_grad=True)),
        None,
        ValueError,
        "variance must be each example's own if it is trained, got 1 for 3 examples",
    ),
    (
        nn.GaussianNLLLoss(),
        (torch.ones(3, 2), torch.ones(3, 4)),
        None,
        ValueError,
        r"variance must have the mean's shape \(3, 2\), .* got \(3, 4\)",
    ),
]


@pytest.mark.parametrize(
    ("module", "outputs", "targets", "error", "message"), REFUSED, ids=lambda x: str(x)[:30]
)
@pytest.mark.parametrize("method", ["terms", "sample", "root"])
def test_what_a_loss_does_not_take_is_refused(
    module: nn.Module,
    outputs: Any,
    targets: Tensor | None,
    error: type[Exception],
    message: str,
    method: str,
) -> None:
    loss = find_loss(module, "mean")
    arguments = (outputs, targets, None) if method == "sample" else (outputs, targets)
    with pytest.raises(error, match=f"^update_curvature: .*{message}"):
        getattr(loss, method)(*arguments)


@pytest.mark.parametrize("method", ["terms", "sample", "root"])
def test_labels_may_be_bytes(method: str) -> None:
    outputs, labels = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 2, 0])
    results = []
    for targets in (labels, labels.byte()):
        more = [torch.Generator().manual_seed(0)] if method == "sample" else []
        loss = CrossEntropy(weight=torch.tensor([1.0, 2.0, 0.5]), ignore_index=1)
        results.append(getattr(loss, method)(outputs, targets, *more))
    assert torch.equal(*results)


def test_soft_labels_may_be_more_precise_than_the_outputs() -> None:
    outputs = torch.randn(6, 3)
    labels = torch.rand(6, 3, dtype=torch.float64).softmax(1)
    for smoothing in (0.0, 0.1):
        loss = CrossEntropy(label_smoothing=smoothing)
        root = loss.root(outputs, labels)
        assert torch.equal(root, loss.root(outputs, labels.float()))
        assert loss.sample(outputs, labels, None).dtype == torch.float32


MEAN = (4, 3, 8)
VARIANCES = {
    "number": 0.5,
    "last": torch.rand(4, 3) + 0.1,
    "one": torch.rand(4, 3, 1) + 0.1,
    "middle": torch.rand(4, 1, 8) + 0.1,
    "examples": torch.rand(1, 3, 8) + 0.1,
}


@pytest.mark.parametrize("variance", VARIANCES.values(), ids=VARIANCES)
def test_a_variance_may_be_what_pytorchs_loss_takes(variance: Tensor | float) -> None:
    mean, targets = torch.randn(MEAN).double(), torch.randn(MEAN).double()
    F.gaussian_nll_loss(mean, targets, variance)
    if isinstance(variance, Tensor):
        variance = variance.double()
        shaped = variance[..., None] if variance.dim() == 2 else variance
        full = shaped.expand(MEAN).clone()
    else:
        full = torch.full(MEAN, variance).double()
    loss = LOSSES["gaussian_nll"]()
    draws = [
        loss.sample((mean, v), None, torch.Generator().manual_seed(0)) for v in (variance, full)
    ]
    assert draws[0] == draws[1] and loss.terms((mean, variance), None) == mean.numel()
    assert torch.equal(loss.root((mean, variance), None), loss.root((mean, full), None))


def test_a_variance_of_one_number_goes_with_a_mean_of_examples() -> None:
    mean = torch.randn(5).double()
    roots = [
        LOSSES["gaussian_nll"]().root((mean, variance), None)
        for variance in (torch.tensor(2.0).double(), torch.full((5,), 2.0).double())
    ]
    assert torch.equal(*roots)


def test_a_class_is_no_loss() -> None:
    with pytest.raises(ValueError, match="loss must be one of .*CrossEntropy"):
        find_loss(CrossEntropy, "mean")
