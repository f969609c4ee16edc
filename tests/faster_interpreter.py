"""Triton's interpreter, without what it does again at each call and each operation of a kernel.

It goes through all of the language to put its own operations there whenever a function inside of a
kernel is called, half of the time that these small kernels take. Once for each module that calls it
something is enough, in a process that compiles nothing. It also looks types up in a table that it
builds each time, and takes bfloat16 apart bit by bit.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def make_faster() -> None:
    _patch_the_language_once()
    _look_types_up_once()
    _shift_bfloat16()


def _patch_the_language_once() -> None:
    """Keep Triton's language patched; a Triton that patches in another way stays as it is."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, patched = interpreter._patch_lang, set[str]()

    def patch_once(function: Any) -> Any:
        # Which modules are patched depends on the names that the function's own module has.
        names = {n.__name__ for n in function.__globals__.values() if n is tl or n is tl.core}
        if not names <= patched:
            patch(function)
            patched.update(names)
        return interpreter._LangPatchScope()  # with nothing to restore

    interpreter._patch_lang = patch_once


def _look_types_up_once() -> None:
    """Keep NumPy's type of each of Triton's; a block's is that of its elements."""
    numpy_type = interpreter._get_np_dtype
    kept = functools.cache(numpy_type)

    def numpy_type_once(dtype: tl.dtype) -> np.dtype:
        return numpy_type(dtype) if dtype.scalar.is_ptr() else kept(dtype.scalar)

    interpreter._get_np_dtype = numpy_type_once


def _shift_bfloat16() -> None:
    """Convert between bfloat16 and float32, whose exponents are alike, by a shift.

    As the interpreter does, this cuts off the bits that bfloat16 lacks; unlike it, it is right of
    subnormal numbers.
    """
    convert = interpreter._convert_float

    def convert_float(x: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return x.astype(np.uint32) << 16
        if (source, target, rounding) == (tl.float32, tl.bfloat16, None):
            return (x.view(np.uint32) >> 16).astype(np.uint16)
        return convert(x, source, target, rounding)

    interpreter._convert_float = convert_float
