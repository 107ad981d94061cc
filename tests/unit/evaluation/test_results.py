"""Loaded questions, examples and table rows against lists that are written out by hand."""

import json

import pytest
import torch

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.evaluation.examples import choose, example_record
from megatron_opdlm.evaluation.graders.grader import Grade
from megatron_opdlm.evaluation.graders.number import NUMBER
from megatron_opdlm.evaluation.report import ReportRow
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.table import HEADER, result_rows
from megatron_opdlm.evaluation.task import Answer, Question, load_task
from megatron_opdlm.rollout.request import DecodingOptions


def answer(name, correct, tokens=1, ended=True, trajectory=None, passes=1):
    question = Question(
        id=name,
        messages=[{"role": "user", "content": f"{name}?"}],
        reference=name,
        where="q.jsonl:1",
        grader=NUMBER,
    )
    return Answer(
        question=question, text=f"{name}!", grade=Grade(correct=correct), num_tokens=tokens,
        num_passes=passes, ended=ended, trajectory=trajectory,
    )  # fmt: skip


def result(answers, seed, seconds):
    return EvalResult(
        task="t", grader="number", options=DecodingOptions(temperature=1.0), response_limit=9,
        enable_thinking=False, seed=seed, answers=answers, seconds=seconds,
    )  # fmt: skip


def test_the_row_of_several_seeds_holds_their_means():
    """Every figure differs between the seeds."""
    first = result([answer("a", True, 6, passes=3), answer("b", True, 2)], 1, 2.0)
    other = result(
        [answer("a", False, 3, passes=2), answer("b", True, 3, ended=False, passes=4)], 2, 1.0
    )
    (row,) = result_rows([first, other])
    cells = dict(zip(HEADER, row, strict=True))
    assert cells["accuracy"] == "75.0 \u00b1 35.4 (std of seeds)"
    assert cells["tokens/forward"] == "1.50"  # 8 / 4 and 6 / 6
    assert cells["tokens/s"] == "5"  # 8 / 2 and 6 / 1
    assert cells["tokens"] == "3.5"  # 8 / 2 and 6 / 2
    assert cells["eos"] == "0.75"
    assert (cells["questions"], cells["seed"]) == ("2", "1, 2")


def test_figures_of_one_result():
    answers = [answer("a", True, 6, passes=4), answer("b", False, 2, ended=False)]
    found = result(answers, 1, 4.0).to_json()
    assert found["correct_ids"] == ["a"]
    assert (found["accuracy"], found["eos_rate"], found["num_questions"]) == (0.5, 0.5, 2)
    assert (found["tokens_per_forward"], found["tokens_per_second"]) == (1.6, 2.0)
    assert (found["response_tokens_mean"], found["seconds"], found["seed"]) == (4.0, 4.0, 1)
    assert found["standard_error"] == pytest.approx(0.125**0.5)
    assert (found["task"], found["grader"], found["enable_thinking"]) == ("t", "number", False)
    row = ReportRow.from_result("student", found, 7)
    assert row.cells() == ("student", "50.0 \u00b1 35.4", "1.60", "2", "7")


@pytest.mark.parametrize(
    ("verdicts", "count", "names"),
    [
        ("1110", 2, "ad"),
        ("11001", 2, "ac"),
        ("1011", 2, "ab"),
        ("1111", 2, "ab"),
        ("10", 0, ""),
        ("10", 5, "ab"),
    ],
)
def test_examples_show_a_wrong_response_where_there_is_one(verdicts, count, names):
    answers = [answer(name, v == "1") for name, v in zip("abcde", verdicts, strict=False)]
    assert "".join(a.question.id for a in choose(answers, count)) == names


class Letters:
    """A tokenizer of one letter per token."""

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def test_an_example_replays_its_decoding():
    """Blocks of 4: [p4 p5 r0 r1] in two steps, [r2 r3 r4 r5] in three; r4, r5 are no response."""
    trajectory = Trajectory(
        prompt_id="a", sample=0, prompt_ids=torch.arange(6), response_ids=torch.arange(10, 16),
        commit_step=torch.tensor([1, 0, 2, 0, 1, 0]), num_response_tokens=4, ended=False,
        block_size=4,
    )  # fmt: skip
    record = example_record(answer("a", False, 4, False, trajectory), Letters())
    assert record == {
        "id": "a", "question": "a?", "reference": "a", "response": "a!", "correct": False,
        "ended": False, "num_tokens": 4, "block_size": 4, "passes": 5, "prompt_tail": ["e", "f"],
        "tokens": list("klmnop"), "commit_steps": [1, 0, 2, 0, 1, 0],
        "passes_at": [1, 0, 4, 2, 3, 2],
    }  # fmt: skip


def test_the_first_questions_have_their_own_references(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [{"id": name, "prompt": name, "answer": n} for n, name in enumerate("abcd", 10)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = load_task("t", str(path), 3)
    found = [(q.id, q.messages[0]["content"], q.reference, q.where) for q in task.questions]
    places = [f"{path}:{line}" for line in (1, 2, 3)]
    assert found == list(zip("abc", "abc", ("10", "11", "12"), places, strict=True))


def test_questions_beyond_those_that_are_asked_need_no_reference(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": "two"}\n')
    assert len(load_task("t", str(path), 1).questions) == 1
    with pytest.raises(ValueError, match=':2: answer="two"'):
        load_task("t", str(path), 2)
