"""How each layer type's factors are formed, and how its gradients are laid out as matrices."""

from __future__ import annotations

from torch import nn

from kfac_fast.layers.attention import ProjectionCalls, ProjectionLayer, projections
from kfac_fast.layers.base import Approximation, Count, Layer, RowLayer, Sharing
from kfac_fast.layers.bias import BiasLayer, ShiftLayer
from kfac_fast.layers.conv import ConvLayer, ConvTransposeLayer
from kfac_fast.layers.embedding import EmbeddingLayer
from kfac_fast.layers.linear import LinearLayer
from kfac_fast.layers.norm import ChannelNormLayer, FeatureNormLayer, NormLayer

__all__ = [
    "RULES",
    "Approximation",
    "BiasLayer",
    "Count",
    "Layer",
    "ProjectionCalls",
    "ProjectionLayer",
    "RowLayer",
    "Sharing",
    "layers_of",
]

RULES: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
    nn.Conv3d: ConvLayer,
    nn.ConvTranspose1d: ConvTransposeLayer,
    nn.ConvTranspose2d: ConvTransposeLayer,
    nn.ConvTranspose3d: ConvTransposeLayer,
    nn.Embedding: EmbeddingLayer,
    nn.LayerNorm: FeatureNormLayer,
    nn.RMSNorm: FeatureNormLayer,
    nn.GroupNorm: ChannelNormLayer,
    nn.BatchNorm1d: ChannelNormLayer,
    nn.BatchNorm2d: ChannelNormLayer,
    nn.BatchNorm3d: ChannelNormLayer,
}
"""The rule of each module type but attention, which :func:`layers_of` takes apart."""


def layers_of(name: str, module: nn.Module, approx: Approximation) -> list[Layer]:
    """The layers that a module's parameters are preconditioned as.

    Args:
        name: Qualified name of the module.
        module: The module.
        approx: ``"expand"`` or ``"reduce"``.

    Returns:
        One layer, four for ``nn.MultiheadAttention``; none if there is no rule. A bias whose weight
        is frozen is a layer of its own.
    """
    if type(module) is nn.MultiheadAttention:
        return [_trained_part(layer) for layer in projections(name, module, approx)]
    rule = RULES.get(type(module))
    return [_trained_part(rule(name, module, approx))] if rule is not None else []


def _trained_part(layer: Layer) -> Layer:
    """A layer of the bias alone, where only that is trained."""
    weight = layer.parameters()[0]
    # One that is computed from others is a plain tensor.
    is_trained = weight is not None and (
        not isinstance(weight, nn.Parameter) or weight.requires_grad
    )
    if is_trained or not layer.has_bias:
        return layer
    if isinstance(layer, RowLayer):
        return BiasLayer(layer)
    return ShiftLayer(layer) if isinstance(layer, NormLayer) else layer
