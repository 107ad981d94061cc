"""The instructions of an IFEval question: which there are, and what an entry must say of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.responses.entries import Entry

RELATIONS = ("less than", "at least")
"""How a response is compared with a number."""

LANGUAGES = (
    *("en", "es", "pt", "ar", "hi", "fr", "ru", "de", "ja", "it", "bn", "uk", "th", "ur", "ta"),
    *("te", "bg", "ko", "pl", "he", "fa", "vi", "ne", "sw", "kn", "mr", "gu", "pa", "ml", "fi"),
)
"""Languages, by ISO 639-1, that a response can be asked to have."""


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction that a program can check."""

    id: str
    """Its name, such as "punctuation:no_comma"."""
    parameters: Mapping[str, Any]
    """Its parameters, such as the number of words."""

    def __str__(self) -> str:
        """Returns the name with the parameters."""
        values = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.id}({values})" if values else self.id


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """What a response must follow, in the order of the entry."""

    items: tuple[Instruction, ...]
    """At least one instruction."""

    def __str__(self) -> str:
        """Returns the instructions, for reports."""
        return "; ".join(map(str, self.items))


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What values a parameter may have."""

    rule: str
    holds: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int) and value >= 1


# A number of 0 counts as missing in lm-eval, which then draws one at random.
_COUNT = _Kind(rule="a whole number of at least 1", holds=_is_count)
_TEXT = _Kind(rule="a text", holds=_is_text)
_CHARACTER = _Kind(rule="one character", holds=lambda value: _is_text(value) and len(value) == 1)
_RELATION = _Kind(rule=" or ".join(RELATIONS), holds=lambda value: value in RELATIONS)
_LANGUAGE = _Kind(rule=f"one of {', '.join(LANGUAGES)}", holds=lambda value: value in LANGUAGES)
_TEXTS = _Kind(
    rule="a list of texts",
    holds=lambda value: isinstance(value, list) and bool(value) and all(map(_is_text, value)),
)

PARAMETERS: dict[str, dict[str, _Kind]] = {
    "keywords:existence": {"keywords": _TEXTS},
    "keywords:frequency": {"keyword": _TEXT, "frequency": _COUNT, "relation": _RELATION},
    "keywords:forbidden_words": {"forbidden_words": _TEXTS},
    "keywords:letter_frequency": {
        "letter": _CHARACTER,
        "let_frequency": _COUNT,
        "let_relation": _RELATION,
    },
    "language:response_language": {"language": _LANGUAGE},
    "length_constraints:number_sentences": {"num_sentences": _COUNT, "relation": _RELATION},
    "length_constraints:number_paragraphs": {"num_paragraphs": _COUNT},
    "length_constraints:number_words": {"num_words": _COUNT, "relation": _RELATION},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": _COUNT,
        "nth_paragraph": _COUNT,
        "first_word": _TEXT,
    },
    "detectable_content:number_placeholders": {"num_placeholders": _COUNT},
    "detectable_content:postscript": {"postscript_marker": _TEXT},
    "detectable_format:number_bullet_lists": {"num_bullets": _COUNT},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": _COUNT},
    "detectable_format:multiple_sections": {"section_spliter": _TEXT, "num_sections": _COUNT},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": _TEXT},
    "startend:end_checker": {"end_phrase": _TEXT},
    "startend:quotation": {},
    "change_case:capital_word_frequency": {
        "capital_frequency": _COUNT,
        "capital_relation": _RELATION,
    },
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
}
"""The 25 instructions of IFEval, with the names and values of their parameters. lm-eval draws a
parameter at random if an entry leaves it out, so an entry must give all of them."""


def read_instructions(entry: Entry) -> Instructions:
    """Reads `instruction_id_list` and `kwargs`, which has one object per instruction.

    Parameters that are null are left out: a table with one column per parameter has many.

    Raises:
        ValueError: an instruction is unknown, or a parameter is missing, unknown or malformed; the
            message names file and line, value, rule and fix.
    """
    ids, kwargs = entry.values.get("instruction_id_list"), entry.values.get("kwargs")
    if not isinstance(ids, list) or not ids:
        example = 'write e.g. "instruction_id_list": ["punctuation:no_comma"]'
        raise entry.refusal("instruction_id_list", "must be a list of instructions", example)
    if not isinstance(kwargs, list) or len(kwargs) != len(ids):
        rule = f"must be a list with one object for each of {len(ids)} instructions"
        raise entry.refusal("kwargs", rule, 'write e.g. "kwargs": [{}]')
    return Instructions(items=tuple(map(_reader(entry), ids, kwargs)))


def _reader(entry: Entry) -> Callable[[Any, Any], Instruction]:
    def read(name: Any, given: Any) -> Instruction:
        if not isinstance(name, str) or name not in PARAMETERS:
            near = difflib.get_close_matches(str(name), PARAMETERS, n=1)
            fix = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(PARAMETERS)}"
            raise entry.refusal("instruction_id_list", f"has the unknown {name}", fix)
        if not isinstance(given, dict):
            raise entry.refusal("kwargs", f"must have an object for {name}", "write {} if empty")
        parameters = {key: _plain(value) for key, value in given.items() if value is not None}
        _check(entry, name, parameters)
        return Instruction(id=name, parameters=parameters)

    return read


def _check(entry: Entry, name: str, parameters: Mapping[str, Any]) -> None:
    kinds = PARAMETERS[name]
    for key in parameters:
        if key not in kinds:
            wanted = ", ".join(kinds) or "none"
            raise entry.refusal("kwargs", f"has {key} for {name}", f"its parameters are: {wanted}")
    for key, kind in kinds.items():
        value = parameters.get(key)
        if not kind.holds(value):
            rule = f"must give {name} the parameter {key}, {kind.rule}"
            raise entry.refusal(
                "kwargs", rule, "it has " + ("none" if value is None else repr(value))
            )
    total, place = parameters.get("num_paragraphs"), parameters.get("nth_paragraph")
    if total is not None and place is not None and place > total:
        rule = f"must give {name} an nth_paragraph of at most num_paragraphs, {total}"
        raise entry.refusal("kwargs", rule, f"it has {place}")


def _plain(value: Any) -> Any:
    """Returns 300.0 as 300: a table with empty cells has no whole numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
