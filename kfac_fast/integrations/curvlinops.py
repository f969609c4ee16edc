"""curvlinops' KFAC and EKFAC operators, computed and inverted by kfac_fast.

Use the classes of this module in place of curvlinops' own, which they are subclasses of; or have
everything that uses curvlinops, such as laplace-torch, use them for a while::

    with kfac_fast.integrations.curvlinops.enabled():
        laplace.fit(data)

Results are those of curvlinops to rounding, with its scales. Where they are not those of the
Fisher, they are so here, unless ``correct`` is given: patches are padded with zeros under every
``padding_mode``, and inputs are counted again whenever activation checkpointing computes a layer
again in the backward pass, but for a first layer that is checkpointed by itself. Always, patches
are averaged over the groups of channels, though each group has a block of its own, which one factor
has no room for; and the covariances of a layer's calls are added up in both factors, of which
curvlinops expects one. Other is how they are computed: patches are never written out, one triangle
of a factor is enough, gradients of the weights are not computed on the way, those of outputs are
used as they pass, a layer's inputs wait for the backward pass that lets go of them, all inverses
are one call, and per-example gradients are formed for a few examples at a time.

Tested with curvlinops-for-pytorch 3.0.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from kfac_fast import ops
from kfac_fast.eigenbases import eigendecompositions
from kfac_fast.graph import last_reached, nodes_behind
from kfac_fast.integrations.convolutions import are_patches_exact, output_positions, patches_gram
from kfac_fast.integrations.dampings import shift_of
from kfac_fast.integrations.replacing import replaced
from kfac_fast.integrations.versions import require
from kfac_fast.layers import RULES
from kfac_fast.schema import result_dtype

require("curvlinops-for-pytorch", "3.0.1")

import curvlinops  # noqa: E402  # isort: skip
from curvlinops.kfac import FisherType, KFACType  # noqa: E402  # isort: skip


class KFACLinearOperator(curvlinops.KFACLinearOperator):  # type: ignore[misc]
    """:class:`curvlinops.KFACLinearOperator`, its factors formed by kfac_fast.

    Takes the same arguments, and ``correct``. Source: Eschenhagen et al. (2023), section 3.

    Args:
        arguments: Of curvlinops' own class.
        correct: Whether padding modes are honoured, and inputs counted once where layers are
            computed again.
        options: Of curvlinops' own class.
    """

    _correct = False
    _is_backward = False

    def __init__(self, *arguments: Any, correct: bool = False, **options: Any) -> None:
        self._correct = correct
        super().__init__(*arguments, **options)

    def state_dict(self) -> dict[str, Any]:
        """The state of curvlinops' own class, and ``"correct"``."""
        return {**super().state_dict(), "correct": self._correct}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of curvlinops' own, whose numbers are not corrected.

        Args:
            state_dict: What :meth:`state_dict` has returned.
        """
        super().load_state_dict(state_dict)
        self._correct = state_dict.get("correct", False)

    def compute_kronecker_factors(self) -> None:
        """Form the factors, summed up at least in float32, in the dtype of the weights."""
        with self._cleared_on_failure():
            super().compute_kronecker_factors()
        for covariances in (self._input_covariances, self._gradient_covariances):
            for name, covariance in covariances.items():
                weight = self._model_func.get_submodule(name).weight
                covariances[name] = covariance.to(weight.dtype)

    @contextmanager
    def _cleared_on_failure(self) -> Iterator[None]:
        """Keep no hooks, inputs and graphs of a pass that is broken off."""
        try:
            yield
        except BaseException:
            self._remove_hooks()  # first, as they fill what is cleared
            for kept in self._kept():
                kept.clear()
            raise

    def _remove_hooks(self) -> None:
        """Those that curvlinops has installed for this operator, and removes on success only."""
        for name in self._mapping:
            module = self._model_func.get_submodule(name)
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in [*hooks.items()]:
                    if isinstance(hook, partial) and getattr(hook.func, "__self__", None) is self:
                        del hooks[key]

    def _kept(self) -> list[Any]:
        """What a pass fills, and empties where it comes to its end."""
        return [self._edges, self._inputs, self._earlier]

    def _hook_accumulate_input_covariance(
        self, module: nn.Module, inputs: tuple[Tensor, ...], module_name: str
    ) -> None:
        if len(inputs) != 1:
            raise ValueError(f"{module_name}: modules must have one input, got {len(inputs)}")
        if self._correct and self._is_backward:
            return
        x = inputs[0].detach()
        waits = self._fisher_type != FisherType.FORWARD_ONLY and not self._is_backward
        if waits and torch.is_grad_enabled():  # autograd keeps the input as well
            self._inputs.setdefault(module_name, []).append((x, x._version))
        else:
            self._add_input(x, module, module_name)

    def _add_inputs(self, module: nn.Module, module_name: str) -> None:
        """Those that wait."""
        for x, version in self._inputs.pop(module_name, []):
            if x._version != version:
                raise RuntimeError(
                    f"{module_name}: the input must not change before the backward pass, got one "
                    "that is changed in place"
                )
            self._add_input(x, module, module_name)

    def _add_input(self, x: Tensor, module: nn.Module, module_name: str) -> None:
        expand = self._kfac_approx == KFACType.EXPAND
        options: dict[str, Any] = {"bias": self._is_joint(module_name)}
        options |= _added_to(self._input_covariances, module_name)
        if isinstance(module, nn.Conv2d):
            positions = output_positions(module, x) if expand else 1
            scale = 1 / (self._N_data * positions)
            options["correct"] = self._correct
            result = patches_gram(module, x, expand=expand, alpha=scale, **options)
        elif expand or x.dim() == 2:
            scale = 1 / (self._N_data * x.shape[1:-1].numel())
            result = ops.gram(x, alpha=scale, **options)
        else:
            result = ops.shared_gram(x, reduction="mean", alpha=1 / self._N_data, **options)
        self._input_covariances[module_name] = result

    def _accumulate_gradient_covariance(
        self, grad_output: Tensor, module: nn.Module, module_name: str
    ) -> None:
        g = grad_output.detach()
        if isinstance(module, nn.Conv2d):
            g = g.movedim(1, -1)
        options: dict[str, Any] = {"alpha": self._scale(len(g))}
        options |= _added_to(self._gradient_covariances, module_name)
        if self._kfac_approx == KFACType.EXPAND or g.dim() == 2:
            result = ops.gram(g, **options)
        else:
            result = ops.shared_gram(g, reduction="sum", **options)
        self._gradient_covariances[module_name] = result
        if self._earlier[module_name]:
            self._earlier[module_name] -= 1
        else:
            self._add_inputs(module, module_name)

    def _register_tensor_hook_on_output_to_accumulate_gradient_covariance(
        self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, module_name: str
    ) -> None:
        self._edges.append((module_name, get_gradient_edge(output)))
        super()._register_tensor_hook_on_output_to_accumulate_gradient_covariance(
            module, inputs, output, module_name
        )

    def _register_tensor_hook_on_output_to_accumulate_corrected_eigenvalues(
        self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, module_name: str
    ) -> None:
        self._edges.append((module_name, get_gradient_edge(output)))
        super()._register_tensor_hook_on_output_to_accumulate_corrected_eigenvalues(
            module, inputs, output, module_name
        )

    @property
    def _edges(self) -> list[tuple[str, GradientEdge]]:
        """Layers that were called in the present pass, and their outputs."""
        edges: list[tuple[str, GradientEdge]] = self.__dict__.setdefault("_outputs", [])
        return edges

    @property
    def _inputs(self) -> dict[str, list[tuple[Tensor, int]]]:
        """Inputs of layers that the last backward pass is still to reach, and their versions."""
        inputs: dict[str, list[tuple[Tensor, int]]] = self.__dict__.setdefault("_waiting", {})
        return inputs

    @property
    def _earlier(self) -> Counter[str]:
        """How many gradients of a layer's outputs are still to come before the last pass."""
        earlier: Counter[str] = self.__dict__.setdefault("_before_last", Counter())
        return earlier

    def _compute_loss_and_backward(self, output: Tensor, y: Tensor) -> None:
        weights: Any = self._params
        try:
            if self._fisher_type != FisherType.FORWARD_ONLY:
                self._params: Any = self._asked_for(output)
                passes = {FisherType.TYPE2: output.shape[1], FisherType.MC: int(self._mc_samples)}
                for name, _ in self._edges:
                    self._earlier[name] += passes.get(self._fisher_type, 1) - 1
            self._is_backward = True
            super()._compute_loss_and_backward(output, y)
            for name in [*self._inputs]:  # of layers that the passes have not reached
                self._add_inputs(self._model_func.get_submodule(name), name)
        finally:
            self._params, self._is_backward = weights, False
            self._edges.clear()  # also those of calls that checkpointing has repeated in it
            self._earlier.clear()

    def _asked_for(self, output: Tensor) -> list[GradientEdge | Tensor]:
        """What a backward pass is asked for, so that it passes all outputs of the layers."""
        # At what it never reaches, an output or a weight, autograd raises, as for curvlinops.
        called = {name for name, _ in self._edges}
        others = [layer for name, layer in self._mapping.items() if name not in called]
        ends = _ends(output, [edge for _, edge in self._edges])
        return [*ends, *(self._params[position] for layer in others for position in layer.values())]

    def _is_joint(self, name: str) -> bool:
        """Whether weight and bias of a layer are one block."""
        return {"weight", "bias"} <= set(self._mapping[name]) and not self._separate_weight_and_bias

    def _scale(self, batch_size: int) -> float:
        """What outer products of the loss's gradients are multiplied by."""
        samples, examples = int(self._mc_samples), int(self._N_data)
        if self._loss_func.reduction == "sum":
            return 1 / samples
        return batch_size**2 * int(self._num_per_example_loss_terms) / (examples * samples)


def _ends(output: Tensor, edges: list[GradientEdge]) -> list[GradientEdge]:
    """Of the layers' outputs those that a pass from the model's reaches last, or never."""
    reached = nodes_behind(get_gradient_edge(output).node)
    last = last_reached(dict(enumerate(edges)))
    return [edge for i, edge in enumerate(edges) if i in last or edge.node not in reached]


def _added_to(covariances: dict[str, Tensor], name: str) -> dict[str, Any]:
    """Options of an operator that adds to a covariance, if there is one."""
    if name not in covariances:
        return {}
    known = covariances[name]
    return {"out": known.to(result_dtype(known.dtype)), "beta": 1.0}


class EKFACLinearOperator(KFACLinearOperator, curvlinops.EKFACLinearOperator):  # type: ignore[misc]
    """:class:`curvlinops.EKFACLinearOperator`, computed by kfac_fast.

    Takes the same arguments, and ``correct``. Source: George et al. (2018), section 3.
    """

    def compute_eigenvalue_correction(self) -> None:
        """Form the corrected eigenvalues."""
        with self._cleared_on_failure():
            super().compute_eigenvalue_correction()

    def _kept(self) -> list[Any]:
        return [*super()._kept(), self._cached_activations]

    def _compute_eigenvectors(self) -> None:
        if not (self._input_covariances or self._gradient_covariances):
            self.compute_kronecker_factors()
        sides = (
            (self._input_covariances, self._input_covariances_eigenvectors),
            (self._gradient_covariances, self._gradient_covariances_eigenvectors),
        )
        for covariances, eigenvectors in sides:
            found = eigendecompositions(list(covariances.values()))
            for name, own in zip(covariances, found, strict=True):
                if not own.valid:
                    raise LinAlgError(f"{name}: its covariance has no eigendecomposition")
                eigenvectors[name] = own.vectors
            covariances.clear()

    def _accumulate_corrected_eigenvalues(
        self, grad_output: Tensor, module: nn.Module, module_name: str
    ) -> None:
        right = self._input_covariances_eigenvectors.get(module_name)
        is_exact = are_patches_exact(module, correct=self._correct)
        if right is None or type(module) not in RULES or not is_exact:
            super()._accumulate_corrected_eigenvalues(grad_output, module, module_name)
            return
        g, scale = grad_output.detach(), self._scale(len(grad_output))
        left = self._gradient_covariances_eigenvectors[module_name]
        layer = RULES[type(module)](module_name, module, "expand")
        layer.has_bias = self._is_joint(module_name)
        x = self._cached_activations[module_name]
        corrected, totals = layer.squared_gradients(x, g, right, left, scale), {}
        if not layer.has_bias:
            positions = g.flatten(2).sum(2) if isinstance(module, nn.Conv2d) else g
            sums = positions if positions.dim() == 2 else positions.flatten(1, -2).sum(1)
            parts = {"weight": corrected, "bias": scale * (sums @ left).square().sum(0)}
            totals = {pos: parts[name] for name, pos in self._mapping[module_name].items()}
        known = self._corrected_eigenvalues
        if layer.has_bias:
            known[module_name] = known.get(module_name, 0) + corrected
        else:
            before = known.get(module_name, {})
            known[module_name] = {pos: before.get(pos, 0) + new for pos, new in totals.items()}


class KFACInverseLinearOperator(curvlinops.KFACInverseLinearOperator):  # type: ignore[misc]
    """:class:`curvlinops.KFACInverseLinearOperator` that inverts all layers in one call.

    Takes the same arguments. A matrix that is not positive definite in float32 is inverted by
    curvlinops itself, which tries again in float64.
    """

    def _compute_or_get_cached_inverse(self, name: str) -> Any:
        inverts = not self._use_exact_damping and self._cache
        if inverts and name not in self._inverse_gradient_covariances:
            self._invert_all()
        return super()._compute_or_get_cached_inverse(name)

    def _invert_all(self) -> None:
        operator = self._A
        sides = (
            (operator._input_covariances, self._inverse_input_covariances),
            (operator._gradient_covariances, self._inverse_gradient_covariances),
        )
        matrices, dampings = [], []
        for name in operator._mapping:
            pair = [covariances.get(name) for covariances, _ in sides]
            for matrix, damping in zip(pair, self._compute_damping(*pair), strict=True):
                if matrix is not None:
                    matrices.append(matrix)
                    dampings.append(shift_of(damping))
        inverses, info, _ = ops.damped_inverse(matrices, dampings)
        solved = iter(zip(inverses, info.tolist(), strict=True))
        for name in operator._mapping:
            found = [next(solved) if name in covs else (None, 0) for covs, _ in sides]
            pair = [inverse for inverse, _ in found]
            if any(failed for _, failed in found):
                pair = self._compute_inverse_factors(*(covs.get(name) for covs, _ in sides))
            for (_, cache), inverse in zip(sides, pair, strict=True):
                cache[name] = inverse


_OURS = {
    curvlinops.KFACLinearOperator: KFACLinearOperator,
    curvlinops.EKFACLinearOperator: EKFACLinearOperator,
    curvlinops.KFACInverseLinearOperator: KFACInverseLinearOperator,
}


_LIBRARY_MAKES = {
    kind: kind.__init__
    for kind in (curvlinops.KFACLinearOperator, curvlinops.KFACInverseLinearOperator)
}


@contextmanager
def enabled(*, correct: bool = False) -> Iterator[None]:
    """Have operators that are made inside of a ``with`` block be of this module's classes.

    Args:
        correct: That of :class:`KFACLinearOperator`.

    Yields:
        Nothing.
    """

    def replacement(library_makes: Any) -> Any:
        def make(self: Any, *args: Any, **options: Any) -> None:
            if type(self) in _OURS:
                self.__class__ = _OURS[type(self)]
                self._correct = correct
            library_makes(self, *args, **options)

        return make

    with replaced([(kind, "__init__", replacement(make)) for kind, make in _LIBRARY_MAKES.items()]):
        yield
