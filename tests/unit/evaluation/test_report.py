"""Tables, plots and the page of a report."""

import dataclasses
import json
import re

import pytest

from megatron_opdlm.diffusion.remasking import LowConfidenceDynamic, Sequential
from megatron_opdlm.evaluation.graders.grader import Grade
from megatron_opdlm.evaluation.graders.number import NUMBER
from megatron_opdlm.evaluation.html import render_page, script_json
from megatron_opdlm.evaluation.labels import labels
from megatron_opdlm.evaluation.plots import smooth
from megatron_opdlm.evaluation.report import SUMMARY_KEYS, ReportRow, write_report
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.table import HEADER, accuracy_text, result_rows
from megatron_opdlm.evaluation.task import Answer, Question, load_task
from megatron_opdlm.rollout.request import DecodingOptions

EVIL = "</script><img src=x onerror=alert(1)> & @DATA@ @TABLE@ \u2028"
EXAMPLE = {
    "setting": "static", "id": "1", "question": EVIL, "reference": "2", "response": EVIL,
    "correct": False, "ended": True, "num_tokens": 3, "block_size": 2, "passes": 4,
    "prompt_tail": [EVIL], "tokens": [EVIL, "b", "c"], "commit_steps": [0, 1, 0],
    "passes_at": [0, 2, 1],
}  # fmt: skip


def records():
    for step in range(1, 5):
        yield {"rollout_step": 0, "optimizer_step": step, "train/loss": 1.0 / step}
    yield {
        "rollout_step": 0, "optimizer_step": 4, "rollout/tokens_per_forward": 1.5,
        "train/kl_masked_0.5": 0.2, "train/kl_masked_1": 0.4,
    }  # fmt: skip
    yield {"rollout_step": 1, "optimizer_step": 4, "eval/accuracy_static": 0.5}


def summary():
    return dict.fromkeys(SUMMARY_KEYS, 1) | {"details": {"more": 1}}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records()))
    row = ReportRow(
        name="student <b>", accuracy=0.5, standard_error=0.1, tokens_per_forward=2.0,
        num_questions=4, seed=7,
    )  # fmt: skip
    write_report(
        folder / "out", title="T & <T>", summary=summary(), rows=[row], run_dir=folder,
        examples=[EXAMPLE],
    )  # fmt: skip
    return folder / "out"


def test_the_folder_holds_everything(report):
    assert {path.name for path in report.iterdir()} == {
        "summary.json", "table.md", "report.html", "loss.png", "accuracy.png",
        "tokens_per_forward.png", "kl_by_masked_fraction.png",
    }  # fmt: skip
    assert json.loads((report / "summary.json").read_text()) == summary()
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in report.glob("*.png"))
    assert (report / "table.md").read_text().splitlines() == [
        "|  | accuracy, % | tokens per forward | questions | seed |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| student \\<b> | 50.0 \u00b1 10.0 | 2.00 | 4 | 7 |",
    ]


def test_the_page_is_complete_in_itself(report):
    page = (report / "report.html").read_text()
    assert not re.search(r"https?://|<link|@import", page)
    assert page.count("data:image/png;base64,") == 4
    without_data = re.sub(r'id="data">.*?</script>', "", page, flags=re.DOTALL)
    assert not re.search("@[A-Z]+@", without_data)


def test_text_cannot_put_markup_into_the_page(report):
    page = (report / "report.html").read_text()
    assert "<img src=x" not in page
    assert "student <b>" not in page
    assert page.count("</script>") == 2
    assert "<h1>T &amp; &lt;T&gt;</h1>" in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert json.loads(data[1]) == [EXAMPLE]


def test_script_json_is_json_without_markup():
    text = script_json([EVIL])
    assert json.loads(text) == [EVIL]
    assert not set("<>&\u2028") & set(text)


def test_a_page_without_examples_has_no_player():
    page = render_page("t", ("a",), [("b",)], facts=[], plots=[], examples=[])
    assert 'id="play"' not in page


@pytest.mark.parametrize("change", [{"extra": 1}, {"seed": None}])
def test_summary_keys_are_fixed(tmp_path, change):
    wrong = {key: value for key, value in (summary() | change).items() if value is not None}
    with pytest.raises(ValueError, match="missing or unknown keys .*(extra|seed)"):
        write_report(tmp_path, title="t", summary=wrong, rows=[], run_dir=tmp_path, examples=[])


def test_smooth():
    assert smooth([4.0, 2.0, 0.0], 2) == [4.0, 3.0, 1.0]


def result(correct, seed=0, limit=64, thinking=False, **options):
    """A result with one answer per entry of `correct`, of 10 tokens each in 5 passes."""
    answers = [
        Answer(
            question=Question(
                id=str(i), messages=[], reference="1", where=f"q.jsonl:{i}", grader=NUMBER
            ),
            text="", grade=Grade(correct=bool(good)), num_tokens=10, num_passes=5, ended=bool(good),
        )
        for i, good in enumerate(correct)
    ]  # fmt: skip
    return EvalResult(
        task="t", grader="number", options=DecodingOptions(**options), response_limit=limit,
        enable_thinking=thinking, seed=seed, answers=answers, seconds=1.0,
    )  # fmt: skip


def test_figures_of_a_result():
    found = result([1, 0, 1, 1])
    assert (found.accuracy, found.tokens_per_forward, found.eos_rate) == (0.75, 2.0, 0.75)
    assert found.standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert found.correct_ids == ["0", "2", "3"]


def test_seeds_share_a_row():
    runs = [result([1, 1], seed=1, temperature=1.0), result([1, 0], seed=2, temperature=1.0)]
    (row,) = result_rows(runs)
    assert row == (
        "t", "static, T=1", "75.0 \u00b1 35.4 (std of seeds)", "2.00", "20", "10.0", "0.75", "2",
        "1, 2",
    )  # fmt: skip
    assert accuracy_text(runs[1:]) == "50.0 \u00b1 35.4"


DYNAMIC = {"rule": LowConfidenceDynamic()}


def test_plain_settings_have_short_labels():
    runs = [result([1]), result([1], **DYNAMIC), result([1], rule=Sequential())]
    runs.append(dataclasses.replace(runs[0], options=None, decoded_by="teacher"))
    assert labels(runs) == ["static", "dynamic(0.9)", "sequential", "teacher"]


@pytest.mark.parametrize(
    ("change", "first", "second"),
    [
        ({"temperature": 0.5}, "static, T=0", "static, T=0.5"),
        ({"temperature": 1.0, "top_p": 0.9}, "static, T=0, top-p 1", "static, T=1, top-p 0.9"),
        ({"temperature": 1.0, "top_k": 5}, "static, T=0, all tokens", "static, T=1, top-k 5"),
        ({"denoising_steps": 2}, "static, 4 steps", "static, 2 steps"),
        ({"block_size": 8, "denoising_steps": 8}, "static, block 4", "static, block 8"),
        ({"limit": 32}, "static, 64 tokens", "static, 32 tokens"),
        ({"thinking": True}, "static, no thinking", "static, thinking"),
        ({"rule": LowConfidenceDynamic(confidence_threshold=0.8)}, "static", "dynamic(0.8)"),
    ],
    ids=str,
)  # fmt: skip
def test_whatever_differs_between_two_arms_is_in_their_labels(change, first, second):
    arms = [result([1, 1]), result([1, 0], **change)]
    assert labels(arms) == [first, second]
    rows = result_rows(arms)
    assert [row[1] for row in rows] == [first, second]
    assert [row[2] for row in rows] == ["100.0 \u00b1 0.0", "50.0 \u00b1 35.4"]
    # control: without the change they are two runs of one setting
    assert len(result_rows([arms[0], result([1, 0], seed=1)])) == 1


def test_an_unusual_option_is_said_also_where_all_arms_have_it():
    both = {"temperature": 1.0, "top_p": 0.9, "denoising_steps": 2}
    assert labels([result([1], **both), result([1], **both, **DYNAMIC)]) == [
        f"{name}, 2 steps, T=1, top-p 0.9" for name in ("static", "dynamic(0.9)")
    ]


def test_arms_with_other_questions_do_not_share_a_row():
    rows = result_rows([result([1]), result([1, 0])])
    assert [row[HEADER.index("questions")] for row in rows] == ["1", "2"]


def test_the_figures_hold_every_option():
    """Two files of figures can be told apart."""
    record = result([1], limit=32, temperature=1.0, top_p=0.9).to_json()
    assert record["options"]["top_p"] == 0.9 and record["options"]["denoising_steps"] == 4
    assert (record["setting"], record["max_new_tokens"]) == ("static", 32)


@pytest.mark.parametrize(
    ("line", "count", "rule"),
    [
        ('{"prompt": "a", "id": "q"}', None, "q.jsonl:1: answer=null must be a number; write"),
        (
            '{"prompt": "a", "answer": "two"}',
            None,
            'q.jsonl:1: answer="two" must be a number',
        ),
        ('{"prompt": "a", "answer": 2}', 2, "--num-questions=2 must be between 1 and .* 1"),
    ],
)
def test_bad_questions_name_file_line_and_fix(tmp_path, line, count, rule):
    path = tmp_path / "q.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=rule):
        load_task("t", str(path), count)


def test_a_plot_that_could_not_be_written_stays_as_it_was(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    from megatron_opdlm.evaluation.plots import draw_plots

    (path,) = draw_plots(tmp_path, {"a.png": lambda axes: True})
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def fill_the_disk(self, target, **options):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fill_the_disk)
    with pytest.raises(OSError, match="make room, or choose another disk: .*a.png"):
        draw_plots(tmp_path, {"a.png": lambda axes: True})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
