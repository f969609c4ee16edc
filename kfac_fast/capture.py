"""What the passes of a training step add to the blocks: hooks on the model, and more gradients."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from kfac_fast import compiled
from kfac_fast.blocks import Block
from kfac_fast.curvature import Fisher
from kfac_fast.factors import Sum
from kfac_fast.layers import Count, Layer, ProjectionCalls, ProjectionLayer, Sharing
from kfac_fast.schema import result_dtype


class Kept:
    """The input of a call, for gradients that come later.

    Autograd's graph owns the hook that waits for them until the whole backward pass is over. The
    inputs would stay with it, long after autograd has let go of its own.

    Attributes:
        x: The input, apart from the graph, which would otherwise own itself where an input is
            written to; None after :meth:`release`.
    """

    def __init__(self, x: Tensor) -> None:
        self.x: Tensor | None = x.detach()

    def release(self) -> None:
        """Let go of it, unless the graph may be passed again."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.x = None


class Call(NamedTuple):
    """A layer's call that waits for gradients."""

    block: Block
    layer: Layer
    kept: Kept | None
    output: GradientEdge | None
    inputs: Sum | None

    def sums(self, gradient: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """Outer products of output gradients, and squared gradients in the eigenbases, if asked."""
        x = None if self.kept is None else self.kept.x
        gram = self.layer.gradient_gram(gradient, scale, x)
        if x is None:
            return gram, None
        return gram, self.block.squared_gradients(self.layer, x, gradient, scale)


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
    sums: dict[Hashable, Sum | None]

    def is_of(self, owner: Tensor, storage: torch.UntypedStorage, version: int) -> bool:
        """Whether these are its contents still."""
        return self.owner() is owner and self.storage() is storage and self.version == version


class InputGrams:
    """Sums of outer products of inputs, formed once for all layers that are fed one tensor.

    A tensor and its views are one where they read the same memory in the same way, and no operation
    in between has written to it. A write that autograd does not count, such as one through
    ``x.data``, is not seen here either; it spoils the gradients of the layers' weights, too.
    """

    def __init__(self) -> None:
        # Of tensors by their addresses, only the latest state, and no longer than the tensor.
        self._latest: dict[int, State] = {}
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
        input_key = layer.input_key(output)
        if input_key is None:
            return None
        if x.is_inference():  # writes to it are not counted
            return layer.input_gram(x.detach(), output)
        try:
            sums = self._sums_of(x)
        except NotImplementedError:  # inside a function transform there is no memory
            return layer.input_gram(x.detach(), output)
        view = x.storage_offset(), x.shape, x.stride(), x.dtype, x.is_neg()
        key = view, input_key
        if key not in sums:
            sums[key] = layer.input_gram(x.detach(), output)
        return sums[key]

    def clear(self) -> None:
        """Let go of all sums."""
        self._latest.clear()

    def _sums_of(self, x: Tensor) -> dict[Hashable, Sum | None]:
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


def _identity(layer: Layer, like: Tensor) -> Tensor:
    """The gradient covariance of the forward-only Fisher, ``[(groups,) out, out]``."""
    shape = layer.factor_shapes()["gradient"]
    identity = torch.eye(shape[-1], dtype=result_dtype(like.dtype), device=like.device)
    return identity.expand(shape).clone()


def _numbered(
    recorded: Iterable[tuple[int, int, Call, Tensor]],
) -> list[tuple[Hashable, Call, Tensor]]:
    """Recorded calls with keys that are the same in every backward pass."""
    seen: Counter[tuple[int, int]] = Counter()
    numbered: list[tuple[Hashable, Call, Tensor]] = []
    for index, forward_pass, call, gradient in recorded:
        numbered.append(((index, forward_pass, seen[index, forward_pass]), call, gradient))
        seen[index, forward_pass] += 1
    return numbered


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


class Capture:
    """Hooks that add the outer products of every layer's inputs and output gradients to its block.

    A layer's inputs enter its sums only together with their gradients, so that a forward pass
    without a backward pass leaves no trace. Under the forward-only Fisher they enter at once.

    Args:
        model: The model.
        blocks: The blocks of its layers.
        due: Says whether the current step captures.
        fisher: Whose gradients are taken: of the training loss under ``"empirical"``, none under
            ``"forward-only"``, else those of :meth:`backpropagate`.
        mean: Whether the training loss is a mean over its terms.
        terms_per_example: Terms of each example that a mean is divided by.
        accumulation_steps: Number that each micro-batch's loss is divided by.
        loss_scale: Gives the number that the training loss is multiplied by.

    Attributes:
        calls: Calls that wait for :meth:`backpropagate`.
        sharing: How rows are shared in the calls of layers of these names, until the step's end.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        due: Callable[[], bool],
        *,
        fisher: Fisher,
        mean: bool,
        terms_per_example: int,
        accumulation_steps: int,
        loss_scale: Callable[[], float],
    ) -> None:
        self.calls: list[Call] = []
        self.sharing: dict[str, Sharing] = {}
        self._due = due
        self._fisher = fisher
        self._mean = mean
        self._terms_per_example = terms_per_example
        self._accumulation_steps = accumulation_steps
        self._loss_scale = loss_scale
        # Asked for once a pass: every layer's hook wants to know, and a scaler's scale may make the
        # host wait.
        self._captures: bool | None = None
        self._scale: float | None = None
        self._passes = 0
        self._terms: dict[int, Count] = {}
        self._batch: int | None = None
        self._input_grams = InputGrams()
        self._handle = compiled.register(self)
        self._tapped: list[tuple[Block, Layer]] = []
        self._traced = False
        self._pass_number = torch.tensor(0)
        self._recorded: list[tuple[int, int, Call, Tensor]] | None = None
        begin = self._begin_hook(model)
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(begin, with_kwargs=True)
        ]
        attention: dict[nn.Module, dict[ProjectionLayer, Block]] = defaultdict(dict)
        for block in blocks:
            for layer in block.layers:
                if isinstance(layer, ProjectionLayer):
                    attention[layer.module][layer] = block
                    continue
                hook = self._layer_hook(block, layer)
                self._hooks.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        for module, projections in attention.items():
            self._hooks += self._attention_hooks(module, projections)

    @property
    def hooked(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._hooks)

    def forget(self) -> None:
        """Drop the calls that still wait and the shared sums, at the end of a step."""
        self.calls, self.sharing = [], {}
        self._passes, self._terms, self._captures, self._scale = 0, {}, None, None
        self._input_grams.clear()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.forget()

    def count(self, terms: Count) -> None:
        """Take note of the number of the training loss's terms in the latest forward pass."""
        self._terms[self._passes] = terms

    def backpropagate(self, scalars: Iterable[Tensor], terms: Count) -> None:
        """Add the waiting calls that some scalars depend on, with the gradients of all of these.

        A gradient is made use of as it passes; none is kept, but those at the end of the way.

        Args:
            scalars: They are taken and backpropagated one by one.
            terms: Number of the loss's terms.
        """
        if not self.calls and not self._traced:
            return
        # Outputs inside of a compiled graph are out of reach; on the way to the weights it meets
        # the operators that record them.
        weights = [block.layer.parameters()[0] for block, _ in self._tapped] if self._traced else []
        edges = {i: c.output for i, c in enumerate(self.calls) if c.output is not None}
        last = last_reached(edges)
        sums: dict[Hashable, tuple[Call, Tensor, Tensor | None]] = {}

        def add(key: Hashable, call: Call, gradient: Tensor | None) -> None:
            if gradient is None:
                return
            gram, squares = call.sums(gradient, 1.0)
            if key in sums:
                _, old_gram, old_squares = sums[key]
                gram = old_gram + gram
                if squares is not None and old_squares is not None:
                    squares = old_squares + squares
            sums[key] = call, gram, squares

        def on_the_way(index: int, number: int, gradients: tuple[Tensor | None, ...]) -> None:
            add(index, self.calls[index], gradients[number])

        hooks = [
            edge.node.register_prehook(partial(on_the_way, index, edge.output_nr))
            for index, edge in edges.items()
            if index not in last
        ]
        inputs: list[Any] = [*(edges[index] for index in last), *dict.fromkeys(weights)]
        try:
            for scalar in scalars:
                self._recorded = []
                found = torch.autograd.grad(scalar, inputs, retain_graph=True, allow_unused=True)
                for index, gradient in zip(last, found, strict=False):
                    add(index, self.calls[index], gradient)
                for key, call, gradient in _numbered(self._recorded):
                    add(key, call, gradient)
        finally:
            self._recorded = None
            for hook in hooks:
                hook.remove()
        counted: set[Block] = set()
        for call, gram, squares in sums.values():
            call.block.add(call.inputs, (gram, 0 if call.block in counted else terms), squares)
            counted.add(call.block)
        self.calls = [call for index, call in enumerate(self.calls) if index not in sums]

    def begin(self, examples: int) -> int:
        """Take note of a forward pass.

        Args:
            examples: Number of examples in the model's first input; 0 if it has none.

        Returns:
            The pass' number in this step.
        """
        self._passes += 1
        self._captures, self._scale = None, None
        self._batch = examples or None
        return self._passes

    def record(self, index: int, x: Tensor, gradient: Tensor, forward_pass: int) -> None:
        """Take down a call of a compiled layer on its way back.

        Args:
            index: Which of the layers.
            x: Its input.
            gradient: The gradient of its output.
            forward_pass: Number of the pass.
        """
        if not self.hooked or not self._capturing():
            return
        block, layer = self._tapped[index]
        if self._fisher == "forward-only":
            self._take_down(block, layer, x, gradient)
        elif self._fisher == "empirical":
            call = self._call(block, layer, x, gradient)
            self._add(call, self._examples(call.layer, gradient), forward_pass, gradient)
        elif self._recorded is not None:
            call = self._call(block, layer, x, gradient)
            self._recorded.append((index, forward_pass, call, gradient))

    def _capturing(self) -> bool:
        if self._captures is None:
            self._captures = self._due()
        return self._captures

    def _begin_hook(self, model: nn.Module) -> Callable[..., None]:
        def begin(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            # An evaluation in between is no pass, and a deep copy of the model has the hook too.
            if module is not model or not torch.is_grad_enabled():
                return
            tensors = [x for x in tree_leaves((inputs, named)) if isinstance(x, Tensor)]
            examples = next((x.shape[0] for x in tensors if x.dim() > 0), 0)
            if torch.compiler.is_compiling() and tensors:
                self._pass_number = compiled.begin(tensors[0], examples, self._handle)
            else:
                self._pass_number = torch.tensor(self.begin(examples))

        return begin

    def _attention_hooks(
        self, attention: nn.Module, blocks: Mapping[ProjectionLayer, Block]
    ) -> list[RemovableHandle]:
        """Hooks that look into an attention module for as long as its forward pass takes."""
        open_calls: list[ProjectionCalls] = []

        def take_down(layer: ProjectionLayer, x: Tensor, output: Tensor) -> None:
            if output.requires_grad:
                self._take_down(blocks[layer], layer, x, output)

        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if module is attention and torch.is_grad_enabled() and self._capturing():
                open_calls.append(ProjectionCalls(list(blocks), take_down))
                open_calls[-1].__enter__()  # type: ignore[no-untyped-call]

        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if module is attention and open_calls:
                open_calls.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

        return [
            attention.register_forward_pre_hook(enter),
            attention.register_forward_hook(leave, always_call=True),
        ]

    def _layer_hook(self, block: Block, layer: Layer) -> Callable[..., Tensor | None]:
        index = len(self._tapped)
        self._tapped.append((block, layer))
        at_once = self._fisher == "forward-only"

        def capture(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            # A deep copy of the model takes the hooks along.
            if module is not layer.module or not output.requires_grad:
                return None
            x = inputs[0] if inputs else named["input"]
            if torch.compiler.is_compiling():
                self._traced = True
                token, handle = self._pass_number, self._handle
                return compiled.tap(output, x, token, handle, index, at_once=at_once)
            if self._capturing():
                self._take_down(block, layer, x, output)
            return None

        return capture

    def _take_down(self, block: Block, layer: Layer, x: Tensor, output: Tensor) -> None:
        """Take down a call, which waits for the gradients of its output."""
        call = self._call(block, layer, x, output)
        if self._fisher == "forward-only":
            block.add(call.inputs, (_identity(layer, output), 1))
            return
        if self._fisher != "empirical":
            self.calls.append(call._replace(output=get_gradient_edge(output)))
            return
        # Without the edge: the graph owns this hook, and nothing else would part the two.
        examples = self._examples(call.layer, output)
        output.register_hook(partial(self._add, call, examples, self._passes))

    def _call(self, block: Block, layer: Layer, x: Tensor, output: Tensor) -> Call:
        """A call with its sum of inputs."""
        layer = layer.shared(self.sharing[layer.name]) if layer.name in self.sharing else layer
        outer = self._input_grams.of(layer, x, output)
        kept = Kept(x) if layer.keeps_input or block.correction is not None else None
        return Call(block, layer, kept, None, outer)

    def _examples(self, layer: Layer, output: Tensor) -> int:
        # Flattened tokens or windows come first in a layer, but are no examples.
        examples = layer.examples(output)
        return examples if self._batch is None else min(examples, self._batch)

    def _add(self, call: Call, examples: int, forward_pass: int, gradient: Tensor) -> None:
        """Add a call's outer products under the training loss."""
        if torch.is_grad_enabled():
            return  # a backward pass that is differentiated again is not that of the training loss
        if call.kept is not None and call.kept.x is None:
            return  # what comes in two parts of a backward pass counts once
        if self._scale is None:
            self._scale = self._loss_scale()
        terms = self._terms.get(forward_pass, examples * self._terms_per_example)
        divisor = terms if self._mean else 1
        scale = self._accumulation_steps / self._scale
        # A layer called twice in one pass sees the same terms of the loss twice.
        block = call.block
        first_call = forward_pass == 0 or block.counted_pass != forward_pass
        block.counted_pass = forward_pass
        if isinstance(divisor, Tensor):
            gram, squares = call.sums(gradient, scale**2)
            gram = divisor**2 * gram
            squares = None if squares is None else divisor**2 * squares
        else:
            gram, squares = call.sums(gradient, (scale * divisor) ** 2)
        block.add(call.inputs, (gram, terms if first_call else 0), squares)
        if call.kept is not None:
            call.kept.release()
