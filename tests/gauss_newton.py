"""The dense generalised Gauss-Newton matrix of a network, and directions to multiply it by."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import hessian


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors.values()])


def gauss_newton(model: nn.Module, x: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The dense generalised Gauss-Newton matrix, from Jacobians and the Hessian of the loss."""
    model = copy.deepcopy(model)  # with running statistics of its own
    parameters = list(trained(model).values())
    outputs = model(x)
    rows = [
        torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        for entry in outputs.flatten()
    ]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    inner = hessian(lambda f: loss_of(f.reshape(outputs.shape)))(outputs.detach().flatten())
    return jacobian.T @ inner @ jacobian


def random_direction(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(p) for name, p in trained(model).items()}


def normalised() -> nn.Module:
    """A float64 network with a batch normalisation, whose scale it trains."""
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)]
    return nn.Sequential(*layers).double()
