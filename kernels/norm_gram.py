"""The factors of normalisations: each unit's block of the gradients of its scale and shift.

Of features, ``example_sums_kernel`` normalises rows again and adds up their products with the
gradients, a part of an example a program; ``feature_blocks_kernel`` adds the parts and multiplies.
Of channels, ``row_moments_kernel`` reads a channel of an example twice, from the cache the second
time; ``statistics_kernel`` pools the moments of what is normalised together, and
``channel_blocks_kernel`` moves them to its mean. No sum depends on the order in which thread blocks
run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_fast.kernels import launch

STEPS_PER_SUM = tl.constexpr(launch.STEPS_PER_SUM)

# Entries and rows of a tile of rows at most, and entries of a step along a channel.
ENTRIES = 4096
MOST_ROWS = 16
MOST_FEATURES = 4096
LONGEST_STEP = 1024
# Rows of moments or of gradients that are read at once, and units of a program.
ROWS = 64
UNITS = 32


@triton.jit
def _inverse_deviation(variance, eps):
    """One that is not finite must not pass for zero."""
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return tl.where(variance < float("inf"), scale, float("nan"))


@triton.jit
def _store_block(out, weight, cross, shift, exists, alpha, beta, BIAS: tl.constexpr):
    """``out <- beta out + alpha`` the blocks of some units, at whose first entries ``out`` points.

    Lower triangles alone are read, and only where ``beta`` is not 0.
    """
    reads = exists & (beta != 0)
    first = alpha * weight + beta * tl.load(out, mask=reads, other=0.0)
    tl.store(out, first, mask=exists)
    if BIAS:
        lower = alpha * cross + beta * tl.load(out + 2, mask=reads, other=0.0)
        last = alpha * shift + beta * tl.load(out + 3, mask=reads, other=0.0)
        tl.store(out + 1, lower, mask=exists)
        tl.store(out + 2, lower, mask=exists)
        tl.store(out + 3, last, mask=exists)


@triton.jit(
    do_not_specialize=[
        "examples", "positions", "units", "split", "x_example", "x_row", "x_unit", "g_example",
        "g_row", "g_unit",
    ]
)  # fmt: skip
def example_sums_kernel(
    x, gradient, mask, sums, examples, positions, units, split, x_example, x_row, x_unit,
    g_example, g_row, g_unit, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr, CENTER: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Sum ``g z`` and ``g`` over a part of an example's positions; grid (split * examples).

    ``sums`` is ``[split, examples, 2, units]``, ``mask`` contiguous.
    """
    example = (tl.program_id(0) % examples).to(tl.int64)
    part = tl.program_id(0) // examples
    unit = tl.arange(0, BLOCK)
    x += example * x_example + unit.to(tl.int64)[None, :] * x_unit
    gradient += example * g_example + unit.to(tl.int64)[None, :] * g_unit
    steps = tl.cdiv(positions, ROWS)
    per_part = tl.cdiv(steps, split)
    begin = part * per_part
    end = tl.minimum(begin + per_part, steps)
    products = tl.zeros((BLOCK,), tl.float32)
    shifts = tl.zeros((BLOCK,), tl.float32)
    product_chain = tl.zeros((ROWS, BLOCK), tl.float32)
    shift_chain = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(begin, end):
        row = tl.arange(0, ROWS).to(tl.int64) + step * ROWS
        counts = row < positions
        if MASKED:
            counts &= tl.load(mask + example * positions + row, mask=counts, other=0) != 0
        exists = counts[:, None] & (unit < units)[None, :]
        value = tl.load(x + row[:, None] * x_row, mask=exists, other=0.0).to(tl.float32)
        if CENTER:
            mean = tl.sum(value, 1) / units
            value = tl.where(exists, value - mean[:, None], 0.0)
            rest = tl.sum(value, 1) / units  # what rounding has left of the mean
            value = tl.where(exists, value - rest[:, None], 0.0)
        variance = tl.sum(value * value, 1) / units
        # Of rows that do not count, nothing is divided by zero.
        scale = _inverse_deviation(tl.where(counts, variance, 1.0), eps)
        slope = tl.load(gradient + row[:, None] * g_row, mask=exists, other=0.0).to(tl.float32)
        product_chain += slope * (value * scale[:, None])
        shift_chain += slope
        if (step - begin) % STEPS_PER_SUM == STEPS_PER_SUM - 1:
            products += tl.sum(product_chain, 0)
            shifts += tl.sum(shift_chain, 0)
            product_chain = tl.zeros((ROWS, BLOCK), tl.float32)
            shift_chain = tl.zeros((ROWS, BLOCK), tl.float32)
    place = (part * examples.to(tl.int64) + example) * 2 * units
    tl.store(sums + place + unit, products + tl.sum(product_chain, 0), mask=unit < units)
    tl.store(sums + place + units + unit, shifts + tl.sum(shift_chain, 0), mask=unit < units)


@triton.jit(do_not_specialize=["examples", "units", "split"])
def feature_blocks_kernel(
    sums, out, examples, units, split, alpha, beta, ROWS: tl.constexpr, UNITS: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """The blocks of some units from the parts of the examples' sums; grid (blocks of units)."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    weight = tl.zeros((ROWS, UNITS), tl.float32)
    cross = tl.zeros((ROWS, UNITS), tl.float32)
    shift = tl.zeros((ROWS, UNITS), tl.float32)
    for step in range(0, tl.cdiv(examples, ROWS)):
        example = tl.arange(0, ROWS).to(tl.int64) + step * ROWS
        exists = (example < examples)[:, None] & (unit < units)[None, :]
        products = tl.zeros((ROWS, UNITS), tl.float32)
        slopes = tl.zeros((ROWS, UNITS), tl.float32)
        for part in range(split):
            place = (part * examples.to(tl.int64) + example)[:, None] * 2 * units + unit[None, :]
            products += tl.load(sums + place, mask=exists, other=0.0)
            slopes += tl.load(sums + place + units, mask=exists, other=0.0)
        weight += products * products
        cross += products * slopes
        shift += slopes * slopes
    place = out + unit.to(tl.int64) * (4 if BIAS else 1)
    _store_block(
        place, tl.sum(weight, 0), tl.sum(cross, 0), tl.sum(shift, 0), unit < units, alpha, beta,
        BIAS,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "rows", "channels", "positions", "x_example", "x_channel", "x_step", "g_example",
        "g_channel", "g_step",
    ]
)  # fmt: skip
def row_moments_kernel(
    x, gradient, moments, rows, channels, positions, x_example, x_channel, x_step, g_example,
    g_channel, g_step, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moments of a channel of an example; grid (examples * channels).

    ``moments`` is ``[5, rows]``: the mean ``m`` but for its rounding, and the sums of ``x - m``, of
    its squares, of its products with the gradients, and of these.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row // channels * x_example + row % channels * x_channel
    gradient += row // channels * g_example + row % channels * g_channel
    steps = tl.cdiv(positions, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, steps):
        place = tl.arange(0, BLOCK).to(tl.int64) + step * BLOCK
        total += tl.load(x + place * x_step, mask=place < positions, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / tl.maximum(positions, 1)
    rest = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    products = tl.zeros((BLOCK,), tl.float32)
    slopes = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, steps):
        place = tl.arange(0, BLOCK).to(tl.int64) + step * BLOCK
        exists = place < positions
        value = tl.load(x + place * x_step, mask=exists, other=0.0).to(tl.float32)
        value = tl.where(exists, value - mean, 0.0)
        slope = tl.load(gradient + place * g_step, mask=exists, other=0.0).to(tl.float32)
        rest += value
        squares += value * value
        products += value * slope
        slopes += slope
    rows = rows.to(tl.int64)
    tl.store(moments + row, mean)
    tl.store(moments + rows + row, tl.sum(rest, 0))
    tl.store(moments + 2 * rows + row, tl.sum(squares, 0))
    tl.store(moments + 3 * rows + row, tl.sum(products, 0))
    tl.store(moments + 4 * rows + row, tl.sum(slopes, 0))


@triton.jit(do_not_specialize=["rows", "pools", "distance", "step", "count", "positions"])
def statistics_kernel(
    moments, statistics, rows, pools, distance, step, count, positions, eps, ROWS: tl.constexpr
):
    """Mean and inverse deviation of the ``count`` rows of a pool, ``step`` apart; grid (pools).

    ``statistics`` is ``[3, pools]``, the mean in two parts, whose sum would be rounded; pools begin
    ``distance`` rows apart.
    """
    pool = tl.program_id(0).to(tl.int64)
    moments += pool * distance
    rows = rows.to(tl.int64)
    entries = tl.maximum(positions, 1)
    # Means are taken from that of the first row, lest large ones round.
    first = tl.load(moments)
    total = tl.zeros((ROWS,), tl.float32)
    for i in range(0, tl.cdiv(count, ROWS)):
        index = tl.arange(0, ROWS).to(tl.int64) + i * ROWS
        own = moments + index * step
        mean = tl.load(own, mask=index < count, other=0.0) - first
        rest = tl.load(own + rows, mask=index < count, other=0.0)
        total += tl.where(index < count, mean + rest / entries, 0.0)
    mean = tl.sum(total, 0) / count
    squares = tl.zeros((ROWS,), tl.float32)
    for i in range(0, tl.cdiv(count, ROWS)):
        index = tl.arange(0, ROWS).to(tl.int64) + i * ROWS
        own = moments + index * step
        apart = tl.load(own, mask=index < count, other=0.0) - first - mean
        rest = tl.load(own + rows, mask=index < count, other=0.0) / entries
        square = tl.load(own + 2 * rows, mask=index < count, other=0.0) / entries
        squares += tl.where(index < count, square + apart * (apart + 2 * rest), 0.0)
    variance = tl.sum(squares, 0) / count
    tl.store(statistics + pool, first)
    tl.store(statistics + pools + pool, mean)
    tl.store(statistics + 2 * pools + pool, _inverse_deviation(variance, eps))


@triton.jit(do_not_specialize=["examples", "channels", "pools", "of_example", "of_channel"])
def channel_blocks_kernel(
    moments, statistics, out, examples, channels, pools, of_example, of_channel, alpha, beta,
    ROWS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A channel's block; grid (channels).

    The statistics of a row are those of pool ``example * of_example + channel // of_channel``.
    """
    channel = tl.program_id(0)
    rows = examples.to(tl.int64) * channels
    weight = tl.zeros((ROWS,), tl.float32)
    cross = tl.zeros((ROWS,), tl.float32)
    shift = tl.zeros((ROWS,), tl.float32)
    for i in range(0, tl.cdiv(examples, ROWS)):
        example = tl.arange(0, ROWS).to(tl.int64) + i * ROWS
        exists = example < examples
        own = moments + example * channels + channel
        pool = statistics + example * of_example + channel // of_channel
        mean = tl.load(own, mask=exists, other=0.0) - tl.load(pool, mask=exists, other=0.0)
        mean -= tl.load(pool + pools, mask=exists, other=0.0)
        scale = tl.load(pool + 2 * pools, mask=exists, other=0.0)
        products = tl.load(own + 3 * rows, mask=exists, other=0.0)
        slopes = tl.load(own + 4 * rows, mask=exists, other=0.0)
        products = scale * (products + mean * slopes)
        weight += products * products
        cross += products * slopes
        shift += slopes * slopes
    one = tl.arange(0, 1)
    place = out + channel.to(tl.int64) * (4 if BIAS else 1) + one
    _store_block(
        place, tl.sum(weight, 0) + one, tl.sum(cross, 0) + one, tl.sum(shift, 0) + one, one == 0,
        alpha, beta, BIAS,
    )  # fmt: skip


def feature_norm_gram(
    x: Tensor,
    gradient: Tensor,
    mask: Tensor | None,
    eps: float,
    center: bool,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
) -> None:
    """``out <- beta out + alpha`` blocks of features; arguments are the operator's, checked."""
    units = x.shape[-1]
    if units == 0:
        return
    x, gradient = (t.reshape(len(t), 0 if t.numel() == 0 else -1, units) for t in (x, gradient))
    examples, positions, _ = x.shape if x.numel() else (0, 0, units)
    block = triton.next_power_of_2(units)
    rows = max(1, min(ENTRIES // block, MOST_ROWS, triton.next_power_of_2(positions)))
    with torch.cuda.device_of(x):
        processors = launch.device(x.get_device()).multiprocessors
        split = launch.choose_adding_split(examples, -(-positions // rows), processors)
        sums = x.new_empty(split * examples * 2 * units, dtype=torch.float32)
        if examples:
            example_sums_kernel[(split * examples,)](
                x,
                gradient,
                x if mask is None else mask.contiguous(),
                sums,
                examples,
                positions,
                units,
                split,
                *x.stride(),
                *gradient.stride(),
                eps,
                ROWS=rows,
                BLOCK=block,
                CENTER=center,
                MASKED=mask is not None,
                num_warps=8 if rows * block >= ENTRIES else 4,
            )
        feature_blocks_kernel[(-(-units // UNITS),)](
            sums, out, examples, units, split, alpha, beta, ROWS=ROWS, UNITS=UNITS, BIAS=bias
        )


def channel_norm_gram(
    x: Tensor,
    gradient: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    num_groups: int,
    eps: float,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
) -> None:
    """``out <- beta out + alpha`` blocks of channels; arguments are the operator's, checked."""
    channels = x.shape[1]
    if channels == 0:
        return
    x, gradient = (t.reshape(*t.shape[:2], 0 if t.numel() == 0 else -1) for t in (x, gradient))
    examples, _, positions = x.shape
    rows = examples * channels
    moments = x.new_empty(5 * rows, dtype=torch.float32)
    with torch.cuda.device_of(x):
        if rows:
            step = min(LONGEST_STEP, max(16, triton.next_power_of_2(positions)))
            row_moments_kernel[(rows,)](
                x,
                gradient,
                moments,
                rows,
                channels,
                positions,
                *x.stride(),
                *gradient.stride(),
                BLOCK=step,
            )
        # Where the rows that are normalised together lie, and which pool a row belongs to.
        pools, of_example, of_channel = channels, 0, 1
        distance, step, count = 1, channels, examples
        if num_groups != -1:
            count = channels // num_groups
            pools, of_example, of_channel = examples * num_groups, num_groups, count
            distance, step = count, 1
        if mean is not None and variance is not None:
            scale = (variance + eps).rsqrt()
            statistics = torch.stack([mean, torch.zeros_like(mean), scale])
        else:
            statistics = x.new_empty(3, pools, dtype=torch.float32)
            if rows:
                statistics_kernel[(pools,)](
                    moments,
                    statistics,
                    rows,
                    pools,
                    distance,
                    step,
                    count,
                    positions,
                    eps,
                    ROWS=ROWS,
                )
        channel_blocks_kernel[(channels,)](
            moments,
            statistics,
            out,
            examples,
            channels,
            pools,
            of_example,
            of_channel,
            alpha,
            beta,
            ROWS=ROWS,
            BIAS=bias,
        )
