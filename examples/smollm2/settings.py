"""The settings that a folder was begun with: another run does not go on in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_opdlm.files.folders import read_json_object, replacing, write_json

SETTINGS = "settings.json"


def require_settings(out: Path, settings: dict[str, Any]) -> None:
    """Notes the settings of a run, and refuses a folder with others.

    Raises:
        ValueError: the folder's run was begun with other settings.
    """
    path = out / SETTINGS
    if not path.exists():
        with replacing(path) as partial:
            write_json(partial, settings)
    elif (found := read_json_object(path)) != settings:
        changed = [key for key in settings if found.get(key) != settings[key]]
        begun = ", ".join(f"{key}={json.dumps(found.get(key))}" for key in changed)
        raise ValueError(
            f"--out {out} was begun with {begun}; use the same or choose another folder"
        )
