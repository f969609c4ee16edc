"""Input covariances of layers that are fed one tensor, formed once."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from kfac_fast.buffers import Buffers
from kfac_fast.factors import Sum
from kfac_fast.layers import Layer, Sharing

Sums = dict[Hashable, tuple[Sum | None, Sharing]]
"""By view and layer, each with the tensors whose addresses are in its key."""


class State(NamedTuple):
    """A tensor with certain contents, and the sums of its views.

    Attributes:
        owner: The tensor, or what it is a view of.
        storage: Its memory: what is assigned to ``x.data`` comes without a write.
        version: Number of writes to it.
        sums: By view and layer.
    """

    owner: ref[Tensor]
    storage: ref[torch.UntypedStorage]
    version: int
    sums: Sums

    def is_of(self, owner: Tensor, storage: torch.UntypedStorage, version: int) -> bool:
        """Whether these are its contents still."""
        return self.owner() is owner and self.storage() is storage and self.version == version


class InputGrams:
    """Sums of outer products of inputs, formed once for all layers that are fed one tensor.

    A tensor and its views are one where they read the same memory in the same way, and no operation
    in between has written to it. A write that autograd does not count, such as one through
    ``x.data``, is not seen here either: within a forward pass it spoils the gradients of the
    layers' weights, too, and nothing outlasts the beginning of the model's next one. Layers that
    are called outside of its passes do see the old contents.

    Attributes:
        buffers: Memory of the sums.
    """

    def __init__(self) -> None:
        # Of tensors by their addresses, only the latest state, and no longer than the tensor.
        self._latest: dict[int, State] = {}
        self.buffers = Buffers()
        self._forget = partial(_forget, ref(self))

    def of(self, layer: Layer, x: Tensor, output: Tensor) -> Sum | None:
        """The result of :meth:`Layer.input_gram`; it is shared, so nobody may change it.

        Args:
            layer: The layer's rule.
            x: The module's input.
            output: The module's output.

        Returns:
            The sum and the number of its terms; None if the layer has no factor of its inputs.
        """
        if any(t.is_inference() for t in (x, *layer.given.tensors())):  # its writes are not counted
            return self._form(layer, x, output)
        input_key = layer.input_key(output)
        if input_key is None:
            return None
        sums = self._sums_of(x)
        view = x.storage_offset(), x.shape, x.stride(), x.dtype, x.is_neg()
        key = view, input_key
        if key not in sums:
            sums[key] = self._form(layer, x, output), layer.given
        return sums[key][0]

    def clear(self) -> None:
        """Let go of all sums."""
        self._latest.clear()

    def _form(self, layer: Layer, x: Tensor, output: Tensor) -> Sum | None:
        key = layer.name, layer.parameters()[0].shape  # the module may grow
        formed = layer.input_gram(x.detach(), output, self.buffers.take(key, output))
        if formed is None:
            return None
        total, count = formed
        return self.buffers.lend(key, total), count

    def _sums_of(self, x: Tensor) -> Sums:
        """The sums of the tensor's present state."""
        # Versions are comparable only among a tensor and its views: they share one counter.
        owner = x if x._base is None else x._base
        storage, version = x.untyped_storage(), x._version
        key = id(owner)
        state = self._latest.get(key)
        if state is None or not state.is_of(owner, storage, version):
            state = State(ref(owner, partial(self._forget, key)), ref(storage), version, {})
            self._latest[key] = state
        return state.sums


def _forget(grams: ref[InputGrams], key: int, _: ref[Tensor]) -> None:
    """Let go of a tensor's sums as it dies. Nothing here owns what owns it."""
    found = grams()
    if found is not None:
        found._latest.pop(key, None)
