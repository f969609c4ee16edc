"""The ways to the factors of normalisations in plain PyTorch; see :mod:`baselines`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from baselines import Ways, by_reference
from torch import Tensor

from kfac_fast import reference


def _blocks(products: Tensor, sums: Tensor, out: Tensor) -> Tensor:
    """The Gram of every unit's gradients of scale and shift, ``[N, units]`` each."""
    torch.sum(products * products, 0, out=out[:, 0, 0])
    torch.sum(products * sums, 0, out=out[:, 0, 1])
    torch.sum(sums * sums, 0, out=out[:, 1, 1])
    out[:, 1, 0] = out[:, 0, 1]
    return out


def feature_norm_gram(x: Tensor, gradient: Tensor) -> Ways:
    """Ways for ``nn.LayerNorm`` on ``[N, S, D]``."""

    def in_place(out: Tensor) -> Tensor:
        z = F.layer_norm(x, x.shape[-1:])
        return _blocks(z.mul_(gradient).sum(1), gradient.sum(1), out)

    arguments = (x, gradient, None, None, -1, 1e-5, True, True, 1.0, 0.0)
    return {
        "layer_norm, mul_, sums": in_place,
        **by_reference(reference.feature_norm_gram, *arguments),
    }


def channel_norm_gram(x: Tensor, gradient: Tensor, num_groups: int | None) -> Ways:
    """Ways for ``nn.BatchNorm2d`` or ``nn.GroupNorm`` on ``[N, C, H, W]``."""

    def in_place(out: Tensor) -> Tensor:
        if num_groups is None:
            z = F.batch_norm(x, None, None, training=True)
        else:
            z = F.group_norm(x, num_groups)
        return _blocks(z.mul_(gradient).sum((2, 3)), gradient.sum((2, 3)), out)

    def by_backward(out: Tensor) -> Tensor:
        """With each channel of each example as a channel of its own, they are its gradients."""
        if num_groups is None:
            _, mean, scale = torch.native_batch_norm(x, None, None, None, None, True, 0.0, 1e-5)
            mean, scale = (value.repeat(len(x)) for value in (mean, scale))
        else:
            pixels, channels = x[0, 0].numel(), x.shape[1]
            _, mean, scale = torch.native_group_norm(
                x, None, None, len(x), channels, pixels, num_groups, 1e-5
            )
            mean, scale = (
                value.repeat_interleave(channels // num_groups, 1).flatten()
                for value in (mean, scale)
            )
        rows = 1, -1, x[0, 0].numel()
        _, products, sums = torch.ops.aten.native_batch_norm_backward(
            *(gradient.reshape(rows), x.reshape(rows), None, None, None),
            *(mean, scale, True, 0.0, [False, True, True]),
        )
        return _blocks(products.view(x.shape[:2]), sums.view(x.shape[:2]), out)

    groups = -1 if num_groups is None else num_groups
    arguments = (x, gradient, None, None, groups, 1e-5, True, 1.0, 0.0)
    return {
        "norm, mul_, sums": in_place,
        "native_batch_norm_backward": by_backward,
        **by_reference(reference.channel_norm_gram, *arguments),
    }
