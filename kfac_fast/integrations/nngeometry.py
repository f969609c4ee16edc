"""nngeometry's Kronecker factors, their inverses and eigenbases' diagonals, computed by kfac_fast.

Have the matrices that are made for a while take them::

    with kfac_fast.integrations.nngeometry.enabled():
        fisher = FIM(model, loader, PMatKFAC)

It serves linear layers and convolutions in one and two dimensions, for ``PMatKFAC`` and
``PMatEKFAC``; other representations and layers are nngeometry's own. Factors are those of
nngeometry to rounding. With ``n`` examples and ``c`` outputs of the function, the input factor is
``sqrt(c) / n`` times its sum and the gradient factor ``1 / (n sqrt(c))``, for convolutions also
divided by the number of output positions. Where they are not those of the Fisher, they are so here,
unless ``correct`` is given: patches are padded with zeros under every ``padding_mode``; and a
module that is called several times has the input of its last call in place of each, whereas the
correct factors add up each call's own, with the gradient factor divided by their number. Always,
patches of a grouped convolution are taken over all groups, so that its factors fit no weight; and
the diagonal in the eigenbasis is of the last call's input with each gradient. The inverses of
``PMatKFAC.inverse`` are one call; a factor that is not positive definite is nngeometry's business.

Tested with nngeometry 0.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.integrations.convolutions import are_patches_exact, geometry_of
from kfac_fast.integrations.dampings import shift_of
from kfac_fast.integrations.replacing import replaced
from kfac_fast.integrations.versions import require
from kfac_fast.layers import RULES
from kfac_fast.schema import result_dtype

require("nngeometry", "0.4")

import nngeometry.layercollection as layers  # noqa: E402  # isort: skip
from nngeometry.backend import TorchHooksJacobianBackend  # noqa: E402  # isort: skip
from nngeometry.backend.torch_hooks import grads  # noqa: E402  # isort: skip
from nngeometry.object import PMatKFAC  # noqa: E402  # isort: skip


def _add(buffer: Tensor, form: Callable[..., Tensor], *inputs: Any, **options: Any) -> None:
    """Add a batch's sum to a factor; one in half precision, as nngeometry's, is rounded to it."""
    if buffer.dtype == result_dtype(buffer.dtype):
        form(*inputs, beta=1.0, out=buffer, **options)
    else:
        buffer += form(*inputs, **options)


def _add_squared_gradients(
    diagonal: Tensor,
    module: nn.Module,
    bias: bool,
    x: Tensor,
    g: Tensor,
    right: Tensor,
    left: Tensor,
) -> None:
    """Add the examples' squared gradients in the bases of the inputs and the outputs."""
    rule = RULES[type(module)]("nngeometry", module, "expand")
    rule.has_bias = bias
    diagonal += rule.squared_gradients(x.detach(), g.detach(), right, left, 1.0).flatten()


class LinearFactory(grads.LinearJacobianFactory):  # type: ignore[misc]
    """nngeometry's ``LinearJacobianFactory``; inputs are ``[N, in]``, as there."""

    @classmethod
    def kfac_xx(cls, buffer: Tensor, mod: nn.Linear, layer: Any, x: Tensor, gy: Tensor) -> None:
        """Add a batch to the input factor."""
        _add(buffer, ops.gram, _rows(x), bias=layer.bias is not None)

    @classmethod
    def kfac_gg(cls, buffer: Tensor, mod: nn.Linear, layer: Any, x: Tensor, gy: Tensor) -> None:
        """Add a batch to the gradient factor."""
        _add(buffer, ops.gram, _rows(gy))

    @classmethod
    def kfe_diag(
        cls,
        buffer: Tensor,
        mod: nn.Linear,
        layer: Any,
        x: Tensor,
        gy: Tensor,
        evecs_a: Tensor,
        evecs_g: Tensor,
    ) -> None:
        """Add a batch to the diagonal in the eigenbasis."""
        bias = layer.bias is not None
        _add_squared_gradients(buffer, mod, bias, _rows(x), gy, evecs_a, evecs_g)


def _rows(x: Tensor) -> Tensor:
    if x.dim() != 2:
        raise ValueError(f"nngeometry: a linear layer must have a [N, in] input, got {x.dim()}-d")
    return x


class _Convolution:
    """What one and two dimensions have in common."""

    correct = False

    @classmethod
    def kfac_xx(cls, buffer: Tensor, mod: nn.Conv2d, layer: Any, x: Tensor, gy: Tensor) -> None:
        """Add a batch to the input factor."""
        geometry = geometry_of(mod, correct=cls.correct)
        bias = layer.bias is not None
        _add(buffer, ops.conv_expand_gram, x, mod.kernel_size, bias=bias, **geometry)

    @classmethod
    def kfac_gg(cls, buffer: Tensor, mod: nn.Conv2d, layer: Any, x: Tensor, gy: Tensor) -> None:
        """Add a batch to the gradient factor."""
        _add(buffer, ops.gram, gy.movedim(1, -1), alpha=1 / gy.shape[2:].numel())

    @classmethod
    def kfe_diag(
        cls,
        buffer: Tensor,
        mod: nn.Conv2d,
        layer: Any,
        x: Tensor,
        gy: Tensor,
        evecs_a: Tensor,
        evecs_g: Tensor,
    ) -> None:
        """Add a batch to the diagonal in the eigenbasis."""
        if are_patches_exact(mod, correct=cls.correct):
            _add_squared_gradients(buffer, mod, mod.bias is not None, x, gy, evecs_a, evecs_g)
        else:
            library: Any = super()
            library.kfe_diag(buffer, mod, layer, x, gy, evecs_a, evecs_g)


class Conv1dFactory(_Convolution, grads.Conv1dJacobianFactory):  # type: ignore[misc]
    """nngeometry's ``Conv1dJacobianFactory``."""


class Conv2dFactory(_Convolution, grads.Conv2dJacobianFactory):  # type: ignore[misc]
    """nngeometry's ``Conv2dJacobianFactory``."""


class CorrectConv1dFactory(Conv1dFactory):
    """One that honours padding modes."""

    correct = True


class CorrectConv2dFactory(Conv2dFactory):
    """One that honours padding modes."""

    correct = True


def inverse(matrix: Any, regul: float = 1e-8, use_pi: bool = True) -> Any:
    """Invert both factors of every layer; see nngeometry's ``PMatKFAC``.

    Args:
        matrix: A ``PMatKFAC``.
        regul: Damping of the product; each factor has a share of its root.
        use_pi: Whether the shares are those of the factors' average eigenvalues, or the same.

    Returns:
        A ``PMatKFAC``.
    """
    factors: list[Tensor] = []
    dampings: list[float | Tensor] = []
    for a, g in matrix.data.values():
        pi = (torch.trace(a) / torch.trace(g) * len(g) / len(a)) ** 0.5 if use_pi else 1.0
        factors += [a, g]
        dampings += [shift_of(regul**0.5 * pi), shift_of(regul**0.5 / pi)]
    inverses, info, _ = ops.damped_inverse(factors, dampings)
    if torch.any(info != 0):
        return _inverse(matrix, regul, use_pi)
    pairs = zip(inverses[0::2], inverses[1::2], strict=True)
    return PMatKFAC(generator=matrix.generator, data=dict(zip(matrix.data, pairs, strict=True)))


_inverse = PMatKFAC.inverse


def _add_hooks(backend: Any, hook_x: Any, hook_gy: Any, mods: Iterable[nn.Module]) -> list[Any]:
    """nngeometry's, but a gradient for ``PMatKFAC`` comes with the input of its own call."""
    if hook_gy != backend._hook_compute_kfac_blocks:
        handles: list[Any] = _library_adds_hooks(backend, hook_x, hook_gy, mods)
        return handles
    calls: dict[nn.Module, int] = {}
    done: set[nn.Module] = set()  # whose gradients have come, so that the next call is another pass

    def forward_hook(mod: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[mod] = 1 if mod in done else calls.get(mod, 0) + 1
        done.discard(mod)

        def backward_hook(gradient: Tensor) -> None:
            done.add(mod)
            hook_x(mod, inputs)
            hook_gy(mod, gradient / calls[mod] ** 0.5)

        output.register_hook(backward_hook)

    return [mod.register_forward_hook(forward_hook) for mod in mods]


_library_adds_hooks = TorchHooksJacobianBackend._add_hooks
_OURS = {
    layers.LinearLayer: LinearFactory,
    layers.Conv1dLayer: Conv1dFactory,
    layers.Conv2dLayer: Conv2dFactory,
}
_CORRECT = {layers.Conv1dLayer: CorrectConv1dFactory, layers.Conv2dLayer: CorrectConv2dFactory}


@contextmanager
def enabled(*, correct: bool = False) -> Iterator[None]:
    """Have matrices that are computed inside of a ``with`` block be this module's.

    Args:
        correct: Whether padding modes are honoured, and the factors of a module that is called
            several times are those of all its calls.

    Yields:
        Nothing.
    """
    ours = _OURS | (_CORRECT if correct else {})
    adds_hooks = _add_hooks if correct else _library_adds_hooks
    replacements = [
        *((grads.FactoryMap, kind, factory) for kind, factory in ours.items()),
        (TorchHooksJacobianBackend, "_add_hooks", adds_hooks),
        (PMatKFAC, "inverse", inverse),
    ]
    with replaced(replacements):
        yield
