"""Products on tensor cores; float32 ones are made up of bfloat16 products."""

import triton
import triton.language as tl

# bfloat16 products that stand for one float32 product, by torch.get_float32_matmul_precision().
PRODUCTS = {"highest": 6, "high": 3, "medium": 1}

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(left, right, total):
    if INTERPRETED:  # its product of bfloat16 multiplies their bit patterns
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return tl.dot(left, right, total)


@triton.jit
def _leading(x):
    """The leading bfloat16 of float32 values, and what is left of them."""
    high = x.to(tl.bfloat16)
    return high, x - high.to(tl.float32)


@triton.jit
def product(left, right, total, PRODUCTS: tl.constexpr):
    """``total + left @ right``; float32 as sums of bfloat16, the smallest products first."""
    if left.dtype != tl.float32:
        return _dot(left, right, total)
    left_high, left_rest = _leading(left)
    right_high, right_rest = _leading(right)
    if PRODUCTS > 1:
        left_middle, left_rest = _leading(left_rest)
        right_middle, right_rest = _leading(right_rest)
        if PRODUCTS == 6:
            total = _dot(left_rest.to(tl.bfloat16), right_high, total)
            total = _dot(left_high, right_rest.to(tl.bfloat16), total)
            total = _dot(left_middle, right_middle, total)
        total = _dot(left_middle, right_high, total)
        total = _dot(left_high, right_middle, total)
    return _dot(left_high, right_high, total)


@triton.jit
def flush(total, chain, due, AWAITED: tl.constexpr):
    """``total + chain`` and zeros where ``due``; ``AWAITED`` waits for the product first."""
    if AWAITED:
        # Triton gives an operand that is also summed one buffer too few for a product that is left
        # running, unless that is of float32. Where each step asks for its result, none is.
        total += tl.where(due, chain, 0.0)
        chain = tl.where(due, 0.0, chain)
    elif due:
        total += chain
        chain = tl.zeros_like(chain)
    return total, chain
