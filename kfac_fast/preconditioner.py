"""The K-FAC preconditioner: hooks that form the factors, and the step that rewrites gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac_fast.blocks import Block, Form
from kfac_fast.capture import Capture
from kfac_fast.curvature import Fisher, backpropagated
from kfac_fast.eigenbases import apply_eigenbases, refresh_eigenbases
from kfac_fast.factors import multiply_sides
from kfac_fast.grafting import AdamNorm
from kfac_fast.inverses import apply_inverses, refine_inverses, refresh_inverses
from kfac_fast.layers import Approximation, Sharing
from kfac_fast.losses import Loss, Outputs, find_loss
from kfac_fast.selection import find_blocks

DampingMode = Literal["factored", "plain", "exact"]
Schedule = float | Callable[[int], float]
STATE_VERSION = 3
SAVED_OPTIONS = ("approx", "fisher", "loss_reduction")

_CHOICES = {
    "approx": ("expand", "reduce"),
    "fisher": ("empirical", "mc", "exact", "forward-only"),
    "loss_reduction": ("mean", "sum"),
    "damping_mode": ("factored", "plain", "exact"),
    "grafting": (None, "adam"),
}
_COUNTS = {  # least value
    "loss_terms_per_example": 1,
    "accumulation_steps": 1,
    "mc_samples": 1,
    "refinement_steps": 0,
}
_BOUNDS = {  # lowest value, and the value to stay below
    "damping": (0, math.inf),
    "factor_decay": (0, 1),
    "factor_update_steps": (1, math.inf),
    "inverse_update_steps": (1, math.inf),
    "kl_clip": (0, math.inf),
    "loss_scale": (1e-30, math.inf),
}


def _refuse_replicas() -> None:
    """Each process would precondition the common gradient by factors of its own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
        if size > 1:
            raise RuntimeError(f"KFAC: the process group must have one process, got {size}")


class KFAC:
    r"""Preconditions the gradients of a model's layers with inverses of their Kronecker factors.

    .. math::

        V \leftarrow \nu \, (G + \sqrt\lambda / \pi \, I)^{-1} \, V \,
        (A + \pi \sqrt\lambda \, I)^{-1}

    for each layer's gradient :math:`V` of shape ``[out, in (+ 1)]``, with the covariances :math:`A`
    of its inputs and :math:`G` of the gradients of its output. It stands beside any ``torch.optim``
    optimizer::

        kfac = kfac_fast.KFAC(model, approx="reduce")
        for inputs, targets in data:
            optimizer.zero_grad()
            loss_function(model(inputs), targets).backward()
            kfac.step()  # rewrites .grad; or, once before the loop, kfac.attach(optimizer)
            optimizer.step()

    Inputs have the batch first; its size is taken from the model's first input. Layers that are fed
    one tensor, such as the projections of an attention block, have their input covariance formed
    once. Several processes are not served yet. Options marked *schedule* are a number, or a
    function of the number of steps taken. A batch whose inputs or gradients hold NaN or infinity
    leaves the factors as they were, and is counted in :meth:`summary`.

    The Fisher types ``"mc"`` and ``"exact"`` run backward passes of their own between those of the
    training loop, which a loss scale does not touch::

        outputs = model(inputs)
        kfac.update_curvature(outputs, loss="cross_entropy")
        loss_function(outputs, targets).backward()

    Args:
        model: The model; layers of the types in :data:`kfac_fast.layers.RULES` are preconditioned.
        approx: ``"expand"`` or ``"reduce"``, for layers that share their weights over positions.
        fisher: Whose gradients make :math:`G`. ``"empirical"``: those of the training loss as they
            pass. ``"mc"``: those of the loss on labels drawn from the model, in
            :meth:`update_curvature`. ``"exact"``: the same in expectation over all labels (the
            type-2 generalised Gauss-Newton matrix), at the cost of a backward pass for each entry
            of an example's outputs. ``"forward-only"``: none, :math:`G` is the identity, whatever
            the loss and its reduction; every forward pass with gradients enabled counts, and
            normalisations, whose only factor needs gradients, are left alone.
        loss_reduction: ``"mean"`` or ``"sum"``, as of the training loss.
        loss_terms_per_example: Terms of each example that a mean loss is divided by: 1 for one
            label an example, the sequence length for one label a token. It serves the empirical
            Fisher where :meth:`update_curvature` does not count the terms.
        accumulation_steps: Micro-batches whose losses are divided by this number and summed up in
            ``.grad``.
        loss_scale: Number that the training loss is multiplied by before ``backward()``
            (*schedule*), for the empirical Fisher; with a ``torch.amp.GradScaler``,
            ``lambda step: scaler.get_scale()``. Call :meth:`step` between ``scaler.unscale_`` and
            ``scaler.step``, which skips the optimizer after an overflow and :meth:`attach` with it.
        mc_samples: Draws of labels in each :meth:`update_curvature`.
        damping: Tikhonov damping :math:`\lambda` (*schedule*).
        damping_mode: ``"factored"`` as above; ``"plain"``: :math:`\lambda` on each factor;
            ``"exact"``: :math:`\lambda` on the Kronecker product, in its eigenbasis. Under it the
            damping acts at once, not at the next refresh, and refreshes are eigendecompositions:
            dearer than inverses, and the host waits for them.
        eigenvalue_correction: With exact damping, take the average squared gradient in the
            eigenbasis for its eigenvalues (EKFAC), from the first update of the factors after each
            refresh on.
        factor_decay: Weight of the past in the factors' running averages, in [0, 1) (*schedule*).
        factor_update_steps: Steps between updates of the factors (*schedule*).
        inverse_update_steps: Steps between refreshes of the inverses or eigenbases (*schedule*).
        refinement_steps: Newton-Schulz iterations by which the inverses follow each update of the
            factors between refreshes, see :func:`kfac_fast.inverses.refine_inverses`.
        kl_clip: Bound :math:`\kappa` on the step's squared length in the Fisher metric
            (*schedule*): all layers are scaled by :math:`\nu = \min(1, \sqrt{\kappa / (\eta^2 \sum
            \langle V, P V \rangle)})`.
        learning_rate: Peak learning rate :math:`\eta` that ``kl_clip`` assumes. The peak on
            purpose: with the current rate of a decaying schedule, the decay would cancel wherever
            the clip acts.
        grafting: ``"adam"`` scales each layer's direction to the length of Adam's step on its raw
            gradient.
        skip: Regular expressions; a layer is left alone if one is found in its qualified or its
            class name.

    Raises:
        RuntimeError: If several processes train one model.
        ValueError: If an option is refused, a pattern matches nothing, or the model has no layer to
            precondition.

    Source: Martens & Grosse (2015); Eschenhagen et al. (2023).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        approx: Approximation = "expand",
        fisher: Fisher = "empirical",
        loss_reduction: Literal["mean", "sum"] = "mean",
        loss_terms_per_example: int = 1,
        accumulation_steps: int = 1,
        loss_scale: Schedule = 1.0,
        mc_samples: int = 1,
        damping: Schedule = 1e-3,
        damping_mode: DampingMode = "factored",
        eigenvalue_correction: bool = False,
        factor_decay: Schedule = 0.95,
        factor_update_steps: Schedule = 10,
        inverse_update_steps: Schedule = 100,
        refinement_steps: int = 0,
        kl_clip: Schedule | None = None,
        learning_rate: float | None = None,
        grafting: Literal["adam"] | None = None,
        skip: Sequence[str] = (),
    ) -> None:
        _refuse_replicas()
        self.approx = approx
        self.fisher = fisher
        self.loss_reduction = loss_reduction
        self.loss_terms_per_example = loss_terms_per_example
        self.accumulation_steps = accumulation_steps
        self.loss_scale = loss_scale
        self.mc_samples = mc_samples
        self.damping = damping
        self.damping_mode = damping_mode
        self.eigenvalue_correction = eigenvalue_correction
        self.factor_decay = factor_decay
        self.factor_update_steps = factor_update_steps
        self.inverse_update_steps = inverse_update_steps
        self.refinement_steps = refinement_steps
        self.kl_clip = kl_clip
        self.learning_rate = learning_rate
        self.grafting = grafting
        self.steps = 0
        self._check_options()
        form: Form = "inverse"
        if damping_mode == "exact":
            form = "corrected" if eigenvalue_correction else "eigenbasis"
        self._blocks, self._left_alone = find_blocks(
            model, approx, skip, form, forward_only=fisher == "forward-only"
        )
        self._optimizer_hook: RemovableHandle | None = None
        self._capture = Capture(
            model,
            self._blocks,
            lambda: self._due("factor_update_steps"),
            fisher=fisher,
            mean=loss_reduction == "mean",
            terms_per_example=loss_terms_per_example,
            accumulation_steps=accumulation_steps,
            loss_scale=lambda: self._now("loss_scale"),
        )

    def _check_options(self) -> None:
        for option, choices in _CHOICES.items():
            if getattr(self, option) not in choices:
                raise ValueError(
                    f"KFAC: {option} must be one of {choices}, got {getattr(self, option)!r}"
                )
        for option, least in _COUNTS.items():
            count = getattr(self, option)
            if not isinstance(count, int) or count < least:
                raise ValueError(f"KFAC: {option} must be an int from {least}, got {count!r}")
        exact = self.damping_mode == "exact"
        if self.eigenvalue_correction and not exact:
            raise ValueError(
                "KFAC: eigenvalue_correction must be False unless damping_mode is 'exact', got True"
            )
        if self.refinement_steps and exact:
            raise ValueError(
                "KFAC: refinement_steps must be 0 with damping_mode 'exact', which has no "
                f"inverses, got {self.refinement_steps}"
            )
        if self.eigenvalue_correction and self.fisher == "forward-only":
            raise ValueError(
                "KFAC: eigenvalue_correction must be False with fisher 'forward-only', which has "
                "no gradients, got True"
            )
        self._check_schedules()
        if self.kl_clip is not None and (self.learning_rate is None or not self.learning_rate > 0):
            raise ValueError(
                f"KFAC: learning_rate must be positive for kl_clip, got {self.learning_rate}"
            )
        if self.kl_clip is not None and self.grafting is not None:
            raise ValueError(
                "KFAC: kl_clip must be None with grafting, which sets the step's length, got both"
            )

    def _check_schedules(self) -> None:
        """Read every schedule at the current step, so that a bad one stops before any change."""
        for option in _BOUNDS:
            if option != "kl_clip" or self.kl_clip is not None:
                self._now(option)

    def _now(self, option: str) -> float:
        """An option's number at the current step, checked."""
        value: Schedule = getattr(self, option)
        number = value(self.steps) if callable(value) else value
        low, high = _BOUNDS[option]
        if not isinstance(number, int | float) or not low <= number < high:
            raise ValueError(
                f"KFAC: {option} must be in [{low}, {high}), got {number!r} at step {self.steps}"
            )
        if option.endswith("_steps") and number != int(number):
            raise ValueError(f"KFAC: {option} must be whole, got {number!r} at step {self.steps}")
        return number

    def _due(self, option: str) -> bool:
        return self.steps % self._now(option) == 0

    def update_curvature(
        self,
        outputs: Outputs,
        *,
        loss: str | nn.Module | Loss[Outputs],
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        r"""Form the gradient covariances from the loss's curvature in the model's outputs.

        .. math:: G = c \sum_k \sum_n \sum_s g_{k,n,s} g_{k,n,s}^\top, \qquad
            g_{k,n,s} = \left(\frac{\partial f_n}{\partial z_{n,s}}\right)^\top r_{k,n}, \qquad
            \sum_k r_{k,n} r_{k,n}^\top = \nabla_{f_n}^2 \sum_m \ell_m

        with :math:`c = 1/M` for a mean of M terms, 1 for a sum. The vectors :math:`r` are the
        columns of a root of the Hessian under ``fisher="exact"``, and gradients of the loss on
        drawn labels under ``"mc"``, where the last equation holds in expectation. Under
        ``"empirical"`` only the terms of the loss are counted, for losses that ignore some labels;
        under ``"forward-only"`` there is nothing to do.

        Call it after the forward pass and before ``backward()``. It keeps the graph and touches no
        ``.grad``; on steps whose factors are not updated it does nothing. One call serves one
        forward pass: a model with several outputs takes them in a single loss.

        Args:
            outputs: The model's outputs, as the loss takes them; for ``"gaussian_nll"`` a tuple
                ``(mean, variance)``. The first dimension is the examples: under ``"exact"``, tokens
                of one example must not be flattened into it.
            loss: ``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"`` or ``"gaussian_nll"``; or
                ``nn.CrossEntropyLoss(...)``, ``nn.MSELoss()``, ``nn.BCEWithLogitsLoss(...)`` or
                ``nn.GaussianNLLLoss()``; or your own, a :class:`kfac_fast.losses.Loss`.
            targets: Training labels. The curvature depends on them only where the loss ignores or
                weighs some.
            generator: Source of randomness; PyTorch's default if None.

        Raises:
            TypeError: If the outputs are not what the loss takes.
            ValueError: If ``loss`` is unknown or has another reduction than ``loss_reduction``, if
                outputs or targets have the wrong shape, or targets are needed.

        Source: Martens & Grosse (2015), section 5; Eschenhagen et al. (2023), section 2.
        """
        known = find_loss(loss, self.loss_reduction)
        if self.fisher == "forward-only" or not self._due("factor_update_steps"):
            return
        terms = known.terms(outputs, targets)
        if self.fisher == "empirical":
            self._capture.count(terms)
            return
        self._capture.backpropagate(
            backpropagated(self.fisher, known, outputs, targets, self.mc_samples, generator), terms
        )

    def share_rows(
        self,
        pattern: str,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        num_segments: int | None = None,
    ) -> None:
        """State which rows of some layers' inputs count, or belong to one example, for this step.

        Call it before the forward pass. A padded batch with a mask has the factors of the unpadded
        one, and a batch of graphs with segments those of a loop over the graphs::

            kfac.share_rows("encoder", mask=tokens != padding)
            kfac.share_rows("node", segments=graph_of_node, num_segments=graphs)
            kfac.share_rows("edge", segments=graph_of_node[sources], num_segments=graphs)

        Args:
            pattern: Regular expression, searched for in the qualified names of linear layers,
                attention's projections, ``nn.LayerNorm`` and ``nn.RMSNorm``. A later call overrides
                an earlier one.
            mask: Bool of the input's shape without its features; rows that are False, such as
                padding, do not count.
            segments: int64, one entry for each row of an input ``[R, features]``: the example
                (graph) that the row (node or edge) belongs to.
            num_segments: Number of examples; required with ``segments``.

        Raises:
            ValueError: If the pattern is found in no such name, or in that of another layer, if
                ``segments`` comes without ``num_segments``, or with corrected eigenvalues.
        """
        if (segments is None) != (num_segments is None):
            raise ValueError(
                "share_rows: segments must come with num_segments, got only one of them"
            )
        if segments is not None and self.eigenvalue_correction:
            raise ValueError("share_rows: segments must be None with eigenvalue_correction")
        layers = [layer for block in self._blocks for layer in block.layers]
        found = [layer for layer in layers if re.search(pattern, layer.name)]
        refused = [layer.name for layer in found if not layer.takes_sharing]
        if not found or refused:
            raise ValueError(
                "share_rows: pattern must be found in names of layers that take rows, "
                f"got {pattern!r}, found in {refused or 'none'}"
            )
        sharing = Sharing(mask, segments, num_segments)
        self._capture.sharing |= {layer.name: sharing for layer in found}

    # The step

    @torch.no_grad()
    def step(self) -> None:
        """Update factors and inverses if they are due, then precondition every layer's ``.grad``.

        Call it after ``backward()`` and before ``optimizer.step()``, unless :meth:`attach` does.
        The host never waits for the device.

        Raises:
            RuntimeError: If the Fisher needs :meth:`update_curvature` and it was not called on a
                step that updates the factors, if no pass of the model was seen, or after
                :meth:`detach`.
            ValueError: If a schedule's number is refused; nothing has changed then.
        """
        if not self._capture.hooked:
            raise RuntimeError("KFAC.step: the model must be hooked, got a call after detach()")
        pending = any(block.pending for block in self._blocks)
        if self._capture.calls and not pending:
            raise RuntimeError(
                f"KFAC.step: fisher={self.fisher!r} needs update_curvature() after the forward "
                "pass, got none"
            )
        if not pending and self._untouched() and any(p.grad is not None for p in self.parameters()):
            raise RuntimeError(
                "KFAC.step: the gradients must come from the model given to KFAC, got no pass of it"
            )
        self._check_schedules()
        self._capture.forget()
        self._update_factors()
        self._precondition()
        self.steps += 1

    def _untouched(self) -> bool:
        return self._due("factor_update_steps") and not any(b.factors for b in self._blocks)

    def _update_factors(self) -> None:
        had_factors = [bool(block.factors) for block in self._blocks]
        update = self._due("factor_update_steps")
        if update:
            # Forward-only identities are averaged over the calls.
            reduction = "mean" if self.fisher == "forward-only" else self.loss_reduction
            for block in self._blocks:
                block.update(self._now("factor_decay"), reduction)
        known = [block for block in self._blocks if block.factors]
        if self._due("inverse_update_steps") or len(known) > sum(had_factors):
            self._refresh(known)
        elif update and self.refinement_steps:
            layers = [(block.factors, block.inverses) for block in known]
            mode, steps = self.damping_mode, self.refinement_steps
            refine_inverses(layers, self._now("damping"), mode, steps=steps)

    def _refresh(self, blocks: Sequence[Block]) -> None:
        if self.damping_mode != "exact":
            layers = [(block.factors, block.inverses) for block in blocks]
            refresh_inverses(layers, self._now("damping"), self.damping_mode)
            return
        refresh_eigenbases([(block.factors, block.bases) for block in blocks])
        for block in blocks:
            block.restart_correction()

    def _precondition(self) -> None:
        ready = [b for b in self._blocks if b.factors and b.layer.has_gradient]
        if not ready:
            return
        grads = [block.layer.gradient_matrix(block.factors[0].total.dtype) for block in ready]
        if self.damping_mode == "exact":
            corrections = [block.correction for block in ready]
            bases = [block.bases for block in ready]
            applied = apply_eigenbases(grads, bases, corrections, self._now("damping"))
        else:
            applied = apply_inverses(grads, [block.inverses for block in ready])
        directions, inner_product = applied
        if self.kl_clip is not None and self.learning_rate is not None:
            bound = self._now("kl_clip") / self.learning_rate**2
            scale = (bound / inner_product.clamp(min=0)).sqrt().nan_to_num(nan=1.0).clamp(max=1)
            torch._foreach_mul_(directions, scale)
        for block, grad, direction in zip(ready, grads, directions, strict=True):
            if self.grafting is not None:
                if block.norm is None:
                    block.norm = AdamNorm(grad)
                length = torch.linalg.vector_norm(direction)
                direction *= block.norm.update(grad) / torch.where(length > 0, length, 1)
            block.layer.write_gradient(direction)

    @torch.no_grad()
    def predicted_change(
        self, gradients: Mapping[nn.Parameter, Tensor], steps: Mapping[nn.Parameter, Tensor]
    ) -> Tensor:
        r"""How a step changes the loss by the quadratic model that K-FAC makes of it.

        .. math:: M(\delta) - M(0) = \sum_l \langle V_l, \delta_l \rangle + \tfrac12
            \langle \delta_l, G_l \delta_l A_l + \lambda \delta_l \rangle

        over the preconditioned layers :math:`l`; other parameters are left out.

        Args:
            gradients: Gradients of the loss before they were preconditioned.
            steps: What was added to the parameters.

        Returns:
            Scalar tensor; negative if the step is predicted to reduce the loss.

        Source: Martens & Grosse (2015), section 6.5.
        """
        known = [block for block in self._blocks if block.factors]
        right = [block.factors[0].mean() for block in known]
        left = [block.factors[1].mean() if len(block.factors) > 1 else None for block in known]
        grads, deltas = (
            [
                block.layer.matrix([tensors[p] for p in block.layer.parameters()], a.dtype)
                for block, a in zip(known, right, strict=True)
            ]
            for tensors in (gradients, steps)
        )
        _, change = multiply_sides(deltas, right, left)
        change = change / 2
        for grad, delta in zip(grads, deltas, strict=True):
            change = change + ((grad + self._now("damping") / 2 * delta) * delta).sum()
        return change

    # Around the training loop

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Call :meth:`step` at the start of every ``optimizer.step()``.

        Args:
            optimizer: Any optimizer that holds some of the preconditioned parameters.

        Raises:
            RuntimeError: If an optimizer is already attached; later, from ``optimizer.step()``, if
                it is given a closure, whose gradients come too late.
            ValueError: If the optimizer holds none of the parameters.
        """
        if self._optimizer_hook is not None:
            raise RuntimeError("KFAC.attach: optimizer must be the only one attached, got a second")
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if held.isdisjoint(self.parameters()):
            raise ValueError(
                "KFAC.attach: optimizer must hold a preconditioned parameter, got one with none"
            )
        self._optimizer_hook = optimizer.register_step_pre_hook(self._before_optimizer)

    def _before_optimizer(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        if any(argument is not None for argument in (*args[1:], *named.values())):
            raise RuntimeError(
                "KFAC.attach: optimizer.step must be called without a closure, got one"
            )
        self.step()

    def detach(self) -> None:
        """Remove every hook from the model and the optimizer; :meth:`state_dict` keeps working."""
        self._capture.remove()
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
            self._optimizer_hook = None

    def __enter__(self) -> KFAC:
        """Return itself; the ``with`` block detaches at its end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that are preconditioned.

        Yields:
            Each weight and bias once.
        """
        yield from dict.fromkeys(p for block in self._blocks for p in block.layer.parameters())

    def summary(self) -> str:
        """What is preconditioned, what is not and why, with failures counted; waits for the device.

        Returns:
            A table, one line for each module that owns parameters.
        """
        lines = [f"K-FAC {self.approx}, {self.fisher} Fisher, {self.steps} steps"]
        for block in self._blocks:
            layer = block.layer
            state = "no factors yet"
            if block.factors:
                named = zip(layer.factor_shapes(), block.factors, strict=True)
                shapes = "  ".join(f"{name} {list(f.total.shape)}" for name, f in named)
                skipped = sum(int(factor.skipped) for factor in block.factors)
                failed = sum(int(i.failed) for i in block.inverses or block.bases)
                state = f"{shapes}  updates skipped {skipped}  inverses failed {failed}"
            lines.append(f"  {layer.name or '(model)'}: {type(layer.module).__name__}  {state}")
        lines += [
            f"  {name or '(model)'}: left alone, {reason}"
            for name, reason in self._left_alone.items()
        ]
        return "\n".join(lines)

    # State

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of everything that a resumed run needs to continue bit for bit.

        Returns:
            A nested dictionary that ``torch.load(weights_only=True)`` accepts. Save it between
            steps.
        """
        layers = {
            block.layer.name: {
                part: {field: getattr(holder, field) for field in holder.STATE}
                for part, holder in block.parts().items()
            }
            for block in self._blocks
        }
        options = {option: getattr(self, option) for option in SAVED_OPTIONS}
        return {
            "version": STATE_VERSION,
            "options": options,
            "steps": self.steps,
            "layers": layers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; nothing changes unless all of it fits.

        Args:
            state: Result of :meth:`state_dict` of a run with the same layers and options that say
                what the factors are.

        Raises:
            ValueError: If the version, an option, the steps, a layer, a part or a shape does not
                fit.
        """
        names = sorted(block.layer.name for block in self._blocks)
        expected = {
            "version": STATE_VERSION,
            "options": {option: getattr(self, option) for option in SAVED_OPTIONS},
        }
        for key, value in expected.items():
            if state.get(key) != value:
                raise ValueError(f"load_state_dict: {key} must be {value}, got {state.get(key)}")
        if sorted(state) != ["layers", "options", "steps", "version"]:
            raise ValueError(
                "load_state_dict: state must hold layers, options, steps and version, "
                f"got {sorted(state)}"
            )
        if not isinstance(state["steps"], int) or state["steps"] < 0:
            raise ValueError(
                f"load_state_dict: steps must be an int from 0, got {state['steps']!r}"
            )
        if sorted(state["layers"]) != names:
            raise ValueError(
                f"load_state_dict: layers must be {names}, got {sorted(state['layers'])}"
            )
        restored = [block.restored(state["layers"][block.layer.name]) for block in self._blocks]
        self.steps = state["steps"]
        self._capture.forget()
        for block, saved in zip(self._blocks, restored, strict=True):
            block.replace(saved)
