"""curvlinops' operators by this package against curvlinops itself, in float64."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_kfac import assert_solved, plain_covariances
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

curvlinops = pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch")

from kfac_fast.integrations import curvlinops as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FISHERS = ["type-2", "mc", "empirical", "forward-only"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images(**options: Any) -> nn.Module:
    """A network whose activations overwrite what a naive hook would look at."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", **options),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, (2, 3), stride=2, dilation=(1, 2), padding=(1, 0)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(30, 5, bias=False),
        nn.ReLU(),
        nn.Linear(5, 3),
    ).double()


def tokens() -> nn.Module:
    """Linear layers on sequences, averaged before the last one."""

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    layers = (nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), Mean(), nn.Linear(4, 3))
    return nn.Sequential(*layers).double()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (images, (2, 8, 8)),
    "groups": (lambda: images(groups=2), (2, 8, 8)),
    "padding": (lambda: images(padding_mode="circular"), (2, 8, 8)),
    "tokens": (tokens, (6, 4)),
}


def arguments(network: str, reduction: str, loss: str = "cross-entropy") -> list[Any]:
    """Model, loss, parameters and two unequal batches."""
    make, shape = NETWORKS[network]
    model = make()
    kind = {"cross-entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss, "bce": nn.BCEWithLogitsLoss}
    data = []
    for n in (5, 3):
        y = torch.randint(3, (n,)) if loss == "cross-entropy" else torch.rand(n, 3).double()
        data.append((torch.randn(n, *shape, dtype=torch.float64), y))
    return [model, kind[loss](reduction=reduction), list(model.parameters()), data]


def both(kind: str, given: list[Any], **options: Any) -> list[Any]:
    return [
        getattr(m, kind)(*given, check_deterministic=False, **options) for m in (curvlinops, ours)
    ]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_factors_are_those_of_curvlinops(
    network: str, fisher: str, approx: str, reduction: str, separate: bool
) -> None:
    given = arguments(network, reduction)
    options = {"fisher_type": fisher, "kfac_approx": approx, "separate_weight_and_bias": separate}
    theirs, mine = both("KFACLinearOperator", given, **options)
    for operator in (theirs, mine):
        operator.compute_kronecker_factors()
    for side in ("_input_covariances", "_gradient_covariances"):
        expected, found = getattr(theirs, side), getattr(mine, side)
        assert found.keys() == expected.keys()
        for name, covariance in expected.items():
            assert_solved(found[name], covariance)
    assert all(parameter.grad is None for parameter in given[2])


@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical"])
def test_a_backward_pass_keeps_the_gradient_of_one_output_only(
    fisher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def watched(*args: Any, **options: Any) -> Any:
        found = torch.autograd.grad(*args, **options)
        kept.append(len(found))
        return found

    monkeypatch.setattr("curvlinops.kfac.grad", watched)
    _, mine = both("KFACLinearOperator", arguments("images", "mean"), fisher_type=fisher)
    mine.compute_kronecker_factors()
    assert set(kept) == {1}


@pytest.mark.parametrize(("fisher", "passes"), [("type-2", 3), ("mc", 2), ("empirical", 1)])
def test_inputs_wait_for_the_pass_that_lets_go_of_them(
    fisher: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed: list[str] = []

    hooks = {"_add_input": "input", "_accumulate_gradient_covariance": "gradient"}
    for hook, side in hooks.items():
        form = getattr(ours.KFACLinearOperator, hook)

        def watching(
            operator: Any,
            x: Tensor,
            module: nn.Module,
            module_name: str,
            form: Any = form,
            side: str = side,
        ) -> None:
            formed.append(f"{side} {module_name}")
            form(operator, x, module, module_name)

        monkeypatch.setattr(ours.KFACLinearOperator, hook, watching)
    given = arguments("images", "mean")
    given[3] = given[3][:1]
    samples = passes if fisher == "mc" else 1
    _, mine = both("KFACLinearOperator", given, fisher_type=fisher, mc_samples=samples)
    mine.compute_kronecker_factors()
    names = [name for name, _ in reversed(list(given[0].named_modules())) if name in mine._mapping]
    gradients = [f"gradient {name}" for name in names]
    last = [f"{kind} {name}" for name in names for kind in ("gradient", "input")]
    assert formed == [*gradients * (passes - 1), *last]
    assert not mine._inputs


def test_an_input_that_is_changed_before_the_backward_pass_is_refused_as_by_curvlinops() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            outputs = self.layer(x)
            x.add_(1)
            return outputs

    model, data = Changing(), [(torch.randn(5, 4), torch.randint(3, (5,)))]
    given = [model, nn.CrossEntropyLoss(), list(model.parameters()), data]
    for operator in both("KFACLinearOperator", given):
        with pytest.raises(RuntimeError, match="in.?place"):
            operator.compute_kronecker_factors()


class Branches(nn.Module):
    """Two ways from one layer to the next, which is called twice; and perhaps one to nowhere."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.first, self.left, self.right, self.last = (nn.Linear(3, 3) for _ in range(4))
        self.unused = nn.Linear(3, 3) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if self.unused is not None:
            self.unused(x)
        return self.last(self.last(self.left(x) + self.right(x)).tanh())


def branched(unused: bool) -> list[Any]:
    model = Branches(unused).double()
    data = [(torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,)))]
    return [model, nn.CrossEntropyLoss(), list(model.parameters()), data]


def test_branches_and_layers_that_are_called_twice() -> None:
    theirs, mine = both("KFACLinearOperator", branched(unused=False), fisher_type="type-2")
    vector = torch.randn(theirs.shape[1], dtype=torch.float64)
    assert_solved(mine @ vector, theirs @ vector)


def test_an_output_that_the_loss_does_not_depend_on_is_refused() -> None:
    for operator in both("KFACLinearOperator", branched(unused=True), fisher_type="type-2"):
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            operator.compute_kronecker_factors()


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_layer_that_is_never_called_is_refused_as_by_curvlinops(fisher: str) -> None:
    given = branched(unused=False)
    given[0].idle = nn.Linear(3, 3).double()
    given[2] = list(given[0].parameters())
    for operator in both("KFACLinearOperator", given, fisher_type=fisher):
        if fisher == "forward-only":  # which goes backward nowhere
            operator.compute_kronecker_factors()
            assert "idle" not in operator._input_covariances
            continue
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            operator.compute_kronecker_factors()


class Checkpointed(nn.Module):
    """Two parts that are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.first, x, use_reentrant=False)
        return checkpoint(self.second, hidden, use_reentrant=False)


@pytest.mark.parametrize("kind", ["KFACLinearOperator", "EKFACLinearOperator"])
@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical"])
def test_checkpointed_layers_are_as_in_curvlinops(fisher: str, kind: str) -> None:
    """Their inputs are counted again whenever they are computed again."""
    model = Checkpointed().double()
    data = [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (5, 3, 4)]
    given = [model, nn.CrossEntropyLoss(), list(model.parameters()), data]
    operators = both(kind, given, fisher_type=fisher)
    vector = torch.randn(operators[0].shape[1], dtype=torch.float64)
    expected, found = (operator @ vector for operator in operators)
    assert_solved(found, expected, condition=1e6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_other_losses_keep_curvlinops_scales(loss: str, reduction: str) -> None:
    operators = both("KFACLinearOperator", arguments("images", reduction, loss))
    vector = torch.randn(operators[0].shape[1], dtype=torch.float64)
    expected, found = (operator @ vector for operator in operators)
    assert_solved(found, expected)


@pytest.mark.parametrize(
    "options", [{}, {"use_heuristic_damping": True}, {"use_exact_damping": True}]
)
@pytest.mark.parametrize("separate", [False, True])
def test_inverses_are_those_of_curvlinops(separate: bool, options: dict[str, Any]) -> None:
    given = arguments("images", "mean")
    operators = both("KFACLinearOperator", given, separate_weight_and_bias=separate)
    vectors = torch.randn(operators[0].shape[1], 2, dtype=torch.float64)
    expected, found = (
        library.KFACInverseLinearOperator(operator, damping=1e-2, **options) @ vectors
        for library, operator in zip((curvlinops, ours), operators, strict=True)
    )
    assert_solved(found, expected, condition=1e6)


def test_a_damping_of_0_is_taken() -> None:
    operators = both("KFACLinearOperator", arguments("images", "mean"))
    for operator in operators:
        operator.compute_kronecker_factors()
        for side in (operator._input_covariances, operator._gradient_covariances):
            for covariance in side.values():
                covariance.diagonal().add_(1)
    vector = torch.randn(operators[0].shape[1], dtype=torch.float64)
    expected, found = (
        library.KFACInverseLinearOperator(operator, damping=0.0) @ vector
        for library, operator in zip((curvlinops, ours), operators, strict=True)
    )
    assert_solved(found, expected)


def test_a_pair_of_dampings_is_one_for_each_side() -> None:
    operators = both("KFACLinearOperator", arguments("images", "mean"))
    vector = torch.randn(operators[0].shape[1], dtype=torch.float64)
    expected, found = (
        library.KFACInverseLinearOperator(operator, damping=(1e-2, 1e-1)) @ vector
        for library, operator in zip((curvlinops, ours), operators, strict=True)
    )
    assert_solved(found, expected, condition=1e6)


def test_a_matrix_that_fails_is_tried_again_by_curvlinops() -> None:
    operator = both("KFACLinearOperator", arguments("images", "mean"))[1]
    operator.compute_kronecker_factors()
    operator._input_covariances["7"] = -torch.eye(5, dtype=torch.float64)
    inverse = ours.KFACInverseLinearOperator(operator, damping=1e-2)
    with pytest.raises(RuntimeError, match="positive-definite"):
        inverse @ torch.randn(operator.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("network", NETWORKS)
def test_ekfac_is_that_of_curvlinops(
    network: str, fisher: str, reduction: str, separate: bool
) -> None:
    given = arguments(network, reduction)
    options = {"fisher_type": fisher, "separate_weight_and_bias": separate}
    operators = both("EKFACLinearOperator", given, **options)
    vector = torch.randn(operators[0].shape[1], dtype=torch.float64)
    expected, found = (operator @ vector for operator in operators)
    assert_solved(found, expected, condition=1e6)


def padded(mode: str) -> list[Any]:
    """A network with this padding mode, the summed loss and two unequal batches."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, stride=2, padding=(1, 0), padding_mode=mode, bias=False),
        nn.Flatten(),
        nn.Linear(12, 3),
    ).double()
    data = [(torch.randn(n, 2, 5, 4).double(), torch.randint(3, (n,))) for n in (5, 3)]
    return [model, nn.CrossEntropyLoss(reduction="sum"), list(model.parameters()), data]


def correct(kind: str, given: list[Any], **options: Any) -> Any:
    """An operator of the Fisher's own factors, with weight and bias in one."""
    options |= {"check_deterministic": False, "separate_weight_and_bias": False}
    return getattr(ours, kind)(*given, correct=True, fisher_type="empirical", **options)


def assert_covariances(operator: Any, given: list[Any], approx: str) -> None:
    """Compare with those of the Fisher in plain PyTorch."""
    model, loss, _, data = given
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    expected = plain_covariances(model, lambda: loss(model(x), y), approx, 1, "sum")
    assert operator._mapping.keys() == expected.keys()
    for name, (a, g) in expected.items():
        assert_solved(operator._input_covariances[name], a[0])
        assert_solved(operator._gradient_covariances[name], g[0])


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate", "zeros"])
def test_correct_factors_are_those_of_the_fisher(mode: str, approx: str) -> None:
    given = padded(mode)
    operator = correct("KFACLinearOperator", given, kfac_approx=approx)
    operator.compute_kronecker_factors()
    assert_covariances(operator, given, approx)


def test_correct_factors_count_checkpointed_layers_once() -> None:
    model = Checkpointed().double()
    data = [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (5, 3)]
    given = [model, nn.CrossEntropyLoss(reduction="sum"), list(model.parameters()), data]
    operator = correct("KFACLinearOperator", given)
    operator.compute_kronecker_factors()
    assert_covariances(operator, given, "expand")


def test_correct_eigenvalues_are_those_of_the_examples_gradients() -> None:
    given = padded("circular")
    model, loss, weights, data = given
    operator = correct("EKFACLinearOperator", given)
    operator.compute_eigenvalue_correction()
    right, left = (
        getattr(operator, f"_{side}_covariances_eigenvectors")["0"]
        for side in ("input", "gradient")
    )
    expected = torch.zeros(3, 19, dtype=torch.float64)
    for x, y in ((x[None], y[None]) for batch in data for x, y in zip(*batch, strict=True)):
        weight, bias = torch.autograd.grad(loss(model(x), y), weights[:2])
        gradient = torch.cat([weight.flatten(1), bias[:, None]], 1)
        expected += (left.T @ gradient @ right).square()
    assert_solved(operator._corrected_eigenvalues["0"], expected)


def test_blocks_have_correct_operators_made() -> None:
    given = padded("circular")
    with ours.enabled():
        with ours.enabled(correct=True):
            inner = [both(kind, given)[0] for kind in ("KFACLinearOperator", "EKFACLinearOperator")]
        outer = both("KFACLinearOperator", given, fisher_type="empirical")[0]
    assert [operator._correct for operator in inner] == [True, True]
    vector = torch.randn(outer.shape[1], dtype=torch.float64)
    own = both("KFACLinearOperator", given, fisher_type="empirical")[0]
    assert_solved(outer @ vector, own @ vector)


LOADING = pytest.mark.filterwarnings("ignore:Loading a state dict will overwrite:UserWarning")


@LOADING
@pytest.mark.parametrize("saved", ["nothing", "factors", "eigenvectors", "eigenvalues"])
@pytest.mark.parametrize("kind", ["KFACLinearOperator", "EKFACLinearOperator"])
def test_saved_operators_stay_correct(kind: str, saved: str, tmp_path: Path) -> None:
    given = padded("circular")
    model, _, weights, data = given
    operator = correct(kind, given)
    if saved != "nothing":
        operator.compute_kronecker_factors()
    if kind == "EKFACLinearOperator" and saved == "eigenvectors":
        operator._compute_eigenvectors()
    elif saved == "eigenvalues":
        operator.trace  # noqa: B018
    torch.save(operator.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    vector = torch.randn(operator.shape[1], dtype=torch.float64)
    expected = operator @ vector
    arguments = (model, weights, data)
    loaded = [getattr(ours, kind).from_state_dict(copy.deepcopy(state), *arguments)]
    with ours.enabled():
        loaded.append(getattr(curvlinops, kind).from_state_dict(state, *arguments))
    for own in loaded:
        assert_solved(own @ vector, expected, condition=1e6)
        assert_solved(own.trace, operator.trace)


@LOADING
@pytest.mark.parametrize("kind", ["KFACLinearOperator", "EKFACLinearOperator"])
def test_states_of_curvlinops_own_operators_are_not_corrected(kind: str) -> None:
    given = padded("circular")
    model, _, weights, data = given
    theirs = both(kind, given, fisher_type="empirical")[0]
    with ours.enabled(correct=True):
        loaded = getattr(ours, kind).from_state_dict(theirs.state_dict(), model, weights, data)
    assert_solved(loaded.trace, theirs.trace)


@LOADING
def test_inverses_are_loaded_with_the_operator_that_they_were_saved_with() -> None:
    given = padded("circular")
    operator = correct("KFACLinearOperator", given)
    state = ours.KFACInverseLinearOperator(operator, damping=1e-2).state_dict()
    options = {"fisher_type": "empirical", "separate_weight_and_bias": False}
    other = both("KFACLinearOperator", given, **options)[1]
    loaded = ours.KFACInverseLinearOperator.from_state_dict(copy.deepcopy(state), other)
    operator.compute_kronecker_factors()
    vector = torch.randn(operator.shape[1], dtype=torch.float64)
    expected = ours.KFACInverseLinearOperator(operator, damping=1e-2) @ vector
    assert_solved(loaded @ vector, expected, condition=1e6)


def test_curvlinops_own_classes_are_replaced_inside_of_a_block_only() -> None:
    given = arguments("images", "mean")
    with ours.enabled():
        inside = both("KFACLinearOperator", given)[0]
        inverse = curvlinops.KFACInverseLinearOperator(inside, damping=1e-2)
        ekfac = both("EKFACLinearOperator", given)[0]
    assert type(inside) is ours.KFACLinearOperator
    assert type(ekfac) is ours.EKFACLinearOperator
    assert type(inverse) is ours.KFACInverseLinearOperator
    with pytest.raises(ZeroDivisionError), ours.enabled():
        raise ZeroDivisionError
    outside = both("KFACLinearOperator", given)[0]
    assert type(outside) is curvlinops.KFACLinearOperator
    vector = torch.randn(outside.shape[1], dtype=torch.float64)
    assert_solved(inside @ vector, outside @ vector)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_models_in_half_precision_are_served(approx: str, dtype: torch.dtype) -> None:
    """Factors have the dtype that curvlinops' own have, and are as close to those in float64."""
    model = tokens().to(dtype)
    x, y = torch.randn(5, 6, 4).to(dtype), torch.randint(3, (5,))
    options = {"fisher_type": "empirical", "kfac_approx": approx}
    given = [model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)]]
    theirs, mine = both("KFACLinearOperator", given, **options)
    for operator in (theirs, mine):
        assert (operator @ torch.ones(operator.shape[1], dtype=dtype)).dtype == dtype
    twin = copy.deepcopy(model).double()
    given = [twin, nn.CrossEntropyLoss(), list(twin.parameters()), [(x.double(), y)]]
    exact = both("KFACLinearOperator", given, **options)[0]
    exact.compute_kronecker_factors()
    for side in ("_input_covariances", "_gradient_covariances"):
        for name, covariance in getattr(exact, side).items():
            errors = [(getattr(o, side)[name].double() - covariance).norm() for o in (theirs, mine)]
            rounding = torch.finfo(dtype).eps * covariance.norm()
            assert errors[1] <= errors[0] + rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factors_that_are_computed_again_are_added_as_in_curvlinops(dtype: torch.dtype) -> None:
    model = tokens().to(dtype)
    data = [(torch.randn(5, 6, 4).to(dtype), torch.randint(3, (5,)))]
    given = [model, nn.CrossEntropyLoss(), list(model.parameters()), data]
    theirs, mine = both("KFACLinearOperator", given, fisher_type="empirical")
    for operator in (theirs, mine):
        for times in (1, 2):
            operator.compute_kronecker_factors()
            sides = operator._input_covariances, operator._gradient_covariances
            totals = {
                (s, name): m.clone() for s, side in enumerate(sides) for name, m in side.items()
            }
            if times == 1:
                once = totals
        for key, total in totals.items():
            assert total.dtype == dtype
            distance = (total - 2 * once[key]).norm()
            assert distance <= 4 * torch.finfo(dtype).eps * total.norm()


@pytest.mark.parametrize("side", ["_input_covariances", "_gradient_covariances"])
def test_a_factor_that_is_not_finite_is_refused_as_by_curvlinops(side: str) -> None:
    for operator in both("EKFACLinearOperator", arguments("tokens", "mean")):
        operator.compute_kronecker_factors()
        getattr(operator, side)["2"][0, 0] = torch.nan
        with pytest.raises(torch.linalg.LinAlgError):
            operator @ torch.ones(operator.shape[1], dtype=torch.float64)


def test_a_subclass_of_a_layer_has_its_corrected_eigenvalues_from_curvlinops() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = [(torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,)))]
    given = [model, nn.CrossEntropyLoss(), list(model.parameters()), data]
    operators = both("EKFACLinearOperator", given, fisher_type="type-2")
    vector = torch.randn(operators[0].shape[1], dtype=torch.float64)
    expected, found = (operator @ vector for operator in operators)
    assert_solved(found, expected, condition=1e6)


@pytest.mark.parametrize("error", [IndexError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize(
    ("kind", "computes"),
    [
        ("KFACLinearOperator", "compute_kronecker_factors"),
        ("EKFACLinearOperator", "compute_kronecker_factors"),
        ("EKFACLinearOperator", "compute_eigenvalue_correction"),
    ],
)
def test_a_pass_that_is_broken_off_leaves_no_trace(
    kind: str, computes: str, fisher: str, place: str, error: type[BaseException]
) -> None:
    given = arguments("tokens", "mean")
    model, _, _, data = given
    expected, found = both(kind, given, fisher_type=fisher)
    if computes == "compute_eigenvalue_correction":
        found.compute_kronecker_factors()

    def fails(*call: Any, **options: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        if place == "forward":
            patch.setattr(model[4], "forward", fails)
        else:
            patch.setattr("curvlinops.kfac.grad", fails)
        with pytest.raises(error):
            getattr(found, computes)()
    for _ in range(3):
        model(data[0][0]).sum().backward()
    assert not any((found._edges, found._inputs, found._earlier, found._is_backward))
    assert not getattr(found, "_cached_activations", None)
    assert all(isinstance(weight, nn.Parameter) for weight in found._params)
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks)
    vector = torch.randn(found.shape[1], dtype=torch.float64)
    assert_solved(found @ vector, expected @ vector, condition=1e6)
    watched = weakref.ref(found)
    del found
    gc.collect()
    assert watched() is None


def test_a_pass_that_is_broken_off_leaves_the_hooks_of_others() -> None:
    given = arguments("tokens", "mean")
    other, operator = (both("EKFACLinearOperator", given)[1] for _ in range(2))
    hook = partial(other._hook_cache_inputs, module_name="0")
    given[0][0].register_forward_pre_hook(hook)
    given[0][4].register_forward_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        operator.compute_kronecker_factors()
    assert [*given[0][0]._forward_pre_hooks.values()] == [hook]
