"""The modules of examples/smollm2, which are a script's neighbours and no package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "examples/smollm2"


def module(name: str) -> ModuleType:
    """Imports one of them, as the scripts do."""
    folders = [str(FOLDER), str(FOLDER.parent / "quickstart")]
    sys.path[:0] = folders
    try:
        return importlib.import_module(name)
    finally:
        for folder in folders:
            sys.path.remove(folder)
