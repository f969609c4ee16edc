"""K-FAC written out in plain PyTorch, dense and slow: what the preconditioner is compared with.

Everything is in the weight-sharing format, with a dimension for the groups even if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from oracle import CONVOLUTIONS, TRANSPOSED, outer_sum, patches, with_bias
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.factors import Factor, update_averages
from kfac_fast.layers import Layer

LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
Factors = tuple[Tensor, Tensor]


class Call(NamedTuple):
    """A call of a layer.

    Attributes:
        rows: Inputs with the bias entry, ``[N, S, groups, in (+ 1)]``.
        gradients: Gradients of the outputs, ``[N, S, groups, out]``.
    """

    rows: Tensor
    gradients: Tensor

    def scaled(self, scale: float) -> Call:
        return Call(self.rows, scale * self.gradients)


def _geometry(module: nn.Module) -> dict[str, Any]:
    names = ["kernel_size", "stride", "padding", "dilation", "groups"]
    names.append("output_padding" if module.transposed else "padding_mode")
    return {"transposed": module.transposed, **{name: getattr(module, name) for name in names}}


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    bias = module.bias is not None and module.bias.requires_grad
    if isinstance(module, nn.Linear):
        return with_bias(x.reshape(len(x), -1, 1, x.shape[-1]), bias)
    return with_bias(patches(x, **_geometry(module)), bias)


def output_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return gradient.reshape(len(gradient), -1, 1, gradient.shape[-1])
    return gradient.flatten(2).mT.unflatten(-1, (module.groups, -1))


def record(model: nn.Module, loss_of: Callable[[], Tensor]) -> dict[str, list[Call]]:
    """Every layer's calls in a forward pass, with the gradients of its loss; leaves no trace."""
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.append((name, module, inputs[0], output))

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LAYERS)]
    hooks = [module.register_forward_hook(note(name)) for name, module in layers]
    loss = loss_of()
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(loss, [output for *_, output in seen])
    calls: dict[str, list[Call]] = {name: [] for name, _ in layers}
    for (name, module, x, _), gradient in zip(seen, gradients, strict=True):
        calls[name].append(Call(input_rows(module, x.detach()), output_rows(module, gradient)))
    return calls


def factors(calls: Sequence[Call], approx: str, divisor: float = 1) -> Factors:
    """The table of the conventions: input and gradient covariance of a step's calls.

    Args:
        calls: With the gradients of the summed loss.
        approx: ``"expand"`` or ``"reduce"``.
        divisor: M of a mean loss, 1 of a sum.

    Returns:
        A ``[groups, in (+ 1), in (+ 1)]`` and G ``[groups, out, out]``.
    """
    if approx == "expand":
        rows = torch.cat([call.rows.flatten(0, 1) for call in calls])
        gradients = torch.cat([call.gradients.flatten(0, 1) for call in calls])
    else:
        rows = torch.cat([call.rows.mean(1) for call in calls])
        gradients = torch.cat([call.gradients.sum(1) for call in calls])
    a, g = outer_sum(rows) / len(rows), outer_sum(gradients) / divisor
    return a.reshape(-1, *a.shape[-2:]), g.reshape(-1, *g.shape[-2:])


def example_gradients(layer: Layer, x: Tensor, gradient: Tensor) -> Tensor:
    """Every example's gradient matrix by autograd, from those of the module's output."""
    output, matrices = layer.module(x), []
    for n in range(len(x)):
        weights = torch.zeros_like(gradient)
        weights[n] = gradient[n]
        layer.module.zero_grad()
        (output * weights).sum().backward(retain_graph=True)
        matrices.append(layer.matrix(layer.gradients(), torch.float64).clone())
    return torch.stack(matrices)


def grad_matrices(module: nn.Module) -> Tensor:
    """``.grad`` of a layer that is not transposed, ``[groups, out, in (+ 1)]``."""
    groups = getattr(module, "groups", 1)
    matrix = module.weight.grad.reshape(groups, len(module.weight) // groups, -1)
    if module.bias is None or not module.bias.requires_grad:
        return matrix.clone()
    return torch.cat([matrix, module.bias.grad.reshape(groups, -1, 1)], -1)


def solve(v: Tensor, damped: Factors) -> Tensor:
    """Each group's dense Kronecker product ``G (x) A``, solved for the gradient's vector."""
    results = [
        torch.linalg.solve(torch.kron(g, a), matrix.flatten()).reshape(matrix.shape)
        for matrix, a, g in zip(v, *damped, strict=True)
    ]
    return torch.stack(results)


def damp(covariances: Factors, damping: float, mode: str = "factored") -> Factors:
    """Both covariances with their share of the damping on the diagonal."""
    a, g = covariances
    share = torch.full((len(a),), damping, dtype=a.dtype)
    if mode == "plain":
        shares = share, share
    else:
        traces = [torch.stack([torch.trace(matrix) for matrix in m]) for m in covariances]
        pi = ((traces[0] / a.shape[-1]) / (traces[1] / g.shape[-1])).sqrt()
        shares = share.sqrt() * pi, share.sqrt() / pi
    identities = [torch.eye(m.shape[-1], dtype=m.dtype) for m in covariances]
    return a + shares[0][:, None, None] * identities[0], g + shares[1][:, None, None] * identities[
        1
    ]


def condition(damped: Factors) -> float:
    """Condition number of the groups' Kronecker products."""
    a, g = (torch.linalg.cond(matrices) for matrices in damped)
    return float((a * g).max())


def assert_solved(out: Tensor, expected: Tensor, condition: float = 1e3) -> None:
    """Check that two float64 solutions of one system differ as its condition explains."""
    assert out.shape == expected.shape and out.dtype == expected.dtype == torch.float64
    error = torch.linalg.vector_norm(out - expected)
    bound = 64 * torch.finfo(torch.float64).eps * condition * torch.linalg.vector_norm(expected)
    assert error <= bound, f"error {error} is above {bound}"


def scaled(calls: dict[str, list[Call]], scale: float) -> dict[str, list[Call]]:
    return {name: [call.scaled(scale) for call in of] for name, of in calls.items()}


def plain_covariances(
    model: nn.Module, loss_of: Callable[[], Tensor], approx: str, terms: int, reduction: str
) -> dict[str, Factors]:
    """Factors by the table of conventions from one forward and backward pass of a loss."""
    scale, divisor = (terms, terms) if reduction == "mean" else (1, 1)
    calls = scaled(record(model, loss_of), scale)
    return {name: factors(of, approx, divisor) for name, of in calls.items()}


def averaged(*covariances: Tensor) -> tuple[Factor, ...]:
    """Factors whose running averages of two batches are these covariances."""
    factors = tuple(Factor(covariance) for covariance in covariances)
    for factor, covariance in zip(factors, covariances, strict=True):
        update_averages([factor], [(2 * covariance, 1)], 0.5)
        update_averages([factor], [(covariance / 2, 1)], 0.5)
    return factors


def covariances(kfac: KFAC) -> dict[str, Factors]:
    """Each layer's running averages, ``[groups, n, n]``."""
    return {
        block.layer.name: tuple(
            factor.mean.clone().reshape(-1, *factor.mean.shape[-2:]) for factor in block.factors
        )
        for block in kfac._blocks
        if block.factors
    }


def assert_covariances(kfac: KFAC, expected: dict[str, Factors]) -> None:
    actual = covariances(kfac)
    assert actual.keys() == expected.keys()
    for name, pair in expected.items():
        for out, covariance in zip(actual[name], pair, strict=True):
            assert_solved(out, covariance)


def expected_grads(
    model: nn.Module, expected: dict[str, Factors], damping: float, mode: str = "factored"
) -> list[Tensor]:
    """Dense Kronecker solves of the raw gradients, in the model's order."""
    return [
        solve(grad_matrices(model.get_submodule(name)), damp(pair, damping, mode))
        for name, pair in expected.items()
    ]


def assert_grads(model: nn.Module, names: dict[str, Any], expected: list[Tensor]) -> None:
    for name, matrix in zip(names, expected, strict=True):
        assert_solved(grad_matrices(model.get_submodule(name)), matrix)
