"""Inverses of damped symmetric matrices by sweeps of blocks of pivots, on tensor cores.

With the Cholesky factor L of the pivots' diagonal block of A, which is what the sweeps before have
left of it, ``Y = L^-1``, ``V = Y A[P, :]`` and ``W = Y^T V``, a sweep is

    A[i, j] <- A[i, j] - (V^T V)[i, j],    A[P, :] <- W,    A[P, P] <- -Y^T Y

for i, j outside of the block, and after all of them A has become its negated inverse (docs/math.md,
section 4). It takes three launches, which all matrices that have pivots left share: one for the
diagonal blocks, one for the panels V and W, one for the tiles outside. The matrix is swept in the
lower triangle of the result, which a last launch mirrors. Products are those of float32, whatever
the matmul precision: with fewer digits, matrices of large condition numbers are not inverted.

A table on the device has a row for each matrix, the largest first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_fast.kernels import launch
from kfac_fast.kernels.product import PRODUCTS, product
from kfac_fast.kernels.table import row_of
from kfac_fast.kernels.triangle import triangle_row

# Pivots of a sweep, and rows of a tile.
BLOCK = 64
WARPS = 4
PANEL_WARPS = 8  # with fewer it runs out of registers

# Columns of the table: addresses and strides, the place in the list, and the first of the matrix'
# blocks of columns and of its tiles.
MATRIX, ROW_STRIDE, COLUMN_STRIDE, DAMPING, OUT, SIZE, PLACE, FIRST_BLOCK, FIRST_TILE, COLUMNS = (
    tl.constexpr(column) for column in range(10)
)
TERMS = tl.constexpr(PRODUCTS["highest"])
# Rows of one sum of products, see launch.py.
DEPTH = launch.ROWS_PER_CHAIN_OF_SIX


@triton.jit
def _out_of(row):
    """Address of a matrix' result and its size."""
    out = tl.load(row + OUT).to(tl.pointer_type(tl.float32))
    return out, tl.load(row + SIZE).to(tl.int32)


@triton.jit
def _lower(out, i, j, size):
    """Where the entries (i, j) of a symmetric matrix are in its lower triangle."""
    return out + tl.maximum(i, j).to(tl.int64) * size + tl.minimum(i, j)


@triton.jit
def _tile_of(table, tile, rows, halvings):
    """Row of the table and the block row and column of a tile of the lower triangles."""
    row = table + row_of(table, tile, rows, halvings, FIRST_TILE, COLUMNS) * COLUMNS
    within = tile - tl.load(row + FIRST_TILE).to(tl.int32)
    i = triangle_row(within)
    return row, i, within - i * (i + 1) // 2


@triton.jit(do_not_specialize=["rows", "halvings"])
def load_kernel(table, rows, halvings, BLOCK: tl.constexpr):
    """The damped matrices, into the lower triangles of the results; a program is a tile."""
    row, i, j = _tile_of(table, tl.program_id(0), rows, halvings)
    out, size = _out_of(row)
    r = (i * BLOCK + tl.arange(0, BLOCK))[:, None]
    c = (j * BLOCK + tl.arange(0, BLOCK))[None, :]
    exists = (r < size) & (c <= r)
    matrix = tl.load(row + MATRIX).to(tl.pointer_type(tl.float32))
    place = r * tl.load(row + ROW_STRIDE) + c * tl.load(row + COLUMN_STRIDE)
    damping = tl.load(tl.load(row + DAMPING).to(tl.pointer_type(tl.float32)))
    values = tl.load(matrix + place, mask=exists, other=0.0) + tl.where(r == c, damping, 0.0)
    tl.store(out + r.to(tl.int64) * size + c, values, mask=exists)


@triton.jit(do_not_specialize=["sweep"])
def diagonal_kernel(table, factors, info, logdet, sweep, BLOCK: tl.constexpr):
    """``factors <- Y`` and ``A[P, P] <- -Y^T Y``; a program is a matrix.

    Beyond the end of a matrix its block goes on as the identity. A pivot that is not positive and
    finite is reported once and replaced by 1: what follows is not read.
    """
    row = table + tl.program_id(0) * COLUMNS
    out, size = _out_of(row)
    lane = tl.arange(0, BLOCK)
    r, c = lane[:, None], lane[None, :]
    i, j = sweep * BLOCK + r, sweep * BLOCK + c
    exists = (i < size) & (j < size)
    identity = tl.where(r == c, 1.0, 0.0)
    block = tl.where(exists, tl.load(_lower(out, i, j, size), mask=exists, other=0.0), identity)
    inverse = identity
    failed = BLOCK
    pivots = tl.full((BLOCK,), 1.0, tl.float32)
    for k in range(tl.minimum(BLOCK, size - sweep * BLOCK)):
        column = tl.sum(tl.where(c == k, block, 0.0), axis=1)
        pivot = tl.sum(tl.where(lane == k, column, 0.0))
        is_valid = (pivot > 0.0) & (pivot < float("inf"))
        failed = tl.where(is_valid, failed, tl.minimum(failed, k))
        pivot = tl.where(is_valid, pivot, 1.0)
        pivots = tl.where(lane == k, pivot, pivots)
        scale = tl.div_rn(1.0, tl.sqrt_rn(pivot))
        rest = tl.where(lane > k, column * scale, 0.0)
        below = rest[:, None]
        block -= below * rest[None, :]
        own = (tl.sum(tl.where(r == k, inverse, 0.0), axis=0) * scale)[None, :]
        inverse = tl.where(r == k, own, inverse - below * own)
    factor = factors + tl.program_id(0).to(tl.int64) * (BLOCK * BLOCK)
    tl.store(factor + r * BLOCK + c, inverse)
    zero = tl.zeros((BLOCK, BLOCK), tl.float32)
    swept = -product(tl.trans(inverse), inverse, zero, TERMS)
    tl.store(_lower(out, i, j, size), swept, mask=exists & (j <= i))
    place = tl.load(row + PLACE)
    before = tl.load(info + place)
    is_first = (before == 0) & (failed < BLOCK)
    tl.store(info + place, tl.where(is_first, sweep * BLOCK + failed + 1, before))
    log = tl.sum(tl.log(pivots.to(tl.float64)))
    tl.store(logdet + place, tl.load(logdet + place) + log)


@triton.jit(do_not_specialize=["sweep", "rows", "halvings"])
def panel_kernel(table, factors, panels, sweep, rows, halvings, BLOCK: tl.constexpr):
    """``panels <- V`` and ``A[P, :] <- W``; a program is a block of columns."""
    program = tl.program_id(0)
    index = row_of(table, program, rows, halvings, FIRST_BLOCK, COLUMNS)
    row = table + index * COLUMNS
    column = program - tl.load(row + FIRST_BLOCK).to(tl.int32)
    if column == sweep:
        return
    out, size = _out_of(row)
    lane = tl.arange(0, BLOCK)
    r, c = lane[:, None], lane[None, :]
    i, j = tl.maximum(sweep, column) * BLOCK + r, tl.minimum(sweep, column) * BLOCK + c
    exists = (i < size) & (j < size)
    place = out + i.to(tl.int64) * size + j
    values = tl.load(place, mask=exists, other=0.0)
    if column > sweep:  # what is there is the panel's transpose
        values = tl.trans(values)
    inverse = tl.load(factors + index.to(tl.int64) * (BLOCK * BLOCK) + r * BLOCK + c)
    zero = tl.zeros((BLOCK, BLOCK), tl.float32)
    solved = product(inverse, values, zero, TERMS)
    tl.store(panels + program.to(tl.int64) * (BLOCK * BLOCK) + r * BLOCK + c, solved)
    values = product(tl.trans(inverse), solved, zero, TERMS)
    if column > sweep:
        values = tl.trans(values)
    tl.store(place, values, mask=exists)


@triton.jit(do_not_specialize=["sweep", "rows", "halvings"])
def update_kernel(table, panels, sweep, rows, halvings, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """``A[i, j] <- A[i, j] - (V^T V)[i, j]``; a program is a tile."""
    row, i, j = _tile_of(table, tl.program_id(0), rows, halvings)
    if (i == sweep) | (j == sweep):
        return
    out, size = _out_of(row)
    lane = tl.arange(0, BLOCK)
    k = tl.arange(0, DEPTH)
    panels += tl.load(row + FIRST_BLOCK) * (BLOCK * BLOCK)
    left = panels + i * (BLOCK * BLOCK) + k[None, :] * BLOCK + lane[:, None]
    right = panels + j * (BLOCK * BLOCK) + k[:, None] * BLOCK + lane[None, :]
    zero = tl.zeros((BLOCK, BLOCK), tl.float32)
    total = zero
    for _ in range(BLOCK // DEPTH):
        total += product(tl.load(left), tl.load(right), zero, TERMS)
        left += DEPTH * BLOCK
        right += DEPTH * BLOCK
    r, c = (i * BLOCK + lane)[:, None], (j * BLOCK + lane)[None, :]
    exists = (r < size) & (c <= r)
    place = out + r.to(tl.int64) * size + c
    tl.store(place, tl.load(place, mask=exists, other=0.0) - total, mask=exists)


@triton.jit(do_not_specialize=["rows", "halvings"])
def finish_kernel(table, info, rows, halvings, BLOCK: tl.constexpr):
    """``out <- -A`` in both triangles, NaN where ``info`` is not zero; a program is a tile."""
    row, i, j = _tile_of(table, tl.program_id(0), rows, halvings)
    out, size = _out_of(row)
    lane = tl.arange(0, BLOCK)
    r, c = (i * BLOCK + lane)[:, None], (j * BLOCK + lane)[None, :]
    exists = (r < size) & (c < size)
    place = out + r.to(tl.int64) * size + c
    values = -tl.load(place, mask=exists & (c <= r), other=0.0)
    if i == j:
        values += tl.trans(tl.where(c < r, values, 0.0))
    values = tl.where(tl.load(info + tl.load(row + PLACE)) == 0, values, float("nan"))
    tl.store(place, values, mask=exists)
    if i != j:
        tl.store(out + c.to(tl.int64) * size + r, values, mask=exists)


class Matrix(NamedTuple):
    """A matrix of the list, as the table begins with it."""

    address: int
    row_stride: int
    column_stride: int
    damping: int
    out: int
    size: int
    place: int


def _matrices(
    stacks: Sequence[Tensor], dampings: Sequence[Tensor], results: Sequence[Tensor]
) -> list[Matrix]:
    """Every matrix of stacks ``[count, n, n]`` with dampings ``[count]``, the largest first."""
    found: list[Matrix] = []
    for stack, damping, out in zip(stacks, dampings, results, strict=True):
        steps = [4 * x.stride(0) for x in (stack, damping, out)]  # in bytes
        first = [x.data_ptr() for x in (stack, damping, out)]
        for n in range(len(stack)):
            matrix, shift, result = (a + n * step for a, step in zip(first, steps, strict=True))
            found.append(
                Matrix(matrix, *stack.stride()[1:], shift, result, stack.shape[-1], len(found))
            )
    return sorted(found, key=lambda matrix: -matrix.size)


def damped_inverse(
    matrices: Sequence[Tensor],
    damping: Sequence[Tensor],
    out: Sequence[Tensor],
    info: Tensor,
    logdet: Tensor | None,
) -> None:
    """``out <- (M + damping I)^-1`` of every matrix, in float32.

    Arguments are the checked ones of the operator, and a damping for each entry of the list. Stacks
    that no single stride describes are copied first.
    """
    shifts = [d.expand(m.shape[:-2]).reshape(-1) for d, m in zip(damping, matrices, strict=True)]
    stacks, results = ([x.reshape(-1, *x.shape[-2:]) for x in xs] for xs in (matrices, out))
    entries = _matrices(stacks, shifts, results)
    if not entries:
        return
    blocks = [-(-entry.size // BLOCK) for entry in entries]
    before = [(0, 0)]  # blocks of columns and tiles of the matrices before
    for count in blocks:
        columns, tiles = before[-1]
        before.append((columns + count, tiles + count * (count + 1) // 2))
    rows = [[*entry, *first] for entry, first in zip(entries, before, strict=False)]
    on_host = torch.tensor(rows, dtype=torch.int64, pin_memory=info.is_cuda)
    like = out[0]
    factors = like.new_empty(len(rows), BLOCK, BLOCK)
    panels = like.new_empty(before[-1][0], BLOCK, BLOCK)
    logs = torch.zeros(len(rows), dtype=torch.float64, device=info.device)
    info.zero_()
    with torch.cuda.device_of(info):
        table = on_host.to(info.device, non_blocking=True)
        of_all = len(rows), len(rows).bit_length()
        options = {"BLOCK": BLOCK, "num_warps": WARPS}
        of_panels = {"BLOCK": BLOCK, "num_warps": PANEL_WARPS}
        load_kernel[before[-1][1],](table, *of_all, **options)
        for sweep in range(blocks[0]):
            active = sum(count > sweep for count in blocks)  # they come first
            columns, tiles = before[active]
            search = active, active.bit_length()
            diagonal_kernel[active,](table, factors, info, logs, sweep, **options)
            if blocks[0] > 1:
                panel_kernel[columns,](table, factors, panels, sweep, *search, **of_panels)
                update_kernel[tiles,](table, panels, sweep, *search, DEPTH=DEPTH, **options)
        finish_kernel[before[-1][1],](table, info, *of_all, **options)
    if logdet is not None:
        logdet.copy_(torch.where(info == 0, logs, torch.nan))
