"""Prompts to train on, prompts that are held out, and questions that can be graded.

    prompts.py --out DIR [--seed N]

Puts together templates, word lists and facts that stand beside this file; no network and no data
set is used. DIR gets train.jsonl (4,800 prompts), heldout.jsonl (400) and questions.jsonl; they
share no prompt, also without case and punctuation. Half of the held-out prompts are about things
that no training prompt names, the other half are new combinations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import facts
import sums
from sentences import PERSONS, SENTENCE_LISTS, TIMES, build, parse_clauses
from templates import TEMPLATES
from words import LISTS, split_list

from megatron_opdlm.checks import require_at_least
from megatron_opdlm.cli import run_script
from megatron_opdlm.files.folders import replacing
from megatron_opdlm.files.paths import folder

NUM_TRAIN, NUM_HELDOUT = 4800, 400
MOST_OF_A_TEMPLATE = 60
"""Training prompts; 1.25 % of them."""
MOST_COMBINATIONS = 800
"""Of the words of a template that are looked at."""
HELD_SHARE = 0.12
"""Of the words of a list that no training prompt names."""
ASKED_LAST = ("number", "difference", "young", "color", "past", "woman")
"""Kinds of questions that the teacher seldom gets right (7 of 97): they follow all others, so that
a measurement of the first hundred finds enough that it knows."""
FILES = ("train", "heldout", "questions")


@dataclass
class Pool:
    """Prompts of one template, in a random order."""

    kind: str
    trained: list[str] = field(default_factory=list)
    combinations: list[str] = field(default_factory=list)
    """Held out; their words are in training prompts."""
    unseen: list[str] = field(default_factory=list)
    """Held out; they hold words that no training prompt has."""


def make_prompts(seed: int) -> dict[str, list[dict[str, Any]]]:
    """The lines of the three files."""
    generator = random.Random(seed)
    words, held = divide_words(generator)
    trained, asked = sums.divide(generator)
    questions = make_questions(asked)
    pools = [*template_pools(words, held, generator), *fact_pools(generator)]
    pools += sum_pools(trained, generator)
    taken = {normal(question["prompt"]) for question in questions}
    heldout = [*take([(p.kind, p.unseen) for p in pools if p.unseen], NUM_HELDOUT // 2, taken)]
    heldout += take([(p.kind, p.combinations) for p in pools], NUM_HELDOUT - len(heldout), taken)
    names = mentions(word for words in held.values() for word in words)
    sources = [(p.kind, [t for t in p.trained if not names.search(t)]) for p in pools]
    train = [*take(sources, NUM_TRAIN, taken, MOST_OF_A_TEMPLATE)]
    for lines in (heldout, train, questions):
        generator.shuffle(lines)
    questions.sort(key=lambda line: line["kind"] in ASKED_LAST)
    numbered = {"train": train, "heldout": heldout, "questions": questions}
    return {
        name: [{"id": f"{name}{i}"} | line for i, line in enumerate(lines)]
        for name, lines in numbered.items()
    }


def divide_words(
    generator: random.Random,
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """All values of every slot, and those of them that training prompts must not name."""
    words = {slot: split_list(text) for slot, text in (LISTS | SENTENCE_LISTS).items()}
    held = {
        slot: generator.sample(items, round(HELD_SHARE * len(items)))
        for slot, items in words.items()
        if slot != "name"
    }
    clauses = parse_clauses()
    new = generator.sample(clauses, round(HELD_SHARE * len(clauses)))
    everyone = list(itertools.product(split_list(PERSONS), clauses, split_list(TIMES)))
    chosen = generator.sample(everyone, 600)
    for slot, form in (("present", "third"), ("past", "past"), ("wrong", "base")):
        words[slot] = [build(*parts, form) for parts in chosen]
        held[slot] = [build(*parts, form) for parts in chosen if parts[1] in new]
    words["n"] = words["m"] = [str(n) for n in range(2, 21)]
    return words, held


def template_pools(
    words: dict[str, list[str]], held: dict[str, list[str]], generator: random.Random
) -> Iterator[Pool]:
    """A pool for every template."""
    for kind, templates in TEMPLATES.items():
        for template in templates:
            slots = [name for _, name, _, _ in string.Formatter().parse(template) if name]
            new = {slot: set(held.get(slot, ())) for slot in slots}
            known: list[str] = []
            unseen: list[str] = []
            for filling in fillings({slot: words[slot] for slot in slots}, generator):
                is_new = any(value in new[slot] for slot, value in filling.items())
                (unseen if is_new else known).append(fill(template, filling))
            yield divided(kind, known, generator, unseen)


def fillings(words: dict[str, list[str]], generator: random.Random) -> list[dict[str, str]]:
    """Values for all slots of a template: every combination, or many of them."""
    total = math.prod(map(len, words.values()))
    chosen = []
    for number in generator.sample(range(total), min(total, MOST_COMBINATIONS)):
        filling = {}
        for slot, values in words.items():
            number, place = divmod(number, len(values))
            filling[slot] = values[place]
        chosen.append(filling)
    return chosen


def fact_pools(generator: random.Random) -> Iterator[Pool]:
    """A pool for every phrase of the facts that are trained on."""
    for name, kind in facts.KINDS.items():
        known = facts.parse(kind.trained)
        for phrase in kind.phrases:
            yield divided(name, [fill(phrase, {"": key}) for key in known], generator)
        for phrase in kind.about_answers:
            yield divided(name, [fill(phrase, {"": a[0]}) for a in known.values()], generator)


def sum_pools(problems: list[sums.Problem], generator: random.Random) -> Iterator[Pool]:
    """A pool for every phrase of the sums that are trained on."""
    for kind, phrases in sums.PHRASES.items():
        for place in range(len(phrases)):
            texts = [problem.prompt(place) for problem in problems if problem.kind == kind]
            yield divided(kind, texts, generator)


def divided(
    kind: str, known: list[str], generator: random.Random, unseen: list[str] | None = None
) -> Pool:
    """A pool; an eighth of the prompts with known words is held out."""
    texts = list(dict.fromkeys(known))
    generator.shuffle(texts)
    new = list(unseen or ())
    generator.shuffle(new)
    num_held = max(1, len(texts) // 8)
    return Pool(kind, trained=texts[num_held:], combinations=texts[:num_held], unseen=new)


def fill(template: str, filling: dict[str, str]) -> str:
    """A template with its words; `a` becomes `an`, and a sentence is not ended twice."""
    text = ""
    for literal, slot, _, _ in string.Formatter().parse(template):
        text += literal
        if slot is None:
            continue
        value = filling[slot]
        if re.search(r"\b[Aa] $", text) and value[0] in "aeiou":
            text = text[:-1] + "n "
        text += value
    return text[0].upper() + text[1:]


def take(
    sources: list[tuple[str, list[str]]], number: int, taken: set[str], most: int | None = None
) -> Iterator[dict[str, Any]]:
    """Prompts from the sources in turn, so that none prevails; each once.

    Args:
        sources: kind and prompts of each template.
        number: prompts to take.
        taken: normal forms of prompts that are gone; new ones are added.
        most: prompts from one source.

    Raises:
        ValueError: there are fewer prompts.
    """
    rounds = itertools.zip_longest(*(texts[: most and 2 * most] for _, texts in sources))
    left = dict.fromkeys(range(len(sources)), most or number)
    for texts in rounds:
        for source, text in enumerate(texts):
            if text is None or not left[source] or normal(text) in taken:
                continue
            taken.add(normal(text))
            left[source] -= 1
            yield {"prompt": text, "kind": sources[source][0]}
            number -= 1
            if not number:
                return
    raise ValueError(f"{number} prompts are missing; the word lists are too short")


def make_questions(problems: list[sums.Problem]) -> list[dict[str, Any]]:
    """The questions that are graded."""
    lines = [
        {"prompt": fill(kind.phrases[0], {"": key}), "answer": answers, "kind": name}
        for name, kind in facts.KINDS.items()
        for key, answers in facts.parse(kind.asked).items()
    ]
    return lines + [{"prompt": p.prompt(0), "answer": p.answers, "kind": p.kind} for p in problems]


def normal(text: str) -> str:
    """A text without case, punctuation and repeated spaces; signs of arithmetic stay."""
    return " ".join(re.sub(r"[^\w\s+*/=-]", " ", text.casefold()).split())


def mentions(words: Iterator[str] | list[str]) -> re.Pattern[str]:
    """Finds any of the words, with or without their article."""
    bare = {re.sub(r"^(an?|the) ", "", word) for word in words}
    longest_first = sorted(bare, key=lambda word: (-len(word), word))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


def main() -> None:
    """Writes the three files, each when it is complete."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=folder, help="folder for the three files")
    parser.add_argument("--seed", type=int, default=0, help="of the choice; default: 0")
    args = parser.parse_args()
    require_at_least(0, "--seed", args.seed)  # random.Random takes -1 for 1
    made = make_prompts(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        with replacing(args.out / f"{name}.jsonl") as partial:
            lines = (json.dumps(line, ensure_ascii=False) for line in made[name])
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(", ".join(f"{len(made[name]):,} lines in {name}.jsonl" for name in FILES))


if __name__ == "__main__":
    run_script(main)
