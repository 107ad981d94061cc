"""Finds by file names which kind of model a path has, and describes a path of the wrong kind."""

import re
import shlex
from pathlib import Path

CONFIG_FILE = "config.json"
LATEST_FILE = "latest_checkpointed_iteration.txt"
METADATA_FILE = ".metadata"
"""Name of the file that lists the tensors of a torch_dist folder."""
CHECKPOINTS = "checkpoints"
"""Name of the checkpoint root in a run folder."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LISTED = 5


def is_hf_directory(path: Path) -> bool:
    """Returns whether a path is a Hugging Face directory."""
    return (path / CONFIG_FILE).is_file()


def checkpoint_root(path: Path) -> Path:
    """Returns the checkpoint root of a run folder, and any other path unchanged."""
    checkpoints = path / CHECKPOINTS
    return checkpoints if (checkpoints / LATEST_FILE).is_file() else path


def is_checkpoint(path: Path) -> bool:
    """Returns whether a path is a run folder, a checkpoint root, or an iteration folder."""
    root = checkpoint_root(path)
    return (root / LATEST_FILE).is_file() or (root / METADATA_FILE).is_file()


def describe(path: Path) -> str:
    """Returns one line about a path that does not have the needed kind of model.

    Args:
        path: path that the user gave. If it is a Hugging Face directory, a checkpoint is needed,
            and the reverse.
    """
    quoted = shlex.quote(str(path))
    if is_hf_directory(path):
        return (
            f"{path} is a Hugging Face directory, not a checkpoint; "
            f"`opdlm convert import --hf {quoted} --out DIR` makes one of it"
        )
    if is_checkpoint(path):
        return (
            f"{path} is a checkpoint, not a Hugging Face directory; "
            f"`opdlm convert export --checkpoint {quoted} --out DIR` makes one of it"
        )
    return f"{path} holds neither a Hugging Face {CONFIG_FILE} nor a checkpoint{_reason(path)}"


def _reason(path: Path) -> str:
    if not path.exists():
        reason = ": no such directory"
        if _HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
            reason += (
                "; models are not downloaded: if that is a name of the Hugging Face hub, run "
                f"`hf download {path} --local-dir {path.name}` and give {path.name}"
            )
        return reason
    if not path.is_dir():
        return f": it is a file; give a folder, such as {path.parent}"
    inside = sorted(child.name for child in path.iterdir() if not child.name.startswith("."))
    models = [name for name in inside if is_hf_directory(path / name) or is_checkpoint(path / name)]
    if models:
        more = f" and {len(models) - _LISTED} more" if len(models) > _LISTED else ""
        return f"; give one of the folders in it: {models[:_LISTED]}{more}"
    return "" if inside else ": it is empty"
