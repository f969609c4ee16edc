"""The K-FAC preconditioner: hooks that form the factors, and the step that rewrites gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac_fast.blocks import Block, Form, bytes_of_parts, left_out, update_blocks
from kfac_fast.capture import Capture
from kfac_fast.curvature import Fisher, backpropagated, check_outputs
from kfac_fast.inverses import refine_inverses
from kfac_fast.layers import Approximation, Sharing
from kfac_fast.losses import Loss, Outputs, Targets, find_loss
from kfac_fast.options import (
    BOUNDS,
    DampingMode,
    Schedule,
    check_optimizer_step,
    check_options,
    number,
    refuse_replicas,
)
from kfac_fast.precision import in_own_precision
from kfac_fast.selection import apply_layer_options, describe_rest, find_blocks, layers_with_rows
from kfac_fast.state import restored_blocks, state_of
from kfac_fast.steps import (
    Refreshes,
    StepReport,
    clip_scale,
    gradient_divisor,
    graft,
    precondition,
    predicted_change,
    refresh,
    write,
)


class KFAC:
    r"""Preconditions the gradients of a model's layers with inverses of their Kronecker factors.

    .. math::

        V \leftarrow \nu \, (G + \sqrt\lambda / \pi \, I)^{-1} \, V \,
        (A + \pi \sqrt\lambda \, I)^{-1}

    for each layer's gradient :math:`V` of shape ``[out, in (+ 1)]``, with the covariances :math:`A`
    of its inputs and :math:`G` of the gradients of its output. It works with any ``torch.optim``
    optimizer::

        kfac = kfac_fast.KFAC(model, damping=1e-2, kl_clip=1e-3, learning_rate=0.1)
        for inputs, targets in data:
            optimizer.zero_grad()
            loss_function(model(inputs), targets).backward()
            kfac.step()  # rewrites .grad; or, once before the loop, kfac.attach(optimizer)
            optimizer.step()

    The first size of every input is the batch's, read from the model's first input. Only backward
    passes that add to the weights' ``.grad`` count, not those of ``torch.autograd.grad``. Layers
    that are fed one tensor, such as the projections of an attention block, have their input
    covariance formed once. Several processes are not served yet. Options marked *schedule* are a
    number, or a function of the number of steps taken. A batch whose inputs or gradients hold NaN
    or infinity leaves the factors as they were, and is counted in :meth:`summary`.

    Fisher types other than ``"empirical"`` and ``"forward-only"`` run backward passes of their own
    between those of the training loop, which a loss scale does not touch::

        outputs = model(inputs)
        kfac.update_curvature(outputs, loss="cross_entropy")
        loss_function(outputs, targets).backward()

    Make it before a compiled model's first run; ``nn.MultiheadAttention`` breaks the graph only
    where it is checkpointed. With ``update_curvature``, a second backward pass, set
    ``torch._functorch.config.donated_buffer = False`` before compiling.

    Args:
        model: The model; layers of the types in :data:`kfac_fast.layers.RULES` are preconditioned,
            and biases whose weights are frozen by now.
        approx: ``"expand"`` or ``"reduce"``, for layers that share their weights over positions.
        fisher: Whose gradients make :math:`G`. ``"empirical"``: those of the training loss as they
            pass. ``"mc"``: those of the loss on labels drawn from the model, in
            :meth:`update_curvature`. ``"exact"``: the same in expectation over all labels (the
            type-2 generalised Gauss-Newton matrix), at the cost of a backward pass for each entry
            of an example's outputs. ``"curvature-propagation"``: the same in expectation, all
            entries in one pass with random signs. ``"forward-only"``: none, :math:`G` is the
            identity, whatever the loss and its reduction; every forward pass with gradients enabled
            counts, and normalisations, whose only factor needs gradients, are left alone.
        loss_reduction: ``"mean"`` or ``"sum"``, as of the training loss.
        loss_terms_per_example: Terms of each example that a mean loss is divided by: 1 for one
            label an example, the sequence length for one label a token. It serves the empirical
            Fisher where :meth:`update_curvature` does not count the terms.
        accumulation_steps: Micro-batches whose losses are divided by this number and summed up in
            ``.grad``.
        loss_scale: Number that the training loss is multiplied by before ``backward()``
            (*schedule*), for the empirical Fisher; with a ``torch.amp.GradScaler``,
            ``lambda step: scaler.get_scale()``. Call :meth:`step` between ``scaler.unscale_`` and
            ``scaler.step`` even after an overflow, or see :meth:`attach`.
        mc_samples: Draws of labels or signs in each :meth:`update_curvature`.
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
        inverse_update_steps: Steps between refreshes of the inverses or eigenbases (*schedule*). A
            layer's first finite batch brings one too.
        refinement_steps: Newton-Schulz iterations by which the inverses follow each update of the
            factors between refreshes, see :func:`kfac_fast.inverses.refine_inverses`.
        kl_clip: Bound :math:`\kappa` on the squared length of :math:`\eta P`, the step without
            momentum, in the Fisher metric (*schedule*; None: no bound): all layers are scaled by
            :math:`\nu = \min(1, \sqrt{\kappa / (\eta^2 \sum \langle V, P \rangle)})`.
        learning_rate: Peak learning rate :math:`\eta` that ``kl_clip`` assumes (*schedule*, always
            above 0). The peak on purpose: with the current rate of a decaying schedule, the decay
            would cancel wherever the clip acts.
        grafting: ``"adam"`` scales each layer's direction to the length of Adam's step on its raw
            gradient.
        skip: Regular expressions; a layer is left alone if one is found in its qualified or its
            module's class name.
        layer_options: Own values of ``approx``, ``damping`` (*schedule*) and ``factor_decay``
            (*schedule*), by regular expressions that are searched for in qualified names; a later
            one overrides an earlier one. For other options to differ, intervals or the clip, give
            the model a second preconditioner, and have each ``skip`` the other's layers.
        factor_dtype: Of the factors and inverses: ``torch.float32`` or ``torch.float64``; that of
            the layers, and float32 for half precision, if None.
        callback: Called at the end of each step with a :class:`StepReport`.

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
        learning_rate: Schedule | None = None,
        grafting: Literal["adam"] | None = None,
        skip: Sequence[str] = (),
        layer_options: Mapping[str, Mapping[str, Any]] | None = None,
        factor_dtype: torch.dtype | None = None,
        callback: Callable[[StepReport], None] | None = None,
    ) -> None:
        refuse_replicas()
        self.model = model
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
        self.layer_options = dict(layer_options or {})
        self.factor_dtype = factor_dtype
        self.callback = callback
        self.steps = 0
        self._refreshes = Refreshes()
        self._listeners: list[Callable[[], None]] = []  # to steps that begin
        check_options(vars(self))
        form: Form = "inverse"
        if damping_mode == "exact":
            form = "corrected" if eigenvalue_correction else "eigenbasis"
        self._blocks, self._left_alone = find_blocks(
            model, approx, skip, form, dtype=factor_dtype, forward_only=fisher == "forward-only"
        )
        apply_layer_options(self._blocks, self.layer_options)
        self._check_schedules()
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

    def _check_schedules(self) -> None:
        """Read every schedule at this step, so that a bad one stops before any change."""
        for option in BOUNDS:
            if option not in ("kl_clip", "learning_rate") or self.kl_clip is not None:
                self._now(option)
        for block in self._blocks:
            for option in block.options:
                self._now(option, block)
        if self.damping_mode == "exact" and 0 in self._dampings(self._blocks):
            raise ValueError("KFAC: damping must be positive with damping_mode 'exact', got 0")

    def _now(self, option: str, block: Block | None = None) -> float:
        """An option's number at the current step, checked; a block may have its own."""
        schedule: Schedule = getattr(self, option)
        if block is not None:
            schedule = block.options.get(option, schedule)
        return number(option, schedule, self.steps)

    def _numbers(self, option: str, blocks: Sequence[Block]) -> list[float]:
        """An option's number for each block."""
        common = self._now(option)
        return [self._now(option, b) if option in b.options else common for b in blocks]

    def _dampings(self, blocks: Sequence[Block]) -> list[float]:
        return self._numbers("damping", blocks)

    def _due(self, option: str) -> bool:
        return self.steps % self._now(option) == 0

    @property
    def device(self) -> torch.device:
        """Where the preconditioned layers are."""
        return self._blocks[0].layer.weight.device

    @in_own_precision
    def update_curvature(
        self,
        outputs: Outputs,
        *,
        loss: str | nn.Module | Loss[Outputs],
        targets: Targets = None,
        generator: torch.Generator | None = None,
    ) -> None:
        r"""Form the gradient covariances from the loss's curvature in the model's outputs.

        .. math:: G = c \sum_k \sum_n \sum_s g_{k,n,s} g_{k,n,s}^\top, \qquad
            g_{k,n,s} = \left(\frac{\partial f_n}{\partial z_{n,s}}\right)^\top r_{k,n}, \qquad
            \sum_k r_{k,n} r_{k,n}^\top = \nabla_{f_n}^2 \sum_m \ell_m

        with :math:`c = 1/M` for a mean of M terms, 1 for a sum. The vectors :math:`r` are the
        columns of a root of the Hessian under ``fisher="exact"``, their sums with random signs
        under ``"curvature-propagation"``, and gradients of the loss on drawn labels under ``"mc"``;
        for both, the last equation holds in expectation. Under ``"empirical"`` only the terms
        of the loss are counted, for losses that ignore some labels; under ``"forward-only"`` there
        is nothing to do.

        Call it after the forward pass and before ``backward()``. It keeps the graph and touches no
        ``.grad``; on steps whose factors are not updated it does nothing. One call serves one
        forward pass, with all of its losses.

        Args:
            outputs: The model's outputs, as the loss takes them; for ``"gaussian_nll"`` a tuple
                ``(mean, variance)``, for several losses a tuple of what each takes. The first
                dimension is the examples: under ``"exact"``, tokens of one example must not be
                flattened into it.
            loss: ``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"`` or ``"gaussian_nll"``; or
                ``nn.CrossEntropyLoss(...)``, ``nn.MSELoss()``, ``nn.BCEWithLogitsLoss(...)`` or
                ``nn.GaussianNLLLoss()``; a :class:`kfac_fast.losses.WeightedSum` of several; or
                your own, a :class:`kfac_fast.losses.Loss`.
            targets: Training labels, for several losses a tuple. The curvature depends on them only
                where the loss ignores or weighs some.
            generator: Source of randomness; PyTorch's default if None.

        Raises:
            RuntimeError: If the outputs need no gradients, or share layers with an earlier call's.
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
        check_outputs(outputs)  # at once: where no layer's call waits, nobody asks for a scalar
        scalars = backpropagated(self.fisher, known, outputs, targets, self.mc_samples, generator)
        self._capture.backpropagate(scalars, terms)

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
                attention's projections and normalisations. A later call overrides an earlier one.
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
        found = layers_with_rows(self._blocks, pattern)
        sharing = Sharing(mask, segments, num_segments)
        self._capture.share({layer.name: sharing for layer in found})

    # The step

    @torch.no_grad()
    @in_own_precision
    def step(self) -> None:
        """Update factors and inverses if they are due, then precondition every layer's ``.grad``.

        Call it after ``backward()`` and before ``optimizer.step()``, unless :meth:`attach` does.
        The host waits for the device only to refresh bases of exact damping.

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
                "pass, got none of its calls; checkpoint(use_reentrant=True) hides them"
            )
        if not pending and self._untouched():
            raise RuntimeError(
                "KFAC.step: the gradients must come from the model given to KFAC, got no pass of it"
            )
        self._check_schedules()
        for listener in self._listeners:
            listener()
        self._capture.forget()
        updated, refreshed = self._update_factors()
        clip, inner_product = self._precondition()
        if self.callback is not None:
            damping, counts = self._now("damping"), left_out(self._blocks)
            self.callback(
                StepReport(self.steps, damping, updated, refreshed, clip, inner_product, *counts)
            )
        self.steps += 1

    def _untouched(self) -> bool:
        """Whether there are gradients of weights, but no factors, although they are due."""
        if not self._due("factor_update_steps") or any(b.factors for b in self._blocks):
            return False
        trained = [b.layer for b in self._blocks if b.layer.reason_against() is None]
        return any(layer.gradients()[0] is not None for layer in trained)

    def _update_factors(self) -> tuple[bool, bool]:
        """Whether factors were updated and inverses refreshed."""
        had_factors = sum(bool(block.factors) for block in self._blocks)
        update = self._due("factor_update_steps")
        if update:
            # Forward-only identities are averaged over the calls.
            reduction = "mean" if self.fisher == "forward-only" else self.loss_reduction
            update_blocks(self._blocks, self._numbers("factor_decay", self._blocks), reduction)
        known = [block for block in self._blocks if block.factors]
        due = self._due("inverse_update_steps") or len(known) > had_factors
        if due or (update and self._refreshes.came_too_early(known)):
            due = True
            self._refreshes.warn()
            refresh(known, self._dampings(known), self.damping_mode)
            self._refreshes.count(known)
        elif update and self.refinement_steps:
            layers = [(block.factors, block.inverses) for block in known]
            count, dampings = self.refinement_steps, self._dampings(known)
            refine_inverses(layers, dampings, self.damping_mode, steps=count)
        return update, due

    def _precondition(self) -> tuple[Tensor | None, Tensor | None]:
        """The clip's scale, and the inner product of gradients and preconditioned ones."""
        found = {block: block.layer.gradients() for block in self._blocks if block.factors}
        ready = [block for block, tensors in found.items() if tensors[0] is not None]
        if not ready:
            return None, None
        grads = [b.layer.matrix(found[b], b.factors[0].mean.dtype) for b in ready]
        directions, inner_product = precondition(
            ready, grads, self._dampings(ready), self.damping_mode
        )
        scale = None
        if self.kl_clip is not None:
            scale = clip_scale(inner_product, self._now("kl_clip"), self._now("learning_rate"))
            torch._foreach_mul_(directions, scale)
        if self.grafting is not None:
            directions = list(map(graft, ready, grads, directions))
        write(ready, directions, found)
        return scale, inner_product

    @torch.no_grad()
    @in_own_precision
    def predicted_change(
        self, gradients: Mapping[nn.Parameter, Tensor], steps: Mapping[nn.Parameter, Tensor]
    ) -> Tensor:
        r"""How a step changes the loss by the quadratic model that K-FAC makes of it.

        .. math:: M(\delta) - M(0) = \sum_l \langle V_l, \delta_l \rangle + \tfrac12
            \langle \delta_l, G_l \delta_l A_l + \lambda \delta_l \rangle

        over the preconditioned layers :math:`l` alone. Corrected eigenvalues take the place of
        those of :math:`A_l` and :math:`G_l`. An accumulated sum is divided as in ``.grad``.

        Args:
            gradients: Gradients of the loss before they were preconditioned.
            steps: What was added to the parameters.

        Returns:
            Scalar tensor; negative if the step is predicted to reduce the loss.

        Source: Martens & Grosse (2015), section 6.5.
        """
        known = [block for block in self._blocks if block.factors]
        divisor = gradient_divisor(self.loss_reduction, self.accumulation_steps)
        return predicted_change(known, gradients, steps, self._dampings(known), divisor)

    # Around the training loop

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Call :meth:`step` at the start of every ``optimizer.step()``.

        One that is skipped, as by a ``torch.amp.GradScaler`` after an overflow, counts as none:
        what its batches have added is forgotten once ``zero_grad`` has set ``.grad`` to None. Call
        :meth:`step` yourself, skipped or not, if ``.grad`` is zeroed in place instead
        (``set_to_none=False``) or set to None between the passes of one step. Under other Fishers
        than the empirical, the curvature of a skipped batch counts with that of the next. A fused
        optimizer's step skips by itself: an overflow counts in ``steps`` and as a batch left out.

        All gradients are preconditioned in that one call. Where other optimizers hold some of the
        parameters, step them later, and with ``kl_clip`` have a scaler unscale all of them first.

        Args:
            optimizer: Any optimizer that holds some of the preconditioned parameters.

        Raises:
            RuntimeError: If an optimizer is already attached; later, from ``optimizer.step()``, if
                it is given a closure, whose gradients come too late, or if it is a fused one whose
                gradients a scaler has not unscaled yet, with ``kl_clip``, ``grafting``, ``adapt``.
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
        for block in self._blocks:
            block.follows_grad = self.fisher == "empirical"

    def _before_optimizer(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        length_counts = bool(self.kl_clip is not None or self.grafting or self._listeners)
        check_optimizer_step(optimizer, (*args[1:], *named.values()), length_counts)
        for block in self._blocks:
            block.forget_cleared()
        self.step()

    def detach(self) -> None:
        """Remove every hook from the model and the optimizer; :meth:`state_dict` keeps working.

        Not between the passes of a checkpointed part, as at the end of a ``with`` block: layers
        whose inputs are needed would save less in the second, and PyTorch raises CheckpointError.
        """
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
        head = f"K-FAC {self.approx}, {self.fisher} Fisher, {self.steps} steps"
        described = [block.describe() for block in self._blocks]
        described += describe_rest(self._left_alone)
        memory = ", ".join(f"{kind} {size / 2**20:.1f}" for kind, size in self.memory().items())
        return "\n  ".join([head, *described, f"MiB: {memory}"])

    def memory(self) -> dict[str, int]:
        """Bytes that the preconditioner holds between steps.

        Returns:
            By kind: running averages, inverses or eigenbases, Adam's second moments, and memory
            that waits for the next batch's sums.
        """
        return {**bytes_of_parts(self._blocks), "sums": self._capture.nbytes}

    def condition_numbers(self) -> dict[str, list[Tensor]]:
        """Spectral condition numbers of the factors as of the last refresh, by layer.

        Each call computes eigenvalues, unless there are eigenbases.

        Returns:
            A tensor of the batch shape for each factor: of the damped one, or under exact damping
            of the factor itself.
        """
        return {b.layer.name: b.condition_numbers() for b in self._blocks if b.factors}

    # State

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of all that a resumed run needs of it to continue bit for bit.

        Returns:
            A nested dictionary that ``torch.load(weights_only=True)`` accepts. Save it between
            steps, and schedules that keep a state apart.
        """
        return state_of(self.steps, self._saved_options(), self._blocks)

    def _saved_options(self) -> dict[str, str]:
        return {option: getattr(self, option) for option in ("fisher", "loss_reduction")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; nothing changes unless all of it fits.

        Args:
            state: Result of :meth:`state_dict` of a run with the same layers and options that say
                what the factors are.

        Raises:
            ValueError: If the version, an option, the steps, a layer, a part or a shape does not
                fit.
        """
        restored = restored_blocks(state, self._saved_options(), self._blocks)
        self.steps = state["steps"]
        self._capture.forget()
        for block, saved in zip(self._blocks, restored, strict=True):
            block.replace(saved)
        self._refreshes.count([block for block in self._blocks if block.factors])
