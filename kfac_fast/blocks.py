"""The blocks of a model: each preconditioned layer with its factors, and why others have none."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from kfac_fast.eigenbases import Eigenbasis, eigenvalues
from kfac_fast.factors import Factor, RunningAverage
from kfac_fast.grafting import AdamNorm
from kfac_fast.inverses import Inverse
from kfac_fast.layers import RULES, Approximation, Layer
from kfac_fast.schema import result_dtype

Sum = tuple[Tensor, int]
"""Outer products added up, and the number of terms to average them over."""
Form = Literal["inverse", "eigenbasis", "corrected"]
Part = RunningAverage | Inverse | Eigenbasis | AdamNorm
"""What a block saves."""


class Block:
    """A layer with its factors and the sums that the current step's batches have added up.

    Args:
        layer: The layer's rule.
        form: What the factors are applied as: damped inverses, or eigenbases with the factors' own
            or with corrected eigenvalues.

    Attributes:
        layer: The layer's rule.
        form: As given.
        factors: Running covariances, as the layer names them; empty before the first batch.
        inverses: Damped inverse of each factor; empty with eigenbases.
        bases: Eigenbasis of each factor; empty with inverses.
        correction: Running average of the corrected eigenvalues in the present eigenbases; None if
            they are not corrected.
        norm: Adam's step length; None if not grafted, or before the first step.
        counted_pass: The last forward pass of the model whose loss terms are counted.
    """

    def __init__(self, layer: Layer, form: Form = "inverse") -> None:
        self.layer = layer
        self.form: Form = form
        self.factors: tuple[Factor, ...] = ()
        self.inverses: tuple[Inverse, ...] = ()
        self.bases: tuple[Eigenbasis, ...] = ()
        self.correction: RunningAverage | None = None
        self.norm: AdamNorm | None = None
        self.counted_pass = 0
        self._sums: tuple[Sum, Sum] | None = None

    @property
    def pending(self) -> bool:
        """Whether the current step's batches have added anything."""
        return self._sums is not None

    def add(self, inputs: Sum, gradients: Sum) -> None:
        """Add one call's outer products of inputs and of output gradients, with their counts."""
        if self._sums is not None:
            inputs, gradients = _plus(self._sums[0], inputs), _plus(self._sums[1], gradients)
        self._sums = inputs, gradients

    def update(self, decay: float, reduction: str) -> None:
        """Average the step's covariances, if there are any, into the factors and forget the sums.

        Args:
            decay: Weight of the past.
            reduction: The loss's: the gradients of its terms are averaged under ``"mean"``, summed
                under ``"sum"``.
        """
        if self._sums is None:
            return
        (inputs, count), (gradients, terms) = self._sums
        batches = inputs / count, gradients / terms if reduction == "mean" else gradients
        if not self.factors:
            self._begin(batches)
        for factor, batch in zip(self.factors, batches, strict=True):
            factor.update(batch, decay)
        self.forget()

    def forget(self) -> None:
        """Drop what the current step's batches have added."""
        self._sums, self.counted_pass = None, 0

    def restart_correction(self) -> None:
        """Forget the corrected eigenvalues, because the eigenbases are other ones."""
        if self.correction is not None:
            self.correction = RunningAverage(self.correction.total)

    def _begin(self, covariances: Sequence[Tensor]) -> None:
        self.factors = tuple(Factor(covariance) for covariance in covariances)
        if self.form == "inverse":
            self.inverses = tuple(Inverse(covariance) for covariance in covariances)
            return
        self.bases = tuple(Eigenbasis(covariance) for covariance in covariances)
        if self.form == "corrected":
            self.correction = RunningAverage(eigenvalues(self.bases, None))

    def parts(self) -> dict[str, Part]:
        """What has a state, by the names that it is saved under."""
        names = list(self.layer.factor_shapes())
        parts: dict[str, Part] = dict(zip(names, self.factors, strict=False))
        parts |= {f"{n}_inverse": part for n, part in zip(names, self.inverses, strict=False)}
        parts |= {f"{n}_basis": part for n, part in zip(names, self.bases, strict=False)}
        if self.correction is not None:
            parts["correction"] = self.correction
        if self.norm is not None:
            parts["norm"] = self.norm
        return parts

    def restored(self, state: dict[str, dict[str, Tensor]]) -> Block:
        """A new block of the same layer with saved parts.

        Args:
            state: Saved tensors by part and field.

        Returns:
            The block; this one is not changed.

        Raises:
            ValueError: If a part, a field or a shape does not fit the layer.
        """
        block = Block(self.layer, self.form)
        like = self.layer.weight_matrix(self.layer.weight.detach())
        like = like.new_empty((), dtype=result_dtype(like.dtype))
        if set(state) - {"norm"}:
            block._begin([like.new_empty(shape) for shape in self.layer.factor_shapes().values()])
        if "norm" in state:
            block.norm = AdamNorm(like.new_empty(self.layer.matrix_shape()))
        parts = block.parts()
        if parts.keys() != state.keys():
            raise ValueError(
                f"load_state_dict: {self.layer.name} must hold {sorted(parts)}, got {sorted(state)}"
            )
        for name, part in parts.items():
            _restore(part, state[name], f"{self.layer.name}.{name}")
        return block

    def replace(self, other: Block) -> None:
        """Take over the parts of a block of the same layer, and forget the current step."""
        self.forget()
        self.factors, self.inverses, self.bases = other.factors, other.inverses, other.bases
        self.correction, self.norm = other.correction, other.norm


def _restore(part: Part, saved: dict[str, Tensor], where: str) -> None:
    """Fill a part with saved tensors of the same shapes, on its own device and in its dtype."""
    if sorted(saved) != sorted(part.STATE):
        raise ValueError(
            f"load_state_dict: {where} must hold {sorted(part.STATE)}, got {sorted(saved)}"
        )
    for field in part.STATE:
        own, value = getattr(part, field), saved[field]
        if own.shape != value.shape:
            raise ValueError(
                f"load_state_dict: {where}.{field} must have shape {tuple(own.shape)}, "
                f"got {tuple(value.shape)}"
            )
        setattr(part, field, value.detach().to(own.device, own.dtype, copy=True))


def _plus(total: Sum, term: Sum) -> Sum:
    return total[0] + term[0], total[1] + term[1]


def find_blocks(
    model: nn.Module, approx: Approximation, skip: Sequence[str], form: Form = "inverse"
) -> tuple[list[Block], dict[str, str]]:
    """The blocks of a model's layers, and why each other module that owns parameters has none.

    Args:
        model: The model.
        approx: ``"expand"`` or ``"reduce"``.
        skip: Regular expressions, searched for in qualified and in class names.
        form: As for :class:`Block`.

    Returns:
        The blocks in the model's order, and reasons by qualified name.

    Raises:
        ValueError: If a pattern is no regular expression or matches no module, if no layer is left,
            or the layers differ in device or precision.
    """
    patterns = _compiled(skip)
    modules = [
        (n, m) for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))
    ]
    for pattern in patterns:
        if not any(_matches(pattern, name, module) for name, module in modules):
            raise ValueError(
                "KFAC: skip must match modules with parameters, "
                f"got {pattern.pattern!r} that matches none"
            )
    blocks: list[Block] = []
    left_alone: dict[str, str] = {}
    holders: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, module in modules:
        for parameter in module.parameters(recurse=False):
            holders[parameter].append(name)
    for name, module in modules:
        reason = _reason_against(name, module, patterns, holders)
        if reason is not None:
            left_alone[name] = reason
            continue
        blocks.append(Block(RULES[type(module)](name, module, approx), form))
    kinds = {(b.layer.weight.device, result_dtype(b.layer.weight.dtype)) for b in blocks}
    if len(kinds) > 1:
        raise ValueError(f"KFAC: layers must be on one device and of one precision, got {kinds}")
    if not blocks:
        raise ValueError(f"KFAC: model must have a layer to precondition, got none: {left_alone}")
    return blocks, left_alone


def _compiled(skip: Sequence[str]) -> list[re.Pattern[str]]:
    if isinstance(skip, str):
        raise ValueError(f"KFAC: skip must be a sequence of patterns, got the string {skip!r}")
    try:
        return [re.compile(pattern) for pattern in skip]
    except re.error as error:
        raise ValueError(
            f"KFAC: skip must hold regular expressions, got {error.pattern!r}: {error}"
        ) from error


def _matches(pattern: re.Pattern[str], name: str, module: nn.Module) -> bool:
    return any(pattern.search(text) for text in (name, type(module).__name__))


def _reason_against(
    name: str,
    module: nn.Module,
    patterns: Sequence[re.Pattern[str]],
    holders: dict[nn.Parameter, list[str]],
) -> str | None:
    """Why a module with parameters is not preconditioned, or None if it is."""
    for pattern in patterns:
        if _matches(pattern, name, module):
            return f"skipped by pattern {pattern.pattern!r}"
    if type(module) not in RULES:
        return f"no rule for {type(module).__name__}"
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is computed from other parameters"
    if not module.weight.requires_grad:
        return "its weight is frozen"
    for parameter in module.parameters(recurse=False):
        others = [other for other in holders[parameter] if other != name]
        if others:
            return f"shares a parameter with {', '.join(map(repr, others))}"
    return None
