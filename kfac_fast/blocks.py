"""The blocks of a model: each preconditioned layer with its factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fast.buffers import fits, may_be_kept
from kfac_fast.eigenbases import Eigenbasis, eigenvalues
from kfac_fast.factors import Factor, RunningAverage, Sum, update_averages
from kfac_fast.grafting import AdamNorm
from kfac_fast.graph import backward_pass, on_its_way
from kfac_fast.inverses import Inverse
from kfac_fast.layers import Layer
from kfac_fast.options import Schedule
from kfac_fast.schema import result_dtype

Form = Literal["inverse", "eigenbasis", "corrected"]
Part = RunningAverage | Inverse | Eigenbasis | AdamNorm
"""What a block saves."""
TRAINED_SINCE = "trained since KFAC was made: make a new one"


class Block:
    """A layer with its factors and the sums that the current step's batches have added up.

    Layers that are tied, by one weight and at most one bias, are one block; their calls are like
    several calls of one layer, with a 0 for the bias' 1 in the inputs of those that have none.

    Args:
        layers: The rules of all layers with the same weight, mostly one; in front one with the
            bias, if there is one.
        form: What the factors are applied as: damped inverses, or eigenbases with the factors' own
            or with corrected eigenvalues.
        dtype: Of the factors; that of the layer's sums if None.

    Attributes:
        layers: As given.
        layer: The first of them.
        form: As given.
        dtype: Of the factors.
        options: The block's own values of some options.
        factors: Running covariances, as the layer names them; empty before the first batch.
        inverses: Damped inverse of each factor; empty with eigenbases.
        bases: Eigenbasis of each factor; empty with inverses.
        correction: Running average of the corrected eigenvalues in the present eigenbases; None if
            they are not corrected.
        norm: Adam's step length; None if not grafted, or before the first step.
        follows_grad: Whether sums are dropped whose weight's ``.grad`` was cleared before the step.
        counted_pass: The last forward pass of the model whose loss terms are counted.
        spare: An earlier sum of output gradients, for its memory, see :mod:`kfac_fast.buffers`.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        form: Form = "inverse",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.layer = self.layers[0]
        self.form: Form = form
        self.dtype = result_dtype(self.layer.weight.dtype) if dtype is None else dtype
        self.options: dict[str, Schedule] = {}
        self.factors: tuple[Factor, ...] = ()
        self.inverses: tuple[Inverse, ...] = ()
        self.bases: tuple[Eigenbasis, ...] = ()
        self.correction: RunningAverage | None = None
        self.norm: AdamNorm | None = None
        self.follows_grad = False
        self.counted_pass = 0
        self.spare: Tensor | None = None
        self._some_lack_bias = any(a.has_bias != self.layer.has_bias for a in self.layers)
        self._sums: tuple[Sum | None, Sum, Tensor | None] | None = None
        self._backward_pass = -1

    @property
    def pending(self) -> bool:
        """Whether the current step's batches have added anything."""
        return self._sums is not None

    def add(self, inputs: Sum | None, gradients: Sum, squares: Tensor | None = None) -> None:
        """Add one call's sums.

        Args:
            inputs: Outer products of inputs and their count; None if the layer has a single factor.
            gradients: Outer products of output gradients, which nobody else holds, and the number
                of the loss's terms.
            squares: Squared gradients in the eigenbases, see :meth:`squared_gradients`.
        """
        if self.follows_grad:
            self._backward_pass = backward_pass()
        if self._some_lack_bias and inputs is not None:
            inputs = self._with_bias(inputs)
        if self._sums is not None:
            old_inputs, old_gradients, old_squares = self._sums
            inputs = _plus(old_inputs, inputs)
            self._keep(gradients[0])
            gradients = old_gradients[0].add_(gradients[0]), old_gradients[1] + gradients[1]
            squares = squares if old_squares is None or squares is None else old_squares + squares
        self._sums = inputs, gradients, squares

    def _with_bias(self, inputs: Sum) -> Sum:
        """A sum of inputs with zeros where a bias is lacking."""
        total, count = inputs
        lacking = self.layer.matrix_shape()[-1] - total.shape[-1]
        return F.pad(total, (0, lacking, 0, lacking)), count

    def memory_for(self, gradient: Tensor) -> Tensor | None:
        """Memory for a sum of these output gradients, if there is some; once."""
        spare, self.spare = self.spare, None
        return spare if spare is not None and fits(spare, gradient) else None

    def _keep(self, total: Tensor) -> None:
        self.spare = total if may_be_kept(total) else None

    def squared_gradients(
        self, layer: Layer, x: Tensor, gradient: Tensor, scale: float
    ) -> Tensor | None:
        """Sums of squared weight gradients in the eigenbases; None if there is nothing to correct.

        Args:
            layer: Which of the block's layers was called.
            x: The module's input.
            gradient: Gradient of the loss with respect to the module's output.
            scale: Factor of the result.

        Returns:
            Of the shape of the layer's gradient matrix.
        """
        if self.correction is None:
            return None
        right = self.bases[0].vectors
        left = self.bases[1].vectors if len(self.bases) > 1 else right.new_ones(len(right), 1, 1)
        if layer.has_bias != self.layer.has_bias:
            right = right[..., :-1, :]
        with torch.autocast(x.device.type, enabled=False):
            return layer.squared_gradients(x, gradient, right, left, scale)

    def take(self, reduction: str) -> tuple[list[RunningAverage], list[Sum]]:
        """The running averages that the step's batches change, and what to average in; once."""
        if self._sums is None:
            return [], []
        inputs, (gradients, terms), squares = self._sums
        self.forget()
        self._keep(gradients)
        # A batch without examples is none, of a sum, too: 0 / 0 is left out.
        is_empty = isinstance(terms, int) and terms == 0
        divisor = terms if reduction == "mean" or is_empty else 1
        sums = [(gradients, divisor)] if inputs is None else [inputs, (gradients, divisor)]
        if not self.factors:
            self._begin([total.new_empty(total.shape, dtype=self.dtype) for total, _ in sums])
        averages: list[RunningAverage] = [*self.factors]
        if self.correction is not None and squares is not None:
            averages.append(self.correction)
            sums.append((squares, divisor))
        return averages, sums

    def forget(self) -> None:
        """Drop what the current step's batches have added."""
        self._sums, self.counted_pass = None, 0

    def forget_cleared(self) -> None:
        """Drop the sums of an earlier backward pass whose gradients are no longer there."""
        if not self.follows_grad or self._sums is None:
            return
        # A pass adds to the gradient after it has added all that it has to the sums; another one,
        # of a checkpointed part, may run amid it.
        if not on_its_way(self._backward_pass) and self.layer.gradients()[0] is None:
            self.forget()

    def restart_correction(self) -> None:
        """Forget the corrected eigenvalues, because the eigenbases are other ones."""
        if self.correction is not None:
            self.correction.restart()

    def _begin(self, covariances: Sequence[Tensor]) -> None:
        self.factors = tuple(Factor(covariance) for covariance in covariances)
        if self.form == "inverse":
            self.inverses = tuple(Inverse(covariance) for covariance in covariances)
            return
        self.bases = tuple(Eigenbasis(covariance) for covariance in covariances)
        if self.form == "corrected":
            self.correction = RunningAverage(eigenvalues(self.bases, None))

    def describe(self) -> str:
        """A line on the layer and its factors, with failures counted; waits for the device."""
        kind = type(self.layer.module).__name__
        kind += ", bias alone" if self.layer.role == "bias" else ""
        state = "no factors yet"
        if self.factors:
            named = zip(self.layer.factor_shapes(), self.factors, strict=True)
            shapes = "  ".join(f"{name} {list(f.mean.shape)}" for name, f in named)
            skipped = sum(int(factor.skipped) for factor in self.factors)
            failed = sum(int(side.failed) for side in self.inverses or self.bases)
            state = f"{shapes}  updates skipped {skipped}  inverses failed {failed}"
        reason = self.layer.reason_against()
        if reason is not None:
            state += f"  left alone since, {reason}"
        since = dict.fromkeys(role for layer in self.layers for role in layer.trained_since())
        if since:
            state += f"  {' and '.join(since)} {TRAINED_SINCE}"
        return f"{self.layer.name or '(model)'}: {kind}  {state}"

    def condition_numbers(self) -> list[Tensor]:
        """See :meth:`kfac_fast.KFAC.condition_numbers`."""
        return [side.condition_number() for side in self.inverses or self.bases]

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
        if not isinstance(state, Mapping) or not all(
            isinstance(v, Mapping) for v in state.values()
        ):
            raise ValueError(
                f"load_state_dict: {self.layer.name} must hold parts, got {state!r:.99}"
            )
        block = Block(self.layers, self.form, self.dtype)
        like = self.layer.weight.new_empty((), dtype=self.dtype)
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


def update_blocks(blocks: Sequence[Block], decays: Sequence[float], reduction: str) -> None:
    """Average the step's covariances, where there are any, into the factors and forget the sums.

    Args:
        blocks: The blocks.
        decays: Weight of the past in each.
        reduction: The loss's: the gradients of its terms are averaged under ``"mean"``, summed
            under ``"sum"``.
    """
    by_decay: dict[float, tuple[list[RunningAverage], list[Sum]]] = {}
    for block, decay in zip(blocks, decays, strict=True):
        averages, sums = by_decay.setdefault(decay, ([], []))
        own, new = block.take(reduction)
        averages += own
        sums += new
    for decay, (averages, sums) in by_decay.items():
        update_averages(averages, sums, decay)


def left_out(blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """Batches that were not averaged in, and matrices that could not be inverted, so far.

    Args:
        blocks: The blocks, all on one device.

    Returns:
        Two scalar tensors, counts over all factors of all blocks.
    """
    skipped = [factor.skipped for block in blocks for factor in block.factors]
    failed = [side.failed for block in blocks for side in block.inverses or block.bases]
    if not skipped:
        none = torch.zeros((), dtype=torch.int64, device="cpu")
        return none, none
    return torch.stack(skipped).sum(), torch.stack(failed).sum()


def bytes_of_parts(blocks: Sequence[Block]) -> dict[str, int]:
    """See :meth:`kfac_fast.KFAC.memory`.

    Args:
        blocks: The blocks.

    Returns:
        By kind of the parts; each is there.
    """
    kinds = {"factors": 0, "inverses": 0, "norms": 0}
    for block in blocks:
        for part in block.parts().values():
            tensors = [getattr(part, field) for field in part.STATE]
            kinds[part.KIND] += sum(tensor.nbytes for tensor in tensors)
    return kinds


def _restore(part: Part, saved: dict[str, Tensor], where: str) -> None:
    """Fill a part with saved tensors of the same shapes, on its own device and in its dtype."""
    if sorted(saved) != sorted(part.STATE):
        raise ValueError(
            f"load_state_dict: {where} must hold {sorted(part.STATE)}, got {sorted(saved)}"
        )
    for field in part.STATE:
        own, value = getattr(part, field), saved[field]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"load_state_dict: {where}.{field} must be a tensor, got {value!r:.99}"
            )
        if own.shape != value.shape:
            raise ValueError(
                f"load_state_dict: {where}.{field} must have shape {tuple(own.shape)}, "
                f"got {tuple(value.shape)}"
            )
        setattr(part, field, torch.empty_like(own).copy_(value.detach()))


def _plus(total: Sum | None, term: Sum | None) -> Sum | None:
    if total is None or term is None:
        return None
    return total[0] + term[0], total[1] + term[1]
