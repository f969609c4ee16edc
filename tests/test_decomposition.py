"""The curvature's eigendecomposition against dense float64 matrices, and against the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import DAMPING, preconditioner, train_step
from oracle import assert_same
from plain_kfac import assert_solved
from torch import Tensor, nn

from kfac_fast import KFAC, Decomposition

pytestmark = pytest.mark.usefixtures("one_thread")
Vectors = dict[nn.Parameter, Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Kinds(nn.Module):
    """Layers of every kind of block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.plain = nn.Linear(4, 6, bias=False)
        self.grouped = nn.Conv1d(6, 4, 2, groups=2)
        self.transposed = nn.ConvTranspose1d(4, 4, 2, groups=2)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, 3]`` of tokens ``[N, S]``."""
        x = self.plain(self.norm(self.embedding(x))).tanh().mT
        return self.head(self.transposed(self.grouped(x).tanh()).mean(2))


class Shared(nn.Module):
    """Projections that share a parameter, and a layer that is tied to another one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, 4]`` of tokens ``[N, S]``."""
        x = self.embedding(x)
        x, _ = self.attention(x, x, x)
        return self.second(self.first(x).tanh()).mean(1)


def matrices(module: nn.Module, vectors: Vectors) -> Tensor:
    """A module's part of a vector as ``[groups, out, in (+ 1)]``."""
    parts = [vectors[p] for p in module.parameters()]
    if isinstance(module, nn.Embedding):
        return parts[0].T[None]
    if isinstance(module, nn.LayerNorm):
        return torch.stack(parts, -1)[:, None]
    groups = getattr(module, "groups", 1)
    weight = parts[0].reshape(groups, len(parts[0]) // groups, *parts[0].shape[1:])
    if isinstance(module, nn.ConvTranspose1d):
        weight = weight.transpose(1, 2).flip(-1)  # patches of the zero-stuffed input
    weight = weight.flatten(2)
    return weight if len(parts) == 1 else torch.cat([weight, parts[1].view(groups, -1, 1)], -1)


def flat(model: nn.Module, vectors: Vectors) -> Tensor:
    """The vector in the coordinates of :func:`dense`."""
    modules = [m for m in model.children() if list(m.parameters())]
    return torch.cat([matrices(module, vectors).flatten() for module in modules])


def dense(kfac: KFAC) -> Tensor:
    """The curvature, written out."""
    blocks = []
    for block in kfac._blocks:
        a, *rest = (factor.mean for factor in block.factors)
        a = torch.diag(a) if a.dim() == 1 else a
        a = a.reshape(-1, *a.shape[-2:])
        g = rest[0].reshape(len(a), *rest[0].shape[-2:]) if rest else a.new_ones(len(a), 1, 1)
        blocks += [torch.kron(*pair) for pair in zip(g, a, strict=True)]
    return torch.block_diag(*blocks)


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


def tokens() -> Tensor:
    return torch.randint(5, (6, 4))


def trained(model: nn.Module, steps: int = 2, **options: Any) -> KFAC:
    kfac = preconditioner(model, **options)
    for _ in range(steps):
        train_step(model, kfac, tokens(), torch.randint(3, (6,)))
    return kfac


def regression(examples: int) -> KFAC:
    """A single layer, whose curvature has no eigenvalues of zero if there are examples enough."""
    model = nn.Linear(4, 3, dtype=torch.float64)
    kfac = preconditioner(model)
    F.mse_loss(
        model(torch.randn(examples, 4).double()), torch.randn(examples, 3).double()
    ).backward()
    kfac.step()
    return kfac


def random_vectors(kfac: KFAC) -> Vectors:
    return {p: torch.randn_like(p) for p in kfac.parameters()}


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_trace_norm_and_eigenvalues_are_those_of_the_dense_matrix(
    damping: float, approx: str
) -> None:
    kfac = trained(Kinds(), approx=approx)
    decomposition, matrix = Decomposition(kfac), dense(kfac)
    found = decomposition.eigenvalues()
    assert list(found) == [name for name, _ in kfac.model.named_children()]
    values = torch.cat([values.flatten() for values in found.values()])
    assert_solved(values.sort().values, torch.linalg.eigvalsh(matrix))
    matrix = damped(matrix, damping)
    assert_same(decomposition.trace(damping), torch.trace(matrix))
    assert_same(decomposition.frobenius_norm(damping), torch.linalg.matrix_norm(matrix))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_the_damped_logdet_is_that_of_the_dense_matrix(approx: str) -> None:
    kfac = trained(Kinds(), approx=approx)
    expected = torch.linalg.slogdet(damped(dense(kfac), 0.05)).logabsdet
    assert_same(Decomposition(kfac).logdet(0.05), expected)


def test_the_logdet_of_a_positive_definite_matrix_needs_no_damping() -> None:
    kfac = regression(40)
    assert_solved(Decomposition(kfac).logdet(), torch.linalg.slogdet(dense(kfac)).logabsdet)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("exponent", [1, 0.5, 0, -0.5, -1, -1.7])
def test_products_are_those_with_the_power_of_the_dense_matrix(
    exponent: float, approx: str
) -> None:
    model = Kinds()
    kfac = trained(model, approx=approx)
    vectors = random_vectors(kfac)
    values, basis = torch.linalg.eigh(damped(dense(kfac), 0.05))
    expected = basis @ (values**exponent * (basis.T @ flat(model, vectors)))
    products = Decomposition(kfac).multiply(vectors, exponent, damping=0.05)
    assert list(products) == list(model.parameters())
    assert_solved(flat(model, products), expected)


def test_an_undamped_product_is_the_matrix_times_the_vector() -> None:
    model = Kinds()
    kfac = trained(model)
    vectors = random_vectors(kfac)
    products = Decomposition(kfac).multiply(vectors)
    assert_same(flat(model, products), dense(kfac) @ flat(model, vectors))


def test_the_exponent_one_half_of_a_singular_matrix_needs_no_damping() -> None:
    kfac = trained(Kinds())
    decomposition, vectors = Decomposition(kfac), random_vectors(kfac)
    twice = decomposition.multiply(decomposition.multiply(vectors, 0.5), 0.5)
    for parameter, product in decomposition.multiply(vectors).items():
        assert_solved(twice[parameter], product)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize(
    ("kind", "skip"), [(Kinds, []), (Kinds, ["norm", "plain"]), (Shared, []), (Shared, ["q_proj"])]
)
def test_the_inverse_is_what_the_step_applies(
    kind: type[nn.Module], skip: list[str], correction: bool
) -> None:
    model, form = kind(), {"damping_mode": "exact", "eigenvalue_correction": correction}
    kfac = trained(model, **form, skip=skip, inverse_update_steps=100 if correction else 1)
    model.zero_grad()
    F.cross_entropy(model(tokens()), torch.randint(3, (6,))).backward()
    raw = {p: p.grad.clone() for p in kfac.parameters()}
    kfac.step()
    products = Decomposition(kfac).multiply(raw, -1, damping=DAMPING)
    for parameter, product in products.items():
        assert not torch.equal(raw[parameter], product)
        assert_solved(product, parameter.grad)


def test_corrected_eigenvalues_are_those_of_the_last_refresh() -> None:
    options = {"damping_mode": "exact", "eigenvalue_correction": True, "inverse_update_steps": 100}
    kfac = trained(Kinds(), **options)
    decomposition = Decomposition(kfac)
    for block in kfac._blocks:
        assert torch.equal(decomposition.eigenvalues()[block.layer.name], block.correction.mean)
    total = sum(block.correction.mean.sum() for block in kfac._blocks)
    assert_same(decomposition.trace(), total)


@pytest.mark.parametrize("correction", [False, True])
def test_later_steps_leave_a_decomposition_alone(correction: bool) -> None:
    model = Kinds()
    options = {"eigenvalue_correction": correction, "inverse_update_steps": 100}
    kfac = trained(model, damping_mode="exact", **options)
    decomposition, vectors = Decomposition(kfac), random_vectors(kfac)
    numbers, products = decomposition.logdet(1.0), decomposition.multiply(vectors, -0.5, 1.0)
    train_step(model, kfac, tokens(), torch.randint(3, (6,)))
    assert torch.equal(decomposition.logdet(1.0), numbers)
    for parameter, product in decomposition.multiply(vectors, -0.5, 1.0).items():
        assert torch.equal(product, products[parameter])
    assert not torch.equal(Decomposition(kfac).logdet(1.0), numbers)


def test_a_refresh_leaves_a_decomposition_with_corrected_eigenvalues_alone() -> None:
    model = Kinds()
    kfac = trained(
        model, 3, damping_mode="exact", eigenvalue_correction=True, inverse_update_steps=3
    )
    decomposition, vectors = Decomposition(kfac), random_vectors(kfac)
    products = decomposition.multiply(vectors)
    train_step(model, kfac, tokens(), torch.randint(3, (6,)))
    assert all(block.correction.weight == 0 for block in kfac._blocks)
    for parameter, product in decomposition.multiply(vectors).items():
        assert torch.equal(product, products[parameter])


def test_posterior_samples_have_the_inverse_for_covariance() -> None:
    """The columns of the root are its products with the unit vectors."""
    kfac = regression(8)
    model, decomposition = nn.Sequential(kfac.model), Decomposition(kfac)
    columns = []
    for i in range(15):
        unit = torch.eye(15, dtype=torch.float64)[i].view(3, 5)
        vectors = dict(zip(kfac.parameters(), (unit[:, :4], unit[:, 4]), strict=True))
        columns.append(flat(model, decomposition.multiply(vectors, -0.5, damping=0.1)))
    root = torch.stack(columns, 1)
    assert_solved(root @ root.T, torch.linalg.inv(damped(dense(kfac), 0.1)))


def test_vectors_stay_as_they_are_and_keep_their_dtypes_under_autocast() -> None:
    model = nn.Linear(4, 3)
    kfac = preconditioner(model)
    train_step(model, kfac, torch.randn(6, 4), torch.randint(3, (6,)))
    decomposition, vectors = Decomposition(kfac), random_vectors(kfac)
    before = {p: vector.clone() for p, vector in vectors.items()}
    plain = decomposition.multiply(vectors, -1, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        other = decomposition.multiply(vectors, -1, 0.1)
    halves = {p: vector.bfloat16() for p, vector in vectors.items()}
    rounded = decomposition.multiply({p: v.float() for p, v in halves.items()}, -1, 0.1)
    for parameter, product in decomposition.multiply(halves, -1, 0.1).items():
        assert torch.equal(vectors[parameter], before[parameter])
        assert torch.equal(other[parameter], plain[parameter])
        assert torch.equal(product, rounded[parameter].bfloat16())


def test_sums_over_float32_factors_are_in_float64() -> None:
    """Ten thousand logarithms, whose sum in float32 would be off in the seventh digit."""
    model = nn.Linear(99, 100)
    kfac = preconditioner(model)
    train_step(model, kfac, torch.randn(400, 99), torch.randint(100, (400,)))
    (values,) = Decomposition(kfac).eigenvalues().values()
    assert_same(Decomposition(kfac).logdet(0.1), (values + 0.1).log().sum())
    assert_same(Decomposition(kfac).trace(), values.sum())


def test_a_preconditioner_without_curvature_is_refused() -> None:
    kfac = preconditioner(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match=r"Decomposition: kfac .* finite batch .* none for"):
        Decomposition(kfac)


def test_layers_that_have_seen_no_finite_batch_are_named() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 3) for name in ("used", "overflown", "unused")})
    kfac = preconditioner(model)
    x = torch.randn(6, 4)
    (model["used"](x).sum() + (torch.inf * model["overflown"](x)).sum()).backward()
    kfac.step()
    with pytest.raises(RuntimeError, match=r"got none for \['overflown', 'unused'\]"):
        Decomposition(kfac)


def test_a_factor_without_eigendecomposition_is_named() -> None:
    kfac = trained(Kinds())
    kfac._blocks[-1].factors[1].mean.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"eigendecompositions, got none for \['head'\]"):
        Decomposition(kfac)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["trace", "frobenius_norm", "logdet", "multiply"])
def test_dampings_that_are_no_number_from_zero_are_refused(method: str, damping: float) -> None:
    kfac = regression(8)
    arguments = (random_vectors(kfac), 1) if method == "multiply" else ()
    with pytest.raises(ValueError, match=f"Decomposition.{method}: damping must be a number from"):
        getattr(Decomposition(kfac), method)(*arguments, damping)


def test_a_singular_matrix_has_no_logdet_and_no_inverse() -> None:
    kfac = trained(Kinds())
    decomposition = Decomposition(kfac)
    with pytest.raises(
        ValueError, match="logdet: damping must be positive, for layer 'embedding' has"
    ):
        decomposition.logdet()
    with pytest.raises(
        ValueError, match="multiply: damping must be positive, for layer 'embedding' has"
    ):
        decomposition.multiply(random_vectors(kfac), -0.5)


def test_a_layer_before_softmax_has_an_eigenvalue_of_zero_whatever_rounding_makes_of_it() -> None:
    """Its gradients add up to zero."""
    for _ in range(5):
        model = nn.Linear(4, 3)
        kfac = preconditioner(model)
        train_step(model, kfac, torch.randn(40, 4), torch.randint(3, (40,)))
        with pytest.raises(ValueError, match="damping must be positive, for layer '' has"):
            Decomposition(kfac).logdet()


def test_vectors_that_do_not_fit_are_refused() -> None:
    kfac = regression(8)
    decomposition, vectors = Decomposition(kfac), random_vectors(kfac)
    weight, bias = kfac.parameters()
    with pytest.raises(ValueError, match=r"multiply: vectors must .* of shape \[3\], got none"):
        decomposition.multiply({weight: vectors[weight]})
    with pytest.raises(
        ValueError, match=r"multiply: vectors must .* of shape \[3, 4\], got \[4, 3\]"
    ):
        decomposition.multiply({bias: vectors[bias], weight: vectors[weight].T})


def test_products_of_eigenvalues_are_formed_in_float64() -> None:
    """Where float32 would have none of them."""
    model = nn.Linear(3, 2, bias=False)
    kfac = preconditioner(model, loss_reduction="sum")
    x, gradient = 1e-6 * torch.randn(8, 3), 1e-18 * torch.randn(8, 2)
    (model(x) * gradient).sum().backward()
    kfac.step()
    a, g = (factor.mean.double() for factor in kfac._blocks[0].factors)
    curvature, decomposition = torch.kron(g, a), Decomposition(kfac)
    assert float(curvature.trace()) < torch.finfo(torch.float32).tiny
    for result, expected in (
        (decomposition.trace(), curvature.trace()),
        (decomposition.logdet(), curvature.logdet()),
        (decomposition.frobenius_norm(), curvature.norm()),
    ):
        assert float(result) == pytest.approx(float(expected), rel=1e-5)
    vector = 1e-20 * torch.randn(2, 3)
    (product,) = decomposition.multiply({model.weight: vector}, -1).values()
    solved = torch.linalg.solve(curvature, vector.double().flatten())
    assert float((product.flatten() - solved).norm() / solved.norm()) < 1e-4
