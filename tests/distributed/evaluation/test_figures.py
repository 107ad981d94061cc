"""Figures of an evaluation against responses that are decoded one by one, and sums by hand.

The oracle tokenises a question, asks the engine for this one response, and knows nothing of tasks:
not what is dropped, not in which order, nor how figures are taken from trajectories.
"""

import json
import math

import pytest

from megatron_opdlm.diffusion.remasking import LowConfidenceDynamic
from tests.helpers import run_ranks
from tests.responses import by_hand, open_student
from tests.tiny import CHAT_TEMPLATE, tiny_model

LIMIT = 12
LONG = ("long", "also long")
"""Questions that leave no room for a response in the 256 positions of the model."""
IDS = ["a", "long", "b", "c", "also long", "d", "e", "f"]
WRONG = ("b", "f")
"""Questions whose reference is not what the student answers."""
SETTINGS = {
    "static": {},
    "dynamic": {"rule": LowConfidenceDynamic(confidence_threshold=0.03)},
    "two steps": {"denoising_steps": 2},
    "sampled": {"temperature": 1.0},
    "another seed": {"temperature": 1.0},
}
SEEDS = dict.fromkeys(SETTINGS, 0) | {"another seed": 5}

THINKING_TEMPLATE = CHAT_TEMPLATE + "{% if enable_thinking %}think{% endif %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


def text_of(name):
    return "x" * 300 if name in LONG else f"{name}{name}?"


def write_task(path, references):
    lines = [{"id": n, "prompt": text_of(n), "answer": references[n]} for n in IDS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def graded(rank, model, folder):
    """By setting: the result as JSON, its answers, and what the oracle says of every question."""
    from megatron_opdlm.evaluation.graders.exact import EXACT
    from megatron_opdlm.evaluation.runner import evaluate
    from megatron_opdlm.evaluation.task import load_task
    from megatron_opdlm.rollout.request import DecodingOptions

    decoder, found = open_student(model), {}
    for setting, changes in SETTINGS.items():
        options, seed = DecodingOptions(**changes), SEEDS[setting]
        oracle = {
            name: by_hand(decoder, name, text_of(name), options, seed=seed, limit=LIMIT)
            for name in IDS
            if name not in LONG
        }
        references = {name: row["text"] for name, row in oracle.items()}
        references |= {name: f"not {references[name]}" for name in WRONG}
        references |= dict.fromkeys(LONG, "anything")
        path = write_task(folder / f"{setting}.jsonl", references)
        task = load_task("t", str(path), grader=EXACT)
        result = evaluate(decoder, task, options, response_limit=LIMIT, seed=seed)
        answers = [
            {"id": a.question.id, "text": a.text, "tokens": a.num_tokens, "ended": a.ended,
             "correct": a.correct, "decoded": a.trajectory is not None}
            for a in result.answers
        ]  # fmt: skip
        found[setting] = (result.to_json(), answers, oracle)
    return found


@pytest.fixture(scope="module")
def settings(model, tmp_path_factory):
    return run_ranks(graded, 1, model, tmp_path_factory.mktemp("tasks"))[0]


by_setting = pytest.mark.parametrize("setting", SETTINGS)


@by_setting
def test_every_question_has_the_answer_that_it_has_alone(settings, setting):
    _, answers, oracle = settings[setting]
    assert [answer["id"] for answer in answers] == IDS
    for answer in answers:
        name = answer["id"]
        if name in LONG:
            nothing = {"text": "", "tokens": 0, "ended": False, "correct": False, "decoded": False}
            assert answer == {"id": name} | nothing
        else:
            row = {key: oracle[name][key] for key in ("text", "tokens", "ended")}
            assert answer == {"id": name, "correct": name not in WRONG, "decoded": True} | row


@by_setting
def test_figures_are_sums_over_all_questions(settings, setting):
    """Of 8 questions: two are too long, two are answered wrongly."""
    figures, _, oracle = settings[setting]
    rows = list(oracle.values())
    tokens, passes = (sum(row[key] for row in rows) for key in ("tokens", "passes"))
    assert figures["correct_ids"] == ["a", "c", "d", "e"]
    assert (figures["num_questions"], figures["accuracy"]) == (8, 0.5)
    assert figures["standard_error"] == pytest.approx(math.sqrt(0.5 * 0.5 / 8))
    assert figures["eos_rate"] == sum(row["ended"] for row in rows) / 8
    assert figures["tokens_per_forward"] == pytest.approx(tokens / passes)
    assert figures["response_tokens_mean"] == tokens / 8
    assert figures["tokens_per_second"] == pytest.approx(tokens / figures["seconds"])
    assert (figures["seed"], figures["max_new_tokens"]) == (SEEDS[setting], LIMIT)


def test_control_the_oracle_tells_questions_settings_and_seeds_apart(settings):
    texts = {
        setting: [row["text"] for row in settings[setting][2].values()] for setting in SETTINGS
    }
    assert all(len(set(found)) == len(found) for found in texts.values())
    assert texts["sampled"] != texts["another seed"] != texts["static"]
    passes = {s: sum(row["passes"] for row in settings[s][2].values()) for s in SETTINGS}
    assert passes["two steps"] < passes["static"] > passes["dynamic"]
    assert any(row["ended"] for s in SETTINGS for row in settings[s][2].values())
    assert not all(row["ended"] for s in SETTINGS for row in settings[s][2].values())


def thinking(rank, model, folder):
    """Texts of an evaluation with thoughts, and by hand with and without them."""
    from megatron_opdlm.evaluation.runner import evaluate
    from megatron_opdlm.evaluation.task import load_task
    from megatron_opdlm.rollout.request import DecodingOptions

    decoder, options = open_student(model), DecodingOptions()
    decoder.student.tokenizer.chat_template = THINKING_TEMPLATE
    path = write_task(folder / "thinking.jsonl", dict.fromkeys(IDS, "7"))
    task = load_task("t", str(path))
    result = evaluate(decoder, task, options, response_limit=LIMIT, enable_thinking=True)
    hands = [
        [
            by_hand(decoder, name, text_of(name), options, limit=LIMIT, suffix=suffix)["text"]
            for name in IDS
            if name not in LONG
        ]
        for suffix in ("think", "")
    ]
    texts = [answer.text for answer in result.answers if answer.trajectory is not None]
    return texts, *hands, result.to_json()["enable_thinking"]


def test_the_template_is_told_to_ask_for_thoughts(model, tmp_path):
    texts, with_thoughts, without, said = run_ranks(thinking, 1, model, tmp_path)[0]
    assert texts == with_thoughts != without
    assert said is True
