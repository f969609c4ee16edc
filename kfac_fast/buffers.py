"""Memory of the host for small sums that are formed anew in every step.

Small sums that lie in between of a pass's activations keep the memory of these apart when they are
freed. The host's allocator would give it back to the system and ask for it again in every step,
page by page, which takes as long as the sums. Allocators of other devices keep what they have, and
a captured graph may rely on that; their memory is left to them.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from weakref import ref

from torch import Tensor

from kfac_fast.dispatch import is_traced
from kfac_fast.schema import result_dtype

MOST_BYTES = 2**21  # of a sum; to form a larger one takes longer than its pages


def may_be_kept(total: Tensor) -> bool:
    """Whether a sum's memory is worth keeping, and nobody else's: a tracer may have seen it."""
    return total.is_cpu and total.nbytes <= MOST_BYTES and not is_traced()


def fits(spare: Tensor, like: Tensor) -> bool:
    """Whether memory serves for a sum of outer products of tensors of this kind."""
    return like.is_cpu and spare.dtype == result_dtype(like.dtype) and not is_traced()


class Buffers:
    """Memory for sums that several may hold, used again when nobody does any more."""

    def __init__(self) -> None:
        self._spare: dict[Hashable, Tensor] = {}
        self._lent: set[ref[Tensor]] = set()

    @property
    def nbytes(self) -> int:
        """Bytes that wait for a sum."""
        return sum(spare.nbytes for spare in self._spare.values())

    def take(self, key: Hashable, like: Tensor) -> Tensor | None:
        """Memory for a sum, if there is some.

        Args:
            key: Whose sums these are, which have one shape.
            like: A tensor of the device and, but for half precision, the dtype of the sum.

        Returns:
            A tensor whose contents nobody needs.
        """
        spare = self._spare.pop(key, None)
        return spare if spare is not None and fits(spare, like) else None

    def lend(self, key: Hashable, total: Tensor) -> Tensor:
        """A sum, whose memory comes back when it is let go of.

        Args:
            key: As of :meth:`take`.
            total: The sum, which nobody else holds.

        Returns:
            The same numbers in the same memory.
        """
        if not may_be_kept(total):
            return total
        lent = total.detach()
        self._lent.add(ref(lent, partial(_come_back, self._spare, self._lent, key, total)))
        return lent

    def clear(self) -> None:
        """Let go of all memory, and of what is lent when it comes back."""
        self._spare, self._lent = {}, set()


def _come_back(
    spare: dict[Hashable, Tensor],
    lent: set[ref[Tensor]],
    key: Hashable,
    total: Tensor,
    own: ref[Tensor],
) -> None:
    """Take a sum's memory back as the sum dies, if there is none yet."""
    lent.discard(own)
    spare.setdefault(key, total)
