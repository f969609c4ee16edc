"""The Gram of sums or means over shared positions, or over segments of rows.

``position_sums_kernel`` adds a part of each example's rows, ``[N, D]`` a part; ``rows_kernel`` adds
the parts, divides by the number of rows that count and appends it where a bias needs it. What
follows is the Gram of few rows. No sum depends on the order in which thread blocks run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_fast.kernels import launch
from kfac_fast.kernels.gram import gram

COLUMNS = tl.constexpr(launch.Line.COLUMNS)
ROWS = tl.constexpr(launch.Line.ROWS)

STEPS_PER_SUM = tl.constexpr(launch.STEPS_PER_SUM)

# Entries of a row that one program finishes.
ENTRIES = 256


class Positions(NamedTuple):
    """The rows that are added to each example's sum; strides in elements.

    Attributes:
        rows: How an example's rows lie; with ``order``, all rows.
        examples: Number of examples or segments.
        example_stride: From an example to the next, of ``x``.
        mask_stride: The same of the mask.
        order: int64, the rows ordered by segment.
        starts: int64 ``[segments + 1]``, the first of each segment in ``order``, and their number.
    """

    rows: launch.Rows
    examples: int
    example_stride: int
    mask_stride: int
    order: Tensor | None
    starts: Tensor | None

    @staticmethod
    def shared(x: Tensor, mask: Tensor | None) -> "Positions":
        """The rows of examples ``[N, *shared, D]``; a copy if they take more than two strides."""
        if len(launch.levels(x[0])) > 2:
            x = x.contiguous()
        order = [1 + i for i in launch.by_stride(x[0])]
        x = x.permute(0, *order, -1)
        if mask is not None:
            mask = mask.permute(0, *order).contiguous()
        rows = launch.Rows.of(x[0], None if mask is None else mask[0], x.shape[-1])
        if x.stride(0) % rows.chunk:
            rows = rows._replace(chunk=1)
        return Positions(
            rows, len(x), x.stride(0), 0 if mask is None else mask.stride(0), None, None
        )

    @staticmethod
    def segmented(
        x: Tensor, mask: Tensor | None, segments: Tensor, num_segments: int
    ) -> "Positions":
        """The rows ``[R, D]`` of segments, in any order."""
        rows = launch.Rows.of(x, mask, x.shape[-1])
        if rows.line != launch.Line.COLUMNS:
            rows = rows._replace(line=launch.Line.NEITHER, chunk=1)
        # Stable, so that each segment's rows are added in one order.
        ordered, order = torch.sort(segments, stable=True)
        edges = torch.arange(num_segments + 1, device=x.device)
        starts = torch.searchsorted(ordered, edges)
        return Positions(rows, num_segments, 0, 0, order, starts)


@triton.jit(
    do_not_specialize=[
        "examples", "outer", "inner", "width", "split", "example_stride", "outer_stride",
        "row_stride", "column_stride", "mask_stride", "mask_outer_stride", "mask_row_stride",
    ]
)  # fmt: skip
def position_sums_kernel(
    x, mask, order, starts, sums, counts, examples, outer, inner, width, split, example_stride,
    outer_stride, row_stride, column_stride, mask_stride, mask_outer_stride, mask_row_stride,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, LINE: tl.constexpr, CHUNK: tl.constexpr,
    SEGMENTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one part of an example's rows; grid (split * examples * blocks of columns).

    ``sums`` is ``[split, examples, width]``, ``counts`` ``[split, examples]``. Where ``CHUNK``, the
    elements of 16 bytes, divides the sizes and strides, these come divided by it.
    """
    if LINE == COLUMNS:
        column_stride = 1
        row_stride = row_stride.to(tl.int64) * CHUNK
        width = width * CHUNK
    elif LINE == ROWS:
        row_stride = 1
        column_stride = column_stride.to(tl.int64) * CHUNK
        inner = inner * CHUNK
    outer_stride = outer_stride.to(tl.int64) * CHUNK
    blocks = tl.maximum(tl.cdiv(width, BLOCK), 1)
    block = tl.program_id(0) % blocks
    example = (tl.program_id(0) // blocks % examples).to(tl.int64)
    part = (tl.program_id(0) // blocks // examples).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    first = x + example * (example_stride.to(tl.int64) * CHUNK)
    first += column.to(tl.int64)[None, :] * column_stride
    mask += example * mask_stride
    if SEGMENTED:
        start = tl.load(starts + example)
        inner = tl.load(starts + example + 1) - start
        outer = 1
    steps_per_outer = tl.cdiv(inner, DEPTH).to(tl.int32)
    steps = outer * steps_per_outer
    steps_per_part = tl.cdiv(steps, split)
    begin = part.to(tl.int32) * steps_per_part
    end = tl.minimum(begin + steps_per_part, steps)
    total = tl.zeros((DEPTH, BLOCK), tl.float32)
    chain = tl.zeros((DEPTH, BLOCK), tl.float32)
    counted = tl.zeros((DEPTH,), tl.int32)
    for step in range(begin, end):
        row = (step % steps_per_outer).to(tl.int64) * DEPTH + tl.arange(0, DEPTH)
        counts_row = row < inner
        if SEGMENTED:
            row = tl.load(order + start + row, mask=counts_row, other=0)
            offset = row * row_stride
            mask_offset = row * mask_row_stride
        else:
            level = (step // steps_per_outer).to(tl.int64)
            offset = level * outer_stride + row * row_stride
            mask_offset = level * mask_outer_stride + row * mask_row_stride
        if MASKED:
            counts_row &= tl.load(mask + mask_offset, mask=counts_row, other=0)
        exists = counts_row[:, None] & (column < width)[None, :]
        chain += tl.load(first + offset[:, None], mask=exists, other=0.0).to(tl.float32)
        if (step - begin) % STEPS_PER_SUM == STEPS_PER_SUM - 1:
            total += chain
            chain = tl.zeros((DEPTH, BLOCK), tl.float32)
        counted += counts_row.to(tl.int32)
    place = part * examples + example
    tl.store(sums + place * width + column, tl.sum(total + chain, 0), mask=column < width)
    if block == 0:
        tl.store(counts + place, tl.sum(counted, 0))


@triton.jit(do_not_specialize=["examples", "width", "groups", "split"])
def rows_kernel(
    sums, counts, rows, kept, examples, width, groups, split,
    ENTRIES: tl.constexpr, MEAN: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Finish some entries of an example's row; grid (examples * blocks of entries).

    ``rows`` is ``[examples, groups * width]``, where ``COUNTED`` each group's last entry is the
    number of rows that count. ``kept`` tells whether any does.
    """
    edge = width + 1 if COUNTED else width
    entries = groups * edge
    blocks = tl.maximum(tl.cdiv(entries, ENTRIES), 1)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * ENTRIES + tl.arange(0, ENTRIES)
    group = entry // tl.maximum(edge, 1)
    feature = entry - group * edge
    column = group * width + feature
    summed = (entry < entries) & (feature < width)
    total = tl.zeros((ENTRIES,), tl.float32)
    count = 0
    for part in range(split):
        place = examples.to(tl.int64) * part + example
        total += tl.load(sums + place * (groups * width) + column, mask=summed, other=0.0)
        count += tl.load(counts + place)
    if COUNTED:
        total = tl.where(feature == width, count.to(tl.float32), total)
    if MEAN:
        total = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32))
    tl.store(rows + example * entries + entry, total, mask=entry < entries)
    if tl.program_id(0) % blocks == 0:
        tl.store(kept + example, count > 0)


def shared_gram(
    x: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    reduction: str,
    groups: int,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
    precision: str,
) -> None:
    """``out <- beta out + alpha`` Gram of sums or means; at the matmul precision ``precision``.

    Arguments are the checked ones of the operator. The sums are float32.
    """
    if out.numel() == 0:
        return
    if 0 in x.shape[:-1]:  # no row counts, so that not even a bias does
        gram(x.new_empty(0, x.shape[-1]), None, groups, bias, alpha, beta, out, precision)
        return
    if segments is None:
        positions = Positions.shared(x, mask)
    else:
        positions = Positions.segmented(x, mask, segments, num_segments)
    # The bias of a mean is 1 unless no row counts; that of a sum is their number.
    counted = bias and reduction == "sum"
    with torch.cuda.device_of(x):
        rows, kept = _reduced(positions, groups, reduction == "mean", counted)
    all_kept = counted or not bias or (mask is None and segments is None)
    gram(
        rows, None if all_kept else kept, groups, bias and not counted, alpha, beta, out, precision
    )


def _reduced(positions: Positions, groups: int, mean: bool, counted: bool) -> tuple[Tensor, Tensor]:
    """The rows' sums or means as ``[N, groups * d]``, and whether any row counts for them."""
    rows, examples = positions.rows, positions.examples
    segmented = positions.order is not None
    width = rows.x.shape[-1]
    block = launch.adding_block(rows.inner, width, rows.line)
    blocks = max(1, -(-width // block.columns))
    steps = rows.steps(block.rows) // (max(1, examples) if segmented else 1)
    device = launch.device(rows.x.get_device())
    split = launch.choose_adding_split(examples * blocks, steps, device.multiprocessors)
    entries = width + groups if counted else width
    sums = rows.x.new_empty(split * examples * width, dtype=torch.float32)
    counts = rows.x.new_empty(split * examples, dtype=torch.int32)
    result = rows.x.new_empty(examples, entries, dtype=torch.float32)
    kept = rows.x.new_empty(examples, dtype=torch.bool)
    if not examples:
        return result, kept
    along_columns, along_rows = rows.line == launch.Line.COLUMNS, rows.line == launch.Line.ROWS
    position_sums_kernel[(split * examples * blocks,)](
        rows.x,
        rows.x if rows.mask is None else rows.mask,
        positions.order if segmented else sums,
        positions.starts if segmented else sums,
        sums,
        counts,
        examples,
        rows.outer,
        rows.inner // rows.chunk if along_rows else rows.inner,
        width // rows.chunk if along_columns else width,
        split,
        positions.example_stride // rows.chunk,
        rows.outer_stride // rows.chunk,
        rows.row_stride // rows.chunk if along_columns else rows.row_stride,
        rows.x.stride(-1) // rows.chunk if along_rows else rows.x.stride(-1),
        positions.mask_stride,
        rows.mask_outer_stride,
        rows.mask_row_stride,
        BLOCK=block.columns,
        DEPTH=block.rows,
        LINE=rows.line,
        CHUNK=rows.chunk,
        SEGMENTED=segmented,
        MASKED=rows.mask is not None,
    )
    rows_kernel[(examples * max(1, -(-entries // ENTRIES)),)](
        sums,
        counts,
        result,
        kept,
        examples,
        width // groups,
        groups,
        split,
        ENTRIES=ENTRIES,
        MEAN=mean,
        COUNTED=counted,
    )
    return result, kept
