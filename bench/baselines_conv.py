"""The ways to compute the convolutions' operators in plain PyTorch; see ``baselines.py``.

Zero padding, no bias, 1 to 3 dimensions; ``arguments`` are the dispatcher's before ``out``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from baselines import Ways, by_reference
from einconv import index_pattern
from shapes import Conv
from torch import Tensor

from kfac_fast import reference

Unfolding = Callable[[Tensor, Conv], Tensor]

# Patches


def _unfold(x: Tensor, conv: Conv) -> Tensor:
    """F.unfold, to which a line is an image of one row."""
    line = len(conv.size) == 1
    return F.unfold(
        x.unsqueeze(2) if line else x,
        (1 if line else conv.kernel, conv.kernel),
        padding=(0 if line else conv.padding, conv.padding),
        stride=conv.stride,
        dilation=conv.dilation,
    )


def _framed(x: Tensor, conv: Conv) -> Tensor:
    return F.pad(x, (conv.padding,) * (2 * len(conv.size)))


def _windows(x: Tensor, conv: Conv) -> Tensor:
    """View of every patch, ``[N, C, *taps, *positions]``."""
    span = conv.dilation * (conv.kernel - 1) + 1
    view = _framed(x, conv)
    for dimension in range(2, x.dim()):
        view = view.unfold(dimension, span, conv.stride)[..., :: conv.dilation]
    positions = range(2, x.dim())
    return view.permute(0, 1, *range(x.dim(), view.dim()), *positions)


def _copy_windows(x: Tensor, conv: Conv) -> Tensor:
    return _windows(x, conv).reshape(len(x), conv.channels * conv.kernel ** len(conv.size), -1)


def unfoldings(conv: Conv) -> dict[str, Unfolding]:
    """Ways to all patches, ``[N, C * taps, S]``."""
    ways = {"unfold": _unfold, "strided view": _copy_windows}
    if len(conv.size) == 3:
        del ways["unfold"]
    return ways


# Expand


def _product(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0) -> Tensor:
    """``out <- beta out + a b``, of matrices or stacks."""
    return out.addmm_(a, b, beta=beta) if out.dim() == 2 else out.baddbmm_(a, b, beta=beta)


def _mm(patches: Tensor, out: Tensor) -> Tensor:
    columns = patches.movedim(0, -2).flatten(-2)
    return _product(columns, columns.mT, out)


def _bmm_and_sum(patches: Tensor, out: Tensor) -> Tensor:
    return torch.sum(patches @ patches.mT, 0, out=out)


def _addmm_each(patches: Iterable[Tensor], out: Tensor) -> Tensor:
    for n, example in enumerate(patches):
        _product(example, example.mT, out, beta=float(n > 0))
    return out


def _einsum(patches: Tensor, out: Tensor) -> Tensor:
    return torch.einsum("n...is,n...js->...ij", patches, patches)


# Of patches ``[N, (groups,) d, S]``.
PRODUCTS = {
    "mm": _mm,
    "bmm + sum": _bmm_and_sum,
    "addmm_ each": _addmm_each,
    "einsum": _einsum,
}


def _unfolded(x: Tensor, conv: Conv, unfolding: Unfolding) -> Ways:
    """Ways from patches of all examples, and from those of one example at a time."""

    def patches(examples: Tensor, out: Tensor) -> Tensor:
        return unfolding(examples, conv).unflatten(1, out.shape[:-1])

    def each(out: Tensor) -> Tensor:
        return _addmm_each((patches(example, out)[0] for example in x.split(1)), out)

    ways: Ways = {
        f"+ {name}": lambda out, multiply=multiply: multiply(patches(x, out), out)
        for name, multiply in PRODUCTS.items()
    }
    return {**ways, "each + addmm_": each}


def _windowed(x: Tensor, conv: Conv) -> Ways:
    """Ways that leave it to one copy, or to einsum, how the view is unfolded."""
    dimensions = len(conv.size)

    def columns_and_mm(out: Tensor) -> Tensor:
        columns = _windows(x, conv).movedim(0, 1 + dimensions).reshape(*out.shape[:-1], -1)
        return _product(columns, columns.mT, out)

    def einsum(out: Tensor) -> Tensor:
        windows = _windows(x, conv).unflatten(1, (conv.groups, -1))
        positions, taps, others = (letters[:dimensions] for letters in ("xyz", "pqr", "uvw"))
        equation = f"ngc{taps}{positions},ngd{others}{positions}->gc{taps}d{others}"
        return torch.einsum(equation, windows, windows).reshape(out.shape)

    return {"strided view + mm": columns_and_mm, "strided view + einsum": einsum}


def conv_expand_gram(x: Tensor, conv: Conv, arguments: Sequence[Any]) -> Ways:
    """Ways to the Gram of all patches."""
    ways: Ways = {}
    for source, unfolding in unfoldings(conv).items():
        for name, way in _unfolded(x, conv, unfolding).items():
            ways[f"{source} {name}"] = way
    ways |= _windowed(x, conv)
    return {**ways, **by_reference(reference.conv_expand_gram, *arguments)}


# Sums over positions, and reduce


def _pixels_of_taps(x: Tensor, conv: Conv) -> list[Tensor]:
    """How often each tap reads each pixel, ``[taps, pixels]`` for every dimension."""
    steps = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    like = {"device": x.device, "dtype": x.dtype}
    return [index_pattern(size, conv.kernel, **steps, **like).sum(1) for size in conv.size]


def _contractions(x: Tensor, conv: Conv) -> dict[str, Callable[[], Tensor]]:
    """Ways that contract the input with einconv's index patterns, ``[N, C, *taps]``.

    ``einconv`` contracts as curvlinops does, which makes the patterns anew for every call. Here
    they are kept, as are the counts, their Kronecker product.
    """
    patterns = _pixels_of_taps(x, conv)
    counts = reduce(torch.kron, [pattern.T for pattern in patterns])
    dimensions = range(len(conv.size))
    pixels, taps = ("".join(letters[i] for i in dimensions) for letters in ("xyz", "pqr"))

    def in_order(order: Sequence[int]) -> Tensor:
        operands = ",".join(taps[i] + pixels[i] for i in order)
        equation = f"nc{pixels},{operands}->nc{taps}"
        return torch.einsum(equation, x, *(patterns[i] for i in order))

    return {
        "einconv": partial(in_order, dimensions),
        "einconv, last dimension first": partial(in_order, dimensions[::-1]),
        "product with counts": lambda: x.flatten(2) @ counts,
    }


def _sum_of_taps(x: Tensor, conv: Conv) -> Tensor:
    dimensions = range(2, x.dim())
    reach = [conv.stride * (count - 1) + 1 for count in output_size(x, conv)]
    framed = _framed(x, conv)
    sums = []
    for tap in product(range(0, conv.dilation * conv.kernel, conv.dilation), repeat=len(reach)):
        reads = (slice(i, i + r, conv.stride) for i, r in zip(tap, reach, strict=True))
        sums.append(framed[(..., *reads)].sum(tuple(dimensions)))
    return torch.stack(sums, -1)


def output_size(x: Tensor, conv: Conv) -> tuple[int, ...]:
    """Output positions of each dimension."""
    return tuple(_windows(x, conv).shape[-len(conv.size) :])


def window_sums(x: Tensor, conv: Conv) -> dict[str, Callable[[], Tensor]]:
    """Ways to every example's patches summed over positions, ``[N, C * taps]`` or unflattened."""
    positions = tuple(range(-len(conv.size), 0))
    ways = {
        "strided view + sum": lambda: _windows(x, conv).sum(positions),
        "sum of each tap": partial(_sum_of_taps, x, conv),
        **_contractions(x, conv),
    }
    if "unfold" in unfoldings(conv):
        ways["unfold + sum"] = lambda: _unfold(x, conv).sum(-1)
    return ways


def conv_window_sum(x: Tensor, conv: Conv, arguments: Sequence[Any]) -> Ways:
    """Ways to the patches summed over positions."""
    ways: Ways = {
        name: lambda out, sums=sums: sums().reshape(out.shape)
        for name, sums in window_sums(x, conv).items()
    }
    return {**ways, **by_reference(reference.conv_window_sum, *arguments)}


def gram_of_means(means: Tensor, out: Tensor) -> Tensor:
    """The product of reduce alone, of means ``[N, (groups,) d]``."""
    rows = means.movedim(0, -2)
    return _product(rows.mT, rows, out)


def conv_reduce_gram(x: Tensor, conv: Conv, arguments: Sequence[Any]) -> Ways:
    """Ways to the Gram of the patches averaged over positions."""
    positions = math.prod(output_size(x, conv))

    def from_sums(sums: Callable[[], Tensor], out: Tensor) -> Tensor:
        means = sums().div_(positions).reshape(len(x), *out.shape[:-1])
        return gram_of_means(means, out)

    ways: Ways = {
        f"{name}, mm": lambda out, sums=sums: from_sums(sums, out)
        for name, sums in window_sums(x, conv).items()
    }
    return {**ways, **by_reference(reference.conv_reduce_gram, *arguments)}
