"""What tests of IFEval need: responses that follow each instruction, and the data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_opdlm.responses.entries import Entry

PUBLISHED = Path(__file__).parents[2] / "shared/data/ifeval/ifeval_input_data.jsonl"
"""The file of the authors, beside the checkout."""

EXAMPLES: dict[str, tuple[dict[str, Any], str, str]] = {
    # instruction: its parameters, a response that follows it, one that does not
    "keywords:existence": (
        {"keywords": ["tide", "moon"]},
        "The Moon pulls at the sea, and the tide follows.",
        "The tide follows the sun.",
    ),
    "keywords:frequency": (
        {"keyword": "sea", "frequency": 2, "relation": "at least"},
        "Sea after sea.",
        "One sea.",
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": ["wave", "foam"]},
        "The waves are high.",  # another word
        "Every wave is high.",
    ),
    "keywords:letter_frequency": (
        {"letter": "z", "let_frequency": 3, "let_relation": "less than"},
        "A lazy maze.",
        "Zoe has a lazy maze.",
    ),
    "language:response_language": (
        {"language": "fr"},
        "Les vagues montent avec la marée et redescendent pendant la nuit.",
        "The waves rise with the tide and fall again during the night.",
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        "Dr. Ng left. He took the boat.",  # the dot of Dr. ends no sentence
        "Ng left. He took the boat. It sank.",
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        "The sea.\n***\nThe land.",
        "The sea.\n\nThe land.",
    ),
    "length_constraints:number_words": (
        {"num_words": 4, "relation": "at least"},
        "The sea is deep.",
        "The deep-sea.",
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "land"},
        "The sea.\n\nLand, at last.",
        "Land, at last.\n\nThe sea.",
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        "Dear [name], meet me at [place].",
        "Dear [name], meet me there.",
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        "Come soon.\nP.S. Bring a boat.",
        "Come soon.\nPS Bring a boat.",
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        "* one boat\n- two oars",
        "* one boat\n* two oars\n* a net\n* a lamp\n* a rope",
    ),
    "detectable_format:constrained_response": (
        {},
        "My answer is maybe.",
        "I do not know.",
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        "*The sea* is deep.\n\n*The land* is high.",
        "*The sea* is deep.",
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nThe sea.\nSection 2\nThe land.",
        "Section 1\nThe sea.\nSection two\nThe land.",
    ),
    "detectable_format:json_format": (
        {},
        '```json\n{"sea": [1, 2]}\n```',
        '{"sea": [1, 2}',
    ),
    "detectable_format:title": (
        {},
        "<<The Sea>>\nIt is deep.",
        "<The Sea>\nIt is deep.",
    ),
    "combination:two_responses": (
        {},
        "It is deep.\n******\nIt is wide.",
        "It is deep.\n******\nIt is deep.",
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "How deep is the sea?"},
        "How deep is the sea? Very deep.",
        "You ask how deep the sea is. Very deep.",
    ),
    "startend:end_checker": (
        {"end_phrase": "That is all."},
        "The sea is deep. That is all.",
        "That is all. The sea is deep.",
    ),
    "startend:quotation": (
        {},
        '"The sea is deep."',
        'He said: "The sea is deep."',
    ),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "The SEA is DEEP.",
        "The SEA is Deep.",
    ),
    "change_case:english_capital": (
        {},
        "THE SEA IS DEEP AND THE LAND IS HIGH.",
        "THE SEA IS DEEP AND the LAND IS HIGH.",
    ),
    "change_case:english_lowercase": (
        {},
        "the sea is deep and the land is high.",
        "the sea is deep and the Land is high.",
    ),
    "punctuation:no_comma": (
        {},
        "The sea is deep; the land is high.",
        "The sea is deep, the land is high.",
    ),
}


def missing_checkers() -> str | None:
    """Returns why lm-eval's checkers cannot run here; None if they can."""
    for name in ("lm_eval", "langdetect", "immutabledict", "nltk"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed; tools/setup_venv.sh --extra eval"
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        return "NLTK's punkt_tab is not on this machine; python tools/get_punkt.py"
    return None


needs_checkers = pytest.mark.skipif(
    missing_checkers() is not None, reason=missing_checkers() or "nothing is missing"
)
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_file(), reason=f"{PUBLISHED} is not beside this checkout"
)


def entry_of(instructions: dict[str, dict[str, Any]], **values: Any) -> Entry:
    """An entry as the authors write it."""
    listed = {"instruction_id_list": list(instructions), "kwargs": list(instructions.values())}
    return Entry("q.jsonl:1", 1, {"prompt": "a"} | listed | values)


def published_entries() -> list[Entry]:
    """All entries of the authors' file."""
    lines = PUBLISHED.read_text(encoding="utf-8").splitlines()
    return [Entry(f"{PUBLISHED}:{n}", n, json.loads(line)) for n, line in enumerate(lines, 1)]
