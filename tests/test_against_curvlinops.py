"""Blocks of ``KFAC`` against curvlinops, a library with another implementation of everything here.

First its Gauss-Newton operator, which knows nothing of layers: multiplied with the identity it is
the matrix ``J^T H J`` in all trainable parameters, of which a block of the exact Fisher is a
diagonal block wherever ``docs/math.md``, section 2, says so. Then its own Kronecker factors, its
corrected eigenvalues and its empirical Fisher. All in float64; networks, settings and bounds are
those of ``tests/settings.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import CONVOLUTIONS, Convolution
from loss_cases import LOSS_CASES, LossCase
from nets import DAMPING, preconditioner
from oracle import convolution
from plain_kfac import assert_solved
from settings import (
    APPROXIMATIONS,
    EXACT,
    NOT_EXACT,
    Attends,
    FeaturesFirst,
    Graphs,
    Padded,
    Pool,
    Sharing,
    Twice,
    expand_setting,
    kronecker_block,
    reduce_setting,
)
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.layers import Layer

curvlinops = pytest.importorskip("curvlinops", reason="needs curvlinops, which `make` installs")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.usefixtures("one_thread"),
]
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
# The variance of a normal likelihood has a Hessian that is not the Fisher; the operator takes it.
LOSSES = {name: case for name, case in LOSS_CASES.items() if not name.startswith("normal")}
losses = pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
MSE = LOSSES["mse"]
Batches = Sequence[tuple[Tensor, Tensor]]
"""Inputs and targets."""
Errors = dict[str, float]
"""Largest relative error of a group's block, by layer."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Matrix:
    """What an operator of curvlinops does to a model's trainable parameters, as a dense matrix."""

    def __init__(
        self,
        operator: type,
        model: nn.Module,
        batches: Batches,
        loss: nn.Module,
        **options: Any,
    ) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.operator = operator(
            model, loss, parameters, batches, check_deterministic=False, **options
        )
        size = self.operator.shape[1]
        self._dense = self.operator @ torch.eye(size, dtype=torch.float64)
        places = torch.arange(size).split([p.numel() for p in parameters])
        self._places = dict(zip(parameters, places, strict=True))

    def block(self, layer: Layer) -> Tensor:
        """``[groups, out * in, out * in]``, in the order of the layer's matrix of parameters."""
        numbers = [self._places[p].reshape(p.shape) for p in layer.parameters()]
        places = layer.matrix(numbers, torch.int64).reshape(layer.groups, -1)
        return self._dense[places[:, :, None], places[:, None, :]]


def relative_error(out: Tensor, expected: Tensor) -> float:
    """The largest of a group."""
    deviation = torch.linalg.matrix_norm(out - expected)
    return float((deviation / torch.linalg.matrix_norm(expected)).max())


def one_step(
    model: nn.Module,
    batches: Batches,
    loss: nn.Module,
    sharing: Sharing | None = None,
    **options: Any,
) -> KFAC:
    """K-FAC, of the exact Fisher unless told otherwise, after a step that accumulates batches."""
    options = {"fisher": "exact", "accumulation_steps": len(batches), **options}
    kfac = preconditioner(model, loss_reduction=loss.reduction, **options)
    for pattern, kinds in (sharing or {}).items():
        kfac.share_rows(pattern, **kinds)
    accumulate(model, batches, loss, kfac)
    kfac.step()
    kfac.detach()
    return kfac


def accumulate(model: nn.Module, batches: Batches, loss: nn.Module, kfac: KFAC) -> None:
    model.zero_grad()
    for x, y in batches:
        f = model(x)
        kfac.update_curvature(f, loss=loss, targets=y)
        (loss(f, y) / len(batches)).backward()


def relative_errors(
    model: nn.Module,
    x: Tensor,
    case: LossCase = MSE,
    reduction: str = "mean",
    sharing: Sharing | None = None,
) -> tuple[Errors, Errors]:
    """Of every block under expand and under reduce."""
    loss, targets = case.module(reduction=reduction), case.targets(model(x).detach())
    matrix = Matrix(curvlinops.GGNLinearOperator, model, [(x, targets)], loss)
    results = []
    for approx in APPROXIMATIONS:
        kfac = one_step(model, [(x, targets)], loss, sharing, approx=approx)
        pairs = [(b, kronecker_block(b), matrix.block(b.layer)) for b in kfac._blocks]
        results.append({b.layer.name: relative_error(ours, theirs) for b, ours, theirs in pairs})
    return results[0], results[1]


def exact(errors: Errors, *names: str) -> bool:
    """Whether the blocks of these names, or all of them, are exact."""
    return all(errors[name] < EXACT for name in names or errors)


def none_exact(errors: Errors, *names: str) -> bool:
    return all(errors[name] > NOT_EXACT for name in names or errors)


# Layers followed by linear maps, squared error


def check_both_settings(layer: nn.Module, x: Tensor, features: int) -> None:
    """In its own setting an approximation is exact for all layers, in the other's not for this."""
    one_position = layer(x).numel() == len(x) * features
    expand, other = relative_errors(*expand_setting(layer, x, features))
    assert exact(expand) and (exact(other, "0") if one_position else none_exact(other, "0"))
    other, reduce = relative_errors(*reduce_setting(layer, x, features))
    assert exact(reduce) and (exact(other, "0") if one_position else none_exact(other, "0"))


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shared", [(), (4,), (2, 3)], ids=["rows", "sequence", "grid"])
def test_linear(shared: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(3, 4, bias=bias, dtype=torch.float64)
    check_both_settings(layer, random(5, *shared, 3), 4)


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(case: Convolution) -> None:
    features = 2 * case.groups
    layer = convolution(len(case.size), case.channels, features, case.options, bias=True)
    check_both_settings(layer, random(2, case.channels, *case.size), features)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_second_convolution_breaks_both_unless_circular_under_reduce(padding_mode: str) -> None:
    layers = [nn.Conv2d(2, 2, 3, padding=1, padding_mode=padding_mode) for _ in range(2)]
    model = nn.Sequential(*layers, Pool(mean=True), nn.Linear(2, 2)).double()
    expand, reduce = relative_errors(model, random(3, 2, 6, 6))
    assert none_exact(expand, "0")
    assert exact(reduce) if padding_mode == "circular" else none_exact(reduce, "0")


@pytest.mark.parametrize("padding", [None, 2], ids=["all", "padding-index"])
def test_an_embedding_is_as_under_expand_in_both(padding: int | None) -> None:
    layer = nn.Embedding(5, 3, padding_idx=padding, dtype=torch.float64)
    x = torch.randint(5, (4, 6))
    for errors in relative_errors(*expand_setting(layer, x, 3)):
        assert exact(errors, "0")
    for errors in relative_errors(*reduce_setting(layer, x, 3)):
        assert none_exact(errors, "0")


# A module, the shape of its input, and its features.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(3, 4), (5, 4, 3), 4),
    "groups": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), (2, 4, 3, 4), 4),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, (2, 3), stride=2, groups=2), (2, 4, 2, 3), 4),
    "normalisation": (lambda: nn.GroupNorm(2, 4), (3, 4, 5), 4),
    "embedding": (lambda: nn.Embedding(5, 3), (3, 4), 3),
}


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "embedding"])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters(frozen: str, name: str) -> None:
    """Each leaves a block of the other."""
    make, shape, features = LAYERS[name]
    layer, x = make().double(), random(*shape)
    layer.get_parameter(frozen).requires_grad_(False)
    expand, _ = relative_errors(*expand_setting(layer, x, features))
    _, reduce = relative_errors(*reduce_setting(layer, x, features))
    assert exact(expand) and exact(reduce)
    assert "0" in expand and "0" in reduce


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_solves_the_damped_gauss_newton_system(name: str) -> None:
    make, shape, features = LAYERS[name]
    x = torch.randint(5, shape) if name == "embedding" else random(*shape)
    model, x = expand_setting(make().double(), x, features)
    loss, targets = nn.MSELoss(), torch.randn_like(model(x))
    matrix = Matrix(curvlinops.GGNLinearOperator, model, [(x, targets)], loss)
    kfac = one_step(model, [(x, targets)], loss, damping_mode="exact")
    steps = [
        block.layer.matrix(block.layer.gradients(), torch.float64).clone() for block in kfac._blocks
    ]
    model.zero_grad()
    loss(model(x), targets).backward()
    for block, step in zip(kfac._blocks, steps, strict=True):
        v = block.layer.matrix(block.layer.gradients(), torch.float64).reshape(
            block.layer.groups, -1, 1
        )
        damped = matrix.block(block.layer)
        damped = damped + DAMPING * torch.eye(v.shape[1], dtype=torch.float64)
        assert_solved(step, torch.linalg.solve(damped, v).reshape(step.shape))


# Losses


@losses
@reductions
def test_one_datum_of_any_network_and_loss(case: LossCase, reduction: str) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Unflatten(1, (4, 1)))
    for errors in relative_errors(model.double(), random(1, 3), case, reduction):
        assert exact(errors)
    _, several = relative_errors(model, random(2, 3), case, reduction)
    assert none_exact(several, "0")


# Their Hessian is the same for all labels.
ALIKE = {name: LOSSES[name] for name in ("cross-entropy", "soft-labels", "smoothed", "mse", "bce")}


@pytest.mark.parametrize("case", ALIKE.values(), ids=ALIKE)
@reductions
def test_losses_of_equal_outputs(case: LossCase, reduction: str) -> None:
    """A weight of zero makes them equal, and thus their Hessians."""
    layer = nn.Conv2d(4, 6, 2, groups=2)
    nn.init.zeros_(layer.weight)
    x = random(3, 4, 3, 4)
    maps = [layer, nn.Flatten(2), nn.Conv1d(6, 4, 1)]
    model = nn.Sequential(*maps).double()
    expand, reduce = relative_errors(model, x, case, reduction)
    assert exact(expand) and none_exact(reduce, "0")
    model = nn.Sequential(*maps, Pool(mean=True), nn.Unflatten(1, (4, 1))).double()
    expand, reduce = relative_errors(model, x, case, reduction)
    assert exact(reduce) and none_exact(expand, "0")


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm((2, 3)), (3, 5, 2, 3)),
    "layer-no-bias": (lambda: nn.LayerNorm(3, bias=False), (3, 3)),
    "rms": (lambda: nn.RMSNorm(3, eps=1e-3), (3, 5, 3)),
    "group": (lambda: nn.GroupNorm(2, 6), (3, 6, 3, 2)),
    "batch1d": (lambda: nn.BatchNorm1d(3).eval(), (3, 3, 5)),
    "batch2d": (lambda: nn.BatchNorm2d(3).eval(), (3, 3, 2, 4)),
    "batch3d": (lambda: nn.BatchNorm3d(2).eval(), (3, 2, 2, 3, 2)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("loss", ["cross-entropy", "mse", "bce", "class-weights-smoothed-ignored"])
@reductions
def test_units_of_normalisations_in_any_network(name: str, loss: str, reduction: str) -> None:
    make, shape = NORMS[name]
    norm = make().double()
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    inputs = random(*shape)[0].numel()
    model = nn.Sequential(
        norm, nn.Tanh(), nn.Flatten(), nn.Linear(inputs, 8), nn.Unflatten(1, (4, 2))
    )
    for errors in relative_errors(model.double(), random(*shape), LOSSES[loss], reduction):
        assert exact(errors, "0")


# Attention


Q, K, V, OUT = (f"attention.{name}_proj" for name in ("q", "k", "v", "out"))


@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=["bias", "no-bias"])
def test_the_projection_of_the_heads_outputs(options: dict[str, Any]) -> None:
    """Per-position maps follow it, or a mean."""
    expand, reduce = relative_errors(Attends(**options), random(3, 5, 4))
    assert exact(expand, OUT, "head") and none_exact(reduce, OUT)
    expand, reduce = relative_errors(Attends(pooled=True, **options), random(3, 5, 4))
    assert exact(reduce, OUT, "head") and none_exact(expand, OUT)


def test_the_projection_of_values_under_uniform_attention() -> None:
    """Uniform attention is a mean over the positions; other attention is not."""
    model = Attends(pooled=True)
    _, reduce = relative_errors(model, random(3, 5, 4))
    assert none_exact(reduce, V)
    nn.init.zeros_(model.attention.in_proj_weight[:8].detach())
    expand, reduce = relative_errors(model, random(3, 5, 4))
    assert exact(reduce, V, OUT) and none_exact(expand, V, OUT)


@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 3}], ids=["packed", "separate"])
@pytest.mark.parametrize("loss", ["cross-entropy", "mse", "bce"])
@reductions
def test_one_query_of_one_datum_in_any_attention(
    options: dict[str, Any], loss: str, reduction: str
) -> None:
    """A single position; keys and values have several, with a Jacobian each."""
    model = Attends(random(1, 6, options.get("kdim", 4)), **options)
    for errors in relative_errors(model, random(1, 1, 4), LOSSES[loss], reduction):
        assert exact(errors, Q, OUT, "head") and none_exact(errors, K, V)


@pytest.mark.parametrize("loss", ["cross-entropy", "mse", "bce"])
@reductions
def test_one_key_beside_a_zero_of_one_datum(loss: str, reduction: str) -> None:
    """A single position of the keys, too; without the zero, no output would depend on it."""
    model = Attends(random(1, 1, 4), add_zero_attn=True)
    for errors in relative_errors(model, random(1, 1, 4), LOSSES[loss], reduction):
        assert exact(errors, Q, K, V, OUT, "head")


# Several calls of one weight


tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["called-twice", "tied"])


@tied_or_not
def test_calls_with_outputs_of_their_own(tied: bool) -> None:
    """No output sees both calls, so that there are no cross terms."""
    x = random(3, 2, 4, 3)
    expand, reduce = relative_errors(Twice(tied, "apart", pooled=False), x)
    assert exact(expand) and none_exact(reduce, "first")
    expand, reduce = relative_errors(Twice(tied, "apart", pooled=True), x)
    assert exact(reduce) and none_exact(expand, "first")
    assert expand.keys() == {"first", "head"}


@tied_or_not
def test_cross_terms_of_calls_are_left_out(tied: bool) -> None:
    """Where outputs see both calls, their Jacobians ``J1, J2`` make ``J1^T J2``, too.

    A block is exact only if these cancel: here between examples that differ in the sign of one
    half. A bias would keep them, its input is 1 in both calls.
    """
    x = random(3, 2, 4, 3)
    mirrored = torch.cat([x, x * torch.tensor([1, -1]).reshape(2, 1, 1)])
    for pooled in (False, True):
        model = Twice(tied, "added", pooled, bias=False)
        right, wrong = relative_errors(model, mirrored)[:: -1 if pooled else 1]
        assert exact(right) and none_exact(wrong, "first")
        for errors in relative_errors(model, x):
            assert none_exact(errors, "first")
    for errors in relative_errors(Twice(tied, "nested", pooled=True), x[:1, :, :1]):
        assert none_exact(errors, "first")


# Masks and graphs


MASK = torch.arange(5) < torch.tensor([[3], [5], [1], [4]])


@reductions
def test_masked_rows(reduction: str) -> None:
    """Of unequal numbers, for which reduce is exact with means, not with sums."""
    x = random(*MASK.shape, 3)
    every, rows = ({pattern: {"mask": MASK}} for pattern in (".", "norm|rows"))
    expand, reduce = relative_errors(Padded(MASK, None), x, MSE, reduction, every)
    assert exact(expand) and exact(reduce, "norm") and none_exact(reduce, "rows")
    expand, reduce = relative_errors(Padded(MASK, "mean"), x, MSE, reduction, rows)
    assert exact(reduce) and exact(expand, "norm") and none_exact(expand, "rows")
    expand, reduce = relative_errors(Padded(MASK, "sum"), x, MSE, reduction, rows)
    assert exact(reduce, "norm", "head") and none_exact(reduce, "rows")
    for model in (Padded(MASK, None), Padded(MASK, "mean")):
        for errors in relative_errors(model, x, MSE, reduction):
            assert exact(errors, "norm") and none_exact(errors, "rows")


@reductions
def test_masked_rows_whose_labels_are_ignored(reduction: str) -> None:
    """Equal outputs, so that the Hessians of all labels that count are equal."""
    model = Padded(MASK, None)
    nn.init.zeros_(model.rows.weight)
    labels = torch.randint(4, MASK.shape).masked_fill(~MASK, -100)
    case = LOSSES["cross-entropy"]._replace(targets=lambda f: labels)
    x = random(*MASK.shape, 3)
    expand, reduce = relative_errors(model, x, case, reduction, {".": {"mask": MASK}})
    assert exact(expand, "rows", "head") and none_exact(reduce, "rows")


@reductions
def test_graphs_of_unequal_sizes(reduction: str) -> None:
    """Reduce is exact for means over nodes, and for edges if nodes have equal numbers of them."""
    x, ring = random(12, 3), Graphs((3, 5, 4))
    expand, reduce = relative_errors(ring, x, MSE, reduction, ring.sharing())
    assert exact(reduce) and exact(expand, "norm", "head") and none_exact(expand, "node", "edge")
    cut = Graphs((3, 5, 4), cut=True)
    expand, reduce = relative_errors(cut, x, MSE, reduction, cut.sharing())
    assert exact(reduce, "norm", "node", "head") and none_exact(reduce, "edge")


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3).eval(), nn.GroupNorm(1, 3)], ids=str)
@reductions
def test_normalised_channels_of_graphs(norm: nn.Module, reduction: str) -> None:
    """A unit's block is of its graphs' gradients; without segments each node counts as a graph."""
    x, graphs = random(12, 3), Graphs((3, 5, 4), norm=norm)
    for errors in relative_errors(graphs, x, MSE, reduction, graphs.sharing()):
        assert exact(errors, "norm")
    for errors in relative_errors(graphs, x, MSE, reduction):
        assert none_exact(errors, "norm")


@reductions
def test_predictions_for_each_node(reduction: str) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double(), random(12, 3)
    graphs = {"segments": torch.arange(3).repeat_interleave(4), "num_segments": 3}
    expand, reduce = relative_errors(model, x, MSE, reduction, {".": graphs})
    assert exact(expand) and none_exact(reduce, "0")


# Its own Kronecker factors

TOGETHER = {"separate_weight_and_bias": False}
FISHERS = {"exact": "type-2", "empirical": "empirical", "forward-only": "forward-only"}
NETS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "rows": (lambda: [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)], (3,)),
    "pooled": (
        lambda: [nn.Linear(3, 5), nn.Tanh(), FeaturesFirst(), Pool(mean=True), nn.Linear(5, 4)],
        (6, 3),
    ),
    "positions": (lambda: [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)], (6, 3)),
    "convolutions": (
        lambda: [
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(3, 4, (2, 1), dilation=2, bias=False),
            Pool(mean=False),
            nn.Linear(4, 4),
        ],
        (2, 7, 6),
    ),
}


def batches_of(net: str, case: LossCase, *examples: int) -> tuple[nn.Module, Batches]:
    """A network and batches of so many examples, with targets that curvlinops takes."""
    modules, shape = NETS[net]
    # It wants the classes second, but the entries of other terms last.
    last = [FeaturesFirst()] if case is LOSSES["cross-entropy"] and net == "positions" else []
    model = nn.Sequential(*modules(), *last).double()
    inputs = [random(n, *shape) for n in examples]
    targets = [case.targets(model(x).detach()) for x in inputs]
    if case is LOSSES["bce"]:
        targets = [y.round() for y in targets]
    return model, list(zip(inputs, targets, strict=True))


@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", ["cross-entropy", "mse", "bce"])
@pytest.mark.parametrize("net", NETS)
@reductions
def test_kronecker_factors(net: str, name: str, reduction: str, fisher: str, approx: str) -> None:
    """Both factors and the block that they make, of two batches of unequal size.

    Nothing is converted; the conventions differ only in how they are written down. curvlinops'
    gradient covariance is of autograd's gradients of a batch's mean, which for terms of C entries
    (squared errors, binary cross entropies) are those of a mean over terms times ``1 / sqrt(C)``.
    It multiplies their outer products with ``(n P)^2 / (N P)``, with n of N examples in the batch
    and P terms in each: the outer products of the gradients of the *sum*, over ``M = N P C``.
    Weight and bias have one block if they are not asked to be apart.

    With the exact Fisher it backpropagates from all positions of an example together. Where the
    outputs have positions, reduce adds up their gradients, with cross terms that the Hessian does
    not have.
    """
    model, batches = batches_of(net, LOSSES[name], 5, 3)
    loss = LOSSES[name].module(reduction=reduction)
    options = {"fisher_type": FISHERS[fisher], "kfac_approx": approx, **TOGETHER}
    matrix = Matrix(curvlinops.KFACLinearOperator, model, batches, loss, **options)
    theirs = matrix.operator._input_covariances, matrix.operator._gradient_covariances
    pairs = []
    for block in one_step(model, batches, loss, fisher=fisher, approx=approx)._blocks:
        pairs.append((kronecker_block(block), matrix.block(block.layer)))
        for factor, covariances in zip(block.factors, theirs, strict=True):
            pairs.append((factor.mean, covariances[block.layer.name]))
    same = all(relative_error(ours, others) < EXACT for ours, others in pairs)
    assert same != (net == "positions" and (fisher, approx) == ("exact", "reduce"))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["cross-entropy", "mse", "bce"])
@pytest.mark.parametrize("net", ["rows", "pooled", "convolutions"])
@reductions
def test_corrected_eigenvalues(net: str, name: str, reduction: str, fisher: str) -> None:
    """The blocks in the eigenbases of their factors, whatever the signs of the eigenvectors."""
    model, batches = batches_of(net, LOSSES[name], 12)
    loss = LOSSES[name].module(reduction=reduction)
    options = {"fisher_type": FISHERS[fisher], **TOGETHER}
    matrix = Matrix(curvlinops.EKFACLinearOperator, model, batches, loss, **options)
    corrected = {"damping_mode": "exact", "eigenvalue_correction": True, "inverse_update_steps": 9}
    kfac = preconditioner(model, fisher=fisher, loss_reduction=reduction, **corrected)
    for _ in range(2):  # the first step finds the bases
        accumulate(model, batches, loss, kfac)
        kfac.step()
    for block in kfac._blocks:
        a, g = (basis.vectors for basis in block.bases)
        vectors, values = torch.kron(g, a), block.correction.mean.flatten()
        assert relative_error(vectors * values @ vectors.mT, matrix.block(block.layer)) < EXACT


@pytest.mark.parametrize("name", ["cross-entropy", "mse", "bce"])
@reductions
def test_the_empirical_fisher(name: str, reduction: str) -> None:
    """Its blocks are exact for normalisations, and for all layers with a single datum."""
    layers = [nn.Linear(3, 5), nn.GroupNorm(1, 5), nn.Tanh(), nn.Linear(5, 4)]
    model, loss = nn.Sequential(*layers).double(), LOSSES[name].module(reduction=reduction)
    for examples, names in ((1, {"0", "1", "3"}), (6, {"1"})):
        x = random(examples, 3)
        batches = [(x, LOSSES[name].targets(model(x).detach()))]
        matrix = Matrix(curvlinops.EFLinearOperator, model, batches, loss)
        for block in one_step(model, batches, loss, fisher="empirical")._blocks:
            error = relative_error(kronecker_block(block), matrix.block(block.layer))
            assert error < EXACT if block.layer.name in names else error > NOT_EXACT
