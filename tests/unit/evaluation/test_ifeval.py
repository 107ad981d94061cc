"""IFEval: hand-written responses to every instruction, the authors' file, lm-eval's own grades."""

import json
import random

import pytest

from megatron_opdlm.evaluation.graders.ifeval import (
    IFEVAL,
    count_verdicts,
    grade_ifeval,
    require_ifeval,
)
from megatron_opdlm.evaluation.graders.instructions import LANGUAGES, PARAMETERS, read_instructions
from tests.ifeval import (
    EXAMPLES,
    entry_of,
    needs_checkers,
    needs_published,
    published_entries,
)

LETTERS_AT_RANDOM = ["!", "#"]
"""The letters of the two prompts for which lm-eval draws another one."""


def instructions_of(*names, **changes):
    return read_instructions(entry_of({name: EXAMPLES[name][0] | changes for name in names}))


def verdicts(response, *names):
    grade = grade_ifeval(response, instructions_of(*names))
    assert grade.error is None
    return {name.removesuffix("_acc"): found for name, found in grade.verdicts.items()}


# --- the checkers


@needs_checkers
def test_the_instructions_are_those_of_lm_eval():
    require_ifeval()
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    from lm_eval.tasks.ifeval.instructions_util import LANGUAGE_CODES

    assert set(PARAMETERS) == set(INSTRUCTION_DICT) == set(EXAMPLES)
    assert len(PARAMETERS) == 25
    for name, kinds in PARAMETERS.items():
        checker = INSTRUCTION_DICT[name](name)
        assert sorted(checker.get_instruction_args_keys()) == sorted(kinds), name
    assert set(LANGUAGES) == set(LANGUAGE_CODES)


@needs_checkers
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_checker_tells_the_two_responses_apart(name):
    _, good, bad = EXAMPLES[name]
    assert grade_ifeval(good, instructions_of(name)).correct
    grade = grade_ifeval(bad, instructions_of(name))
    assert not grade.correct and grade.error is None
    assert grade.verdicts == {each: (False,) for each in grade.verdicts}


@needs_checkers
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_empty_response_follows_nothing(name):
    for text in ("", " \n\t"):
        assert grade_ifeval(text, instructions_of(name)).verdicts["inst_level_loose_acc"] == (
            False,
        )


@needs_checkers
def test_the_opposite_relation_has_the_opposite_verdict():
    cases = {
        "keywords:frequency": "relation",
        "keywords:letter_frequency": "let_relation",
        "length_constraints:number_sentences": "relation",
        "length_constraints:number_words": "relation",
        "change_case:capital_word_frequency": "capital_relation",
    }
    for name, key in cases.items():
        parameters, good, bad = EXAMPLES[name]
        other = {"at least": "less than", "less than": "at least"}[parameters[key]]
        turned = instructions_of(name, **{key: other})
        assert [grade_ifeval(text, turned).correct for text in (good, bad)] == [False, True]


# --- strict, loose, prompts, instructions


@needs_checkers
def test_all_instructions_must_be_followed():
    pair = ("punctuation:no_comma", "startend:quotation")
    assert verdicts('"The sea."', *pair) == {
        "prompt_level_strict": (True,), "inst_level_strict": (True, True),
        "prompt_level_loose": (True,), "inst_level_loose": (True, True),
    }  # fmt: skip
    assert verdicts("The sea.", *pair) == {
        "prompt_level_strict": (False,), "inst_level_strict": (True, False),
        "prompt_level_loose": (False,), "inst_level_loose": (True, False),
    }  # fmt: skip


@needs_checkers
@pytest.mark.parametrize(
    "decorated",
    [
        'Sure, here it is:\n"The sea."',  # without the first line
        '"The sea."\nCan I help you further?',  # without the last line
        'Sure:\n"The sea."\nCan I help you further?',  # without both
        '**"The sea."**',  # without asterisks
        'Sure:\n**"The sea."**',
        '*"The sea."*\nBye.',
        'Sure:\n*"The sea."*\nBye.',
    ],
)
def test_decoration_counts_strictly_and_not_loosely(decorated):
    found = verdicts(decorated, "startend:quotation")
    assert found["inst_level_strict"] == (False,) and found["inst_level_loose"] == (True,)


@needs_checkers
def test_control_more_than_decoration_counts_loosely_too():
    for text in ('One.\nTwo.\n"The sea."', '_"The sea."_', '"The sea.'):
        assert verdicts(text, "startend:quotation")["inst_level_loose"] == (False,)


UNSURE = {"hello": "fi", "uno due tre": "es"}
"""Texts that langdetect takes for another language in about one of six draws."""


@needs_checkers
def test_the_language_of_a_short_text_is_always_the_same():
    for text, language in UNSURE.items():
        instructions = instructions_of("language:response_language", language=language)
        found = {grade_ifeval(text, instructions).correct for _ in range(30)}
        assert len(found) == 1


@needs_checkers
def test_control_without_a_seed_the_language_changes(monkeypatch):
    import langdetect

    require_ifeval()
    assert langdetect.DetectorFactory.seed == 0
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", None)
    found = {text: {langdetect.detect(text) for _ in range(40)} for text in UNSURE}
    assert max(map(len, found.values())) > 1


@needs_checkers
def test_a_character_that_is_no_letter_is_counted():
    """lm-eval would draw a letter at random, and "a!a!" has many of some and none of others."""
    many = instructions_of("keywords:letter_frequency", letter="!", let_relation="at least")
    few = instructions_of("keywords:letter_frequency", letter="!", let_relation="less than")
    for _ in range(20):
        assert [grade_ifeval("a! b! c!", which).correct for which in (many, few)] == [True, False]
        assert [grade_ifeval("a! b! c?", which).correct for which in (many, few)] == [False, True]
    assert not grade_ifeval(" ", few).correct


# --- reading


def test_null_parameters_are_left_out_and_whole_numbers_stay_whole():
    entry = entry_of(
        {"length_constraints:number_words": {
            "num_words": 300.0, "relation": "at least", "keywords": None, "letter": None,
        }}
    )  # fmt: skip
    (item,) = read_instructions(entry).items
    assert item.parameters == {"num_words": 300, "relation": "at least"}
    assert type(item.parameters["num_words"]) is int
    assert str(read_instructions(entry)) == (
        "length_constraints:number_words(num_words=300, relation=at least)"
    )


WORDS = {"num_words": 3, "relation": "at least"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"instruction_id_list": None}, "instruction_id_list=null must be a list of instructions"),
        ({"instruction_id_list": []}, "instruction_id_list=[] must be a list of instructions"),
        ({"kwargs": [WORDS, {}]}, "must be a list with one object for each of 1 instructions"),
        ({"kwargs": [None]}, "must have an object for length_constraints:number_words"),
        ({"instruction_id_list": ["length_constraints:number_word"]},
         "has the unknown length_constraints:number_word; did you mean "
         "length_constraints:number_words?"),
        ({"instruction_id_list": [["a"]]}, "has the unknown ['a']; choose one of keywords:"),
        ({"kwargs": [WORDS | {"num_words": None}]},
         "the parameter num_words, a whole number of at least 1; it has none"),
        ({"kwargs": [WORDS | {"num_words": 0}]}, "a whole number of at least 1; it has 0"),
        ({"kwargs": [WORDS | {"num_words": True}]}, "a whole number of at least 1; it has True"),
        ({"kwargs": [WORDS | {"num_words": 2.5}]}, "a whole number of at least 1; it has 2.5"),
        ({"kwargs": [WORDS | {"relation": "at most"}]}, "less than or at least; it has 'at most'"),
        ({"kwargs": [WORDS | {"keyword": "sea"}]},
         "has keyword for length_constraints:number_words; its parameters are: num_words, rel"),
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_entry_is_refused(changes, says):
    entry = entry_of({"length_constraints:number_words": WORDS})
    read_instructions(entry)  # control
    with pytest.raises(ValueError) as refused:
        read_instructions(entry_of({"length_constraints:number_words": WORDS}, **changes))
    assert str(refused.value).startswith("q.jsonl:1: ")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("keywords:existence", {"keywords": []}, "a list of texts; it has []"),
        ("keywords:existence", {"keywords": "sea"}, "a list of texts; it has 'sea'"),
        ("keywords:letter_frequency", {"letter": "ab"}, "one character; it has 'ab'"),
        ("language:response_language", {"language": "da"}, "mr, gu, pa, ml, fi; it has 'da'"),
        ("startend:end_checker", {"end_phrase": " "}, "a text; it has ' '"),
        ("length_constraints:nth_paragraph_first_word", {"nth_paragraph": 3},
         "an nth_paragraph of at most num_paragraphs, 2; it has 3"),
    ],
)  # fmt: skip
def test_a_parameter_that_lm_eval_would_draw_at_random_is_refused(name, changes, says):
    instructions_of(name)  # control
    with pytest.raises(ValueError) as refused:
        instructions_of(name, **changes)
    assert says in str(refused.value)


# --- the authors' file


@needs_published
def test_all_entries_of_the_authors_are_read():
    found = [read_instructions(entry) for entry in published_entries()]
    assert len(found) == 541
    assert sum(len(each.items) for each in found) == 834
    assert {item.id for each in found for item in each.items} == set(PARAMETERS)
    letters = [item.parameters.get("letter", "a") for each in found for item in each.items]
    assert sorted(letter for letter in letters if not letter.isalpha()) == LETTERS_AT_RANDOM


def answers_to(entries):
    """One text per entry: examples, joined, decorated, empty, and texts about something else."""
    rng = random.Random(0)
    texts = [text for _, good, bad in EXAMPLES.values() for text in (good, bad)]
    answers = []
    for entry in entries:
        chosen = rng.sample(texts, rng.randint(1, 6))
        text = rng.choice(["\n", "\n\n", " "]).join(chosen)
        forms = (
            *(text, text.upper(), text.lower(), f"**{text}**", f"Sure.\n{text}\nBye."),
            *(entry.values["prompt"] + text, ""),
        )
        answers.append(rng.choice(forms))
    return answers


@pytest.fixture(scope="module")
def graded():
    """Entries of the authors, an answer to each, and its grade."""
    entries = published_entries()
    answers = answers_to(entries)
    grades = [
        grade_ifeval(answer, read_instructions(entry))
        for entry, answer in zip(entries, answers, strict=True)
    ]
    return list(zip(entries, answers, grades, strict=True))


@needs_checkers
@needs_published
def test_grades_are_those_of_lm_eval(graded):
    """All 541 entries, apart from the two prompts for which lm-eval draws a letter."""
    from lm_eval.tasks.ifeval.utils import process_results

    agreed, at_random = 0, []
    for entry, answer, grade in graded:
        letters = [kwargs.get("letter", "a") for kwargs in entry.values["kwargs"]]
        if not all(letter.isalpha() for letter in letters):
            at_random.append(entry.values["key"])
            continue
        ours = {
            name: list(found) if name.startswith("inst_") else found[0]
            for name, found in grade.verdicts.items()
        }
        assert ours == process_results(entry.values, [answer])
        agreed += 1
    assert (agreed, len(at_random)) == (539, 2)


@needs_checkers
@needs_published
def test_control_the_answers_differ_in_their_verdicts(graded):
    grades = [grade for *_, grade in graded]
    pooled = {
        name: [v for grade in grades for v in grade.verdicts[name]] for name in grades[0].verdicts
    }
    assert [len(found) for found in pooled.values()] == [541, 834, 541, 834]
    shares = {name: sum(found) / len(found) for name, found in pooled.items()}
    assert 0.05 < shares["prompt_level_strict_acc"] < shares["prompt_level_loose_acc"] < 0.5
    assert 0.1 < shares["inst_level_strict_acc"] < shares["inst_level_loose_acc"] < 0.8


def test_the_number_of_verdicts_is_that_of_the_grade():
    instructions = instructions_of("punctuation:no_comma", "startend:quotation")
    assert count_verdicts(instructions) == {
        "prompt_level_strict_acc": 1, "inst_level_strict_acc": 2,
        "prompt_level_loose_acc": 1, "inst_level_loose_acc": 2,
    }  # fmt: skip


@needs_checkers
def test_control_the_grade_has_the_verdicts_that_are_counted():
    instructions = instructions_of("punctuation:no_comma", "startend:quotation")
    grade = grade_ifeval("a", instructions)
    assert {n: len(v) for n, v in grade.verdicts.items()} == count_verdicts(instructions)


# --- what the machine lacks


@needs_checkers
def test_a_missing_model_of_sentences_is_refused_and_not_downloaded(monkeypatch):
    import nltk

    from megatron_opdlm.evaluation.graders import ifeval

    def download(*args, **options):
        raise AssertionError("nothing is downloaded")

    def find(name, *args):
        raise LookupError(name)

    monkeypatch.setattr(nltk, "download", download)
    monkeypatch.setattr(nltk.data, "find", find)
    ifeval._checkers.cache_clear()
    with pytest.raises(FileNotFoundError) as refused:
        IFEVAL.require()
    assert str(refused.value) == (
        "grader=ifeval needs NLTK's data tokenizers/punkt_tab/english, which is not on this "
        "machine; get it with: python -m nltk.downloader punkt_tab, or from the package index "
        "with: python tools/get_punkt.py, or set NLTK_DATA=DIR to the folder that has it"
    )
    monkeypatch.undo()
    IFEVAL.require()  # control


@pytest.mark.parametrize("name", ["langdetect", "nltk"])
def test_a_missing_library_is_refused_with_the_extra(name, monkeypatch):
    import sys

    from megatron_opdlm.evaluation.graders import ifeval

    monkeypatch.setitem(sys.modules, name, None)
    ifeval._checkers.cache_clear()
    with pytest.raises(ImportError) as refused:
        IFEVAL.require()
    assert str(refused.value).endswith("install it with: pip install 'megatron-opdlm[eval]'")
    ifeval._checkers.cache_clear()


def test_references_travel_to_worker_processes():
    import pickle

    instructions = instructions_of("keywords:existence", "punctuation:no_comma")
    assert pickle.loads(pickle.dumps(instructions)) == instructions
    json.dumps(str(instructions))
