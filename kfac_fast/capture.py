"""What the passes of a training step add to the blocks: hooks on the model, and more gradients."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from kfac_fast import compiled
from kfac_fast.blocks import Block
from kfac_fast.curvature import Fisher
from kfac_fast.factors import Sum
from kfac_fast.graph import (
    Counted,
    Kept,
    View,
    checkpoint_hooks,
    current_node,
    end_at,
    in_transform,
    last_reached,
    lasting,
    next_node,
    reaches,
    recomputes,
    unseen,
)
from kfac_fast.input_grams import InputGrams
from kfac_fast.layers import BiasLayer, Count, Layer, ProjectionCalls, ProjectionLayer, Sharing
from kfac_fast.reference import diagonal_of
from kfac_fast.schema import result_dtype

MOST_WAITING = 64  # passes, each of which holds its activations


@dataclass
class ForwardPass:
    """A forward pass of the model, and what tells the number of its loss's terms.

    Attributes:
        number: From 1 on in each step; 0 is for calls outside of any pass.
        batch: Examples in the model's first input; None if it has none.
        most: Examples in that call of a layer which has the most.
        graphs: Examples that the rows of a layer's inputs belong to, where it was told.
        terms: Number of terms, where :meth:`Capture.count` was told.
        recomputed: Whether they were counted before it, in a pass without gradients.
        sharing: How rows are shared in it in layers of these names.
    """

    number: int = 0
    batch: int | None = None
    most: int = 0
    graphs: int | None = None
    terms: Count | None = None
    recomputed: bool = False
    sharing: Mapping[str, Sharing] = field(default_factory=dict)

    def see(self, layer: Layer, output: Tensor) -> int:
        """Take note of a layer's call.

        Returns:
            Number of examples in it.
        """
        examples = layer.examples(output)
        self.most = max(self.most, examples)
        self.graphs = layer.sharing.num_segments or self.graphs
        return examples

    def examples(self, own: int) -> int:
        """Number of examples, seen from a call of a layer with so many of its own.

        Flattened tokens or windows come first in a layer, but are no examples; positions that are
        embedded, or an expert's tokens, are not all of them; an input without a batch is one.

        Returns:
            That of the loss, if it has a term for each.
        """
        if self.graphs is not None or self.batch is None:
            return self.graphs or own
        return min(max(self.most, own), self.batch)


class Call(NamedTuple):
    """A layer's call that waits for gradients.

    Attributes:
        block: The layer's block.
        layer: The layer's rule.
        kept: The input, if gradients need it.
        inputs: Sum of the inputs' outer products.
        output: The output, or what it is a view of; None if its gradients come by themselves.
        view: How the output views it.
        end: Where a backward pass ends that adds to the gradient of the weight of this call.
    """

    block: Block
    layer: Layer
    kept: Kept | None
    inputs: Sum | None
    output: GradientEdge | None = None
    view: View | None = None
    end: Node | None = None

    def is_foreign(self) -> bool:
        """Whether another parameter took the place of the module's own for the call."""
        weight = getattr(self.end, "variable", None)  # where it is one, and not computed
        return weight is not None and weight is not self.layer.in_place()

    def sums(self, gradient: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """Outer products of output gradients, and squared gradients in the eigenbases, if asked."""
        if self.view is not None:
            gradient = self.view.gradient(gradient)
        x = None if self.kept is None else self.kept.get()
        gram = self.layer.gradient_gram(gradient, scale, x, self.block.memory_for(gradient))
        if x is None:
            return gram, None
        return gram, self.block.squared_gradients(self.layer, x, gradient, scale)


def _identity(block: Block, layer: Layer, like: Tensor) -> Tensor:
    """The gradient covariance of the forward-only Fisher, ``[(groups,) out, out]``."""
    total = block.memory_for(like)
    if total is None:
        shape = layer.factor_shapes()["gradient"]
        total = like.new_empty(shape, dtype=result_dtype(like.dtype))
    diagonal_of(total.zero_()).fill_(1)
    return total


def _numbered(
    recorded: Iterable[tuple[int, int, Call, Tensor]],
) -> list[tuple[tuple[int, int, int], Call, Tensor]]:
    """Recorded calls with keys that are the same in every backward pass."""
    seen: Counter[tuple[int, int]] = Counter()
    numbered: list[tuple[tuple[int, int, int], Call, Tensor]] = []
    for index, forward_pass, call, gradient in recorded:
        numbered.append(((index, forward_pass, seen[index, forward_pass]), call, gradient))
        seen[index, forward_pass] += 1
    return numbered


def _keeps(block: Block, layer: Layer) -> bool:
    """Whether a call's gradients may need its input."""
    return layer.keeps_input or block.form == "corrected"


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
        traced: Whether layers are called inside of a compiled graph.
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
        self.traced = False
        self._blocks = blocks
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
        self._pass = ForwardPass()
        self._passes = {0: self._pass}
        # All that were stated in this step, with the first node of the graph that may follow.
        self._sharings: list[tuple[int, Mapping[str, Sharing]]] = []
        self._counted = Counted()
        self._input_grams = InputGrams()
        self._handle = compiled.register(self)
        self._tapped: list[tuple[Block, Layer]] = []
        self._waiting = 0
        self._pass_number = torch.tensor(0, device="cpu")
        self._recorded: list[tuple[int, int, Call, Tensor]] | None = None
        begin = self._begin_hook(model)
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(begin, with_kwargs=True)
        ]
        attention: dict[nn.Module, dict[ProjectionLayer, tuple[Block, Layer]]] = defaultdict(dict)
        for block in blocks:
            for layer in block.layers:
                projection = layer.of if isinstance(layer, BiasLayer) else layer
                if isinstance(projection, ProjectionLayer):
                    attention[layer.module][projection] = block, layer
                    continue
                hook = self._layer_hook(block, layer)
                # The layer's own output, before hooks of others replace it.
                handle = layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                self._hooks.append(handle)
        for module, projections in attention.items():
            self._hooks += self._attention_hooks(module, projections)

    @property
    def hooked(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._hooks)

    @property
    def nbytes(self) -> int:
        """Bytes that wait for the sums of the next step."""
        spares = [block.spare for block in self._blocks]
        own = sum(spare.nbytes for spare in spares if spare is not None)
        return own + self._input_grams.buffers.nbytes

    def forget(self) -> None:
        """Drop the calls that still wait and the shared sums, at the end of a step."""
        self.calls, self._sharings = [], []
        self._captures, self._scale = None, None
        self._pass = ForwardPass()
        self._passes = {0: self._pass}
        self._counted = Counted()
        self._input_grams.clear()

    def remove(self) -> None:
        """Take the hooks off the model, not between the passes of a checkpointed part."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.forget()
        self._input_grams.buffers.clear()
        for block in self._blocks:
            block.spare = None

    def count(self, terms: Count) -> None:
        """Take note of the number of the training loss's terms in the latest forward pass."""
        # After a pass that was recomputed, it is of the next one, which has run without gradients.
        latest = self._passes[0] if self._pass.recomputed else self._pass
        latest.terms = terms

    def share(self, sharing: Mapping[str, Sharing]) -> None:
        """Take note of how rows are shared in layers of these names, until the step's end."""
        before = self._sharings[-1][1] if self._sharings else {}
        self._sharings.append((next_node(), {**before, **sharing}))

    def _sharing(self) -> Mapping[str, Sharing]:
        """How rows are shared at present, or were when a backward pass's present node was made."""
        node = current_node() if self._sharings else None
        for first, sharing in reversed(self._sharings):
            if node is None or first <= node:
                return sharing
        return {}

    def backpropagate(self, scalars: Iterable[Tensor], terms: Count) -> None:
        """Add the waiting calls that some scalars depend on, with the gradients of all of these.

        A gradient is made use of as it passes; none is kept, but those at the end of the way.

        Args:
            scalars: They are taken and backpropagated one by one.
            terms: Number of the loss's terms.
        """
        # Outputs inside of a compiled graph are out of reach; on the way to the weights it meets
        # the operators that record them.
        tapped = [layer.trained() for _, layer in self._tapped] if self.traced else []
        weights = [weight for weight in tapped if weight is not None]
        self.calls = [call for call in self.calls if not call.is_foreign()]
        edges = {i: c.output for i, c in enumerate(self.calls) if c.output is not None}
        last = last_reached(edges)
        sums: dict[Hashable, tuple[Call, Tensor, Tensor | None]] = {}

        def add(key: Hashable, call: Call, gradient: Tensor | None) -> None:
            if gradient is None:
                return
            gram, squares = call.sums(gradient, 1.0)
            if key in sums:
                _, old_gram, old_squares = sums[key]
                gram = old_gram.add_(gram)
                if squares is not None and old_squares is not None:
                    squares = old_squares.add_(squares)
            sums[key] = call, gram, squares

        def on_the_way(index: int, number: int, gradients: tuple[Tensor | None, ...]) -> None:
            add(index, self.calls[index], gradients[number])

        hooks = [
            edge.node.register_prehook(partial(on_the_way, index, edge.output_nr))
            for index, edge in edges.items()
            if index not in last
        ]
        inputs: list[Any] = [*(edges[index] for index in last), *dict.fromkeys(weights)]
        if not inputs and not self._counted.marked:  # no call waits, or all compiled are frozen
            return
        try:
            for scalar in scalars:
                if not sums:  # at the first
                    self._counted.check_behind(scalar)
                if not inputs:
                    return
                self._recorded = []
                found = torch.autograd.grad(scalar, inputs, retain_graph=True, allow_unused=True)
                for index, gradient in zip(last, found, strict=False):
                    add(index, self.calls[index], gradient)
                for number, call, gradient in _numbered(self._recorded):
                    if number[1] > 0:  # in a pass that is known
                        self._counted.check_recorded(call.layer.name, number)
                    add(number, call, gradient)
        finally:
            self._recorded = None
            for hook in hooks:
                hook.remove()
        counted: set[Block] = set()
        for key, (call, gram, squares) in sums.items():
            call.block.add(call.inputs, (gram, 0 if call.block in counted else terms), squares)
            counted.add(call.block)
            self._counted.add(call.layer.name, call.output, key)
        self.calls = [call for index, call in enumerate(self.calls) if index not in sums]

    def begin(self, examples: int) -> int:
        """Take note of a forward pass.

        Args:
            examples: Number of examples in the model's first input; 0 if it has none.

        Returns:
            The pass' number in this step, 0 if nothing is captured.
        """
        self._captures, self._scale = None, None
        if not self._capturing():
            return 0
        number = len(self._passes)
        if recomputes():  # which calls of compiled parts alone ask for again
            self._passes[number] = ForwardPass(number, examples or None, sharing=self._sharing())
            return number
        self._input_grams.clear()  # inputs may have been refilled since
        self._waiting = self._waiting + 1 if self.calls else 0
        if self._waiting > MOST_WAITING:
            warnings.warn(
                "KFAC: the graphs of many forward passes wait for update_curvature() or step(); "
                "run other passes under torch.no_grad()",
                RuntimeWarning,
                stacklevel=2,
            )
        # What was counted outside of any pass is of one that ran without gradients.
        terms = self._passes[0].terms
        self._passes[0] = ForwardPass()
        self._pass = ForwardPass(
            number,
            examples or None,
            terms=terms,
            recomputed=terms is not None,
            sharing=self._sharing(),
        )
        self._passes[number] = self._pass
        return number

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
            return
        if self._fisher != "empirical" and self._recorded is None:
            return
        weight = layer.trained()
        if weight is None:
            return
        sharing = self._passes[forward_pass].sharing if forward_pass in self._passes else None
        if not forward_pass or sharing is None:  # outside of any pass
            sharing = self._sharing()
        call = self._call(block, layer, x, gradient, self._keep(block, layer, x), sharing)
        if self._recorded is not None:
            self._recorded.append((index, forward_pass, call, gradient))
            return
        seen = self._passes.get(forward_pass, self._pass)
        with torch.enable_grad():
            call = call._replace(end=end_at(weight))
        examples = seen.see(call.layer, gradient)
        if examples > 1 and seen.batch is not None:  # the layers in front are not seen yet
            seen.most = max(seen.most, seen.batch)
        self._add(call, examples, seen, gradient)

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
                self._pass_number = torch.tensor(self.begin(examples), device="cpu")

        return begin

    def _attention_hooks(
        self, attention: nn.Module, found: Mapping[ProjectionLayer, tuple[Block, Layer]]
    ) -> list[RemovableHandle]:
        """Hooks that look into an attention module for as long as its forward pass takes."""
        numbers = {projection: self._number(*own) for projection, own in found.items()}
        keeps = any(block.form == "corrected" for block, _ in found.values())

        def see(projection: ProjectionLayer, x: Tensor, output: Tensor) -> Tensor:
            return self._see(numbers[projection], x, output) if output.requires_grad else output

        calls = ProjectionCalls(list(found), see)

        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if module is not attention or not torch.is_grad_enabled() or in_transform():
                return
            if (
                torch.compiler.is_compiling()
                or self._capturing()
                or (keeps and checkpoint_hooks() is not None)
            ):
                calls.open()

        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if module is attention:
                calls.close()

        return [
            attention.register_forward_pre_hook(enter),
            attention.register_forward_hook(leave, always_call=True),
        ]

    def _number(self, block: Block, layer: Layer) -> int:
        """A number that compiled graphs know a layer by."""
        self._tapped.append((block, layer))
        return len(self._tapped) - 1

    def _see(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        """Have a call of a layer taken down; the output to go on with."""
        if not self._tapped[index][1].reads_input:  # nobody is to keep it
            x = x.new_empty(0)
        if torch.compiler.is_compiling():
            call = self._pass_number, self._handle, index
            return compiled.tap(output, x, *call, at_once=self._fisher == "forward-only")
        self._take_down(*self._tapped[index], x, output)
        return output

    def _layer_hook(self, block: Block, layer: Layer) -> Callable[..., Tensor | None]:
        index = self._number(block, layer)
        keeps = _keeps(block, layer)

        def capture(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            # Mostly nothing is due, which a compiler must not look at.
            if not torch.compiler.is_compiling() and self._captures is False:
                if not keeps or checkpoint_hooks() is None:
                    return None
            # A deep copy of the model takes the hooks along.
            if module is not layer.module or not output.requires_grad or in_transform():
                return None
            x = inputs[0] if inputs else named["x" if "x" in named else "input"]  # nn.RMSNorm's
            return self._see(index, x, output)

        return capture

    def _keep(self, block: Block, layer: Layer, x: Tensor) -> Kept | None:
        """The input of a call, where its gradients may need it."""
        if not _keeps(block, layer):
            return None
        # At any step in a checkpointed part, which must save the same when it runs again.
        needed = self._capturing() or checkpoint_hooks() is not None
        return Kept(x, layer.name) if needed else None

    def _take_down(self, block: Block, layer: Layer, x: Tensor, output: Tensor) -> None:
        """Take down a call, if it is due, which waits for the gradients of its output."""
        kept = self._keep(block, layer, x)
        if not self._capturing() or self._recorded is not None or recomputes():
            return
        with unseen():
            self._take_in(block, layer, x, output, kept)

    def _take_in(
        self, block: Block, layer: Layer, x: Tensor, output: Tensor, kept: Kept | None
    ) -> None:
        """Take down a call that is due."""
        weight = layer.trained()
        if weight is None:
            return
        call = self._call(block, layer, x, output, kept, self._sharing())
        if self._fisher == "forward-only":
            block.add(call.inputs, (_identity(block, layer, output), 1))
            return
        source, view = lasting(output)
        call = call._replace(view=view, end=end_at(weight))
        if self._fisher != "empirical":
            self.calls.append(call._replace(output=get_gradient_edge(source)))
            return
        # Without the edge: the graph owns this hook, and nothing else would part the two.
        examples = self._pass.see(call.layer, output)
        source.register_hook(partial(self._add, call, examples, self._pass))

    def _call(
        self,
        block: Block,
        layer: Layer,
        x: Tensor,
        output: Tensor,
        kept: Kept | None,
        sharing: Mapping[str, Sharing],
    ) -> Call:
        """A call with its sum of inputs."""
        if x.layout != torch.strided:
            raise TypeError(
                f"KFAC: inputs of {layer.name!r} must be strided, got {x.layout}; skip the layer"
            )
        layer = layer.shared(sharing[layer.name]) if layer.name in sharing else layer
        outer = self._input_grams.of(layer, x, output)
        needed = layer.keeps_input or block.correction is not None
        return Call(block, layer, kept if needed else None, outer)

    def _add(
        self, call: Call, own_examples: int, forward_pass: ForwardPass, gradient: Tensor
    ) -> None:
        """Add a call's outer products under the training loss."""
        if call.end is None or not reaches(call.end) or call.is_foreign():
            return
        if torch.is_grad_enabled():  # to be differentiated again, which sums are not
            with torch.no_grad():
                self._add(call, own_examples, forward_pass, gradient)
            return
        if call.kept is not None and call.kept.released:
            return  # what comes in two parts of a backward pass counts once
        if self._scale is None:
            self._scale = self._loss_scale()
        terms = forward_pass.terms
        if terms is None:
            terms = forward_pass.examples(own_examples) * self._terms_per_example
        divisor = terms if self._mean else 1
        scale = self._accumulation_steps / self._scale
        block, number = call.block, forward_pass.number
        block.forget_cleared()
        # A layer called twice in one pass sees the same terms of the loss twice.
        first_call = number == 0 or block.counted_pass != number
        if isinstance(divisor, Tensor):
            gram, squares = call.sums(gradient, scale**2)
            gram = divisor**2 * gram
            squares = None if squares is None else divisor**2 * squares
        else:
            gram, squares = call.sums(gradient, (scale * divisor) ** 2)
        block.add(call.inputs, (gram, terms if first_call else 0), squares)
        block.counted_pass = number
        if call.kept is not None:
            call.kept.release()
