"""Fisher types: which gradients of the layers' outputs make the gradient covariances.

The empirical Fisher takes the gradients of the training loss, as they pass. The Monte-Carlo Fisher
takes those of the loss on labels drawn from the model's own predictive distribution; its
expectation is the Fisher, which for most losses is the generalised Gauss-Newton matrix. The exact
one backpropagates the columns of a square root of the loss's Hessian in place of labels, and
curvature propagation their sums with random signs, which have the same expectation. The
forward-only one takes the identity for the gradient covariance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kfac_fast.losses import Loss, Outputs, Targets

Fisher = Literal["empirical", "mc", "exact", "curvature-propagation", "forward-only"]


def backpropagated(
    fisher: Fisher,
    loss: Loss[Outputs],
    outputs: Outputs,
    targets: Targets,
    samples: int,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    r"""Scalars whose gradients' outer products add up to the Fisher.

    .. math:: \sum_k \frac{\partial s_k}{\partial f_n}
        \left(\frac{\partial s_k}{\partial f_n}\right)^\top = \nabla_{f_n}^2 \sum_m \ell_m

    for the outputs :math:`f_n` of each example; in expectation, unless ``"exact"``.

    Args:
        fisher: ``"mc"`` draws labels, ``"exact"`` takes each column of the Hessian's root,
            ``"curvature-propagation"`` adds them up with random signs.
        loss: The loss.
        outputs: The model's outputs.
        targets: Training labels.
        samples: Draws of labels or signs.
        generator: Source of randomness; PyTorch's default if None.

    Yields:
        One scalar after the other, formed as it is asked for.

    Raises:
        RuntimeError: If the outputs that matter are in no graph.

    Source: Martens & Grosse (2015), section 5; Eschenhagen et al. (2023), section 2; Martens,
    Sutskever & Swersky (2012).
    """
    targets = constants(targets)
    if fisher == "mc":
        for _ in range(samples):
            yield _in_graph(loss.sample(outputs, targets, generator)) / samples**0.5
    elif fisher == "curvature-propagation":
        root = _in_graph(loss.root(outputs, targets))
        for _ in range(samples):
            coins = torch.empty_like(root).bernoulli_(generator=generator)
            yield (root * (2 * coins - 1)).sum() / samples**0.5
    else:
        columns = _in_graph(loss.root(outputs, targets)).sum(0)
        for index in range(len(columns)):
            yield columns[index]


def constants(targets: Targets) -> Targets:
    """Labels without their history: they may be learned.

    Args:
        targets: Training labels, of several losses a tuple.

    Returns:
        The same numbers.
    """
    if isinstance(targets, tuple):
        return tuple(constants(each) for each in targets)
    return None if targets is None else targets.detach()


def check_outputs(outputs: object) -> None:
    """Check that outputs are in a graph, which :func:`backpropagated` sees only when it is asked.

    Args:
        outputs: The model's outputs, in any structure; one without tensors passes.

    Raises:
        RuntimeError: If none of them needs gradients.
    """
    tensors = [output for output in tree_leaves(outputs) if isinstance(output, Tensor)]
    if tensors and not any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "update_curvature: outputs must be those of a forward pass with gradients enabled, got "
            "none that need gradients"
        )


def _in_graph(result: Tensor) -> Tensor:
    check_outputs(result)
    return result
