"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch


def save_checkpoint(state: Any, path: str | os.PathLike[str]) -> None:
    """Save a state so that the file holds all of the old or all of the new one, never a part.

    Equivalent to::

        torch.save(state, path)

    but for a process that is killed, or a machine that fails, while it writes: the state goes to a
    file beside the path, to the disk, and under the path's name last. Load it with
    ``torch.load(path, weights_only=True)``.

    Args:
        state: What :func:`torch.save` takes, for example the ``state_dict()`` of the model, the
            optimizer and :class:`kfac_fast.KFAC` in one dictionary.
        path: File to write or replace; its folder exists.

    Raises:
        OSError: If the file cannot be written; the one at the path is as it was.
    """
    path = Path(os.path.realpath(path))  # what a link points to, not the link
    beside = path.with_name(f".{uuid4().hex}.tmp")
    try:
        with open(beside, "xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Have the file's new name on the disk, too; not every system opens folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
