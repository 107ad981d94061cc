"""The same responses through lm-eval's own tasks and through our graders, on small files."""

import dataclasses
import json

import pytest

from megatron_opdlm.evaluation.graders import GRADERS
from tests.harness_tasks import needs_lm_eval_and_checkers, write_lines
from tools import compare_with_lm_eval

pytestmark = needs_lm_eval_and_checkers
GSM8K = [
    # answer, response
    ("14", "It is 14.\n#### 14"),
    ("14", "#### 14 apples, and not 15"),
    ("1400", "The answer is $1,400."),
    ("14", "The answer is 14.0."),
    ("14", "fifteen"),
]
IFEVAL = [
    # instructions and parameters, response
    ({"punctuation:no_comma": {}}, "The sea."),
    ({"punctuation:no_comma": {}, "startend:quotation": {}}, 'Sure:\n"The sea."'),
    ({"language:response_language": {"language": "fi"}}, "hello"),
    ({"length_constraints:number_sentences": {"num_sentences": 2, "relation": "at least"}}, ""),
    ({"keywords:letter_frequency": {"letter": "!", "let_frequency": 1,
                                    "let_relation": "at least"}}, "Oh no"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """A worker process would import lm-eval again."""
    in_place = dataclasses.replace(GRADERS["ifeval"], runs_in="place")
    monkeypatch.setitem(GRADERS, "ifeval", in_place)


def write_responses(folder, texts):
    lines = [{"id": n, "response": text} for n, text in enumerate(texts, 1)]
    return str(write_lines(folder / "responses.jsonl", lines))


@pytest.fixture
def gsm8k(tmp_path):
    entries = [
        {"question": f"{n}?", "answer": f"So it is.\n#### {answer}"}
        for n, (answer, _) in enumerate(GSM8K)
    ]
    file = write_lines(tmp_path / "test.jsonl", entries)
    responses = write_responses(tmp_path, [text for _, text in GSM8K])
    return ["--task", f"gsm8k={file}", "--responses", responses]


@pytest.fixture
def ifeval(tmp_path):
    entries = [
        {"key": n, "prompt": f"{n}?", "instruction_id_list": list(given),
         "kwargs": list(given.values())}
        for n, (given, _) in enumerate(IFEVAL, 1)
    ]  # fmt: skip
    file = write_lines(tmp_path / "input.jsonl", entries)
    responses = write_responses(tmp_path, [text for _, text in IFEVAL])
    return ["--task", f"ifeval={file}", "--responses", responses]


def run(argv, tmp_path):
    out = tmp_path / "report.json"
    status = compare_with_lm_eval.main([*argv, "--json", str(out)])
    report = json.loads(out.read_text())
    return status, {(each["ours"], each["lm_eval"]): each for each in report["comparisons"]}


def test_gsm8k_agrees_and_lists_where_our_own_verdict_differs(gsm8k, tmp_path, capsys):
    status, found = run(gsm8k, tmp_path)
    assert status == 0
    strict, flexible = "exact_match,strict-match", "exact_match,flexible-extract"
    for name, share in ((strict, 2 / 5), (flexible, 2 / 5)):
        assert found[name, name]["equal"] == 5
        assert found[name, name]["our_share"] == found[name, name]["their_share"] == share
    # by hand: strict 11000, flexible 10100, ours 11110
    listed = {name: [d["id"] for d in found["correct", name]["differences"]] for name in
              (strict, flexible)}  # fmt: skip
    assert listed == {strict: ["3", "4"], flexible: ["2", "4"]}
    printed = capsys.readouterr().out
    assert "5 of 5 equal (must agree)" in printed and "3 of 5 equal (differ by def" in printed
    assert "  2: ours [True] (14), lm-eval [False]" in printed


def test_ifeval_agrees_but_for_the_letter_that_lm_eval_draws(ifeval, tmp_path):
    status, found = run(ifeval, tmp_path)
    assert status == 0
    for comparison in found.values():
        assert comparison["responses"] == 5
        assert {each["id"] for each in comparison["differences"]} <= {"5"}
        assert comparison["at_random"] == ["5"]
    strict = found["inst_level_strict_acc,none", "inst_level_strict_acc,none"]
    assert strict["our_share"] == pytest.approx(3 / 6)
    loose = found["inst_level_loose_acc,none", "inst_level_loose_acc,none"]
    assert loose["our_share"] == pytest.approx(4 / 6)


def test_control_a_grader_that_errs_is_found(gsm8k, tmp_path, monkeypatch):
    right = GRADERS["gsm8k"]

    def wrong(response, answer):
        grade = right.grade(response, answer)
        strict = "exact_match,strict-match"
        turned = {strict: tuple(not each for each in grade.verdicts[strict])}
        return dataclasses.replace(grade, verdicts={**grade.verdicts, **turned})

    monkeypatch.setitem(GRADERS, "gsm8k", dataclasses.replace(right, grade=wrong))
    status, found = run(gsm8k, tmp_path)
    assert status == 1
    assert found["exact_match,strict-match", "exact_match,strict-match"]["equal"] == 0


def test_the_first_questions_can_be_compared_alone(gsm8k, tmp_path):
    status, found = run([*gsm8k, "--num-questions", "2"], tmp_path)
    assert status == 0
    assert {each["responses"] for each in found.values()} == {2}


def test_a_report_without_a_folder_is_refused_before_any_work(gsm8k, capsys, monkeypatch):
    monkeypatch.setattr(compare_with_lm_eval, "read", None)
    assert compare_with_lm_eval.main([*gsm8k, "--json", "missing/x.json"]) == 2
    assert "--json=missing/x.json: there is no folder missing" in capsys.readouterr().err


def test_another_task_is_refused(gsm8k, capsys):
    assert compare_with_lm_eval.main(["--task", "mmlu=x", *gsm8k[2:]]) == 2
    assert "--task=mmlu=x must be NAME=FILE, NAME one of gsm8k, ifeval" in capsys.readouterr().err
