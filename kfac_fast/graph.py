"""What autograd's graph, and the pass through it that is on its way, tell of a layer's call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils._python_dispatch import _disable_current_modes

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class Kept:
    """The input of a call, for gradients that come later.

    Autograd's graph owns the hook that waits for them until the whole backward pass is over. The
    inputs would stay with it, long after autograd has let go of its own. Between the passes of a
    checkpointed part they are left to the checkpoint, as is what autograd saves there.

    Autograd does not watch over an input that it saves a cast copy of, as under autocast: a later
    write to it goes unnoticed there, and is refused here.

    Args:
        x: The input.
        name: Of the layer.

    Attributes:
        released: Whether it is gone.
    """

    def __init__(self, x: Tensor, name: str) -> None:
        self._name = name
        # Apart from the graph, which would own itself where an input is written to.
        self._held: Any = x.detach()
        self._version: int | None = None
        self._hooks = checkpoint_hooks()
        if self._hooks is not None:
            # What comes back from the second run has no version of when it was saved there.
            self._held = self._hooks[0](self._held.clone() if _may_be_cast(x) else self._held)
        elif not x.is_inference():
            self._version = x._version
        self.released = False

    def get(self) -> Tensor:
        """The input, for which a checkpointed part may have to run; once in a backward pass.

        Returns:
            The same numbers as in the call.

        Raises:
            RuntimeError: If it has been written to.
        """
        held: Tensor = self._held if self._hooks is None else self._hooks[1](self._held)
        if self._version is not None and held._version != self._version:
            raise RuntimeError(
                f"KFAC: the input of {self._name or 'the model'!r} is needed for its factors, but "
                f"has been modified by an inplace operation: it is at version {held._version}, "
                f"expected version {self._version}; clone the input, avoid the in-place operation, "
                "or skip the layer"
            )
        return held

    def release(self) -> None:
        """Let go of it, unless the graph may be passed again."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self._held, self._hooks, self.released = None, None, True


def _may_be_cast(x: Tensor) -> bool:
    """Whether autograd may have saved a copy of an input in another precision."""
    return torch.is_autocast_enabled(x.device.type) or x.dtype in (torch.float16, torch.bfloat16)


class Counted:
    """The calls whose gradients an update of the curvature has taken, in this step.

    One that comes later would miss them: they wait no longer. Nodes of the graph are marked and not
    held, for they own all that is behind them.

    Attributes:
        marked: Whether there are marks.
    """

    def __init__(self) -> None:
        self.marked = False
        self._recorded: set[Hashable] = set()

    def add(self, name: str, output: GradientEdge | None, call: Hashable) -> None:
        """Note a call of a layer, by its output, or what it was recorded as."""
        if output is None:
            self._recorded.add(call)
            return
        _metadata(output.node)[self] = name
        self.marked = True

    def check_recorded(self, name: str, call: Hashable) -> None:
        """Raise if a recorded call is among them."""
        if call in self._recorded:
            _refuse_again(name)

    def check_behind(self, scalar: Tensor) -> None:
        """Raise if the backward pass from a scalar reaches one of them."""
        if self.marked and scalar.grad_fn is not None:
            for node in nodes_behind(scalar.grad_fn):
                name = _metadata(node).get(self)
                if name is not None:
                    _refuse_again(name)


def _metadata(node: Node) -> dict[object, str]:
    metadata: Any = node.metadata  # which its class says to be a method
    return metadata  # type: ignore[no-any-return]


def _refuse_again(name: str) -> NoReturn:
    raise RuntimeError(
        "update_curvature: outputs that share layers must come in one call, got another one that "
        f"reaches {name!r}; kfac_fast.losses.WeightedSum adds several losses up"
    )


def reaches(end: Node) -> bool:
    """Whether the backward pass that is on its way adds to the weight's gradient at its end.

    One for an attack on the input, a penalty, or what lies in front of a frozen part does not.

    Returns:
        Whether it does.
    """
    try:
        return torch._C._will_engine_execute_node(end)
    except RuntimeError:  # asked for by torch.autograd.grad, which adds to nothing
        return False


class _Ending:
    """What a backward pass calls at its end, and lets go of if it fails before.

    Args:
        number: Of the pass.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self) -> None:
        """Note that the pass is over."""
        del _ENDINGS[self.number]


_ENDINGS: WeakValueDictionary[int, _Ending] = WeakValueDictionary()


def backward_pass() -> int:
    """A number of the backward pass that the present gradient comes in; -1 in none."""
    number = torch._C._current_graph_task_id()
    if number != -1 and number not in _ENDINGS:
        _ENDINGS[number] = ending = _Ending(number)
        torch.autograd.Variable._execution_engine.queue_callback(ending)
    return number


def on_its_way(number: int) -> bool:
    """Whether a backward pass, a number of :func:`backward_pass`, is neither over nor failed."""
    return number in _ENDINGS


def checkpoint_hooks() -> Hooks | None:
    """What saves tensors inside of a checkpointed part, and gives them back; None outside."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks if hooks is not None and _is_checkpoints(hooks) else None


def _is_checkpoints(hooks: Hooks) -> bool:
    # A method of a C type has no module.
    return getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def _in_checkpoint() -> bool:
    """Whether a checkpoint saves tensors, or one outside of other hooks would."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or _is_checkpoints(hooks):
        return hooks is not None
    torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        return _in_checkpoint()
    finally:
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)


def recomputes() -> bool:
    """Whether calls are those of an earlier forward pass, run again amid a backward pass.

    A checkpointed part does so to have its activations back; no gradients come to these calls. With
    ``use_reentrant=True`` they do, and the calls are new: the first run was without gradients.

    Returns:
        Whether they are.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    node = torch._C._current_autograd_node()
    name = "" if node is None else node.name()
    if name == "CompiledFunctionBackward":
        return True
    # What is saved again is caught by hooks.
    return name != "CheckpointFunctionBackward" and _in_checkpoint()


def next_node() -> int:
    """A number that nodes are not below if they are made from now on, in this thread."""
    return torch._C._autograd._get_sequence_nr()


def current_node() -> int | None:
    """A number of the node that a backward pass is at, as of :func:`next_node`; None in none."""
    if torch._C._current_graph_task_id() == -1:
        return None
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def unseen() -> AbstractContextManager[object]:
    """For operators that run in a checkpointed part, but not when it is recomputed.

    A selective checkpoint knows operators by their order alone, and would hand out the results of
    these for later ones of the model.

    Returns:
        What hides them from it.
    """
    if torch._C._len_torch_dispatch_stack() and _in_checkpoint():
        return _disable_current_modes()
    return nullcontext()


def in_transform() -> bool:
    """Whether a function is being transformed: its tensors have no memory to form sums of."""
    return torch._C._are_functorch_transforms_active()


def end_at(weight: Tensor) -> Node:
    """Where a backward pass ends that adds to a weight's gradient."""
    # As get_gradient_edge, which costs more.
    return weight.view_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr, return-value]


class View(NamedTuple):
    """How a view reads a tensor, all of whose entries it has once.

    Attributes:
        base_stride: Of the tensor.
        shape: Of the view.
        stride: Of the view.
        offset: Of the view's first entry from the tensor's.
    """

    base_stride: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def gradient(self, of_base: Tensor) -> Tensor:
        """The view's gradient, from that of the tensor."""
        if of_base.stride() != self.base_stride:
            empty = of_base.new_empty_strided(of_base.shape, self.base_stride)
            of_base = empty.copy_(of_base)
        return of_base.as_strided(self.shape, self.stride, of_base.storage_offset() + self.offset)


def lasting(output: Tensor) -> tuple[Tensor, View | None]:
    """What stays in the graph when an output is written to.

    A write to a view replaces its node, with all hooks on it, but not that of what it is a view of.

    Returns:
        The output itself, if it is no view, or one that leaves out or repeats entries; else what it
        is a view of, and how.
    """
    base = output._base
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return output, None
    if any(map(torch._debug_has_internal_overlap, (base, output))):
        return output, None
    offset = int(output.storage_offset() - base.storage_offset())
    return base, View(base.stride(), output.shape, output.stride(), offset)


def nodes_behind(start: Node) -> set[Node]:
    """All that a backward pass from a node may reach, and the node itself."""
    found: set[Node] = set()
    ahead = [start]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead += [following for following, _ in node.next_functions if following is not None]
    return found


def last_reached(edges: Mapping[int, GradientEdge]) -> list[int]:
    """Keys of the edges behind which a backward pass reaches none of the others."""
    nodes = {edge.node for edge in edges.values()}
    reaches: dict[Node, bool] = {}  # whether one of the nodes lies behind
    for edge in edges.values():
        stack = [(edge.node, iter(edge.node.next_functions))]
        reaches.setdefault(edge.node, False)
        while stack:
            node, behind = stack[-1]
            for following, _ in behind:
                if following is None:
                    continue
                if following not in reaches:
                    reaches[following] = False
                    stack.append((following, iter(following.next_functions)))
                    break
                reaches[node] |= following in nodes or reaches[following]
            else:
                stack.pop()
                if stack:
                    reaches[stack[-1][0]] |= node in nodes or reaches[node]
    return [key for key, edge in edges.items() if not reaches[edge.node]]
