"""Prompts for the small chat model: enough, diverse, and the held-out ones unknown in training."""

import os
import re
import string
import subprocess
import sys
from collections import Counter

import pytest

from megatron_opdlm.responses.prompts import load_prompts
from tests.smollm2 import FOLDER, module


@pytest.fixture(scope="module")
def made():
    return module("prompts").make_prompts(0)


def texts(lines):
    return [line["prompt"] for line in lines]


def plain(text):
    """As `normal`, but written anew."""
    return re.sub(r"[^a-z0-9+*/=-]+", " ", text.lower()).strip()


def test_there_are_enough(made):
    counts = {name: len(lines) for name, lines in made.items()}
    assert counts["train"] >= 4000 and counts["heldout"] >= 300 and counts["questions"] >= 150
    for name, lines in made.items():
        assert len({line["id"] for line in lines}) == len(lines)
        assert all(line["kind"] for line in lines), name


def test_no_prompt_is_there_twice_or_in_two_files(made):
    seen = Counter(plain(text) for lines in made.values() for text in texts(lines))
    assert [text for text, count in seen.items() if count > 1] == []


def test_no_template_prevails(made):
    templates = [t for some in module("templates").TEMPLATES.values() for t in some]
    for kind in module("facts").KINDS.values():
        templates += [*kind.phrases, *kind.about_answers]
    templates += [p for phrases in module("sums").PHRASES.values() for p in phrases]
    left, shares = texts(made["train"]), []
    for template in sorted(templates, key=lambda t: -len(re.sub(r"{\w*}", "", t))):
        parts = [re.escape(literal) for literal, *_ in string.Formatter().parse(template)]
        pattern = re.compile("(.+)".join(p.replace("a\\ ", "an?\\ ") for p in parts) + "(.*)", re.I)
        found = [text for text in left if pattern.fullmatch(text)]
        left = [text for text in left if not pattern.fullmatch(text)]
        shares.append(len(found) / len(made["train"]))
    assert max(shares) < 0.025 and len(shares) > 120
    kinds = Counter(line["kind"] for line in made["train"])
    assert len(kinds) > 25 and max(kinds.values()) < 0.1 * len(made["train"])


def test_half_of_the_held_out_prompts_are_about_something_new(made):
    prompts, random = module("prompts"), module("random")
    _, held = prompts.divide_words(random.Random(0))
    names = [re.sub("^(an?|the) ", "", word).lower() for words in held.values() for word in words]
    inside = re.compile("|".join(rf"\b{re.escape(n)}(?!\w)" for n in names), re.I)
    train = "\n".join(texts(made["train"]))
    assert inside.findall(train) == []
    new = [text for text in texts(made["heldout"]) if inside.search(text)]
    assert len(new) >= 0.5 * len(made["heldout"])
    assert inside.search(train + new[0])  # control


def test_what_is_asked_is_never_trained_in_any_phrase(made):
    facts, sums, prompts = module("facts"), module("sums"), module("prompts")
    train = {plain(text) for text in texts(made["train"]) + texts(made["heldout"])}
    asked = []
    for kind in facts.KINDS.values():
        asked += [
            prompts.fill(p, {"": key}) for p in kind.phrases for key in facts.parse(kind.asked)
        ]
    problems = [p for some in sums.all_problems().values() for p in some]
    questions = set(texts(made["questions"]))
    chosen = [p for p in problems if p.prompt(0) in questions]
    assert len(chosen) == sum(sums.NUM_ASKED.values())
    for p in chosen:
        turned = sums.Problem(p.kind, p.b, p.a, p.answer)
        both = [p, turned] if p.kind in ("sum", "product", "difference") else [p]
        asked += [q.prompt(i) for q in both for i in range(len(sums.PHRASES[p.kind]))]
    assert len(asked) > 1000 and [text for text in asked if plain(text) in train] == []


def test_questions_can_be_graded(made):
    is_right = module("questions").is_right
    for question in made["questions"]:
        answers = question["answer"]
        assert answers and all(is_right(answer, answers) for answer in answers), question
        words = re.findall(r"[\w+]+", question["prompt"].lower())  # an echo is no answer
        assert not any(answer.lower() in words for answer in answers), question
    kinds = Counter(question["kind"] for question in made["questions"])
    assert len(kinds) >= 10
    first = Counter(question["kind"] for question in made["questions"][:80])
    assert len(first) >= 10 and max(first.values()) < 30  # measure.py takes the first ones


def test_sums_are_right():
    for kind, problems in module("sums").all_problems().items():
        signs = {"sum": "+", "difference": "-", "product": "*"}
        if kind in signs:
            assert all(eval(f"{p.a}{signs[kind]}{p.b}") == int(p.answer) for p in problems)
    days = [p for p in module("sums").all_problems()["day"] if p.a == "Sunday"]
    assert {(p.b, p.answer) for p in days} == {("after", "Monday"), ("before", "Saturday")}


def test_the_text_is_whole(made):
    for lines in made.values():
        for text in texts(lines):
            assert text == " ".join(text.split()) and len(text) < 200, text
            assert not text[0].islower(), text
            assert "{" not in text and not re.search(r"\b[Aa] [aeio]", text.replace("a one", "")), (
                text
            )


def test_a_seed_that_random_takes_for_another_is_refused(tmp_path, monkeypatch):
    prompts = module("prompts")
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--out", str(tmp_path / "p"), "--seed", "-1"])
    with pytest.raises(ValueError, match="--seed=-1 must be at least 0"):
        prompts.main()
    assert not (tmp_path / "p").exists()
    monkeypatch.setattr(prompts, "make_prompts", lambda seed: dict.fromkeys(prompts.FILES, []))
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "1"])
    prompts.main()  # control
    assert (tmp_path / "p").is_dir()


def test_the_files_are_the_same_everywhere_and_can_be_read(tmp_path, made):
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(FOLDER.parents[1])}
    command = [sys.executable, FOLDER / "prompts.py", "--out", tmp_path]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    for name, lines in made.items():
        read = load_prompts(tmp_path / f"{name}.jsonl")
        assert [p.messages[-1]["content"] for p in read] == texts(lines)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "heldout.jsonl", "questions.jsonl", "train.jsonl",
    ]  # fmt: skip
    assert texts(module("prompts").make_prompts(1)["train"]) != texts(made["train"])  # control
