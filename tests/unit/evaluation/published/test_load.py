"""Tasks of benchmarks: their form, size and ids. Graders are real, of numbers."""

import json
import logging

import pytest

from megatron_opdlm.evaluation.benchmarks import BENCHMARKS
from megatron_opdlm.evaluation.benchmarks.benchmark import Asked, Benchmark, Form, LeftOut
from megatron_opdlm.evaluation.benchmarks.load import load_benchmark
from tests.unit.evaluation.published.make import Synthetic


def ask(entry):
    if entry.values["q"] == "no":
        return LeftOut("not asked")
    return Asked(text=entry.text("q"), answer={"answer": entry.values["a"]}, id=entry.label("id"))


TOY = Benchmark(
    name="toy",
    title="Toy",
    source="here.example",
    licence="none",
    split="test",
    size=4,
    other_splits={"train": 6},
    grader="number",
    forms=[
        Form(name="toy.jsonl", keys=("q", "a"), ask=ask, absent=("x",)),
        Form(name="whole.jsonl", keys=("q", "a", "x"), ask=ask, is_whole=True, size=2),
    ],
    response_limit=77,
    seeds=3,
)


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def entries(count, **more):
    return [{"q": f"q{n}", "a": n} | more for n in range(1, count + 1)]


def test_a_task_has_what_the_record_says(tmp_path, caplog):
    path = write(tmp_path / "t.jsonl", *entries(4))
    task = load_benchmark(TOY, path)
    assert (task.name, task.grader, task.path) == ("toy", "number", str(path))
    assert (task.response_limit, task.seeds) == (77, 3)
    assert [(q.id, q.reference, q.where) for q in task.questions] == [
        (str(n), str(n), f"{path}:{n}") for n in range(1, 5)
    ]
    assert caplog.records == []  # the size is that of the publication


def test_the_first_questions_are_taken(tmp_path, caplog):
    path = write(tmp_path / "t.jsonl", *entries(4))
    assert [q.id for q in load_benchmark(TOY, path, 3).questions] == ["1", "2", "3"]
    assert caplog.records == []  # the file is whole
    with pytest.raises(ValueError, match="--num-questions=5 must be between 1 and .* is 4; use 4"):
        load_benchmark(TOY, path, 5)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_another_number_of_questions_is_told(count, tmp_path, caplog):
    path = write(tmp_path / "t.jsonl", *entries(count))
    with caplog.at_level(logging.WARNING):
        assert len(load_benchmark(TOY, path).questions) == count
    assert [record.getMessage() for record in caplog.records] == [
        f"toy: {path} has {count} questions, and toy.jsonl has 4: this is another version or a "
        "part of it"
    ]


def test_the_size_of_a_form_is_its_own(tmp_path, caplog):
    load_benchmark(TOY, write(tmp_path / "t.jsonl", *entries(2, x=1)))
    assert caplog.records == []
    load_benchmark(TOY, write(tmp_path / "t.jsonl", *entries(4, x=1)))
    assert "whole.jsonl has 2" in caplog.text  # control


@pytest.mark.parametrize("asked", [None, 2])
def test_a_wrong_split_is_refused_by_its_size(asked, tmp_path):
    path = write(tmp_path / "t.jsonl", *entries(6))
    with pytest.raises(ValueError) as refused:
        load_benchmark(TOY, path, asked)
    assert str(refused.value) == (
        f"{path}: has 6 entries, which is the split train of toy; test is reported; give its file"
    )


def test_entries_that_are_left_out_are_counted(tmp_path, caplog):
    path = write(tmp_path / "t.jsonl", *entries(4), {"q": "no", "a": 1}, {"q": "no", "a": 1},
                 {"q": "no", "a": 1})  # fmt: skip
    assert len(load_benchmark(TOY, path).questions) == 4
    (record,) = caplog.records
    assert record.getMessage() == "toy: 3 of 7 entries are left out: not asked (3)"
    path = write(tmp_path / "t.jsonl", {"q": "no", "a": 1})
    with pytest.raises(ValueError, match=r"1 of 1 entries are left out: not asked \(1\); give the"):
        load_benchmark(TOY, path)


def test_an_id_that_is_there_twice_is_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", *entries(2), {"q": "c", "a": 1, "id": "2"})
    with pytest.raises(ValueError) as refused:
        load_benchmark(TOY, path)
    assert str(refused.value) == (
        f"{path}:3: id=2 must be unique and stands at {path}:2 too; get the file anew, or give one "
        "copy of it"
    )


def test_ids_of_several_files_have_their_names(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", *({"q": f"{name}{n}", "a": n} for n in range(2)))
    ids = [question.id for question in load_benchmark(TOY, tmp_path).questions]
    assert ids == ["a/1", "a/2", "b/1", "b/2"]


def test_a_set_that_a_folder_holds_twice_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", *entries(4))
    (tmp_path / "b.json").write_text(json.dumps(entries(4)))
    with pytest.raises(ValueError) as refused:
        load_benchmark(TOY, tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}/b.json: 4 of its 4 questions stand in {tmp_path}/a.jsonl too, and would count "
        "twice; give one of the files, or a folder without the other"
    )
    assert len(load_benchmark(TOY, tmp_path / "a.jsonl").questions) == 4


def test_a_few_questions_may_stand_in_two_files(tmp_path):
    """As in MMLU, whose subjects share some."""
    write(tmp_path / "a.jsonl", *entries(4))
    others = [{"q": f"p{n}", "a": n} for n in range(2)]
    write(tmp_path / "b.jsonl", *entries(2), *others)
    assert len(load_benchmark(TOY, tmp_path).questions) == 8
    write(tmp_path / "b.jsonl", *entries(3), *others)
    with pytest.raises(ValueError, match="3 of its 5 questions stand in"):  # control
        load_benchmark(TOY, tmp_path)


def test_a_field_that_is_missing_later_is_named(tmp_path):
    path = write(tmp_path / "t.jsonl", *entries(2), {"q": "c"}, *entries(1))
    with pytest.raises(ValueError) as refused:
        load_benchmark(TOY, path)
    assert str(refused.value) == (
        f"{path}:3: has no a, which every entry of toy.jsonl has; get the file anew"
    )


@pytest.mark.parametrize("entry", [{"q": "a"}, {"q": "a", "a": 1, "x": 1, "y": 1}, {}], ids=str)
def test_another_schema_is_refused_with_the_known_ones(entry, tmp_path):
    path = write(tmp_path / "t.jsonl", entry)
    with pytest.raises(ValueError) as refused:
        load_benchmark(TOY, path)
    assert str(refused.value) == (
        f"{path}:1: the file has another schema than toy: its keys are "
        f"{', '.join(entry) or 'none'}; known forms and their keys: toy.jsonl (q, a); whole.jsonl "
        "(q, a, x)"
    )


def test_a_schema_of_many_keys_is_told_in_part(tmp_path):
    path = write(tmp_path / "t.jsonl", {f"k{n}" + "x" * (50 * (n == 2)): n for n in range(999)})
    with pytest.raises(ValueError) as refused:
        load_benchmark(TOY, path)
    keys = f"its keys are k0, k1, k2{'x' * 35}..., k3, k4, k5, k6, k7, k8, k9, k10, k11, ...; known"
    assert keys in str(refused.value)


def test_a_schema_of_another_benchmark_is_recognised(tmp_path):
    entry = {"key": 1, "prompt": "p", "instruction_id_list": ["a"], "kwargs": [{}]}
    path = write(tmp_path / "t.jsonl", entry)
    with pytest.raises(ValueError, match="kwargs; it fits ifeval; known forms"):
        load_benchmark(TOY, path)


def test_an_answer_that_the_grader_cannot_read_is_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", *entries(1), {"q": "b", "a": "two"})
    with pytest.raises(ValueError, match=':2: answer="two" must be a number'):
        load_benchmark(TOY, path)


def test_a_file_that_is_missing_is_said_to_be_published(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        load_benchmark(BENCHMARKS["gpqa_diamond"], tmp_path / "none.csv")
    assert str(missing.value) == (
        f"file of gpqa_diamond {tmp_path}/none.csv does not exist; it is published by Rein et al. "
        "2023, github.com/idavidrein/gpqa as: idavidrein/gpqa, gpqa_diamond.csv; "
        "divelab/opdlm_eval_data, GPQA_Diamond_shuffled.json"
    )


def test_a_released_file_needs_its_name(tmp_path):
    """The files have the same keys, so their name alone says which benchmark they hold."""
    entry = {"question": "a", "ground_truth_answer": "7"}
    good = Synthetic("gsm8k", {"GSM8K.json": [entry]}, 1).write(tmp_path)
    assert load_benchmark(BENCHMARKS["gsm8k"], good).questions[0].reference == "7"
    with pytest.raises(ValueError, match=r"GSM8K.json must be called AIME2024.json, because"):
        load_benchmark(BENCHMARKS["aime_24"], good)


def test_an_unknown_grader_of_a_record_is_named(tmp_path):
    import dataclasses

    path = write(tmp_path / "t.jsonl", *entries(1))
    with pytest.raises(ValueError, match="grader=numbre of benchmark toy must be one of"):
        load_benchmark(dataclasses.replace(TOY, grader="numbre"), path)
