"""Gradients between two matrices on tensor cores, one launch a product for layers of any shapes.

Both products, ``H = G V`` and ``P = H A``, are ``product_kernel``'s. A table on the device has a
row for each stack of matrices, which says where they are; a program finds the row of its tile.
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

# Columns of the table. A matrix has its address, and its strides from stack entry to entry, from
# row to row and from column to column.
FIRST_TILE, TILES, HEIGHT, WIDTH, DEPTH_OF_SUM, LEFT, RIGHT, OUT, GRAD, COLUMNS = (
    tl.constexpr(column) for column in (0, 1, 2, 3, 4, 5, 9, 13, 17, 21)
)


@triton.jit
def _first(place, entry, CHUNK: tl.constexpr):
    """Address of a stack's matrix, and its strides."""
    # Sizes and strides come divided by a chunk, so that the compiler knows that they are multiples.
    first = tl.load(place).to(tl.pointer_type(tl.float32))
    row_stride = tl.load(place + 2) * CHUNK
    column_stride = tl.load(place + 3)
    if CHUNK > 1:
        first = tl.multiple_of(first, 16)
        column_stride = 1
    return first + entry * (tl.load(place + 1) * CHUNK), row_stride, column_stride


@triton.jit(do_not_specialize=["rows", "halvings"])
def product_kernel(
    table, inner_products, rows, halvings,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, FLUSH: tl.constexpr, PRODUCTS: tl.constexpr,
    CHUNK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """``out = left right`` in one tile of one matrix; with ``INNER``, its products with ``grad``.

    ``inner_products`` is float64, one for each tile.
    """
    tile = tl.program_id(0)
    row = table + row_of(table, tile, rows, halvings, FIRST_TILE, COLUMNS) * COLUMNS
    within = tile - tl.load(row + FIRST_TILE).to(tl.int32)
    tiles = tl.load(row + TILES).to(tl.int32)
    entry = within // tiles
    height = tl.load(row + HEIGHT).to(tl.int32) * CHUNK
    width = tl.load(row + WIDTH).to(tl.int32) * CHUNK
    depth = tl.load(row + DEPTH_OF_SUM).to(tl.int32) * CHUNK
    across = tl.cdiv(width, BLOCK)
    part = within % tiles
    r = part // across * BLOCK + tl.arange(0, BLOCK)
    c = part % across * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, DEPTH)
    left, left_row_stride, left_column_stride = _first(row + LEFT, entry, CHUNK)
    right, right_row_stride, right_column_stride = _first(row + RIGHT, entry, CHUNK)
    left += r[:, None] * left_row_stride + k[None, :] * left_column_stride
    right += k[:, None] * right_row_stride + c[None, :] * right_column_stride
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    chain = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(tl.cdiv(depth, DEPTH)):
        done = step * DEPTH
        ahead = k + done < depth
        left_step = left + done * left_column_stride
        right_step = right + done * right_row_stride
        left_values = tl.load(left_step, mask=(r[:, None] < height) & ahead[None, :], other=0.0)
        right_values = tl.load(right_step, mask=ahead[:, None] & (c[None, :] < width), other=0.0)
        chain = product(left_values, right_values, chain, PRODUCTS)
        if step % FLUSH == FLUSH - 1:
            total += chain
            chain = tl.zeros((BLOCK, BLOCK), tl.float32)
    total += chain
    exists = (r[:, None] < height) & (c[None, :] < width)
    out, out_row_stride, out_column_stride = _first(row + OUT, entry, CHUNK)
    place = r[:, None] * out_row_stride + c[None, :] * out_column_stride
    tl.store(out + place, total, mask=exists)
    if INNER:
        grad, grad_row_stride, grad_column_stride = _first(row + GRAD, entry, CHUNK)
        place = r[:, None] * grad_row_stride + c[None, :] * grad_column_stride
        values = tl.load(grad + place, mask=exists, other=0.0)
        tl.store(inner_products + tile, tl.sum((total * values).to(tl.float64)))


def has_chunks(x: Tensor) -> bool:
    """Whether 16 bytes of ``[count, rows, columns]`` can be read at once anywhere in a row."""
    multiples = (*x.shape[1:], x.stride(1), x.stride(0) if len(x) > 1 else 0)
    return x.stride(2) == 1 and launch.chunk_of(x, multiples) > 1


class Product(NamedTuple):
    """Stacks ``[count, rows, columns]``: ``out = left right``, of the same size as ``grad``."""

    left: Tensor
    right: Tensor
    out: Tensor
    grad: Tensor

    def tiles(self, block: int) -> int:
        """Tiles of one matrix."""
        _, height, width = self.out.shape
        return -(-height // block) * -(-width // block)

    def row(self, first: int, block: int, chunk: int) -> list[int]:
        """The row of the table, whose tiles begin with ``first``."""
        _, height, width = self.out.shape
        row = [first, self.tiles(block)]
        row += [size // chunk for size in (height, width, self.left.shape[-1])]
        for x in self:
            row += [x.data_ptr(), *(stride // chunk for stride in x.stride())]
        return row


def _run(products: Sequence[Product], inner: Tensor | None, precision: str) -> None:
    """Launch the kernel on all products; ``inner`` takes the sum of their products with grads."""
    like = products[0].out
    aligned = all(has_chunks(x) for each in products for x in each)
    chunk = 16 // like.element_size() if aligned else 1
    terms = PRODUCTS[precision]
    tiling = launch.product_tiling(terms)
    table, tiles = [], 0
    for each in products:
        table.append(each.row(tiles, tiling.block, chunk))
        tiles += len(each.out) * each.tiles(tiling.block)
    sums = like.new_empty(tiles if inner is not None else 0, dtype=torch.float64)
    on_host = torch.tensor(table, dtype=torch.int64, pin_memory=like.is_cuda)
    with torch.cuda.device_of(like):
        product_kernel[tiles,](
            on_host.to(like.device, non_blocking=True),
            sums,
            len(table),
            len(table).bit_length(),
            BLOCK=tiling.block,
            DEPTH=tiling.depth,
            FLUSH=tiling.flush,
            PRODUCTS=terms,
            CHUNK=chunk,
            INNER=inner is not None,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        if inner is not None:
            inner.copy_(sums.sum())


def precondition(
    grads: Sequence[Tensor],
    input_sides: Sequence[Tensor],
    gradient_sides: Sequence[Tensor],
    out: Sequence[Tensor],
    inner: Tensor,
    precision: str,
) -> None:
    """``out <- G V A`` of every layer, ``inner <- sum <V, G V A>`` at the matmul ``precision``.

    Arguments are the checked ones of the operator. Stacks that no single stride describes are
    copied first. An infinity may come out as NaN.
    """
    lists = zip(grads, input_sides, gradient_sides, out, strict=True)
    layers = [
        tuple(x.reshape(-1, *x.shape[-2:]) for x in each) for each in lists if each[0].numel()
    ]
    if not layers:
        inner.zero_()
        return
    first, last = [], []
    for grad, right, left, result in layers:
        half = torch.empty_like(result)
        first.append(Product(left, grad, half, half))
        last.append(Product(half, right, result, grad))
    _run(first, None, precision)
    _run(last, inner, precision)
