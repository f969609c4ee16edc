"""Kronecker factors and inverses of asdl (ASDFGHJKL), computed by kfac_fast.

Have whatever asdl computes for a while take them::

    with kfac_fast.integrations.asdl.enabled():
        maker = KfacGradientMaker(model, config)
        maker.forward_and_backward()

It serves the Fisher shapes ``"kron"`` and ``"swift_kron"`` of linear layers and convolutions in two
dimensions, and ``Kron.update_inv``. Results are those of asdl to rounding, with ``scale /
data_size`` on both factors. Where they are not those of the Fisher, they are so here, unless
``correct`` is given: the input factor of a linear layer is not divided by the shared positions,
patches are padded with zeros under every ``padding_mode``, and of ``n`` samples, the gradient
factor is ``1 / n`` of what it should be. Always, patches of a grouped convolution are taken over
all groups, so that its factors fit no weight; and the factors of a module's calls are added up on
both sides, or their inverses, all of the last input's, where asdl inverts in the backward pass.
Under ``"swift_kron"``, of which ``correct`` mends the samples only, a layer with fewer rows than
features has its rows kept, scaled in place, by asdl itself. Dilated convolutions, which asdl
refuses, are served. Other is how they are computed: one triangle of a factor is enough, and for
``"kron"``, patches are never written out and all inverses of a model are one call, which leaves the
factors' diagonals as they are. For that call, all factors are there together with all inverses.

Tested with asdfghjkl 0.1a5, as asdl is named where packages are installed from. The package that is
named asdl there is another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.integrations.convolutions import geometry_of, output_positions
from kfac_fast.integrations.replacing import replaced
from kfac_fast.integrations.versions import require

require("asdfghjkl", "0.1a5")

from asdl import core, fisher, operations, symmatrix  # noqa: E402  # isort: skip
from asdl.fisher import FisherMaker  # noqa: E402  # isort: skip
from asdl.operations import OP_COV_KRON, OP_COV_KRON_INV  # noqa: E402  # isort: skip
from asdl.precondition import natural_gradient  # noqa: E402  # isort: skip
from asdl.precondition.natural_gradient import NaturalGradientMaker  # noqa: E402  # isort: skip
from asdl.utils import cholesky_inv  # noqa: E402  # isort: skip

EPS = 1e-7
"""Least damping of a factor, asdl's default."""


class _Operation(ABC):
    """What both operations have in common: the input factor, formed of the input as it is.

    Factors to invert wait for those of the other layers, where asdl inverts them as a gradient
    passes, together with that of the module's last input.
    """

    correct = False
    _cov_scale: float
    _op_names: set[str]

    def __init__(self, module: nn.Module, op_names: Sequence[str], **options: Any) -> None:
        names = [op_names] if isinstance(op_names, str) else list(op_names)
        self._inverts = OP_COV_KRON_INV in names and OP_COV_KRON not in names
        self._waiting: list[Kron] = []
        if self._inverts:
            names = [OP_COV_KRON if name == OP_COV_KRON_INV else name for name in names]
        super().__init__(module, names, **options)  # type: ignore[call-arg]

    def forward_post_process(self, in_data: Tensor, out_data: Tensor) -> None:
        """Form the input factor, and hand the rest over to asdl."""
        library: Any = super()
        names = self._op_names
        if OP_COV_KRON in names:
            total = self._input_gram(in_data, self._cov_scale)
            self.accumulate_result(total, OP_COV_KRON, "A")
        self._op_names = names - {OP_COV_KRON}
        try:
            library.forward_post_process(in_data, out_data)
        finally:
            self._op_names = names

    @abstractmethod
    def _input_gram(self, x: Tensor, scale: float) -> Tensor:
        """``scale`` times the sum of the outer products of a layer's inputs, in their dtype."""

    def accumulate_result(self, value: Any, *keys: str, extend: bool = False) -> None:
        """Add to a result, or keep a factor until it is inverted."""
        if self._inverts and keys == (OP_COV_KRON, "A"):
            self._input_factor: Tensor = value
        elif self._inverts and keys == (OP_COV_KRON, "B"):
            self._waiting.append(Kron(self._input_factor, value))
        else:
            library: Any = super()
            library.accumulate_result(value, *keys, extend=extend)

    def get_result(self, *keys: str, pop: bool = False, default: Any = None) -> Any:
        """A result, of factors that are inverted by now."""
        if keys[0] == OP_COV_KRON:
            _invert_waiting([self])
        library: Any = super()
        return library.get_result(*keys, pop=pop, default=default)


class Linear(_Operation, operations.Linear):  # type: ignore[misc]
    """asdl's ``Linear``; data are ``[N, in]`` and ``[N, out]``."""

    def _input_gram(self, x: Tensor, scale: float) -> Tensor:
        positions = x.shape[1:-1].numel() if self.correct else 1
        return ops.gram(x, alpha=scale / positions).to(x.dtype)

    @staticmethod
    def cov_kron_A(module: nn.Linear, in_data: Tensor) -> Tensor:  # noqa: N802
        """Input factor."""
        return ops.gram(in_data).to(in_data.dtype)

    @staticmethod
    def cov_kron_B(module: nn.Linear, out_grads: Tensor) -> Tensor:  # noqa: N802
        """Gradient factor."""
        return ops.gram(out_grads).to(out_grads.dtype)


class Conv2d(_Operation, operations.Conv2d):  # type: ignore[misc]
    """asdl's ``Conv2d``; data are ``[N, D, positions]`` and ``[N, out, positions]``."""

    def _input_gram(self, x: Tensor, scale: float) -> Tensor:
        geometry = geometry_of(self._module, correct=self.correct)
        geometry["alpha"] = scale / output_positions(self._module, x)
        return ops.conv_expand_gram(x, self._module.kernel_size, **geometry).to(x.dtype)

    @staticmethod
    def cov_kron_A(module: nn.Conv2d, in_data: Tensor) -> Tensor:  # noqa: N802
        """Input factor."""
        return ops.gram(in_data.movedim(1, -1), alpha=1 / in_data.shape[-1]).to(in_data.dtype)

    @staticmethod
    def cov_kron_B(module: nn.Conv2d, out_grads: Tensor) -> Tensor:  # noqa: N802
        """Gradient factor."""
        return ops.gram(out_grads.movedim(1, -1)).to(out_grads.dtype)


class CorrectLinear(Linear):
    """One whose input factor is divided by the shared positions."""

    correct = True


class CorrectConv2d(Conv2d):
    """One that honours padding modes."""

    correct = True


class Kron(symmatrix.Kron):  # type: ignore[misc]
    """asdl's ``Kron``, which inverts both factors in one call, or takes what one call for all gave.

    A factor that is missing, or is kept as rows, or is not positive definite, is asdl's business.
    """

    # The damping and the inverses of a call for all layers, if there was one.
    _ready: tuple[float, dict[str, Tensor] | None] | None = None

    def update_inv(
        self,
        damping: float = 1e-5,
        calc_A_inv: bool = True,  # noqa: N803
        calc_B_inv: bool = True,  # noqa: N803
        eps: float = EPS,
        replace: bool = False,
    ) -> None:
        """Invert the damped factors; see asdl's ``Kron``."""
        asked = [name for name, is_asked in (("A", calc_A_inv), ("B", calc_B_inv)) if is_asked]
        ready, self._ready = self._ready, None
        if ready and ready[0] == damping and eps == EPS:
            inverses = ready[1]
        elif self.is_served:
            (inverses,) = _inverses([self], damping, eps, asked)
        else:
            inverses = None
        if inverses is None:
            super().update_inv(damping, calc_A_inv, calc_B_inv, eps, replace)
            return
        for name in asked:
            if name in inverses:
                setattr(self, f"{name}_inv", inverses[name])
                if replace:
                    setattr(self, name, None)

    @property
    def is_served(self) -> bool:
        """Whether both factors are there, as matrices."""
        return bool(self.has_A and self.has_B and self.A_is_square and self.B_is_square)


def _inverses(
    krons: Sequence[Kron],
    damping: float,
    eps: float = EPS,
    sides: Sequence[str] = ("A", "B"),
    *,
    zeros: bool = False,
) -> list[dict[str, Tensor] | None]:
    """Invert the factors, damped by the ratio of their average eigenvalues as in asdl.

    Returns:
        For each, the inverses by name, without those of zeros unless asked for; None where one
        fails.
    """
    alike = defaultdict(list)
    for i, kron in enumerate(krons):
        alike[kron.A.dtype, kron.A.device].append(i)
    results: dict[int, dict[str, Tensor] | None] = {}
    for indices in alike.values():
        factors = [matrix for i in indices for matrix in (krons[i].A, krons[i].B)]
        inverses = _damped_inverses(factors, damping, eps, sides, zeros)
        results |= dict(zip(indices, inverses, strict=True))
    return [results[i] for i in range(len(krons))]


def _damped_inverses(
    factors: Sequence[Tensor], damping: float, eps: float, sides: Sequence[str], zeros: bool
) -> list[dict[str, Tensor] | None]:
    """:func:`_inverses` of factors A and B in turn, all of one dtype."""
    means = ops.mean_eigenvalues(factors)
    shares = [_shares(ratio, damping, eps) for ratio in (means[::2] / means[1::2]).tolist()]
    names = ["A", "B"] * len(shares)
    asked = [
        i
        for i, mean in enumerate(means.tolist())
        if names[i] in sides and (zeros or mean != 0 or torch.any(factors[i]))
    ]
    found: list[dict[str, Tensor]] = [{} for _ in shares]
    if not asked:
        return [*found]
    dampings = factors[0].new_tensor([shares[i // 2][i % 2] for i in asked])
    inverses, info, _ = ops.damped_inverse([factors[i] for i in asked], dampings)
    for i, inverse in zip(asked, inverses, strict=True):
        found[i // 2][names[i]] = inverse
    failed = {asked[k] // 2 for k, failure in enumerate(info.tolist()) if failure}
    return [None if i in failed else own for i, own in enumerate(found)]


def _shares(ratio: float, damping: float, eps: float) -> tuple[float, float]:
    """The dampings of two factors of this ratio of average eigenvalues; NaN if it is negative."""
    if ratio in (0, math.inf):
        return damping, damping
    pi, root = math.sqrt(ratio) if ratio > 0 else math.nan, damping**0.5
    return max(root * pi, eps), max(root / pi, eps)


def _invert_waiting(found: Iterable[Any]) -> None:
    """Invert what waits in operations in one call; the inverses of a module's calls are added."""
    waiting = [(op, kron) for op in found if isinstance(op, _Operation) for kron in op._waiting]
    if not waiting:
        return
    for operation, _ in waiting:
        operation._waiting = []
    library: Any = waiting[0][0]
    inverses = _inverses([kron for _, kron in waiting], library._damping, zeros=True)
    for (operation, kron), own in zip(waiting, inverses, strict=True):
        if own is None:  # asdl says what fails
            dampings = library.cov_kron_damping(kron.A, kron.B)
            pairs = zip("AB", (kron.A, kron.B), dampings, strict=True)
            own = {name: cholesky_inv(factor, share) for name, factor, share in pairs}
        for name, inverse in own.items():
            operation.accumulate_result(inverse, OP_COV_KRON, f"{name}_inv")


def _extract_fisher(maker: FisherMaker, context: Any) -> None:
    _invert_waiting(context._operations.values())
    _library_extracts(maker, context)


@contextmanager
def _together(
    fishers: Iterable[Any], damping: float, sides: Sequence[str] = ("A", "B")
) -> Iterator[None]:
    """Have factors of all layers inverted in one call, for their ``update_inv`` in a block."""
    found = [fisher.kron for fisher in fishers if fisher is not None]
    krons = [kron for kron in found if isinstance(kron, Kron) and kron.is_served]
    for kron, own in zip(krons, _inverses(krons, damping, sides=sides), strict=True):
        kron._ready = damping, own
    try:
        yield
    finally:
        for kron in krons:
            kron._ready = None


def _replace_fisher_with_inv(maker: FisherMaker, damping: float) -> None:
    fishers = [getattr(m, maker.config.fisher_attr, None) for m in maker.model.modules()]
    with _together(fishers, damping):
        for own in (*fishers, fishers[0]):  # asdl comes to the model itself again
            if own is not None:
                own.update_inv(damping=damping, replace=True)


def _update_preconditioner(
    maker: NaturalGradientMaker,
    damping: float | None = None,
    module_name: str | None = None,
    kron: Sequence[str] | None = None,
    zero_curvature: bool = False,
    partition_aware: bool = False,
) -> None:
    fishers = []
    if maker.do_accumulate and module_name is None:
        for ranks, shape in zip(
            maker.partitions, natural_gradient._module_level_shapes, strict=True
        ):
            for rank, module in zip(ranks, maker.modules_for(shape), strict=True):
                if rank == maker.world_rank and maker.is_module_for_inv_and_precondition(module):
                    fishers.append(maker._get_module_fisher(module))
    given = maker.config.damping if damping is None else damping
    with _together(fishers, given, ("A", "B") if kron is None else kron):
        _library_updates(maker, damping, module_name, kron, zero_curvature, partition_aware)


_library_chooses = core.get_op_class
_LIBRARY_LOOPS = {
    kind: kind._fisher_loop for kind in (fisher.FisherMCCrossEntropy, fisher.FisherMCMSE)
}
_library_extracts = FisherMaker._extract_fisher
_library_updates = NaturalGradientMaker.update_preconditioner
_OURS = {operations.Linear: Linear, operations.Conv2d: Conv2d}
_CORRECT = {operations.Linear: CorrectLinear, operations.Conv2d: CorrectConv2d}


def _correct_loop(library_loops: Any) -> Any:
    """A loop over samples, whose losses asdl divides by ``n``, of which each counts ``1 / n``."""

    def loop(maker: FisherMaker, closure: Any) -> None:
        root = maker.config.n_mc_samples**0.5
        library_loops(maker, lambda loss, **options: closure(lambda: root * loss(), **options))

    return loop


@contextmanager
def enabled(*, correct: bool = False) -> Iterator[None]:
    """Have operations and matrices that are made inside of a ``with`` block be of these classes.

    What inverts those of a whole model inside of it does so in one call.

    Args:
        correct: Whether input factors of linear layers are divided by the shared positions, padding
            modes are honoured, and samples averaged.

    Yields:
        Nothing.
    """
    kinds = _CORRECT if correct else _OURS

    def get_op_class(module: nn.Module) -> Any:
        kind = _library_chooses(module)
        return kinds.get(kind, kind)

    loops = [
        (kind, "_fisher_loop", _correct_loop(loop) if correct else loop)
        for kind, loop in _LIBRARY_LOOPS.items()
    ]
    replacements: list[tuple[Any, str, Any]] = [
        (core, "get_op_class", get_op_class),
        (symmatrix, "Kron", Kron),
        (FisherMaker, "_extract_fisher", _extract_fisher),
        (FisherMaker, "replace_fisher_with_inv", _replace_fisher_with_inv),
        (NaturalGradientMaker, "update_preconditioner", _update_preconditioner),
        *loops,
    ]
    with replaced(replacements):
        yield
