"""States of a preconditioner: what is saved, and whether a saved one fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kfac_fast.blocks import Block

STATE_VERSION = 5


def state_of(steps: int, options: Mapping[str, str], blocks: Sequence[Block]) -> dict[str, Any]:
    """See :meth:`kfac_fast.KFAC.state_dict`.

    Args:
        steps: Number of steps taken.
        options: Those that say what the factors are.
        blocks: The blocks.

    Returns:
        A nested dictionary of tensors, numbers and strings.
    """
    layers = {
        block.layer.name: {
            part: {field: getattr(holder, field).clone() for field in holder.STATE}
            for part, holder in block.parts().items()
        }
        for block in blocks
    }
    approximations = {block.layer.name: block.layer.approx for block in blocks}
    return {
        "version": STATE_VERSION,
        "options": dict(options),
        "steps": steps,
        "approximations": approximations,
        "layers": layers,
    }


def restored_blocks(
    state: Mapping[str, Any], options: Mapping[str, str], blocks: Sequence[Block]
) -> list[Block]:
    """New blocks with the parts of a saved state; the present ones do not change.

    Args:
        state: Result of :func:`state_of`.
        options: Those that say what the factors are.
        blocks: The present blocks.

    Returns:
        One block for each present one.

    Raises:
        ValueError: If the version, an option, the steps, a layer, a part or a shape does not fit.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"load_state_dict: state must be a dictionary, got {state!r:.99}")
    expected = {"version": STATE_VERSION, "options": dict(options)}
    for key, value in expected.items():
        if state.get(key) != value:
            raise ValueError(f"load_state_dict: {key} must be {value}, got {state.get(key)}")
    if sorted(state) != ["approximations", "layers", "options", "steps", "version"]:
        raise ValueError(
            "load_state_dict: state must hold approximations, layers, options, steps and version, "
            f"got {sorted(state)}"
        )
    if not isinstance(state["steps"], int) or state["steps"] < 0:
        raise ValueError(f"load_state_dict: steps must be an int from 0, got {state['steps']!r}")
    names = sorted(block.layer.name for block in blocks)
    for key in ("layers", "approximations"):
        held = state[key]
        if not isinstance(held, Mapping) or sorted(held) != names:
            got = sorted(held) if isinstance(held, Mapping) else held
            raise ValueError(f"load_state_dict: {key} must be of {names}, got {got}")
    for block in blocks:
        name, approx = block.layer.name, block.layer.approx
        if state["approximations"][name] != approx:
            raise ValueError(
                f"load_state_dict: approximation of {name!r} must be {approx!r}, "
                f"got {state['approximations'][name]!r}"
            )
    return [block.restored(state["layers"][block.layer.name]) for block in blocks]
