"""kronfluence's influence factors, computed by kfac_fast.

Prepare the model and fit the factors inside of a ``with`` block; scores need none::

    with kfac_fast.integrations.kronfluence.enabled():
        model = prepare_model(model, task)
        analyzer = Analyzer("mnist", model, task)
        analyzer.fit_all_factors("ekfac", data)

Factors are those of kronfluence to rounding, sums with a count beside them, of linear layers and
convolutions in two dimensions. Where they are not those of the Fisher, they are so here, unless
``correct`` is given: patches are padded with zeros under every ``padding_mode``, also those of
per-example gradients in factors and scores, and rows that an attention mask leaves out are missing
from the sum of the inputs but not from that of the gradients. Always, patches are averaged over the
groups of channels, though each group has a block of its own, which one factor has no room for; and
of a module that is called several times, lambda matrices know the last call only, unless
kronfluence is told so by ``has_shared_parameters``. Other is how they are computed: the factors'
patches are never written out, one triangle is enough, per-example gradients are formed for a few
examples at a time, and matrices of several modules are decomposed at the same time. Covariances
that are given to the eigendecomposition stay as they are, where kronfluence divides float64 ones by
their counts in place.

Tested with kronfluence 1.0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.conv import ConvGeometry
from kfac_fast.eigenbases import eigendecompositions
from kfac_fast.integrations.convolutions import (
    are_patches_exact,
    geometry_of,
    output_positions,
    patches_gram,
)
from kfac_fast.integrations.replacing import replaced
from kfac_fast.integrations.versions import require
from kfac_fast.layers import RULES

require("kronfluence", "1.0.1")

from kronfluence.computer import factor_computer  # noqa: E402  # isort: skip
from kronfluence.factor.config import FactorConfig  # noqa: E402  # isort: skip
from kronfluence.module import conv2d, linear  # noqa: E402  # isort: skip
from kronfluence.module.tracked_module import ModuleMode, TrackedModule  # noqa: E402  # isort: skip
from kronfluence.module.tracker import factor  # noqa: E402  # isort: skip
from kronfluence.module.utils import get_tracked_module_names  # noqa: E402  # isort: skip
from kronfluence.utils import constants  # noqa: E402  # isort: skip

Factors = dict[str, dict[str, Tensor]]
"""Tensors by the names of the factor and of the module."""

MOST_ENTRIES = 2**18
"""For each thread, of covariances that are decomposed together, the last one's aside."""


class CovarianceTracker(factor.CovarianceTracker):  # type: ignore[misc]
    """kronfluence's tracker; what it is given are inputs and gradients as the module has them."""

    _activation_covariance_initialized: bool
    _gradient_covariance_initialized: bool

    def _update_activation_covariance_matrix(
        self, input_activation: Tensor, count: Tensor | int
    ) -> None:
        names = (
            constants.ACTIVATION_COVARIANCE_MATRIX_NAME,
            constants.NUM_ACTIVATION_COVARIANCE_PROCESSED,
        )
        known = self._activation_covariance_initialized
        self._add(names, known, count, self.module.input_gram, input_activation)
        self._activation_covariance_initialized = True

    def _update_gradient_covariance_matrix(
        self, output_gradient: Tensor, count: Tensor | int
    ) -> None:
        names = (
            constants.GRADIENT_COVARIANCE_MATRIX_NAME,
            constants.NUM_GRADIENT_COVARIANCE_PROCESSED,
        )
        known = self._gradient_covariance_initialized
        scale = float(self.module.gradient_scale) ** 2
        self._add(names, known, count, self.module.gradient_gram, output_gradient, alpha=scale)
        self._gradient_covariance_initialized = True

    def _add(
        self,
        names: tuple[str, str],
        known: bool,
        count: Tensor | int,
        form: Callable[..., Tensor],
        x: Tensor,
        **options: Any,
    ) -> None:
        """Add a sum of outer products and its count to those that are known, or keep them."""
        storage, (total, number) = self.module.storage, names
        if not known:
            device = count.device if isinstance(count, Tensor) else None
            storage[number] = torch.zeros(1, dtype=torch.int64, device=device)
            storage[total] = form(x, **options).to(x.dtype)
        elif storage[total].dtype in (torch.float32, torch.float64):
            form(x, beta=1.0, out=storage[total], **options)
        else:
            storage[total] += form(x, **options)  # which is in float32
        storage[number].add_(count)


class LambdaTracker(factor.LambdaTracker):  # type: ignore[misc]
    """kronfluence's tracker, which forms squared gradients of a few examples at a time.

    It is kronfluence's own for shared parameters, for gradients that the task processes, for other
    strategies than EKFAC, and for grouped or not zero-padded convolutions.
    """

    def register_hooks(self) -> None:
        """Set up the hooks."""
        module = self.module.original_module
        arguments = self.module.factor_args
        if (
            arguments.has_shared_parameters
            or self.module.per_sample_gradient_process_fnc is not None
            or not FactorConfig.CONFIGS[arguments.strategy].requires_eigendecomposition_for_lambda
            or not are_patches_exact(module, correct=self.module.correct)
        ):
            super().register_hooks()
            return
        dtype = arguments.per_sample_gradient_dtype

        @torch.no_grad()
        def forward_hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            device = "cpu" if arguments.offload_activations_to_cpu else x.device
            self.cached_activations = x.to(device=device, dtype=dtype, copy=True)
            self.cached_hooks.append(output.register_hook(backward_hook))

        @torch.no_grad()
        def backward_hook(gradient: Tensor) -> None:
            x = self.cached_activations.to(gradient.device)
            self.clear_all_cache()
            self._add_squared_gradients(x, gradient.detach().to(dtype))

        self.registered_hooks.append(self.module.register_forward_hook(forward_hook))

    def _add_squared_gradients(self, x: Tensor, gradient: Tensor) -> None:
        module, storage = self.module.original_module, self.module.storage
        layer = RULES[type(module)](self.module.name, module, "expand")
        layer.has_bias = module.bias is not None
        dtype = self.module.factor_args.lambda_dtype
        # Without any examples, kronfluence's own makes the zeros and converts the eigenvectors.
        self._update_lambda_matrix(gradient.new_empty(0, *layer.matrix_shape(), dtype=dtype))
        storage[constants.NUM_LAMBDA_PROCESSED] += len(gradient)
        bases = constants.ACTIVATION_EIGENVECTORS_NAME, constants.GRADIENT_EIGENVECTORS_NAME
        right, left = (storage[name] for name in bases)
        scale = float(self.module.gradient_scale) ** 2
        squares = layer.squared_gradients(x, gradient, right, left, scale)
        storage[constants.LAMBDA_MATRIX_NAME] += squares


class _Tracked:
    """What both modules have in common: their trackers."""

    def __init__(self, *args: Any, correct: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.correct = correct
        trackers: dict[Any, Any] = self._trackers  # type: ignore[attr-defined]
        trackers[ModuleMode.COVARIANCE] = CovarianceTracker(self)
        trackers[ModuleMode.LAMBDA] = LambdaTracker(self)


class TrackedLinear(_Tracked, linear.TrackedLinear):  # type: ignore[misc]
    """kronfluence's wrapper of ``nn.Linear``."""

    def get_flattened_activation(self, input_activation: Tensor) -> tuple[Tensor, Tensor | int]:
        """The input as it is, and how many of its rows count."""
        mask = self._mask(input_activation)
        rows = input_activation.shape[:-1].numel()
        return input_activation, rows if mask is None else self.attention_mask.sum()

    def input_gram(self, x: Tensor, **options: Any) -> Tensor:
        """Gram of the rows that count; options are those of the operator."""
        return ops.gram(x, bias=self.bias is not None, mask=self._mask(x), **options)

    def gradient_gram(self, gradient: Tensor, **options: Any) -> Tensor:
        """Gram of all rows, or correctly of those that count; options are those of the operator."""
        return ops.gram(gradient, mask=self._mask(gradient) if self.correct else None, **options)

    def _mask(self, x: Tensor) -> Tensor | None:
        mask: Tensor | None = self.attention_mask
        if mask is None or mask.numel() != x.shape[:-1].numel():
            return None
        return mask.reshape(x.shape[:-1]).bool()


class TrackedConv2d(_Tracked, conv2d.TrackedConv2d):  # type: ignore[misc]
    """kronfluence's wrapper of ``nn.Conv2d``."""

    def get_flattened_activation(self, input_activation: Tensor) -> tuple[Tensor, int]:
        """The input as it is, and the number of its patches."""
        x = input_activation
        return x, len(x) * output_positions(self.original_module, x)

    def input_gram(self, x: Tensor, **options: Any) -> Tensor:
        """Gram of the patches; options are those of the operator."""
        options |= {"bias": self.bias is not None, "correct": self.correct}
        return patches_gram(self.original_module, x, expand=True, **options)

    def gradient_gram(self, gradient: Tensor, **options: Any) -> Tensor:
        """Gram of the pixels; options are those of the operator."""
        return ops.gram(gradient, **options)

    def get_flattened_gradient(self, output_gradient: Tensor) -> tuple[Tensor, int]:
        """The pixels of the gradient, a view, and their number."""
        pixels = output_gradient.movedim(1, -1)
        return pixels, pixels.shape[:-1].numel()

    def _flatten_input_activation(self, input_activation: Tensor) -> Tensor:
        module, x = self.original_module, input_activation
        if are_patches_exact(module) or not are_patches_exact(module, correct=self.correct):
            rows: Tensor = super()._flatten_input_activation(x)
            return rows
        options = geometry_of(module, correct=True)
        geometry = ConvGeometry.normalize(self.name, 2, module.kernel_size, **options)
        patches = geometry.windows(x).flatten(1, 3).flatten(2).mT
        return F.pad(patches.flatten(0, 1), (0, int(self.bias is not None)), value=1.0)


Sized = tuple[int, str, tuple[str, ...]]
"""Entries of a covariance, the module's name and the names of what belongs to it."""


def _parts(covariances: Iterable[Sized]) -> Iterator[list[Sized]]:
    """Parts to decompose in one call: all of a large model's would double the memory it takes."""
    most = MOST_ENTRIES * torch.get_num_threads()
    part: list[Sized] = []
    for covariance in covariances:
        part.append(covariance)
        if sum(entries for entries, *_ in part) >= most:
            yield part
            part = []
    yield part


@torch.no_grad()
def perform_eigendecomposition(
    covariance_factors: Factors,
    model: nn.Module,
    state: Any,
    factor_args: Any,
    disable_tqdm: bool = True,
) -> Factors:
    """Decompose the covariances of every module, several at the same time.

    Args:
        covariance_factors: Sums and counts of every module.
        model: The prepared model.
        state: kronfluence's; the matrices are decomposed on its device.
        factor_args: kronfluence's; ``eigendecomposition_dtype`` is that of the computation.
        disable_tqdm: Taken for compatibility; there is no progress bar.

    Returns:
        Eigenvectors and eigenvalues of every module, on the CPU.

    Raises:
        ValueError: If a matrix is not finite.
    """
    names = get_tracked_module_names(model=model)
    results: Factors = {name: {} for name in constants.EIGENDECOMPOSITION_FACTOR_NAMES}
    sides = [
        (
            constants.ACTIVATION_COVARIANCE_MATRIX_NAME,
            constants.NUM_ACTIVATION_COVARIANCE_PROCESSED,
            constants.ACTIVATION_EIGENVECTORS_NAME,
            constants.ACTIVATION_EIGENVALUES_NAME,
        ),
        (
            constants.GRADIENT_COVARIANCE_MATRIX_NAME,
            constants.NUM_GRADIENT_COVARIANCE_PROCESSED,
            constants.GRADIENT_EIGENVECTORS_NAME,
            constants.GRADIENT_EIGENVALUES_NAME,
        ),
    ]
    sized = [
        (len(covariance_factors[side[0]][name]) ** 2, name, side)
        for name in names
        for side in sides
    ]
    for together in _parts(sorted(sized, key=lambda entry: entry[0])):
        means = (
            covariance_factors[total][name].to(state.device, factor_args.eigendecomposition_dtype)
            / covariance_factors[count][name].to(state.device)
            for _, name, (total, count, *_) in together
        )
        solved = eigendecompositions([(mean + mean.mT).div_(2) for mean in means])
        for (_, name, (total, _, vectors, values)), found in zip(together, solved, strict=True):
            if not found.valid:
                raise ValueError(f"{name}: {total} has no eigendecomposition")
            dtype = covariance_factors[total][name].dtype
            results[vectors][name] = found.vectors.to("cpu", dtype).contiguous()
            results[values][name] = found.values.to("cpu", dtype)
    return results


@contextmanager
def enabled(*, correct: bool = False) -> Iterator[None]:
    """Have models that are prepared inside of a ``with`` block be of this module's classes.

    The eigendecomposition is this module's in there, too.

    Args:
        correct: Whether padding modes are honoured, and an attention mask's also in the gradients.

    Yields:
        Nothing.
    """
    supported = TrackedModule.SUPPORTED_MODULES
    replacements = [
        (supported, nn.Linear, partial(TrackedLinear, correct=correct)),
        (supported, nn.Conv2d, partial(TrackedConv2d, correct=correct)),
        (factor_computer, "perform_eigendecomposition", perform_eigendecomposition),
    ]
    with replaced(replacements):
        yield
