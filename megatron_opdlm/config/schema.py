"""Reads keys, types, defaults and documentation from configuration dataclasses.

Nothing here depends on the name of a key; `config/run.py` declares the keys. This file needs only
the standard library, so that `opdlm train --help` stays fast.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_opdlm.checks import format_value, require
from megatron_opdlm.config.annotations import MAY_CHANGE, OneOf, ParametersOf, split

_TRUE_FALSE = {"true": True, "false": False}
_NULL = ("null", "none", "~", "")


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of the YAML file and of the command line."""

    name: str
    """Name, with a dot for a nested key: `lr`, `max_response_tokens.end`."""
    path: tuple[str, ...]
    """Attribute path from the root dataclass: ("rollout", "max_response_tokens", "end")."""
    marks: tuple[Any, ...] = ()
    """Facts of the annotation beyond the type, see annotations.py."""
    annotation: Any
    """Type of the value: bool, int, float, str or Literal[...], or one of these | None."""
    default: Any
    """Default of the field; `dataclasses.MISSING` for a required key."""
    doc: str
    """Documentation string under the field."""

    @property
    def required(self) -> bool:
        """Whether the user must give a value."""
        return self.default is dataclasses.MISSING

    @property
    def may_change(self) -> bool:
        """Whether a resumed run may have another value."""
        return MAY_CHANGE in self.marks

    def read(self, root: Any) -> Any:
        """Returns the key's value in a dataclass of sections."""
        for part in self.path:
            root = root[part] if isinstance(root, Mapping) else getattr(root, part)
        return root


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that is most similar to `name`, or None if none is similar.

    A nested key is also found by its last part (`end` -> `max_response_tokens.end`), and any key is
    also found if its section stands before it (`rollout.block_size` -> `block_size`).
    """
    known = list(known)
    if (last_part := name.rsplit(".", 1)[-1]) in known:
        return last_part
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if matches:
        return matches[0]
    by_last_part = {key.rsplit(".", 1)[-1]: key for key in known if "." in key}
    matches = difflib.get_close_matches(name, by_last_part, n=1, cutoff=0.75)
    if matches:
        return by_last_part[matches[0]]
    # compare parts: by edit distance `tensor_parallel` is far from `tensor_model_parallel_size`
    parts = set(name.lower().split("_"))
    scored = [(len(parts & set(key.split("_"))), -len(key), key) for key in known]
    best = max(scored, default=(0, 0, ""))
    return best[2] if best[0] else None


def describe_type(annotation: Any) -> str:
    """Returns a type as the documentation and the error texts write it."""
    if typing.get_origin(annotation) is Literal:
        return "{" + ", ".join(map(str, typing.get_args(annotation))) + "}"
    inner, optional = _split_optional(annotation)
    if optional:
        return f"{describe_type(inner)} or null"
    return str(inner.__name__)


def check_value(key: str, value: Any, annotation: Any) -> Any:
    """Checks a value against the type of its field. An integer is accepted for a float.

    Returns:
        The value as the field stores it.

    Raises:
        ValueError: the type is wrong; the message names key, value and type.
    """
    inner, optional = _split_optional(annotation)
    if value is None and optional:
        return None
    if typing.get_origin(inner) is Literal:
        choices = typing.get_args(inner)
        if value in choices:
            return value
        _raise_type(key, value, annotation, nearest(str(value), map(str, choices)))
    if inner is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if inner is float and isinstance(value, float):
        require(math.isfinite(value), key, value, "must be finite", "use a number")
    if type(value) is inner:  # not isinstance: True is not an integer here
        return value
    _raise_type(key, value, annotation, None)


def parse_text(key: str, text: str, annotation: Any) -> Any:
    """Reads the text of a `key=value` override as the type of its field.

    Raises:
        ValueError: the text is not of this type; the message names key, text and type.
    """
    inner, optional = _split_optional(annotation)
    if optional and text.lower() in _NULL:
        return None
    if inner is bool:
        value: Any = _TRUE_FALSE.get(text.lower(), text)
    elif inner in (int, float):
        try:
            value = inner(text)
        except ValueError:
            value = text
    else:
        value = text
    return check_value(key, value, annotation)


def collect_keys(root: type) -> dict[str, Key]:
    """Returns the keys of a dataclass of sections. Section names are not part of a key.

    Args:
        root: dataclass whose fields are dataclasses (sections); a dataclass inside a section is a
            nested key.

    Returns:
        Keys by name, in the order of declaration.
    """
    keys: dict[str, Key] = {}
    for section, section_type in typing.get_type_hints(root).items():
        for key in section_keys(section_type, section):
            assert key.name not in keys, f"key {key.name} is declared in two sections"
            keys[key.name] = key
    return keys


def section_keys(cls: type, *path: str) -> tuple[Key, ...]:
    """Returns the keys of one section, including nested keys and parameters of tables.

    Args:
        cls: dataclass of the section.
        path: attribute names from the root to the section; all but the first name nested keys.
    """
    annotations, docs = hints(cls), field_docs(cls)
    keys: list[Key] = []
    for field in dataclasses.fields(cls):
        annotation, marks = split(annotations[field.name])
        if dataclasses.is_dataclass(annotation):
            keys += section_keys(typing.cast(type, annotation), *path, field.name)
            continue
        full_path, doc = (*path, field.name), docs[field.name]
        for mark in marks:
            if isinstance(mark, ParametersOf):
                keys += parameter_keys(mark, full_path)
                break
            if isinstance(mark, OneOf):
                doc = f"{doc} {mark.describe()}."
        else:
            name = ".".join(full_path[1:])
            keys.append(
                Key(
                    name=name,
                    path=full_path,
                    annotation=annotation,
                    default=field.default,
                    doc=doc,
                    marks=marks,
                )
            )
    return tuple(keys)


def parameter_keys(mark: ParametersOf, path: tuple[str, ...]) -> list[Key]:
    """Returns the keys of a table's parameters. A parameter of several entries is one key."""
    keys: dict[str, Key] = {}
    users: dict[str, list[str]] = {}
    for entry_name, entry, field in mark.fields():
        annotation, marks = split(hints(entry)[field.name])
        has_default = field.default is not dataclasses.MISSING
        assert has_default, f"the parameter {field.name} of {entry_name} needs a default"
        users.setdefault(field.name, []).append(entry_name)
        doc = f"{', '.join(users[field.name])}: {field_docs(entry)[field.name]}"
        key = Key(
            name=field.name,
            path=(*path, field.name),
            annotation=annotation,
            default=field.default,
            doc=doc,
            marks=marks,
        )
        before = keys.setdefault(field.name, key)
        is_same = (before.annotation, before.default) == (key.annotation, key.default)
        assert is_same, f"{' and '.join(users[field.name])} differ in the parameter {field.name}"
        keys[field.name] = dataclasses.replace(before, doc=doc)
    return list(keys.values())


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Returns the annotations of a class's fields, with their marks."""
    return typing.get_type_hints(cls, include_extras=True)


def flatten(values: Mapping[Any, Any], known: Iterable[str]) -> dict[str, Any]:
    """Joins nested mappings into dotted keys.

    Raises:
        ValueError: a nested key has a scalar as value, or an unknown key has a mapping.
    """
    parents = {name.split(".")[0] for name in known if "." in name}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in parents:
            fields = ", ".join(key.split(".")[1] for key in known if key.startswith(f"{name}."))
            is_mapping = isinstance(value, Mapping)
            require(is_mapping, name, value, "must be a mapping", f"give it {{{fields}}}")
            flat |= {f"{name}.{inner}": item for inner, item in value.items()}
        else:
            flat[str(name)] = value
    return flat


def unknown_key_error(name: str, known: Iterable[str]) -> ValueError:
    """Returns the error for a key that does not exist; it names the most similar key."""
    guess = nearest(name, known)
    hint = f"did you mean {guess}?" if guess else "`opdlm train --help` lists the keys"
    return ValueError(f"unknown key {name}; {hint}")


def build(root: type, values: Mapping[str, Any]) -> Any:
    """Constructs the dataclass of sections from values by key name.

    Raises:
        ValueError: a key is unknown, a required key is missing, or a dataclass refuses a value.
    """
    keys = collect_keys(root)
    for name in values:
        if name not in keys:
            raise unknown_key_error(name, keys)
    missing = [key for key in keys.values() if key.required and key.name not in values]
    if missing:
        names = ", ".join(key.name for key in missing)
        doc = missing[0].doc.split(". ")[0].rstrip(".")
        raise ValueError(f"missing required {names}; add `{missing[0].name}: ...` ({doc})")
    tree: dict[str, Any] = {}
    for name, value in values.items():
        node = tree
        for part in keys[name].path[:-1]:
            node = node.setdefault(part, {})
        node[keys[name].path[-1]] = value
    return _construct(root, tree)


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Returns the text under each field of a dataclass, on one line, by field name.

    Inherited fields are included.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        body = tree.body[0].body  # type: ignore[attr-defined]
        for field, below in zip(body, body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def keys_as_markdown(root: type) -> str:
    """Returns one table per section: key, type, default, may change on resume, meaning."""
    lines: list[str] = []
    section = ""
    for key in collect_keys(root).values():
        if key.path[0] != section:
            section = key.path[0]
            lines += [
                "",
                f"### {section}",
                "",
                "| key | type | default | on resume | meaning |",
                "|---|---|---|---|---|",
            ]
        default = "required" if key.required else f"`{format_value(key.default)}`"
        resume = "may change" if key.may_change else ""
        cells = (f"`{key.name}`", describe_type(key.annotation), default, resume, key.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).lstrip("\n") + "\n"


def _construct(cls: type, tree: Mapping[str, Any]) -> Any:
    values = {}
    for field in dataclasses.fields(cls):
        annotation, _ = split(hints(cls)[field.name])
        if dataclasses.is_dataclass(annotation):
            inner = typing.cast(type, annotation)
            values[field.name] = _construct(inner, tree.get(field.name, {}))
        elif field.name in tree:
            values[field.name] = tree[field.name]
    return cls(**values)


def _split_optional(annotation: Any) -> tuple[Any, bool]:
    """Returns (T, True) for `T | None`, else (annotation, False)."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        inner = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        assert len(inner) == 1, f"a key is one type or null, not {annotation}"
        return inner[0], True
    return annotation, False


def _raise_type(key: str, value: Any, annotation: Any, guess: str | None) -> typing.NoReturn:
    expected = describe_type(annotation)
    if typing.get_origin(_split_optional(annotation)[0]) is Literal:
        rule = f"must be one of {expected}"
    else:
        rule = f"must have type {expected}"
    is_choice = typing.get_origin(_split_optional(annotation)[0]) is Literal
    got = "use one of them" if is_choice else f"got {type(value).__name__}"
    hint = f"did you mean {guess}?" if guess else got
    raise ValueError(f"{key}={format_value(value)} {rule}; {hint}")
