"""The generalised Gauss-Newton matrix of a batch itself, without forming it, in forward mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from kfac_fast.losses import Loss, Targets


def root_product(
    model: nn.Module,
    outputs_of: Callable[[], Any],
    direction: Mapping[str, Tensor],
    *,
    loss: Loss[Any],
    reduction: Literal["mean", "sum"],
    targets: Targets,
) -> Tensor:
    r"""A square root of the generalised Gauss-Newton matrix times a direction.

    .. math:: c^{1/2} R^\top J v, \qquad F = c \, J^\top R R^\top J

    with the Jacobian :math:`J` of the outputs, the root :math:`R` of the summed loss's Hessian, and
    :math:`c = 1/M` for a mean of M terms, 1 for a sum. :math:`J v` is one forward pass, which
    leaves the model's buffers as they are. No backward pass can follow, so that none of it is
    captured. The root goes through reverse mode, as for the Fisher: forward mode would take what it
    makes under ``no_grad`` for more than constants.

    Args:
        model: The model.
        outputs_of: Evaluates its outputs, tensors or what PyTorch's pytrees find tensors in.
        direction: :math:`v`, by names of the model's parameters; zero for others.
        loss: The loss.
        reduction: Whether it is a mean or a sum.
        targets: Training labels.

    Returns:
        ``[N, K]``; its squared length is :math:`\langle v, F v \rangle`.

    Raises:
        RuntimeError: If the outputs do not depend on the parameters.

    Source: Martens & Grosse (2015), appendix C.
    """
    uncompiled = torch.compiler.set_stance("force_eager")
    # Of attention's kernels, only this one has a derivative in forward mode.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), uncompiled:
        tensors = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for name, parameter in model.named_parameters():
            if name in direction:
                tensors[name] = forward_ad.make_dual(parameter.detach(), direction[name])
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        outputs = functional_call(_Evaluation(model, outputs_of), named, ())
        leaves: dict[Tensor, Tensor] = {}
        outputs = tree_map_only(Tensor, lambda output: _leaf(output, leaves), outputs)
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        root = loss.root(outputs, targets)
        terms = loss.terms(outputs, targets)
    if not root.requires_grad:
        raise RuntimeError(
            "QuadraticModel.step: outputs_of must return outputs that depend on the parameters, "
            "tensors or tuples, lists and dicts of them, got ones that do not"
        )
    return _derivative(root, leaves) / (terms**0.5 if reduction == "mean" else 1)


class _Evaluation(nn.Module):
    """A model's evaluation as a module, for which tensors can take the place of parameters."""

    def __init__(self, model: nn.Module, outputs_of: Callable[[], Any]) -> None:
        super().__init__()
        self.model = model
        self.outputs_of = outputs_of

    def forward(self) -> Any:
        """Evaluate it."""
        return self.outputs_of()


def _leaf(output: Tensor, leaves: dict[Tensor, Tensor]) -> Tensor:
    """An output at the beginning of a graph, noted with its derivative if it has one."""
    value, tangent = forward_ad.unpack_dual(output)
    leaf: Tensor = value.detach()
    if tangent is not None:
        leaves[leaf.requires_grad_()] = tangent
    return leaf


def _derivative(root: Tensor, leaves: Mapping[Tensor, Tensor]) -> Tensor:
    """That of a linear map: what takes it backward, with derivatives as seeds, taken backward."""
    seed = torch.zeros_like(root, requires_grad=True)
    columns = torch.autograd.grad(root, list(leaves), seed, create_graph=True, allow_unused=True)
    used = [pair for pair in zip(columns, leaves.values(), strict=True) if pair[0] is not None]
    backward, tangents = zip(*used, strict=True)
    product: Tensor = torch.autograd.grad(backward, seed, tangents)[0]
    return product
