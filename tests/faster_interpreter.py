"""Triton's interpreter, without what it does again at each call of a function inside of a kernel.

It goes through all of the language to put its own operations there, half of the time that these
small kernels take. Once for each module that calls it something is enough, in a process that
compiles nothing.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_the_language_once() -> None:
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
