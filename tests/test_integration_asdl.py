"""asdl with this package's factors and inverses against asdl itself, in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_kfac import assert_solved, plain_covariances
from torch import Tensor, nn

asdl = pytest.importorskip("asdl.symmatrix", reason="needs asdfghjkl")
from asdl import FisherConfig, get_fisher_maker  # noqa: E402
from asdl import core as asdl_core  # noqa: E402
from asdl.precondition import KfacGradientMaker, PreconditioningConfig  # noqa: E402

from kfac_fast.integrations import asdl as ours  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Failed to lookup operations:UserWarning"),
]
DTYPES = [torch.float32, torch.float64]
FISHERS = ["fisher_emp", "fisher_exact", "fisher_mc"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images(groups: int = 1, padding_mode: str = "zeros") -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=groups, padding_mode=padding_mode),
        nn.Tanh(),
        nn.Conv2d(4, 3, (2, 3), stride=2, padding=(1, 0), bias=False),
        nn.Flatten(),
        nn.Linear(45, 5, bias=False),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def tokens() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.Flatten(), nn.Linear(12, 3)
    )


class Twice(nn.Module):
    """Calls a layer two times, of whose inputs asdl inverts the last with every gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


NETWORKS: dict[str, Any] = {
    "images": (images, (2, 8, 8)),
    "groups": (lambda: images(groups=2), (2, 8, 8)),
    "padding": (lambda: images(padding_mode="circular"), (2, 8, 8)),
    "tokens": (tokens, (6, 4)),
    "twice": (Twice, (4,)),
}


def fisher(
    model: nn.Module,
    x: Tensor,
    kind: str,
    shape: str,
    samples: int = 2,
    loss_type: str = "cross_entropy",
    **options: Any,
) -> dict[str, Any]:
    """The Kronecker factors, the diagonals or the inverses of every layer."""
    y = torch.arange(len(x)) % 3
    config = FisherConfig(kind, [shape], loss_type=loss_type, seed=1, n_mc_samples=samples)
    maker = get_fisher_maker(model, config)
    outputs = maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, outputs, y, reduction="sum")
    maker.setup_logits_repr(outputs)
    maker.forward_and_backward(data_size=len(x), scale=0.5, **options)
    attribute = "diag" if shape == "diag" else "kron"
    return {
        f"{name}.{part}": matrix
        for name, module in model.named_modules()
        if hasattr(module, "fisher")
        for part, matrix in vars(getattr(module.fisher, attribute)).items()
        if isinstance(matrix, Tensor)
    }


@pytest.mark.parametrize("shape", ["kron", "swift_kron"])
@pytest.mark.parametrize("kind", FISHERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_factors_are_those_of_asdl(network: str, kind: str, shape: str) -> None:
    make, size = NETWORKS[network]
    examples = 8 if shape == "kron" else 48  # fewer than features would be scaled in place
    model, x = make().double(), torch.randn(examples, *size, dtype=torch.float64)
    expected, found = both(model, x, kind, shape)
    for name, matrix in expected.items():
        assert_solved(found[name], matrix)


def both(*arguments: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Asdl's results and ours, of the same names."""
    expected = fisher(*arguments, **options)
    with ours.enabled():
        found = fisher(*arguments, **options)
    assert found.keys() == expected.keys() and expected
    return expected, found


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("kind", FISHERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_inverses_are_those_of_asdl(network: str, kind: str, samples: int) -> None:
    make, size = NETWORKS[network]
    model, x = make().double(), torch.randn(8, *size, dtype=torch.float64)
    options = {"calc_inv": True, "damping": 1e-2, "samples": samples}
    expected, found = both(model, x, kind, "kron", **options)
    for name, matrix in expected.items():
        assert_solved(found[name], matrix, condition=1e6)


@pytest.mark.parametrize("shape", ["kron", "diag"])
@pytest.mark.parametrize("kind", ["fisher_emp", "fisher_mc"])
def test_a_damping_that_is_not_given_is_that_of_asdl(kind: str, shape: str) -> None:
    model, x = Twice().double(), torch.randn(48, 4, dtype=torch.float64)
    expected, found = both(model, x, kind, shape, calc_inv=True, samples=1)
    for name, matrix in expected.items():
        assert_solved(found[name], matrix, condition=1e9)


def test_inverses_of_zeros_are_those_of_asdl() -> None:
    model, x = tokens().double(), torch.zeros(8, 6, 4, dtype=torch.float64)
    expected, found = both(model, x, "fisher_emp", "kron", calc_inv=True, damping=1e-2)
    assert expected["0.A_inv"].equal(torch.eye(4, dtype=torch.float64) / 1e-2)
    for name, matrix in expected.items():
        assert_solved(found[name], matrix, condition=1e6)


def test_factors_that_are_not_finite_are_refused_as_by_asdl() -> None:
    x = torch.full((8, 6, 4), torch.nan, dtype=torch.float64)
    for block in (nullcontext(), ours.enabled()):
        model = tokens().double()  # of the last one, asdl has left the weights frozen
        with block, pytest.raises(torch.linalg.LinAlgError):
            fisher(model, x, "fisher_emp", "kron", calc_inv=True, damping=1e-2)


@pytest.mark.parametrize("names", [["cov_kron_inv"], ["cov_kron", "cov_kron_inv"]])
def test_operations_outside_of_a_maker_are_those_of_asdl(names: list[str]) -> None:
    model, x = Twice().double(), torch.randn(8, 4, dtype=torch.float64)
    results = []
    for block in (nullcontext(), ours.enabled()):
        with block, asdl_core.extend(model, *names) as context:
            context.set_damping(1e-2)
            F.cross_entropy(model(x), torch.arange(8) % 3).backward()
            results.append([context.cov_kron(module) for module in (model.twice, model.last)])
    for expected, found in zip(*results, strict=True):
        assert found.keys() == expected.keys()
        for name, matrix in expected.items():
            assert_solved(found[name], matrix, condition=1e6)


def test_covariances_of_saved_data_are_those_of_asdl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes the inputs of a convolution as they are for its patches."""
    monkeypatch.setattr("torch.cuda.nvtx.range", nullcontext)
    model, x = images().double(), torch.randn(8, 2, 8, 8, dtype=torch.float64)
    results = []
    for block in (nullcontext(), ours.enabled()):
        with block, asdl_core.save_inputs_outgrads(model) as context:
            F.cross_entropy(model(x), torch.arange(8) % 3).backward()
            for module in (model[0], model[4]):
                context.calc_cov_kron(module)
                results.append(context.cov_kron(module))
    for expected, found in zip(results[:2], results[2:], strict=True):
        assert_solved(found["A"], expected["A"])
        assert_solved(found["B"], expected["B"])


@pytest.mark.parametrize("kind", ["fisher_emp", "fisher_mc"])
@pytest.mark.parametrize("network", ["images", "rows"])
def test_swift_gradients_are_those_of_asdl(network: str, kind: str) -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        model = (images() if network == "images" else Twice()).double()
        x = torch.randn(8, *((2, 8, 8) if network == "images" else (4,)), dtype=torch.float64)
        config = PreconditioningConfig(data_size=8, damping=0.1)
        maker = KfacGradientMaker(model, config, fisher_type=kind, seed=1, swift=True)
        outputs = maker.setup_model_call(model, x)
        maker.setup_loss_call(F.cross_entropy, outputs, torch.arange(8) % 3)
        maker.setup_logits_repr(outputs)
        maker.forward_and_backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients()
    with ours.enabled():
        found = gradients()
    for mine, theirs in zip(found, expected, strict=True):
        assert_solved(mine, theirs, condition=1e6)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("kind", FISHERS)
def test_a_fisher_is_inverted_in_one_call(kind: str, samples: int, inverted: list[int]) -> None:
    model, x = images().double(), torch.randn(8, 2, 8, 8, dtype=torch.float64)
    with ours.enabled():
        fisher(model, x, kind, "kron", samples, calc_inv=True, damping=1e-2)
    assert inverted == [8]


def test_a_model_that_is_a_layer_is_refused_as_by_asdl() -> None:
    """Asdl comes to the model twice, whose factors it has replaced by then."""
    model, x = nn.Linear(4, 3).double(), torch.randn(8, 4, dtype=torch.float64)
    for block in (nullcontext(), ours.enabled()):
        with block, pytest.raises(ValueError, match="data do not exist"):
            fisher(model, x, "fisher_exact", "kron", calc_inv=True, damping=1e-2)


def precondition(kron: list[str] | None) -> list[Tensor]:
    """Inverses after a step of asdl's K-FAC whose factors are running averages."""
    torch.manual_seed(1)
    model, x = images().double(), torch.randn(8, 2, 8, 8, dtype=torch.float64)
    config = PreconditioningConfig(data_size=8, damping=1e-2, ema_decay=0.1)
    maker = KfacGradientMaker(model, config, fisher_type="fisher_emp")
    dummy = maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, dummy, torch.arange(8) % 3)
    maker.forward_and_backward()
    krons = [module.fisher.kron for module in model.modules() if hasattr(module, "fisher")]
    for matrix in krons:
        matrix.A_inv = matrix.B_inv = None
    maker.update_preconditioner(0.1, None, kron, False)
    found = [inverse for matrix in krons for inverse in (matrix.A_inv, matrix.B_inv)]
    return [inverse for inverse in found if inverse is not None]


@pytest.mark.parametrize("kron", [None, ["B"]])
def test_a_preconditioner_is_inverted_in_one_call(
    kron: list[str] | None, inverted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # asdl marks ranges for a profiler that only a CUDA build of PyTorch has.
    monkeypatch.setattr("torch.cuda.nvtx.range", nullcontext)
    expected = precondition(kron)
    with ours.enabled():
        found = precondition(kron)
    assert inverted == [8, len(expected)] and len(expected) == (4 if kron else 8)
    for mine, theirs in zip(found, expected, strict=True):
        assert_solved(mine, theirs, condition=1e6)


def test_a_factor_that_fails_leaves_the_others_their_inverses(inverted: list[int]) -> None:
    good, bad = ours.Kron(covariance(5), covariance(3)), ours.Kron(covariance(5), covariance(3))
    bad.B -= 100 * torch.eye(3, dtype=torch.float64)
    with ours._together([asdl.SymMatrix(kron=kron) for kron in (bad, good)], 1e-2):
        with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
            bad.update_inv(1e-2)
        good.update_inv(1e-2)
    assert inverted == [4]
    alone = asdl.Kron(good.A, good.B)
    alone.update_inv(1e-2)
    assert_solved(good.A_inv, alone.A_inv, condition=1e6)
    assert_solved(good.B_inv, alone.B_inv, condition=1e6)


def test_layers_of_two_dtypes_are_inverted(inverted: list[int]) -> None:
    krons = [ours.Kron(covariance(5).to(d), covariance(3).to(d)) for d in DTYPES]
    with ours._together([asdl.SymMatrix(kron=kron) for kron in krons], 1e-2):
        for kron in krons:
            kron.update_inv(1e-2)
    assert inverted == [2, 2]
    assert [kron.A_inv.dtype for kron in krons] == DTYPES


def test_patches_are_never_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = images().double(), torch.randn(8, 2, 8, 8, dtype=torch.float64)
    monkeypatch.delattr("asdl.operations.conv.im2col_2d")
    with ours.enabled():
        fisher(model, x, "fisher_emp", "kron")
        fisher(model, x, "fisher_emp", "kron", calc_inv=True, damping=1e-2)


def test_dilated_convolutions_are_served() -> None:
    conv = nn.Conv2d(2, 3, 3, dilation=2, padding=1).double()
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    patches = F.unfold(x, 3, dilation=2, padding=1)
    expected = torch.einsum("nis,njs->ij", patches, patches) / patches.shape[-1]
    operation = ours.Conv2d(conv, ["cov_kron"])
    operation.forward_post_process(x, conv(x))
    assert_solved(operation.get_result("cov_kron")["A"], expected)


def assert_fisher(
    model: nn.Module, found: dict[str, Any], losses: list[Callable[[], Tensor]]
) -> None:
    """Compare factors with those of the Fisher in plain PyTorch, averaged over some losses."""
    passes = [plain_covariances(model, loss, "expand", 1, "sum") for loss in losses]
    for name, (a, _) in passes[0].items():
        inputs = a[0] if model.get_submodule(name).bias is None else a[0, :-1, :-1]
        gradients = sum(covariances[name][1][0] for covariances in passes) / len(passes)
        assert_solved(found[f"{name}.A"], 0.5 * inputs)
        assert_solved(found[f"{name}.B"], 0.5 * gradients / 8)


CORRECT: dict[str, Any] = {
    "circular": (lambda: images(padding_mode="circular"), (2, 8, 8)),
    "reflect": (lambda: images(padding_mode="reflect"), (2, 8, 8)),
    "tokens": (tokens, (6, 4)),
}


@pytest.mark.parametrize("network", CORRECT)
def test_correct_factors_are_those_of_the_fisher(network: str) -> None:
    make, size = CORRECT[network]
    model, x = make().double(), torch.randn(8, *size, dtype=torch.float64)
    with ours.enabled():
        with ours.enabled(correct=True):
            found = fisher(model, x, "fisher_emp", "kron")
            inverses = fisher(model, x, "fisher_emp", "kron", calc_inv=True, damping=1e-2)
        again = fisher(model, x, "fisher_emp", "kron")
    y = torch.arange(8) % 3
    assert_fisher(model, found, [lambda: F.cross_entropy(model(x), y, reduction="sum")])
    for name in dict.fromkeys(key.rpartition(".")[0] for key in found):
        own = asdl.Kron(found[f"{name}.A"], found[f"{name}.B"])
        own.update_inv(1e-2)
        assert_solved(inverses[f"{name}.A_inv"], own.A_inv, condition=1e6)
        assert_solved(inverses[f"{name}.B_inv"], own.B_inv, condition=1e6)
    for name, matrix in fisher(model, x, "fisher_emp", "kron").items():
        assert_solved(again[name], matrix)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "mse"])
def test_correct_samples_are_averaged(loss_type: str) -> None:
    model, x = tokens().double(), torch.randn(8, 6, 4, dtype=torch.float64)
    with ours.enabled(correct=True):
        found = fisher(model, x, "fisher_mc", "kron", samples=3, loss_type=loss_type)
    torch.manual_seed(1)
    logits = model(x).detach()
    if loss_type == "mse":
        draws = [torch.distributions.Normal(logits, 1.0).sample() for _ in range(3)]
        losses = [lambda t=t: (model(x) - t).square().sum() / 2 for t in draws]
    else:
        draws = [torch.distributions.Categorical(logits=logits).sample() for _ in range(3)]
        losses = [lambda t=t: F.cross_entropy(model(x), t, reduction="sum") for t in draws]
    assert_fisher(model, found, losses)


def covariance(size: int, scale: float = 1.0) -> Tensor:
    rows = torch.randn(2 * size, size, dtype=torch.float64)
    return scale * rows.T @ rows


FACTORS: dict[str, Any] = {
    "both": lambda: (covariance(5), covariance(3, 10.0)),
    "a zero": lambda: (torch.zeros(4, 4, dtype=torch.float64), covariance(3)),
    "zeros": lambda: (torch.zeros(4, 4, dtype=torch.float64),) * 2,
    "tiny": lambda: (covariance(5, 1e-20), covariance(3)),
    "rows": lambda: (torch.randn(3, 5, dtype=torch.float64), covariance(3)),
    "one": lambda: (covariance(5), None),
}


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("asked", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("factors", FACTORS)
def test_update_inv_is_that_of_asdl(factors: str, asked: tuple[bool, bool], replace: bool) -> None:
    a, b = FACTORS[factors]()
    if b is None and asked[1]:
        for kind in (asdl.Kron, ours.Kron):
            with pytest.raises(ValueError, match="B does not exist"):
                kind(a, b).update_inv(1e-2, *asked)
        return
    results = []
    for kind in (asdl.Kron, ours.Kron):
        kron = kind(*(None if m is None else m.clone() for m in (a, b)))
        kron.update_inv(1e-2, *asked, replace=replace)
        results.append(kron)
    expected, found = results
    for part in ("A", "B", "A_inv", "B_inv"):
        mine, theirs = getattr(found, part), getattr(expected, part)
        assert (mine is None) == (theirs is None)
        if part in {"A", "B"} and mine is not None:
            assert mine.equal({"A": a, "B": b}[part])  # asdl's diagonals are rounded
        elif theirs is not None:
            assert_solved(mine, theirs, condition=1e7)


def test_damping_is_not_split_by_a_ratio_beyond_float32() -> None:
    factors = covariance(5, 1e10).float(), covariance(3, 1e-30).float()
    for pair in (factors, factors[::-1]):
        mine, theirs = ours.Kron(*pair), asdl.Kron(*(factor.clone() for factor in pair))
        for kron in (mine, theirs):
            kron.update_inv(1e-2)
        torch.testing.assert_close(mine.A_inv, theirs.A_inv, rtol=1e-3, atol=0)
        torch.testing.assert_close(mine.B_inv, theirs.B_inv, rtol=1e-3, atol=0)


def test_a_factor_that_fails_is_tried_again_by_asdl() -> None:
    kron = ours.Kron(covariance(5), covariance(3) - 100 * torch.eye(3, dtype=torch.float64))
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        kron.update_inv(1e-2)


def replaceable() -> list[Any]:
    from asdl import symmatrix
    from asdl.precondition.natural_gradient import NaturalGradientMaker

    maker = ours.FisherMaker
    methods = maker._extract_fisher, maker.replace_fisher_with_inv
    return [
        asdl_core.get_op_class,
        symmatrix.Kron,
        *methods,
        NaturalGradientMaker.update_preconditioner,
    ]


def test_classes_are_replaced_inside_of_a_block_only() -> None:
    before = replaceable()
    norm = asdl_core.get_op_class(nn.LayerNorm(1))
    with pytest.raises(ZeroDivisionError), ours.enabled():
        assert asdl_core.get_op_class(nn.Linear(1, 1)) is ours.Linear
        assert asdl_core.get_op_class(nn.Conv2d(1, 1, 1)) is ours.Conv2d
        assert asdl_core.get_op_class(nn.LayerNorm(1)) is norm
        inside = replaceable()
        assert not any(new is old for new, old in zip(inside, before, strict=True))
        with ours.enabled():
            assert asdl_core.get_op_class(nn.Linear(1, 1)) is ours.Linear
        assert all(new is old for new, old in zip(replaceable(), inside, strict=True))
        raise ZeroDivisionError
    assert all(new is old for new, old in zip(replaceable(), before, strict=True))


@pytest.mark.parametrize("network", ["images", "tokens"])
def test_factors_keep_the_dtype(network: str) -> None:
    make, size = NETWORKS[network]
    model, x = make().bfloat16(), torch.randn(8, *size).bfloat16()
    with ours.enabled():
        found = fisher(model, x, "fisher_emp", "kron")
    expected = fisher(model.double(), x.double(), "fisher_emp", "kron")
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        assert matrix.dtype == torch.bfloat16
        assert (matrix.double() - expected[name]).norm() <= 0.03 * expected[name].norm()
