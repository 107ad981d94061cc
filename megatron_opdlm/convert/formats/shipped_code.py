"""The code in exports: files of `formats/code`, and the remasking rules of this package."""

import builtins
import importlib
import inspect
import symtable
import textwrap
from collections.abc import Iterator
from importlib import resources
from typing import Any

from megatron_opdlm.diffusion import remasking
from megatron_opdlm.files.errors import ConversionError

_CODE = "megatron_opdlm.convert.formats.code"
REMASKING_FILE = "remasking_block_diffusion.py"
"""File with the source of diffusion/remasking.py, and of rules that other modules add."""


def shipped_code(name: str) -> str:
    """Returns the text of a code file of an export.

    Args:
        name: one of a format's `code_files`.

    Raises:
        ConversionError: the source of a remasking rule would not run outside its module.
    """
    if name == REMASKING_FILE:
        return _remasking_code()
    source = resources.files(_CODE) / name
    return source.read_text(encoding="utf-8")


def shipped_class(reference: str) -> Any:
    """Returns a class of `formats/code`; loads transformers.

    Args:
        reference: 'module.Class', as a format's `model_class` names it.
    """
    module, name = reference.split(".")
    return getattr(importlib.import_module(f"{_CODE}.{module}"), name)


def _remasking_code() -> str:
    parts = [inspect.getsource(remasking)]
    known = {*vars(remasking), *vars(builtins)}
    for name, rule in remasking.RULES.items():
        if rule.__module__ == remasking.__name__:
            continue
        source = textwrap.dedent(inspect.getsource(rule))
        if unknown := sorted(set(_globals_of(source)) - known):
            raise ConversionError(
                f"remasking rule {name}: its class uses {', '.join(unknown)}, which exported code "
                "does not have; use what diffusion/remasking.py imports or defines, or put it there"
            )
        known.add(rule.__name__)
        parts.append(f'{source}\n\nRULES["{name}"] = {rule.__name__}\n')
    return "\n\n".join(parts)


def _globals_of(source: str) -> Iterator[str]:
    """Yields the names that a class uses but does not define, without names in annotations."""
    text = f"from __future__ import annotations\n{source}"
    tables = [symtable.symtable(text, "rule", "exec")]
    own = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_assigned()}
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            is_outside = symbol.is_global() or table.get_type() == "module"
            if is_outside and symbol.is_referenced() and symbol.get_name() not in own:
                yield symbol.get_name()
