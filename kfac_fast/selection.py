"""Which layers of a model are preconditioned, and why the others are not."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kfac_fast.blocks import TRAINED_SINCE, Block, Form
from kfac_fast.layers import Approximation, Layer, RowLayer, layers_of
from kfac_fast.schema import result_dtype

NamedModules = Sequence[tuple[str, nn.Module]]


class Passing(str):
    """Why a layer is left alone, which may be so no longer.

    Args:
        reason: The reason.
        layer: The layer.
    """

    layer: Layer

    def __new__(cls, reason: str, layer: Layer) -> Passing:
        """The reason itself, with the layer beside it."""
        passing = super().__new__(cls, reason)
        passing.layer = layer
        return passing


def eager_name(name: str) -> str:
    """A qualified name without the wrappers of compiled modules."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def find_blocks(
    model: nn.Module,
    approx: Approximation,
    skip: Sequence[str],
    form: Form = "inverse",
    *,
    dtype: torch.dtype | None = None,
    forward_only: bool = False,
) -> tuple[list[Block], dict[str, str]]:
    """The blocks of a model's layers, and why each other module that owns parameters has none.

    Layers of one kind with the very same weight and bias are one block, linear layers and
    convolutions also where some have no bias.

    Args:
        model: The model.
        approx: ``"expand"`` or ``"reduce"``.
        skip: Regular expressions, searched for in the qualified and in the class names of modules,
            and in the names of attention's projections.
        form: As for :class:`Block`.
        dtype: As for :class:`Block`.
        forward_only: Whether there are no gradients to form factors of.

    Returns:
        The blocks in the model's order, and reasons by qualified name.

    Raises:
        ValueError: If a pattern is no regular expression or matches no module, if no layer is left,
            or the layers differ in device or precision.
    """
    patterns = _compiled(skip)
    modules = [
        (eager_name(name), module)
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    unused = {pattern.pattern for pattern in patterns}

    def skipped(*texts: str) -> str | None:
        found = [pattern.pattern for pattern in patterns if any(map(pattern.search, texts))]
        unused.difference_update(found)
        return f"skipped by pattern {found[0]!r}" if found else None

    attention = {name for name, module in modules if type(module) is nn.MultiheadAttention}
    left_alone: dict[str, str] = {}
    layers: list[Layer] = []
    for name, module in modules:
        if name and name.rpartition(".")[0] in attention:
            continue  # an output projection, a layer of the attention module
        kind = type(module).__name__
        reason = skipped(name, kind)
        own = layers_of(name, module, approx)
        reasons = [skipped(layer.name) or _reason_against(layer, forward_only) for layer in own]
        if reason is not None or not own:
            left_alone[name] = reason or f"no rule for {kind}"
            continue
        for layer, reason in zip(own, reasons, strict=True):
            if reason is None:
                layers.append(layer)
            else:
                left_alone[layer.name] = reason
        if isinstance(module, nn.MultiheadAttention):
            left_alone |= _added_rows(name, module)
    if unused:
        raise ValueError(
            f"KFAC: skip must match modules with parameters, got {min(unused)!r} that matches none"
        )
    _warn_of_positions_first(model, [a for a in layers if _needs_examples(a, form)])
    blocks = []
    for tied in _tied(layers):
        others = _other_holders(tied, layers, modules)
        if others:
            names = ", ".join(map(repr, others))
            reason = f"shares a parameter with {names}; untied, it would have a block"
            left_alone |= {layer.name: reason for layer in tied}
        else:
            blocks.append(Block(tied, form, dtype))
    kinds = {(b.layer.weight.device, result_dtype(b.layer.weight.dtype)) for b in blocks}
    if len(kinds) > 1:
        raise ValueError(f"KFAC: layers must be on one device and of one precision, got {kinds}")
    if not blocks:
        raise ValueError(f"KFAC: model must have a layer to precondition, got none: {left_alone}")
    return blocks, left_alone


def describe_rest(left_alone: Mapping[str, str]) -> list[str]:
    """A line on each module that is left alone.

    Args:
        left_alone: Reasons by qualified name, from :func:`find_blocks`.

    Returns:
        The lines.
    """
    lines = []
    for name, reason in left_alone.items():
        since = reason.layer.trained_since() if isinstance(reason, Passing) else []
        now = f"{' and '.join(since)} {TRAINED_SINCE}" if since else reason
        lines.append(f"{name or '(model)'}: left alone, {now}")
    return lines


def apply_layer_options(
    blocks: Sequence[Block], layer_options: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give blocks their own values of some options.

    Args:
        blocks: The blocks.
        layer_options: Values by option, by regular expressions searched for in qualified names.

    Raises:
        ValueError: If a pattern is found in no name.
    """
    for pattern, options in layer_options.items():
        own = dict(options)
        approx = own.pop("approx", None)
        found = [
            block
            for block in blocks
            if any(re.search(pattern, layer.name) for layer in block.layers)
        ]
        if not found:
            raise ValueError(
                f"KFAC: layer_options must match preconditioned layers, got {pattern!r} that "
                "matches none"
            )
        for block in found:
            for layer in block.layers:
                layer.approx = approx or layer.approx
            block.options |= own


def layers_with_rows(blocks: Sequence[Block], pattern: str) -> list[Layer]:
    """The layers that :meth:`kfac_fast.KFAC.share_rows` is about.

    Args:
        blocks: The blocks.
        pattern: Regular expression, searched for in the layers' qualified names.

    Returns:
        At least one layer.

    Raises:
        ValueError: If the pattern is found in no name, or in that of a layer that takes no rows.
    """
    layers = [layer for block in blocks for layer in block.layers]
    found = [layer for layer in layers if re.search(pattern, layer.name)]
    refused = [layer.name for layer in found if not layer.takes_sharing]
    if not found or refused:
        raise ValueError(
            "share_rows: pattern must be found in names of layers that take rows, "
            f"got {pattern!r}, found in {refused or 'none'}"
        )
    return found


def _reason_against(layer: Layer, forward_only: bool) -> str | None:
    reason = layer.reason_against()
    if forward_only and "input" not in layer.factor_shapes():
        return reason or "its only factor needs gradients"
    return reason and Passing(reason, layer)


def _needs_examples(layer: Layer, form: Form) -> bool:
    """Whether it matters which rows of a layer's input are of one example."""
    if isinstance(layer.module, nn.MultiheadAttention):  # which tells
        return False
    return layer.approx == "reduce" or form == "corrected" or "input" not in layer.factor_shapes()


def _warn_of_positions_first(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Say where a transformer's layers take the positions for the examples."""
    inside = {id(layer.module) for layer in layers}
    kinds = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        and not getattr(module.self_attn, "batch_first", True)
        and any(id(part) in inside for part in module.modules())
    ]
    if found:
        warnings.warn(
            f"KFAC: transformer layers ({len(found)}, the first is {found[0] or 'the model'!r}) "
            "have positions in front, which their linear layers and normalisations take for "
            "examples; make them with batch_first=True, or skip the layers",
            RuntimeWarning,
            stacklevel=4,
        )


def _added_rows(name: str, module: nn.MultiheadAttention) -> dict[str, str]:
    """Reasons by qualified name of trainable rows that join an attention's keys and values."""
    prefix = f"{name}." if name else ""
    rows = {"bias_k": module.bias_k, "bias_v": module.bias_v}
    return {
        f"{prefix}{row}": "it joins keys or values, and is no weight of a layer"
        for row, parameter in rows.items()
        if parameter is not None and parameter.requires_grad
    }


def _tied(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers, those of one type that go into one block together."""
    alike: dict[tuple[object, ...], list[Layer]] = defaultdict(list)
    for layer in layers:
        alike[type(layer), layer.groups, layer.places()[0]].append(layer)
    return [tied for own in alike.values() for tied in _of_one_bias(own)]


def _of_one_bias(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers of one weight by their biases; one bias' in front of those that have none."""
    groups: dict[tuple[object, ...], list[Layer]] = defaultdict(list)
    for layer in layers:
        groups[tuple(layer.places()[1:])].append(layer)
    biased = [bias for bias in groups if bias]
    if len(groups) == 2 and len(biased) == 1 and isinstance(layers[0], RowLayer):
        return [groups[biased[0]] + groups[()]]
    return list(groups.values())


def _other_holders(
    tied: Sequence[Layer], layers: Sequence[Layer], modules: NamedModules
) -> list[str]:
    """Names of those that hold a parameter of these layers: modules, or others of their own."""
    places = set(tied[0].places())
    parameters = {parameter for parameter, _ in places}
    own = {id(module) for layer in tied for module in layer.module.modules()}
    found = [
        name
        for name, module in modules
        if id(module) not in own and any(id(p) in parameters for p in module.parameters(False))
    ]
    beside = [a for a in layers if id(a.module) in own and a not in tied]
    return found + [layer.name for layer in beside if not places.isdisjoint(layer.places())]


def _compiled(skip: Sequence[str]) -> list[re.Pattern[str]]:
    if isinstance(skip, str):
        raise ValueError(f"KFAC: skip must be a sequence of patterns, got the string {skip!r}")
    try:
        return [re.compile(pattern) for pattern in skip]
    except re.error as error:
        raise ValueError(
            f"KFAC: skip must hold regular expressions, got {error.pattern!r}: {error}"
        ) from error
