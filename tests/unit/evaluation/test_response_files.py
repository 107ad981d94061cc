"""`opdlm eval` without a model: responses of any engine, and of an earlier evaluation."""

import json

import pytest

from megatron_opdlm import cli
from megatron_opdlm.evaluation import records
from megatron_opdlm.evaluation.graders.grader import Grade
from megatron_opdlm.evaluation.graders.number import NUMBER
from megatron_opdlm.evaluation.labels import TEACHER
from megatron_opdlm.evaluation.records import EvaluationFolder, require_new
from megatron_opdlm.evaluation.response_file import read_responses
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.task import Answer, load_task
from megatron_opdlm.rollout.request import DecodingOptions

QUESTIONS = [
    {"id": "a", "prompt": "1 + 1?", "answer": "2"},
    {"id": "b", "prompt": "1 + 2?", "answer": "3"},
    {"id": 7, "prompt": "3 + 4?", "answer": "7"},
]
RESPONSES = [
    {"id": 7, "response": "The answer is 7."},
    {"id": "a", "response": "It is 3."},
    {"id": "b", "response": "3"},
]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Questions, responses, and a working directory."""
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "q.jsonl", QUESTIONS), write(tmp_path / "r.jsonl", RESPONSES)


def command(*argv):
    return cli.main(["eval", *map(str, argv)])


def test_responses_of_another_engine_are_graded(files, tmp_path, capsys):
    questions, responses = files
    out, folder = tmp_path / "o.json", tmp_path / "out"
    argv = ["--task", f"t={questions}", "--grader", "number", "--responses", responses]
    assert command(*argv, "--json", out, "--out", folder) == 0
    found = json.loads(out.read_text())
    assert found["correct_ids"] == found["results"][0]["correct_ids"] == ["b", "7"]
    (result,) = found["results"]
    assert (result["accuracy"], result["setting"], result["num_questions"]) == (2 / 3, "r.jsonl", 3)
    unknown = ("tokens_per_forward", "tokens_per_second", "eos_rate", "seconds", "options")
    assert [result[key] for key in unknown] == [None] * 5
    printed = capsys.readouterr().out
    assert "66.7" in printed and str(folder) in printed
    lines = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert [(line["id"], line["correct"], line["extracted"]) for line in lines] == [
        ("a", False, "3"), ("b", True, "3"), ("7", True, "7"),
    ]  # fmt: skip


def test_a_run_is_named_by_date_unless_it_has_a_name(files, tmp_path):
    questions, responses = files
    assert command("--task", f"t={questions}", "--responses", responses) == 0
    (folder,) = (tmp_path / "runs" / "eval").iterdir()
    assert {file.name for file in folder.iterdir()} == {
        "results.json", "responses.jsonl", "table.md",
    }  # fmt: skip


def test_seeds_and_tasks_are_told_apart(files, tmp_path):
    questions, _ = files
    tasks = [load_task("one", str(questions)), load_task("two", str(questions), grader=NUMBER)]
    lines = [
        line | {"task": task, "seed": seed, "num_tokens": 3, "ended": True, "num_passes": 2}
        for task in ("one", "two") for seed in (0, 5) for line in RESPONSES
    ]  # fmt: skip
    found = read_responses(str(write(tmp_path / "m.jsonl", lines)), tasks)
    assert list(found) == [("one", 0), ("one", 5), ("two", 0), ("two", 5)]
    for responses in found.values():
        assert [response.question.id for response in responses] == ["a", "b", "7"]
        assert {(r.num_tokens, r.num_passes, r.ended) for r in responses} == {(3, 2, True)}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            RESPONSES[:2],
            "has no response to 1 of 3 questions of task t, the first of which is id=b",
        ),
        ([*RESPONSES, RESPONSES[0]], ":4: id=7 has a response above; give each"),
        ([{"id": "c", "response": ""}], ':1: id="c" must be the id of one of 3 questions'),
        ([{"response": "1"}], ":1: id=null must be the id of one of 3 questions"),
        ([{"id": "a"}], ":1: response=null must be text"),
        ([{"id": "a", "response": 2}], ":1: response=2 must be text"),
        ([{"id": "a", "response": "", "seed": -1}], ":1: seed=-1 must be a whole number"),
        ([{"id": "a", "response": "", "seed": True}], ":1: seed=true must be a whole number"),
        ([{"id": "a", "response": "", "task": "u"}], ':1: task="u" must be one of t'),
        ([{"id": "a", "response": "", "task": ["t"]}], ':1: task=["t"] must be one of t'),
        ([{"id": "a", "response": "\ud800"}], ":1: response holds half of a surrogate pair"),
        ([{"id": "a", "response": "", "num_tokens": -1}], ":1: num_tokens=-1 must be a whole"),
        ([{"id": "a", "response": "", "ended": 1}], ":1: ended=1 must be true or false"),
        ([{"id": "a", "response": "", "prompt_digest": "0"}], "the question was another one"),
    ],
)
def test_malformed_responses_are_refused(files, tmp_path, capsys, lines, said):
    questions, _ = files
    responses = write(tmp_path / "bad.jsonl", lines)
    assert command("--task", f"t={questions}", "--responses", responses) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {responses}") and error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "runs").exists()


def test_the_first_questions_need_the_first_responses_only(files, tmp_path):
    questions, responses = files
    out = tmp_path / "o.json"
    argv = ["--task", f"t={questions}", "--responses", responses, "--json", out]
    assert command(*argv, "--num-questions", 2) == 0
    assert json.loads(out.read_text())["correct_ids"] == ["b"]


def decoded(task, texts, options, seed):
    """A result as the decoding of a student leaves it."""
    answers = [
        Answer(
            question=question, text=text, grade=Grade(correct=False), num_tokens=4, num_passes=2,
            ended=True, prompt_fits=text != "",
        )
        for question, text in zip(task.questions, texts, strict=True)
    ]  # fmt: skip
    return EvalResult(
        task=task.name, grader=task.grader, options=options, response_limit=16,
        decoded_by=TEACHER if options is None else "student", enable_thinking=True, seed=seed,
        answers=answers, seconds=2.0,
    )  # fmt: skip


def test_regrading_changes_grades_and_nothing_else(files, tmp_path):
    questions, _ = files
    task = load_task("t", str(questions))
    about = {"model": "m", "tasks": [f"t={questions}"], "grader": None, "num_questions": None}
    folder = EvaluationFolder(tmp_path / "before", about=about)
    options = DecodingOptions(temperature=0.5, top_k=3)
    results = [decoded(task, ["2", "4", ""], options, 3), decoded(task, ["2", "3", "7"], None, 0)]
    for result in results:
        folder.add(result)
    out = tmp_path / "after"
    assert command("--regrade", folder.folder, "--out", out) == 0
    before = json.loads((folder.folder / "results.json").read_text())["results"]
    after = json.loads((out / "results.json").read_text())["results"]
    assert [result["correct_ids"] for result in before] == [[], []]
    assert [result["correct_ids"] for result in after] == [["a"], ["a", "b", "7"]]
    same = set(after[0]) - {"correct_ids", "accuracy", "standard_error"}
    for old, new in zip(before, after, strict=True):
        assert {key: old[key] for key in same} == {key: new[key] for key in same}
    assert after[0]["too_long_ids"] == ["7"]


def test_a_setting_that_was_stopped_is_not_regraded(files, tmp_path):
    """Its responses may lie in the file already; results.json does not have it yet."""
    questions, _ = files
    task = load_task("t", str(questions))
    about = {"model": "m", "tasks": [f"t={questions}"], "grader": None, "num_questions": None}
    folder = EvaluationFolder(tmp_path / "before", about=about)
    folder.add(decoded(task, ["2", "3", "7"], None, 0))
    lines = (folder.folder / "responses.jsonl").read_text().splitlines(keepends=True)
    half = "".join(lines[:2]).replace('"result": 0', '"result": 1')
    with (folder.folder / "responses.jsonl").open("a") as file:
        file.write(half)
    assert command("--regrade", folder.folder, "--out", tmp_path / "after") == 0
    (after,) = json.loads((tmp_path / "after" / "results.json").read_text())["results"]
    assert after["accuracy"] == 1


def test_questions_that_changed_are_refused(files, tmp_path, capsys):
    questions, _ = files
    task = load_task("t", str(questions))
    about = {"model": "m", "tasks": [f"t={questions}"], "grader": None, "num_questions": None}
    folder = EvaluationFolder(tmp_path / "before", about=about)
    folder.add(decoded(task, ["2", "3", "7"], None, 0))
    write(questions, [QUESTIONS[0] | {"prompt": "2 + 2?"}, *QUESTIONS[1:]])
    assert command("--regrade", folder.folder, "--out", tmp_path / "after") == 2
    assert "the question was another one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about: about.pop("tasks"), "has no tasks, which opdlm eval writes"),
        (lambda about: about["results"][0].pop("seed"), "has no seed, which opdlm eval writes"),
        (lambda about: about["results"].append(3), "has no task, which opdlm eval writes"),
    ],
)
def test_a_folder_of_another_program_is_refused(files, tmp_path, capsys, change, said):
    questions, _ = files
    task = load_task("t", str(questions))
    about = {"model": "m", "tasks": [f"t={questions}"], "grader": None, "num_questions": None}
    folder = EvaluationFolder(tmp_path / "before", about=about)
    folder.add(decoded(task, ["2", "3", "7"], None, 0))
    path = folder.folder / "results.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    assert command("--regrade", folder.folder, "--out", tmp_path / "after") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {said}") and error.count("\n") == 1


def test_tasks_that_were_not_evaluated_are_not_regraded(files, tmp_path, capsys):
    questions, _ = files
    task = load_task("t", str(questions))
    about = {"model": "m", "tasks": [f"t={questions}"], "grader": None, "num_questions": None}
    folder = EvaluationFolder(tmp_path / "before", about=about)
    folder.add(decoded(task, ["2", "3", "7"], None, 0))
    argv = ["--regrade", folder.folder, "--out", tmp_path / "after"]
    assert command(*argv, "--task", f"u={questions}") == 2
    said = "--task=u must name one of the tasks that were evaluated, t; leave it out"
    assert said in capsys.readouterr().err and not (tmp_path / "after").exists()
    assert command(*argv, "--task", f"t={questions}") == 0  # control


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--task", "t=f"], "--model=null must be given; name a run folder"),
        (["--model", "m"], "--task=null must be given"),
        (["--responses", "f", "--regrade", "d", "--task", "t=f"], "excludes --responses"),
        (["--responses", "f", "--task", "t=f", "--model", "m"], "has no effect with --responses"),
        (["--responses", "f"], "--task=null must be given"),
        (
            ["--responses", "f", "--task", "t=f", "--temperature", "1"],
            "--temperature=1.0 has no effect with --responses; leave it out",
        ),
        (
            ["--responses", "f", "--task", "t=f", "--static", "--entropy-bounded"],
            "--static --entropy-bounded=true has no effect with --responses",
        ),
        (
            ["--regrade", "d", "--grader", "math"],
            "--grader=math has no effect with --regrade, which asks the same questions again, "
            "unless --task is given",
        ),
        (["--regrade", "d", "--num-questions", "2"], "--num-questions=2 has no effect with"),
        (["--responses", "f", "--task", "t=f", "--seeds", "1"], "has no effect with --responses"),
        (["--regrade", "nowhere"], "nowhere has no results.json"),
        (["--responses", "f", "--task", "t=f", "--grader", "numbr"], "did you mean number?"),
        (["--model", "m", "--task", "t"], "must name a file, unless it is a benchmark"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(argv, said, capsys):
    assert command(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_of_two_evaluations_one_has_the_folder(tmp_path, monkeypatch):
    """The second one found the folder empty, before the first one wrote."""
    EvaluationFolder(tmp_path / "out", about={})
    checks = [lambda folder: None, require_new]
    monkeypatch.setattr(records, "require_new", lambda folder: checks.pop(0)(folder))
    with pytest.raises(ValueError, match="must not exist, or be an empty folder"):
        EvaluationFolder(tmp_path / "out", about={})


def test_finished_work_is_not_overwritten(files, tmp_path, capsys):
    questions, responses = files
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    argv = ["--task", f"t={questions}", "--responses", responses]
    assert command(*argv, "--out", tmp_path / "full") == 2
    assert "must not exist, or be an empty folder" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["x"]
