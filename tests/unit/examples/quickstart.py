"""The scripts of examples/quickstart, with commands that only take notes."""

import contextlib
import importlib
import io
import sys
from pathlib import Path

import pytest

from megatron_opdlm import cli

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "quickstart"


@contextlib.contextmanager
def script(name):
    """A script as a module; other folders have one of the same name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where it goes itself
        patch.syspath_prepend(str(FOLDER))
        sys.modules.pop(name, None)
        try:
            yield importlib.import_module(name)
        finally:
            sys.modules.pop(name, None)


def started(module, *arguments):
    """Status and errors of a script's `main`, as its last line runs it."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run_script(module.main)
    return ended.value.code, said.getvalue()


def value_of(words, option):
    """The word after an option."""
    return words[words.index(option) + 1]
