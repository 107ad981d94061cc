"""The settings that a folder was begun with: another run does not go on in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_opdlm.files.folders import read_json_object, replacing, write_json

SETTINGS = "settings.json"
NAMED = 4
"""A refusal names at most so many values that differ."""


def require_same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Refuses a folder whose run was begun with other settings. Writes nothing.

    Args:
        out: folder of the run; it need not exist.
        settings: values by name; a value may be an object, whose entries are compared by name.

    Raises:
        ValueError: the message names what has changed, as it was and as it is now.
    """
    path = out / SETTINGS
    if not path.exists():
        return
    before, now = _flat(read_json_object(path)), _flat(settings)
    changed = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    if changed:
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        begun, given = (
            ", ".join(f"{key}={_short(values.get(key))}" for key in changed[:NAMED]) + more
            for values in (before, now)
        )
        raise ValueError(
            f"--out {out} was begun with {begun}, and now it is {given}; use the same or choose "
            "another folder"
        )


def note_settings(out: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a run into its folder."""
    with replacing(out / SETTINGS) as partial:
        write_json(partial, settings)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Entries of objects by their name alone, so that a message names them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if is_digest else text
