"""What a configuration dataclass says about itself: keys, types, defaults, documentation.

Nothing here knows a key by name; `config/run.py` declares them. The standard library only, so that
`opdlm train --help` stays fast.
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
from typing import Any, ClassVar, Literal

from megatron_opdlm.checks import format_value, require, require_at_least

_TRUE_FALSE = {"true": True, "false": False}
_NULL = ("null", "none", "~", "")


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of the YAML file and of the command line."""

    name: str
    """Spelling, with a dot for a nested key: `lr`, `max_response_tokens.end`."""
    path: tuple[str, ...]
    """Attribute path from the root dataclass: ("rollout", "max_response_tokens", "end")."""
    annotation: Any
    """Type of the value: bool, int, float, str, Literal[...] or one of them | None."""
    default: Any
    """Default of the field; `dataclasses.MISSING` for a required key."""
    doc: str
    """Documentation string under the field."""

    @property
    def required(self) -> bool:
        """Whether the user must give a value."""
        return self.default is dataclasses.MISSING


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that looks most like `name`, or None if none does.

    A nested key is also found by its last part (`end` -> `max_response_tokens.end`), and any key
    behind the name of its section (`rollout.block_size` -> `block_size`).
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
    # a fragment: `tensor_parallel` is in no edit distance of `tensor_model_parallel_size`
    parts = set(name.lower().split("_"))
    scored = [(len(parts & set(key.split("_"))), -len(key), key) for key in known]
    best = max(scored, default=(0, 0, ""))
    return best[2] if best[0] else None


def describe_type(annotation: Any) -> str:
    """Writes a type the way the documentation and the error texts name it."""
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
        ValueError: naming key, value and type.
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
    if type(value) is inner:  # not isinstance: True is no integer here
        return value
    _raise_type(key, value, annotation, None)


def parse_text(key: str, text: str, annotation: Any) -> Any:
    """Reads the text of a `key=value` override as the type of its field.

    Raises:
        ValueError: naming key, text and type.
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
    """Lists the keys of a dataclass of sections. Section names are no part of a key.

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


@functools.cache
def section_keys(cls: type, *path: str) -> tuple[Key, ...]:
    """Lists the keys of one section, nested ones included.

    Args:
        cls: dataclass of the section.
        path: attributes that lead to it from the root; all but the first name nested keys.
    """
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    keys: list[Key] = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            keys += section_keys(hints[field.name], *path, field.name)
            continue
        full_path = (*path, field.name)
        keys.append(
            Key(
                name=".".join(full_path[1:]),
                path=full_path,
                annotation=hints[field.name],
                default=field.default,
                doc=docs[field.name],
            )
        )
    return tuple(keys)


def flatten(values: Mapping[Any, Any], known: Iterable[str]) -> dict[str, Any]:
    """Joins nested mappings into dotted keys.

    Raises:
        ValueError: a scalar where a nested key belongs, or a nested mapping under an unknown key.
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
    """Builds the error for a key that does not exist, naming the nearest one."""
    guess = nearest(name, known)
    hint = f"did you mean {guess}?" if guess else "`opdlm train --help` lists the keys"
    return ValueError(f"unknown key {name}; {hint}")


def build(root: type, values: Mapping[str, Any]) -> Any:
    """Constructs the dataclass of sections from values by key name.

    Raises:
        ValueError: an unknown key, a missing required key, or what the dataclasses refuse.
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


def field_docs(cls: type) -> dict[str, str]:
    """Returns the string literal under each field of a class, on one line, by field name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    docs: dict[str, str] = {}
    for field, below in zip(body, body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def keys_as_markdown(root: type) -> str:
    """Renders one table per section: key, type, default, meaning."""
    lines: list[str] = []
    section = ""
    for key in collect_keys(root).values():
        if key.path[0] != section:
            section = key.path[0]
            lines += [
                "",
                f"### {section}",
                "",
                "| key | type | default | meaning |",
                "|---|---|---|---|",
            ]
        default = "required" if key.required else f"`{format_value(key.default)}`"
        cells = (f"`{key.name}`", describe_type(key.annotation), default, key.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).lstrip("\n") + "\n"


def _construct(cls: type, tree: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            inner = typing.cast(type, hints[field.name])
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


@dataclass(frozen=True, kw_only=True)
class Section:
    """Checks the type of every field, then the rules of the section."""

    _path: ClassVar[tuple[str, ...]] = ("section",)

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for key in section_keys(cls, *self._path):
            if len(key.path) > len(self._path) + 1:
                continue  # of a nested section, which has checked itself
            name = key.path[-1]
            value = getattr(self, name)
            object.__setattr__(self, name, check_value(key.name, value, key.annotation))
        self._check()

    def _check(self) -> None:
        """Raises ValueError for a value outside its range."""

    def _at_least(self, minimum: float, *names: str) -> None:
        for name in names:
            require_at_least(minimum, ".".join((*self._path[1:], name)), getattr(self, name))

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value > 0, name, value, "must be positive", "use a number above 0")

    def _fraction(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(0 < value <= 1, name, value, "must lie in (0, 1]", "use e.g. 0.9")


def require_default_unless(is_used: bool, section: Section, name: str, rule: str, fix: str) -> None:
    """Refuses another value than the default where nothing reads it.

    Raises:
        ValueError: "name=value rule; fix".
    """
    value = getattr(section, name)
    default = next(field.default for field in dataclasses.fields(section) if field.name == name)
    require(is_used or value == default, name, value, rule, fix)
