"""Shapes, geometries and dtypes that the tests run over; data only."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Convolution(NamedTuple):
    """A convolution and its input; options as for :func:`kfac_fast.conv_expand_gram`."""

    channels: int
    size: tuple[int, ...]
    options: dict[str, Any]

    @property
    def groups(self) -> int:
        """Groups of channels."""
        return self.options.get("groups", 1)

    @property
    def transposed(self) -> bool:
        """Whether the convolution is transposed."""
        return self.options.get("transposed", False)


def _convolution(channels: int, *size: int, **options: Any) -> Convolution:
    return Convolution(channels, size, options)


CONVOLUTIONS = {
    "1d": _convolution(2, 7, kernel_size=3),
    "1d-stride-over-the-edge": _convolution(2, 8, kernel_size=3, stride=3, padding=1),
    "1d-dilated-groups": _convolution(4, 9, kernel_size=2, dilation=3, groups=2),
    "1d-same-uneven": _convolution(2, 6, kernel_size=4, padding="same"),
    "1d-same-uneven-dilated": _convolution(2, 7, kernel_size=2, dilation=3, padding="same"),
    "1d-same-uneven-reflect": _convolution(
        2, 6, kernel_size=4, padding="same", padding_mode="reflect"
    ),
    "1d-same-uneven-circular": _convolution(
        2, 5, kernel_size=2, padding="same", padding_mode="circular"
    ),
    "1d-circular-whole-input": _convolution(
        1, 3, kernel_size=3, padding=3, padding_mode="circular"
    ),
    "1d-replicate-beyond-input": _convolution(
        1, 2, kernel_size=2, padding=4, padding_mode="replicate"
    ),
    "2d-valid": _convolution(3, 5, 6, kernel_size=3),
    "2d-padded": _convolution(3, 4, 5, kernel_size=3, padding=1),
    "2d-more-padding-than-kernel": _convolution(2, 3, 3, kernel_size=2, padding=3),
    "2d-less-padding-than-half": _convolution(2, 6, 5, kernel_size=(5, 2), padding=(1, 0)),
    "2d-1x1": _convolution(4, 3, 3, kernel_size=1),
    "2d-1x1-stride": _convolution(4, 5, 5, kernel_size=1, stride=2),
    "2d-even": _convolution(2, 5, 5, kernel_size=2, padding=1),
    "2d-uneven": _convolution(2, 5, 4, kernel_size=(3, 1), stride=(1, 2), padding=(1, 0)),
    "2d-stride": _convolution(2, 7, 6, kernel_size=3, stride=2, padding=1),
    "2d-dilated": _convolution(2, 7, 6, kernel_size=3, dilation=2, padding=2),
    "2d-stride-dilated": _convolution(
        2, 9, 8, kernel_size=(2, 3), stride=(3, 2), dilation=(3, 2), padding=(2, 1)
    ),
    "2d-one-position": _convolution(2, 3, 3, kernel_size=3),
    "2d-groups": _convolution(4, 5, 4, kernel_size=3, padding=1, groups=2),
    "2d-depthwise": _convolution(3, 5, 4, kernel_size=3, padding=1, groups=3),
    "2d-reflect": _convolution(2, 5, 4, kernel_size=3, padding=2, padding_mode="reflect"),
    "2d-replicate": _convolution(2, 4, 4, kernel_size=3, padding=2, padding_mode="replicate"),
    "2d-circular": _convolution(2, 4, 5, kernel_size=3, padding=1, padding_mode="circular"),
    "2d-circular-stride": _convolution(
        2, 6, 5, kernel_size=3, stride=2, padding=(2, 1), padding_mode="circular"
    ),
    "2d-same": _convolution(2, 4, 5, kernel_size=(3, 4), dilation=(2, 1), padding="same"),
    "2d-valid-named": _convolution(2, 4, 5, kernel_size=2, padding="valid"),
    "3d": _convolution(2, 3, 4, 3, kernel_size=2, padding=(1, 0, 1)),
    "3d-stride-dilated-groups": _convolution(
        4, 5, 4, 3, kernel_size=2, stride=(2, 1, 1), dilation=(1, 2, 1), groups=2
    ),
    "3d-replicate": _convolution(
        1, 2, 3, 3, kernel_size=(1, 2, 3), padding=(0, 1, 1), padding_mode="replicate"
    ),
    "1d-transposed": _convolution(2, 5, kernel_size=3, transposed=True),
    "1d-transposed-stride": _convolution(
        2, 4, kernel_size=4, stride=3, padding=2, output_padding=2, transposed=True
    ),
    "1d-transposed-groups": _convolution(
        4, 4, kernel_size=3, stride=2, padding=1, groups=2, transposed=True
    ),
    "2d-transposed": _convolution(
        3, 3, 4, kernel_size=3, stride=2, padding=1, output_padding=1, transposed=True
    ),
    "2d-transposed-dilated": _convolution(
        2, 3, 3, kernel_size=(2, 3), stride=(1, 2), dilation=(3, 1), transposed=True
    ),
    "2d-transposed-cropped": _convolution(
        2, 4, 5, kernel_size=(1, 2), stride=2, padding=(1, 2), transposed=True
    ),
    "2d-transposed-depthwise": _convolution(
        3, 3, 3, kernel_size=2, stride=2, groups=3, transposed=True
    ),
    "3d-transposed": _convolution(
        2, 2, 2, 3, kernel_size=2, stride=(2, 1, 2), padding=(0, 1, 1), transposed=True
    ),
    "3d-transposed-groups": _convolution(
        2, 2, 3, 2, kernel_size=(1, 2, 2), dilation=2, groups=2, transposed=True
    ),
}

SHARED_SHAPES = {
    "no-sharing": (6, 4),
    "one-position": (6, 1, 4),
    "sequence": (3, 5, 4),
    "image": (3, 2, 3, 4),
    "no-positions": (3, 0, 4),
    "no-examples": (0, 5, 4),
}

GRAM_ROWS = {
    "vector": (5,),
    "one-row": (1, 7),
    "no-rows": (0, 5),
    "no-features": (4, 0),
    "one-feature": (9, 1),
    "few-rows": (3, 40),
    "tile-edge": (33, 64),
    "off-tile-edge": (129, 65),
    "sequence": (5, 13, 24),
    "empty-sequence": (5, 0, 6),
    "image": (3, 4, 5, 18),
}

LONG_OR_WIDE_ROWS = {
    "long": (20011, 6),
    "wide": (40, 261),
    "several-blocks": (300, 530),
}

GRAM_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "masked": {"mask": 0.7, "bias": True},
    "all-masked": {"mask": 0.0, "bias": True},
    "groups": {"groups": 2},
    "masked-groups": {"groups": 3, "mask": 0.5, "bias": True},
}

MATRIX_SIZES = (1, 2, 3, 8, 17, 33)
