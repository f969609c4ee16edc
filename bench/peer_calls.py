"""What other libraries compute, by themselves and with kfac_fast: calls to time in turn.

A function here makes the calls for one network. Libraries are imported where they are used, so that
each can be missing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peer_networks import Problem
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kfac_fast

Call = Callable[[], Any]
Enabled = Callable[[], AbstractContextManager[None]]
Kind = Literal["mc", "type-2"]

DAMPING = 1e-2
NEVER = 10**9


@dataclass(frozen=True)
class Calls:
    """Ways to one result.

    Attributes:
        library: The library's own; its result is a list of tensors.
        ours: The library's with kfac_fast's backend, to the same result.
        kfac: kfac_fast alone to a like one: a step of ``KFAC``, or the operator.
        bare: Forward passes and the gradients of the layers' outputs, which each of them needs.
        made: Whether a call makes its result anew, rather than changing it in place.
        held: Bytes of the state that ``kfac`` keeps between calls.
    """

    library: Call
    ours: Call
    kfac: Call | None = None
    bare: Call | None = None
    made: bool = True
    held: Callable[[], int] = lambda: 0


def _both(make: Callable[[Enabled], Call], enabled: Enabled) -> dict[str, Call]:
    return {"library": make(nullcontext), "ours": make(enabled)}


def bare_passes(problem: Problem, fisher: Kind) -> Call:
    """A forward pass and gradients of the outputs of all layers, once or for every class.

    That of the first layer's output comes last, and is all that is kept.
    """

    def call() -> None:
        outputs: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            for layer in problem.layers
        ]
        logits = problem.model(problem.x)
        for hook in hooks:
            hook.remove()
        if fisher == "mc":
            torch.autograd.grad(F.cross_entropy(logits, problem.y), outputs[0])
            return
        for scalar in logits.sum(0):
            torch.autograd.grad(scalar, outputs[0], retain_graph=True)

    return call


def _kfac(
    problem: Problem, approx: Any, fisher: Kind, refreshes: bool
) -> tuple[Call, Callable[[], int]]:
    """A step of ``KFAC`` that updates factors, or refreshes everything; and the bytes it holds."""
    model = copy.deepcopy(problem.model)  # with hooks of its own
    kfac = kfac_fast.KFAC(
        model,
        approx=approx,
        fisher="mc" if fisher == "mc" else "exact",
        damping=DAMPING,
        damping_mode="plain",
        factor_decay=0.0,
        factor_update_steps=1,
        inverse_update_steps=1 if refreshes else NEVER,
    )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    grads = gradients(problem) if refreshes else []

    def call() -> None:
        for weight, grad in zip(weights, grads, strict=False):
            weight.grad = grad.clone()
        kfac.update_curvature(model(problem.x), loss="cross_entropy")
        kfac.step()

    return call, lambda: sum(kfac.memory().values())


def _factors_by_kfac(problem: Problem) -> dict[str, Any]:
    kfac, held = _kfac(problem, "expand", "mc", refreshes=False)
    return {"kfac": kfac, "held": held}


def _inverses_by_operator(matrices: Sequence[Tensor]) -> Call:
    return lambda: kfac_fast.damped_inverse(matrices, DAMPING).matrices


def gradients(problem: Problem) -> list[Tensor]:
    """Those of the mean loss."""
    loss = F.cross_entropy(problem.model(problem.x), problem.y)
    return list(torch.autograd.grad(loss, problem.weights))


def _curvlinops(
    problem: Problem, enabled: Enabled, approx: str, fisher: Kind, kind: Any = None
) -> Any:
    """An operator, of this kind in place of ``KFACLinearOperator``."""
    import curvlinops

    with enabled():
        return (kind or curvlinops.KFACLinearOperator)(
            problem.model,
            nn.CrossEntropyLoss(),
            problem.weights,
            [(problem.x, problem.y)],
            fisher_type=fisher,
            kfac_approx=approx,
            check_deterministic=False,
        )


def curvlinops_factors(problem: Problem, approx: str, fisher: Kind = "mc") -> Calls:
    """Factors of a batch."""
    from kfac_fast.integrations.curvlinops import enabled

    def make(path: Enabled) -> Call:
        def call() -> list[Tensor]:
            operator = _curvlinops(problem, path, approx, fisher)
            operator.compute_kronecker_factors()
            sides = operator._input_covariances, operator._gradient_covariances
            return [side[name] for side in sides for name in operator._mapping]

        return call

    kfac, held = _kfac(problem, approx, fisher, refreshes=False)
    bare = bare_passes(problem, fisher)
    return Calls(**_both(make, enabled), kfac=kfac, bare=bare, held=held)


def curvlinops_inverses(problem: Problem) -> Calls:
    """All damped inverses, of factors that are known."""
    import curvlinops

    from kfac_fast.integrations.curvlinops import enabled

    known = _curvlinops(problem, nullcontext, "expand", "mc")
    known.compute_kronecker_factors()

    def make(path: Enabled) -> Call:
        def call() -> list[Tensor]:
            with path():
                inverse = curvlinops.KFACInverseLinearOperator(known, damping=DAMPING)
            pairs = [inverse._compute_or_get_cached_inverse(name)[:2] for name in known._mapping]
            return [matrix for pair in pairs for matrix in pair]

        return call

    sides = known._input_covariances, known._gradient_covariances
    matrices = [side[name] for side in sides for name in known._mapping]
    return Calls(**_both(make, enabled), kfac=_inverses_by_operator(matrices))


def curvlinops_corrections(problem: Problem) -> Calls:
    """Factors of a batch, their eigenbases, corrected eigenvalues, and a gradient times these."""
    import curvlinops

    from kfac_fast.integrations.curvlinops import enabled

    grads = gradients(problem)

    def make(path: Enabled) -> Call:
        def call() -> list[Tensor]:
            kind = curvlinops.EKFACLinearOperator
            operator = _curvlinops(problem, path, "expand", "mc", kind)
            # As whole matrices: a single kernel may be all but zero.
            return [product.view(len(product), -1) for product in operator @ grads]

        return call

    return Calls(**_both(make, enabled))


def curvlinops_refresh(problem: Problem) -> Calls:
    """Factors of a batch, their inverses, and a gradient multiplied by these."""
    import curvlinops

    from kfac_fast.integrations.curvlinops import enabled

    grads = gradients(problem)

    def make(path: Enabled) -> Call:
        def call() -> list[Tensor]:
            with path():
                operator = _curvlinops(problem, nullcontext, "expand", "mc")
                inverse = curvlinops.KFACInverseLinearOperator(operator, damping=DAMPING)
            return inverse @ grads

        return call

    kfac, held = _kfac(problem, "expand", "mc", refreshes=True)
    return Calls(**_both(make, enabled), kfac=kfac, held=held)


def _loader(problem: Problem, batches: int = 1) -> DataLoader[tuple[Tensor, ...]]:
    x = torch.cat([problem.x] * batches)
    y = torch.cat([problem.y] * batches)
    return DataLoader(TensorDataset(x, y), batch_size=len(problem.x))


def laplace_fit(problem: Problem, fisher: Kind, batches: int) -> Calls:
    """A posterior from several batches: their factors, added up and decomposed."""
    from laplace import Laplace
    from laplace.curvature.curvlinops import CurvlinopsGGN

    from kfac_fast.integrations.laplace import KFACGGN

    loader = _loader(problem, batches)

    def make(backend: type) -> Call:
        def call() -> list[Tensor]:
            posterior = Laplace(
                problem.model,
                "classification",
                subset_of_weights="all",
                hessian_structure="kron",
                backend=backend,
                backend_kwargs={"stochastic": fisher == "mc"},
            )
            posterior.fit(loader)
            return [factor for block in posterior.H_facs.kfacs for factor in block]

        return call

    passes = bare_passes(problem, fisher)

    def bare() -> None:
        for _ in range(batches):
            passes()

    return Calls(make(CurvlinopsGGN), make(KFACGGN), bare=bare)


def _kronfluence(problem: Problem, path: Enabled) -> tuple[nn.Module, dict[str, Any]]:
    """The prepared model, and the arguments of what fits factors."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class Classification(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits, labels = model(batch[0]), batch[1]
            if sample:
                with torch.no_grad():
                    rows = logits.movedim(1, -1).softmax(-1)
                    labels = torch.multinomial(rows.flatten(0, -2), 1).view(rows.shape[:-1])
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task = Classification()
    with path():
        model = prepare_model(copy.deepcopy(problem.model), task)
    options = {
        "model": model,
        "state": State(cpu=problem.x.device.type == "cpu"),
        "task": task,
        "loader": _loader(problem),
        "factor_args": FactorArguments(),
        "disable_tqdm": True,
    }
    return model, options


def _tensors(factors: dict[str, dict[str, Tensor]], kinds: Iterable[str]) -> list[Tensor]:
    return [matrix for kind in kinds for _, matrix in sorted(factors[kind].items())]


def kronfluence_covariances(problem: Problem) -> Calls:
    """Covariances of a batch."""
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.utils.constants import COVARIANCE_FACTOR_NAMES

    from kfac_fast.integrations.kronfluence import enabled

    def make(path: Enabled) -> Call:
        _, options = _kronfluence(problem, path)

        def call() -> list[Tensor]:
            with _no_warnings():
                _, factors = fit_covariance_matrices_with_loader(**options)
            return _tensors(factors, COVARIANCE_FACTOR_NAMES[:2])

        return call

    own = _factors_by_kfac(problem)
    return Calls(**_both(make, enabled), bare=bare_passes(problem, "mc"), **own)


def _kronfluence_bases(problem: Problem) -> tuple[Any, dict[str, Any]]:
    """Covariances of a batch, and what they are decomposed with."""
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader

    model, options = _kronfluence(problem, nullcontext)
    with _no_warnings():
        _, covariances = fit_covariance_matrices_with_loader(**options)
    names = ("model", "state", "factor_args", "disable_tqdm")
    return covariances, {name: options[name] for name in names}


def kronfluence_eigendecompositions(problem: Problem) -> Calls:
    """Eigenvalues and vectors of all covariances; the former are the result."""
    from kronfluence.factor.eigen import perform_eigendecomposition
    from kronfluence.utils.constants import COVARIANCE_FACTOR_NAMES

    from kfac_fast.integrations import kronfluence as ours

    covariances, options = _kronfluence_bases(problem)

    def make(decompose: Callable[..., Any]) -> Call:
        def call() -> list[Tensor]:
            found = decompose(covariances, **options)
            return _tensors(found, ("activation_eigenvalues", "gradient_eigenvalues"))

        return call

    matrices = _tensors(covariances, COVARIANCE_FACTOR_NAMES[:2])
    return Calls(
        make(perform_eigendecomposition),
        make(ours.perform_eigendecomposition),
        kfac=lambda: kfac_fast.eigh([matrix.double() for matrix in matrices]).values,
    )


def kronfluence_lambdas(problem: Problem) -> Calls:
    """Squared gradients of a batch in the eigenbases."""
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader

    from kfac_fast.integrations import kronfluence as ours

    covariances, given = _kronfluence_bases(problem)
    bases = ours.perform_eigendecomposition(covariances, **given)

    def make(path: Enabled) -> Call:
        _, options = _kronfluence(problem, path)

        def call() -> list[Tensor]:
            with _no_warnings():
                _, found = fit_lambda_matrices_with_loader(**options, eigen_factors=bases)
            return _tensors(found, ("lambda_matrix",))

        return call

    return Calls(**_both(make, ours.enabled))


def nngeometry_factors(problem: Problem) -> Calls:
    """Factors of a batch."""
    from nngeometry.metrics import FIM_MonteCarlo
    from nngeometry.object import PMatKFAC

    from kfac_fast.integrations.nngeometry import enabled

    collection, loader = _nngeometry_layers(problem), _loader(problem)

    def make(path: Enabled) -> Call:
        def call() -> list[Tensor]:
            with path():
                found = FIM_MonteCarlo(problem.model, loader, PMatKFAC, layer_collection=collection)
            return [factor for pair in found.data.values() for factor in pair]

        return call

    own = _factors_by_kfac(problem)
    return Calls(**_both(make, enabled), bare=bare_passes(problem, "mc"), **own)


def _nngeometry_layers(problem: Problem) -> Any:
    from nngeometry.layercollection import LayerCollection

    collection = LayerCollection()
    for layer in problem.layers:
        collection.add_layer_from_model(problem.model, layer)
    return collection


def nngeometry_inverses(problem: Problem) -> Calls:
    """All damped inverses, of factors that are known."""
    from nngeometry.metrics import FIM_MonteCarlo
    from nngeometry.object import PMatKFAC

    from kfac_fast.integrations.nngeometry import enabled

    collection = _nngeometry_layers(problem)
    known = FIM_MonteCarlo(problem.model, _loader(problem), PMatKFAC, layer_collection=collection)

    def make(path: Enabled) -> Call:
        def call() -> list[Tensor]:
            with path():
                inverse = known.inverse(regul=DAMPING**2, use_pi=True)
            return [matrix for pair in inverse.data.values() for matrix in pair]

        return call

    matrices = [factor for pair in known.data.values() for factor in pair]
    return Calls(**_both(make, enabled), kfac=_inverses_by_operator(matrices))


def _asdl(problem: Problem) -> Any:
    """What computes a batch's factors into ``module.fisher.kron``."""
    from asdl import FisherConfig, get_fisher_maker

    norms = [nn.BatchNorm2d, nn.LayerNorm, nn.Embedding]
    options = {"loss_type": "cross_entropy", "seed": 1, "ignore_modules": norms}
    maker = get_fisher_maker(problem.model, FisherConfig("fisher_mc", ["kron"], **options))
    outputs = maker.setup_model_call(problem.model, problem.x)
    maker.setup_loss_call(F.cross_entropy, outputs, problem.y, reduction="sum")
    maker.setup_logits_repr(outputs)
    return maker


def asdl_factors(problem: Problem) -> Calls:
    """Factors of a batch."""
    from kfac_fast.integrations.asdl import enabled

    def make(path: Enabled) -> Call:
        def call() -> list[Tensor]:
            with _no_warnings(), path():
                _asdl(problem).forward_and_backward(data_size=len(problem.x))
            krons = [layer.fisher.kron for layer in problem.layers]
            for layer in problem.layers:
                del layer.fisher
            return [factor for kron in krons for factor in (kron.A, kron.B)]

        return call

    own = _factors_by_kfac(problem)
    return Calls(**_both(make, enabled), bare=bare_passes(problem, "mc"), **own)


def asdl_inverses(problem: Problem) -> Calls:
    """All damped inverses, of factors that are known."""
    import asdl.symmatrix

    from kfac_fast.integrations.asdl import enabled

    with _no_warnings():
        maker = _asdl(problem)
        maker.forward_and_backward(data_size=len(problem.x))
    known = [layer.fisher.kron for layer in problem.layers]
    for layer in problem.layers:
        del layer.fisher

    def make(path: Enabled) -> Call:
        def call() -> list[Tensor]:
            with path():
                for layer, kron in zip(problem.layers, known, strict=True):
                    layer.fisher = asdl.symmatrix.SymMatrix(kron_A=kron.A, kron_B=kron.B)
                maker.replace_fisher_with_inv(DAMPING**2)
            krons = [layer.fisher.kron for layer in problem.layers]
            for layer in problem.layers:
                del layer.fisher
            return [matrix for kron in krons for matrix in (kron.A_inv, kron.B_inv)]

        return call

    matrices = [factor for kron in known for factor in (kron.A, kron.B)]
    return Calls(**_both(make, enabled), kfac=_inverses_by_operator(matrices))


def singd_steps(problem: Problem) -> Calls:
    """A step that updates the curvature, from the empirical Fisher as always in singd."""
    from singd.optim.optimizer import SINGD

    from kfac_fast.integrations import singd as ours

    def make(kind: type) -> Call:
        model = copy.deepcopy(problem.model)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = kind(model, weights, lr=0.0, T=1, warn_unsupported=False)

        def call() -> list[Tensor]:
            optimizer.zero_grad()
            F.cross_entropy(model(problem.x), problem.y).backward()
            optimizer.step()
            sides = optimizer.Ks, optimizer.Cs
            return [matrix.to_dense() for side in sides for matrix in side.values()]

        return call

    return Calls(make(SINGD), make(ours.SINGD), bare=bare_passes(problem, "mc"), made=False)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Leave out what a library warns of in every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


MAKERS: dict[tuple[str, str], tuple[str, Callable[[Problem], Calls]]] = {
    ("curvlinops", "factors, expand"): (
        "curvlinops-for-pytorch",
        partial(curvlinops_factors, approx="expand"),
    ),
    ("curvlinops", "factors, reduce"): (
        "curvlinops-for-pytorch",
        partial(curvlinops_factors, approx="reduce"),
    ),
    ("curvlinops", "factors, expand, type-2"): (
        "curvlinops-for-pytorch",
        partial(curvlinops_factors, approx="expand", fisher="type-2"),
    ),
    ("curvlinops", "EKFAC"): ("curvlinops-for-pytorch", curvlinops_corrections),
    ("curvlinops", "inverses"): ("curvlinops-for-pytorch", curvlinops_inverses),
    ("curvlinops", "refresh"): ("curvlinops-for-pytorch", curvlinops_refresh),
    ("laplace-torch", "fit"): ("laplace-torch", partial(laplace_fit, fisher="mc", batches=4)),
    ("laplace-torch", "fit, type-2"): (
        "laplace-torch",
        partial(laplace_fit, fisher="type-2", batches=2),
    ),
    ("kronfluence", "covariances"): ("kronfluence", kronfluence_covariances),
    ("kronfluence", "eigendecompositions"): ("kronfluence", kronfluence_eigendecompositions),
    ("kronfluence", "lambda matrices"): ("kronfluence", kronfluence_lambdas),
    ("nngeometry", "factors"): ("nngeometry", nngeometry_factors),
    ("nngeometry", "inverses"): ("nngeometry", nngeometry_inverses),
    ("asdl", "factors"): ("asdfghjkl", asdl_factors),
    ("asdl", "inverses"): ("asdfghjkl", asdl_inverses),
    ("singd", "step, empirical"): ("singd", singd_steps),
}
"""By library and result: the package, and what makes the calls."""
