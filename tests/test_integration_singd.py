"""singd's optimizer with this package's curvature against singd's own, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_kfac import assert_solved, plain_covariances
from torch import Tensor, nn

pytest.importorskip("singd", reason="needs singd and what it imports")
from singd.optim.optimizer import SINGD  # noqa: E402
from singd.structures.dense import DenseMatrix  # noqa: E402

from kfac_fast import ops  # noqa: E402
from kfac_fast.integrations import singd as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images(groups: int = 1, padding_mode: str = "zeros") -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", groups=groups, padding_mode=padding_mode),
        nn.Tanh(),
        nn.Conv2d(4, 3, (2, 3), stride=2, dilation=(1, 2), padding=(1, 0), bias=False),
        nn.Flatten(),
        nn.Linear(30, 5, bias=False),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "images": (images, (2, 8, 8), ()),
    "groups": (lambda: images(groups=2), (2, 8, 8), ()),
    "padding": (lambda: images(padding_mode="circular"), (2, 8, 8), ()),
    "tokens": (tokens, (6, 4), (6,)),
    "rows": (tokens, (4,), ()),
}


def accumulate(model: nn.Module, network: str, scale: float, examples: int = 8) -> None:
    """Gradients of two micro-batches with few, and then with many examples."""
    _, shape, positions = NETWORKS[network]
    generator = torch.Generator().manual_seed(1)
    for n in (examples // 4, examples):
        x = torch.randn(n, *shape, dtype=torch.float64, generator=generator)
        y = torch.randint(3, (n, *positions), generator=generator)
        logits: Tensor = model(x)
        (scale * F.cross_entropy(logits.reshape(-1, 3), y.flatten())).backward()


def both(network: str, **options: Any) -> list[tuple[nn.Module, Any]]:
    model = NETWORKS[network][0]().double()
    models = [model, copy.deepcopy(model)]
    given = {"T": 1, "lr_cov": 0.1, **options}
    return [(m, kind(m, **given)) for m, kind in zip(models, (SINGD, ours.SINGD), strict=True)]


def assert_equal_terms(pairs: list[tuple[nn.Module, Any]]) -> None:
    (_, expected), (_, found) = pairs
    for side in ("H_Ks", "H_Cs"):
        theirs, mine = getattr(expected, side), getattr(found, side)
        assert mine.keys() == theirs.keys() and theirs
        for name, term in theirs.items():
            assert_solved(mine[name].to_dense(), term.to_dense())


@pytest.mark.parametrize("average", [None, "batch", "batch+sequence"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("network", NETWORKS)
def test_terms_and_steps_are_those_of_singd(network: str, approx: str, average: str | None) -> None:
    pairs = both(network, kfac_approx=approx, loss_average=average)
    for _ in range(3):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            accumulate(model, network, 1.0)
        assert_equal_terms(pairs)
        for _, optimizer in pairs:
            optimizer.step()
    for expected, found in zip(*(model.parameters() for model, _ in pairs), strict=True):
        assert_solved(found.detach(), expected.detach())


@pytest.mark.parametrize("kfac_like", [True, False])
def test_terms_of_few_rows_are_added_without_being_formed(
    kfac_like: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = both("rows", kfac_like=kfac_like, alpha1=0.0 if kfac_like else 0.5)
    x, y = torch.randn(3, 2, 4, dtype=torch.float64), torch.tensor([0, 2])
    monkeypatch.delattr(ours.Product, "_mat")
    for inputs in x:
        for model, optimizer in pairs:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), y).backward()
        assert {type(m) for m in pairs[1][1].H_Ks.values()} == {ours.Product}
        for _, optimizer in pairs:
            optimizer.step()
    for side in ("Ks", "Cs", "m_Ks", "m_Cs"):
        expected, found = (getattr(optimizer, side) for _, optimizer in pairs)
        for name, matrix in expected.items():
            assert_solved(found[name].to_dense(), matrix.to_dense())


def test_a_product_is_every_matrix_of_its_entries() -> None:
    root = torch.randn(5, 2, dtype=torch.float64)
    dense = DenseMatrix(root @ root.T)
    changes: list[Callable[[Any], Any]] = [
        lambda m: m,
        lambda m: m.mul_(2.0),
        lambda m: m.diag_add_(1.0),
        lambda m: m.add_(DenseMatrix(torch.eye(5, dtype=torch.float64)), alpha=3.0),
        lambda m: m + dense,
        lambda m: m @ dense,
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ]
    for change in changes:
        expected, found = change(copy.deepcopy(dense)), change(ours.Product(root))
        assert_solved(found.to_dense(), expected.to_dense())
        assert_solved(found.average_trace()[None], expected.average_trace()[None])
    half = ours.Dense(torch.zeros(5, 5, dtype=torch.bfloat16))
    half.add_(ours.Product(root.bfloat16()), alpha=2.0)
    assert torch.equal(half.to_dense(), 2 * ours.Product(root.bfloat16()).to_dense())


def test_scales_of_the_loss_are_those_of_singd() -> None:
    pairs = both("images", init_grad_scale=16.0)
    for scale in (16.0, 64.0):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            accumulate(model, "images", scale)
        assert_equal_terms(pairs)
        for _, optimizer in pairs:
            optimizer.set_current_grad_scale(scale)
            optimizer.step()


@pytest.mark.parametrize("structures", [("dense", "diagonal"), ("diagonal", "dense")])
def test_other_structures_are_left_to_singd(structures: tuple[str, str]) -> None:
    pairs = both("images", structures=structures)
    for model, _ in pairs:
        accumulate(model, "images", 1.0)
    assert_equal_terms(pairs)


def test_patches_of_many_rows_are_never_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = both("images")[1]
    monkeypatch.delattr("singd.optim.utils._extract_patches")
    accumulate(model, "images", 1.0, examples=40)


@pytest.mark.parametrize("average", [None, "batch"])
def test_terms_are_reduced_over_the_ranks(
    average: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, dist.ReduceOp]] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x, op, **_: seen.append((x.numel(), op)))
    calls = []
    for model, _ in both("tokens", loss_average=average):
        seen.clear()
        accumulate(model, "tokens", 1.0)
        calls.append(list(seen))
    assert calls[0] and calls[1] == calls[0]


def test_optimizers_are_replaced_inside_of_a_block_only() -> None:
    model = tokens().double()
    original = SINGD.__init__
    with ours.enabled():
        assert type(SINGD(model)) is ours.SINGD
    with pytest.raises(ZeroDivisionError), ours.enabled():
        raise ZeroDivisionError
    assert SINGD.__init__ is original and type(SINGD(model)) is SINGD


@pytest.mark.parametrize("examples", [1, 40])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("mode", ["circular", "reflect", "zeros"])
def test_correct_terms_are_those_of_the_fisher(mode: str, approx: str, examples: int) -> None:
    """Few rows are rotated, of many the covariance; the first basis is the identity."""
    model = images(padding_mode=mode).double()
    x, y = torch.randn(examples, 2, 8, 8, dtype=torch.float64), torch.arange(examples) % 3
    loss = nn.CrossEntropyLoss()
    expected = plain_covariances(model, lambda: loss(model(x), y), approx, examples, "mean")
    optimizer = ours.SINGD(model, loss_average="batch", kfac_approx=approx, T=1, correct=True)
    loss(model(x), y).backward()
    for name, (a, g) in expected.items():
        assert_solved(optimizer.H_Ks[name].to_dense(), a[0])
        assert_solved(optimizer.H_Cs[name].to_dense(), g[0])


def test_blocks_have_correct_optimizers_made() -> None:
    model = tokens().double()
    with ours.enabled():
        with ours.enabled(correct=True):
            inner = SINGD(model)
        outer = SINGD(model)
    assert (inner.correct, outer.correct) == (True, False)


STATE = ("Ks", "Cs", "m_Ks", "m_Cs")


def kinds(optimizer: Any) -> set[type]:
    return {type(m) for name in STATE for m in getattr(optimizer, name).values()}


def test_a_state_is_saved_as_that_of_singd_and_loaded_as_ours() -> None:
    (_, theirs), (model, optimizer) = both("tokens", alpha1=0.5)
    accumulate(model, "tokens", 1.0)
    optimizer.step()
    saved = pickle.loads(pickle.dumps({name: getattr(optimizer, name) for name in STATE}))
    assert {type(m) for held in saved.values() for m in held.values()} == {DenseMatrix}
    assert kinds(optimizer) == {ours.Dense} == {type(copy.deepcopy(optimizer.Ks["0"]))}
    state = theirs.state_dict()
    assert kinds(theirs) == {DenseMatrix}
    optimizer.load_state_dict(copy.deepcopy(state))
    assert kinds(optimizer) == {ours.Dense}
    for name in STATE:
        for key, matrix in getattr(optimizer, name).items():
            assert matrix.to_dense().equal(getattr(theirs, name)[key].to_dense())


def test_products_with_transposes_are_computed_by_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: list[tuple[int, ...]] = []
    gram = ops.gram

    def counted(x: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return gram(x, **options)

    _, (model, optimizer) = both("tokens")
    accumulate(model, "tokens", 1.0)
    monkeypatch.setattr(ops, "gram", counted)
    optimizer.step()
    sides = [m.to_dense().shape for side in (optimizer.Ks, optimizer.Cs) for m in side.values()]
    assert sorted(shapes) == sorted(map(tuple, sides))  # K^T K and C^T C of every layer


@pytest.mark.parametrize(
    ("side", "size", "scale"),
    [("input", 300.0, 1e-3), ("gradient", 1.0, 1e-2), ("gradient", 4e-7, 3e3)],
)
def test_a_covariance_may_be_beyond_half_precision(side: str, size: float, scale: float) -> None:
    """Only what is rotated has to be in its range, as in singd, which rotates the rows."""
    rows = (size * torch.randn(512, 3)).half()
    basis = DenseMatrix((scale * torch.eye(3)).half())
    outer = scale**2 * rows.double().T @ rows.double()
    if side == "input":
        found = ours._input_term(basis, rows, nn.Linear(3, 3, bias=False), "expand")
        expected = outer / 512
    else:
        found = ours._gradient_term(basis, rows, nn.Linear(3, 3), "batch", "expand", 1.0)
        expected = 512 * outer
    assert found.to_dense().dtype == torch.float16
    error = (found.to_dense().double() - expected).norm()
    assert error <= 2 * torch.finfo(torch.float16).eps * expected.norm()
