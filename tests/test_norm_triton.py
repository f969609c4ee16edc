"""The Triton kernels of normalisations without a GPU: compiled."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compile_kernels import compiled_only

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton_kernels import SHARED_BYTES, assert_no_spills  # noqa: E402

from kfac_fast.kernels import launch  # noqa: E402
from kfac_fast.kernels import norm_gram as kernels  # noqa: E402

FEATURES = ((256, 16, 48), (16, 197, 768), (2, 128, 4096))
CHANNELS = ((128, 16, 32, 32), (32, 2048, 7, 7), (4, 64, 112, 112))


def _compile_features(capability: int, shape: tuple[int, ...], dtype: torch.dtype, masked: bool):
    x, out = torch.zeros(shape, dtype=dtype), torch.zeros(shape[-1], 2, 2)
    mask = torch.ones(shape[:-1], dtype=torch.bool) if masked else None
    with compiled_only(capability) as compiled:
        kernels.feature_norm_gram(x, x.clone(), mask, 1e-5, True, True, 1.0, 0.0, out)
    return dict(compiled)


def _compile_channels(
    capability: int, shape: tuple[int, ...], dtype: torch.dtype, groups: int
) -> dict[str, Any]:
    x, out = torch.zeros(shape, dtype=dtype), torch.zeros(shape[1], 2, 2)
    with compiled_only(capability) as compiled:
        kernels.channel_norm_gram(x, x.clone(), None, None, groups, 1e-5, True, 1.0, 0.0, out)
    return dict(compiled)


@pytest.fixture(autouse=True)
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device", lambda index: launch.Device(90, 132))


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_compiles_without_spills(
    record_property: Callable[[str, str], None], capability: int, dtype: torch.dtype
) -> None:
    for shape in FEATURES:
        for masked in (False, True):
            compiled = _compile_features(capability, shape, dtype, masked)
            assert set(compiled) == {"example_sums_kernel", "feature_blocks_kernel"}
            assert_no_spills(compiled, capability, record_property)
    for shape in CHANNELS:
        for groups in (-1, 8):
            compiled = _compile_channels(capability, shape, dtype, groups)
            names = {"row_moments_kernel", "statistics_kernel", "channel_blocks_kernel"}
            assert set(compiled) == names
            assert_no_spills(compiled, capability, record_property)


def test_one_compilation_serves_all_sizes() -> None:
    hashes = defaultdict(set)
    for examples, positions in ((128, 48), (7, 64), (33, 40)):
        shape = (examples, positions, 768)
        for name, own in _compile_features(90, shape, torch.float32, False).items():
            hashes[name].add(own.hash)
    for examples, channels in ((128, 16), (7, 64), (33, 40)):
        shape = (examples, channels, 30, 30)
        for name, own in _compile_channels(90, shape, torch.float32, 8).items():
            hashes[name].add(own.hash)
    assert {name: len(found) for name, found in hashes.items()} == dict.fromkeys(hashes, 1)
