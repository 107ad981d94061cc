"""Figures, agreement and report of examples/smollm2, by brute force and by hand."""

import json
import math
import re
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm import cli
from megatron_opdlm.diffusion.trajectory import Trajectory
from tests import smollm2

figures, agreement = smollm2.module("figures"), smollm2.module("agreement")
report, table, curves = (smollm2.module(name) for name in ("report", "table", "curves"))
samples, measurement = smollm2.module("samples"), smollm2.module("measurement")


def random_responses(seed, count=20):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [torch.randint(0, 4, (n,), generator=generator).tolist() for n in lengths]


# --- figures ---


def distinct_by_loops(responses):
    """Share of bigrams that no earlier bigram equals."""
    seen, total = [], 0
    for response in responses:
        for place in range(len(response) - 1):
            total += 1
            if not any(a == response[place] and b == response[place + 1] for a, b in seen):
                seen.append((response[place], response[place + 1]))
    return len(seen) / total


@pytest.mark.parametrize("seed", range(3))
def test_distinct_2_by_brute_force(seed):
    responses = random_responses(seed)
    assert figures.distinct_bigrams(responses) == distinct_by_loops(responses)
    several = [r for r in responses if len(r) > 1]
    by_hand = [distinct_by_loops([r]) for r in several]
    assert figures.mean_distinct_bigrams(responses) == pytest.approx(statistics.mean(by_hand))
    joined = [sum(responses, [])]  # control: no bigram reaches from one response to the next
    assert figures.distinct_bigrams(responses) != distinct_by_loops(joined)


def test_distinct_2_of_a_run_of_commas_is_low():
    assert figures.distinct_bigrams([[7] * 11]) == 0.1
    assert figures.distinct_bigrams([[1, 2], [3, 4]]) == 1.0
    assert figures.distinct_bigrams([[1], [2]]) is None is figures.mean_distinct_bigrams([[1]])


def test_starts_that_are_the_references():
    references = [[1, 2, 3, 4, 5], [1, 2, 9], [6], [1, 2, 3, 4]]
    responses = [[1, 2, 3, 4, 7], [1, 2, 9], [6, 2, 3, 4], [1, 2, 3]]
    assert figures.equal_starts(responses, references, 1) == 1.0
    # The first two: the third goes on where the reference ends, the fourth ends before it.
    assert figures.equal_starts(responses, references, 4) == 0.5
    assert figures.equal_starts([[5], [6]], [[5], [7]], 1) == 0.5  # control


def test_the_error_of_equal_lengths_is_that_of_a_mean():
    totals, length = [3.0, 5.0, 4.5, 9.0], 5
    mean, error = figures.ratio(totals, [length] * 4)
    means = [total / length for total in totals]
    assert mean == pytest.approx(statistics.mean(means))
    assert error == pytest.approx(statistics.stdev(means) / math.sqrt(4))


def test_the_error_of_other_lengths_is_that_of_a_jackknife():
    """A long response weighs more: the mean of the responses' means is something else."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 40, (200,), generator=generator).tolist()
    totals = [c * (1 + torch.rand(1, generator=generator).item() + 0.02 * c) for c in counts]
    mean, error = figures.ratio(totals, counts)
    others = [(sum(totals) - t) / (sum(counts) - c) for t, c in zip(totals, counts, strict=True)]
    jackknife = math.sqrt(199 / 200 * sum((o - statistics.mean(others)) ** 2 for o in others))
    assert mean == sum(totals) / sum(counts)
    assert error == pytest.approx(jackknife, rel=0.02)
    means = [t / c for t, c in zip(totals, counts, strict=True)]
    assert abs(error / (statistics.stdev(means) / math.sqrt(200)) - 1) > 0.05  # control
    assert figures.ratio([2.0], [4]) == (0.5, None)


def trajectory(response, *, ended, after=()):
    ids = torch.tensor([*response, *after])
    return Trajectory(
        prompt_id="p", sample=0, prompt_ids=torch.tensor([1, 1]), response_ids=ids,
        commit_step=torch.arange(len(ids)) % 2, num_response_tokens=len(response), ended=ended,
        block_size=2,
    )  # fmt: skip


def test_figures_of_a_decoding_by_hand():
    """Tokens after the end are in no figure, but their passes were run."""
    trajectories = [
        trajectory([3, 4, 5], ended=True, after=[9]), trajectory([3, 3, 3, 3], ended=False)
    ]  # fmt: skip
    decoding = SimpleNamespace(
        setting=SimpleNamespace(
            writer="student", name="static", options=SimpleNamespace(temperature=0.0)
        ),
        trajectories=trajectories,
        responses=[t.text_ids.tolist() for t in trajectories],
        seconds=2.0,
        cpu_seconds=4.0,
    )
    found = figures.figures(decoding, [6.0, 1.0], [[3, 4, 5], [4, 3, 3, 3]])
    assert found["nll"] == 1.0 and found["num_tokens"] == 7 and found["mean_tokens"] == 3.5
    assert (found["eos_rate"], found["first_token"], found["first_four"]) == (0.5, 0.5, 0.5)
    assert found["distinct_2"] == 3 / 5 and found["distinct_2_per_response"] == (1 + 1 / 3) / 2
    assert found["tokens_per_forward"] == 7 / 8
    assert (found["tokens_per_second"], found["tokens_per_cpu_second"]) == (3.5, 1.75)


# --- agreement ---


def question(number, kind, *answers):
    prompt = SimpleNamespace(id=str(number))
    return agreement.AskedQuestion(prompt=prompt, answers=list(answers), kind=kind)


def says(response, answers):
    return response in answers


def test_agreement_by_hand():
    questions = [
        question(0, "capital", "Paris"), question(1, "sum", "4", "four"),
        question(2, "sum", "5"), question(3, "capital", "Rome"),
    ]  # fmt: skip
    asked = agreement.right_questions(questions, ["Paris", "four", "6", "Rome"], says)
    assert [q.prompt.id for q in asked] == ["0", "1", "3"]
    found = agreement.agreement(asked, ["Paris", "4", "Oslo"], says)
    assert (found["asked"], found["right"], found["share"]) == (3, 2, 2 / 3)
    assert found["standard_error"] == pytest.approx(math.sqrt(2 / 9 / 3))
    assert found["by_kind"] == {"capital": [1, 2], "sum": [1, 1]}
    assert found["right_ids"] == ["0", "1"]
    turned = agreement.agreement(asked, ["Oslo", "4", "Paris"], says)  # control: others' answers
    assert turned["right"] == 1
    assert agreement.agreement([], [], says)["share"] is None


@pytest.mark.parametrize("answer", ['"Paris"', "[]", "[1]", '[" "]', "null"])
def test_answers_that_are_no_list_of_texts(tmp_path, answer):
    path = tmp_path / "q.jsonl"
    good = '{"prompt": "a", "answer": ["b"], "kind": "k", "id": "x"}\n'
    path.write_text(good + f'{{"prompt": "a", "kind": "k", "answer": {answer}}}\n')
    with pytest.raises(ValueError, match=r"q.jsonl:2: answer=.* must be a list of texts; write"):
        agreement.read_questions(path)
    (read,) = agreement.read_questions(path, 1)
    assert (read.answers, read.kind, read.prompt.id) == (["b"], "k", "x")


# --- report ---


def record(setting, temperature=0.0, *, nll=1.0, right=None, speed=1.0, responses=("x", "y")):
    found = {
        "writer": "teacher" if setting == "autoregressive" else "student", "setting": setting,
        "temperature": temperature, "nll": nll, "nll_error": 0.05, "num_tokens": 10,
        "mean_tokens": 5.0, "eos_rate": 0.5, "distinct_2": 0.75, "distinct_2_per_response": 0.9,
        "first_token": 0.25, "first_four": 0.125, "tokens_per_forward": speed, "seconds": 1.0,
        "cpu_seconds": 2.0, "tokens_per_second": 10.0, "tokens_per_cpu_second": 5.0,
        "responses": list(responses), "page": [],
    }  # fmt: skip
    if right is not None:
        share, error = right / 8, math.sqrt(right / 8 * (1 - right / 8) / 8)
        found["agreement"] = {
            "asked": 8, "right": right, "share": share, "standard_error": error
        }  # fmt: skip
    return found


EVIL = "a|b <i>\n**c** [d](e)"


def states_of(kl):
    entries = [{"kl": kl * (1 + i), "num_positions": 5} for i in range(2)]
    return {"kl": kl, "num_positions": 10, "by_position": entries, "by_masked": entries}


def values(tokens, results, kl=None):
    found = {
        "teacher": "t", "student": "s", "teacher_weights": "ab", "parameters": 1000,
        "response_tokens": tokens,
        "optimizer_steps": tokens // 10, "block_size": 2,
        "prediction": "same_position", "max_new_tokens": 48, "seed": 3,
        "device": "CPU", "threads": 2, "dtype": "float32", "prompts": ["first?", EVIL],
        "num_questions": 20, "teacher_right": 8, "seconds": {}, "results": results,
    }  # fmt: skip
    return found if kl is None else found | {"states": states_of(kl)}


PAGE_RECORD = {
    "id": "1", "question": EVIL, "reference": "", "response": EVIL, "correct": None,
    "ended": True, "num_tokens": 3, "block_size": 2, "passes": 4, "prompt_tail": [EVIL],
    "tokens": [EVIL, "b", "c"], "commit_steps": [0, 1, 0], "passes_at": [0, 2, 1],
    "setting": "static",
}  # fmt: skip


@pytest.fixture
def out(tmp_path):
    """A run folder with two measurements and metrics."""
    teacher = [record("autoregressive", right=8), record("autoregressive", 1.0, nll=1.5)]
    static = record("static", nll=1.5, right=6)
    after = [
        *teacher, static | {"page": [PAGE_RECORD]}, record("static", 1.0, nll=2.5),
        record("dynamic(0.7)", right=4, speed=2.0),
        record("dynamic(0.9)", right=5, speed=1.5, responses=("z", EVIL)),
    ]  # fmt: skip
    before = [record("static", nll=6.0, right=0)]
    (tmp_path / "before.json").write_text(json.dumps(values(0, before, kl=4.0)))
    (tmp_path / "after.json").write_text(json.dumps(values(500, after, kl=1.0)))
    (tmp_path / "run").mkdir()
    lines = [
        {"rollout_step": 0, "optimizer_step": 1, "train/kl": 4.0},
        {"rollout_step": 0, "optimizer_step": 2, "train/kl": 2.0},
        {"rollout_step": 0, "optimizer_step": 2, "perf/tokens_paper": 100,
         "rollout/tokens_per_forward": 0.9},
        {"rollout_step": 1, "optimizer_step": 3, "train/kl": 1.0},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    return tmp_path


def test_the_report_has_everything(out):
    folder = report.write_report(out)
    assert {path.name for path in folder.iterdir()} == {
        "report.md", "summary.json", "report.html", "kl_over_training.png",
        "nll_over_training.png", "agreement_over_training.png", "tokens_per_forward.png",
        "threshold.png", "kl_by_position.png", "kl_by_masked.png",
    }  # fmt: skip
    text = (folder / "report.md").read_text()
    assert (
        "| student after, dynamic(0.9) | 1.00 \u00b1 0.05 | - | 62 \u00b1 17 (5 of 8) "
        "| 50 | 0.75 | 5.0 | 25 | 12 | 1.50 | 10.0 | 5.0 |"
    ) in text
    assert text.count("| teacher, autoregressive |") == 1
    assert "| student before, static | 6.00 \u00b1 0.05 | - | 0 \u00b1 0 (0 of 8) |" in text
    after = (
        "| student after, static | 1.50 \u00b1 0.05 | 2.50 \u00b1 0.05 | 75 \u00b1 15 (6 of 8) |"
    )
    assert after in text
    assert "| position 1 of the block | 8.00 | 2.00 |" in text
    assert all(f"({path.name})" in text for path in folder.glob("*.png"))
    assert "NaN" not in (folder / "summary.json").read_text()


def test_the_figures_that_a_run_is_judged_by(out):
    found = report.summary(measurement.read_measured(out))
    judged = {key: value for key, value in found.items() if key != "measurements"}
    assert judged == {
        "response_tokens": 500, "teacher_nll": 1.0, "student_nll": 1.5, "nll_above_teacher": 0.5,
        "questions": 20, "teacher_right": 8, "agreement_static": 75.0,
        "dynamic_setting": "dynamic(0.9)", "agreement_dynamic": 62.5,
        "tokens_per_forward_static": 1.0, "tokens_per_forward_dynamic": 1.5,
    }  # fmt: skip
    assert list(found["measurements"]) == ["before", "after"]
    assert "responses" not in json.dumps(found["measurements"])


def test_measurements_between_are_points_of_the_curves(out):
    between = values(200, [record("static", nll=3.0, right=2)], kl=2.0)
    (out / "at_0000010.json").write_text(json.dumps(between))
    measured = measurement.read_measured(out)
    points = curves.measured_points(measured, lambda m: curves.share(m.find("static")))
    assert points == [(0, 0.0), (200, 25.0), (500, 75.0)]
    assert curves.logged(measured.metrics, "train/kl") == [(100, 3.0)]  # rollout 1 has not ended
    assert "at 200" in report.summary(measured)["measurements"]


def test_samples_stand_side_by_side_and_cannot_add_markup(out):
    text = samples.samples(measurement.read_measured(out))
    first, second = text.split("\n\n**")
    assert first.splitlines() == [
        "**first?**", "", "- teacher: x", "- student before, static: x",
        "- student after, static: x", "- student after, dynamic(0.9): z",
    ]  # fmt: skip
    assert r"dynamic(0.9): a\|b \<i\> " + "\u23ce " + r"\*\*c\*\* \[d\]\(e\)" in second
    assert "<i>" not in text
    assert samples.plain("x" * 500) == "x" * 400 + " ..."


def test_the_page_replays_open_prompts_without_a_verdict(out):
    page = (report.write_report(out) / "report.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert json.loads(data[1]) == [PAGE_RECORD | {"setting": "after, static"}]
    assert "item.correct === null" in page and "<i>" not in page


def status_of(main):
    with pytest.raises(SystemExit) as ended:
        cli.run_script(main)
    return ended.value.code


def test_a_missing_measurement_is_one_line(out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "--out", str(out)])
    (out / "before.json").unlink()
    assert status_of(report.main) == 2
    said = capsys.readouterr().err
    assert said == f"error: {out / 'before.json'}: file not found\n"
    assert not (out / "report").exists()
    only = json.loads((out / "after.json").read_text())
    (out / "before.json").write_text(json.dumps(only | {"response_tokens": 0}))
    assert status_of(report.main) == 0  # control
    only["results"] = [r for r in only["results"] if r["writer"] == "student"]
    for name, tokens in (("before", 0), ("after", 500)):
        (out / f"{name}.json").write_text(json.dumps(only | {"response_tokens": tokens}))
    assert status_of(report.main) == 2 and "the teacher was not measured" in capsys.readouterr().err
