"""examples/smollm2: a step counts as done only for the settings with which it was done."""

import json
import shutil

import pytest

from tests.smollm2 import module

KEPT = ("lr=2e-4", "--rollouts", 8)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def refused(smollm2, capsys, *arguments):
    """The one line with which a command is refused before it begins."""
    capsys.readouterr()
    assert smollm2(*arguments) == (2, []), arguments
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_settings_that_are_gone_do_not_free_the_steps(smollm2, out, capsys):
    assert smollm2(*KEPT)[0] == 0
    (out / "settings.json").unlink()
    for other, words in (
        (("lr=3e-4", "--rollouts", 8), "'train to 2' was done with lr=2e-4, and now it is lr=3e-4"),
        (("--rollouts", 8), "'train to 2' was done with lr=2e-4, and now it is left out"),
        (("lr=2e-4", "--rollouts", 12), "holds the step 'train to 2', which a run with these"),
        ((*KEPT, "--seed", 5), "'before' was done with --seed 0, and now it is --seed 5"),
        ((*KEPT, "block_size=2", "denoising_steps=2"),
         "'before' was done with --block-size 4, and now it is --block-size 2"),
    ):  # fmt: skip
        assert words in refused(smollm2, capsys, *other)
    assert smollm2(*KEPT) == (0, [])  # control


@pytest.mark.parametrize("name", ["train", "heldout", "questions"])
def test_prompts_of_another_content_are_refused(smollm2, out, capsys, name):
    assert smollm2(*KEPT, fail=9)[0] == 1
    path = out / "prompts" / f"{name}.jsonl"
    path.write_text("others")
    error = refused(smollm2, capsys, *KEPT)
    assert f"another content of OUT/prompts/{name}.jsonl than it has now" in error
    path.write_text(name)
    assert smollm2(*KEPT)[0] == 0  # control


def test_another_content_of_the_configuration_is_refused(smollm2, out, capsys, monkeypatch):
    assert smollm2(*KEPT)[0] == 0
    steps, run = module("steps"), module("run")
    monkeypatch.setattr(run, "file_digest", lambda path: "0" * 64)
    assert "was begun with config_sha256=" in refused(smollm2, capsys, *KEPT)
    monkeypatch.setattr(run, "file_digest", module("digests").file_digest)
    digest = module("digests").file_digest
    monkeypatch.setattr(
        steps, "file_digest", lambda path: "1" * 64 if path.suffix == ".yaml" else digest(path)
    )
    assert "content of ./examples/configs/smollm2.yaml" in refused(smollm2, capsys, *KEPT)


def test_an_output_that_is_gone_is_made_again_only_if_nothing_was_made_of_it(smollm2, out, capsys):
    _, whole = smollm2(*KEPT)
    for gone, used in (
        ("run/checkpoints", "at_0002"), ("at_0002.json", "train to 4"), ("before.json", "train to"),
        ("student", "verify"), ("prompts/train.jsonl", "import"), ("check.json", "report"),
    ):  # fmt: skip
        (out / gone).rename(out / "away")
        error = refused(smollm2, capsys, *KEPT)
        assert f"{out / gone} is gone, and the step '{used}" in error
        (out / "away").rename(out / gone)
    shutil.rmtree(out / "report")
    assert smollm2(*KEPT) == (0, whole[-1:])  # the last step: nothing was made of it


def test_what_was_there_before_its_step_is_not_taken_for_its_output(smollm2, out, capsys):
    assert smollm2(*KEPT, fail=6)[0] == 1
    (out / "at_0002.json").write_text("{}")
    error = refused(smollm2, capsys, *KEPT)
    assert f"{out / 'at_0002.json'} is there and no step of --out {out} made it" in error


def test_a_step_that_was_killed_after_its_output_has_ended_under_its_own_key(smollm2, out, capsys):
    status, begun = smollm2(*KEPT, fail=7, status=-9, leaves=True)  # at_0002
    assert status == 1 and "at_0002" in begun[-1]
    (out / "settings.json").unlink()
    error = refused(smollm2, capsys, *KEPT, "--seed", 3)
    assert "--seed 0, and now it is --seed 3" in error
    record = json.loads((out / "steps.json").read_text())
    at = record["steps"]["at_0002"]
    at["words"] = [word.replace("static", "dynamic") for word in at["words"]]
    (out / "steps.json").write_text(json.dumps(record))
    assert "--which dynamic, and now it is --which static" in refused(smollm2, capsys, *KEPT)
    at["words"] = [word.replace("dynamic", "static") for word in at["words"]]
    (out / "steps.json").write_text(json.dumps(record))
    _, rest = smollm2(*KEPT)
    assert "train_rollouts=4" in rest[0]  # control: at_0002 counts


def test_a_training_that_was_killed_goes_on_and_is_not_taken_for_complete(smollm2, out):
    status, begun = smollm2(*KEPT, fail=6, status=-9, leaves=True)
    assert status == 1 and "opdlm train" in begun[-1]
    _, rest = smollm2(*KEPT)
    assert rest[0] == begun[-1]


def test_another_place_of_the_same_file_makes_no_difference(smollm2, out, tmp_path):
    (tmp_path / "a.gguf").touch()
    assert smollm2(*KEPT, "--gguf", tmp_path / "a.gguf", fail=5)[0] == 1
    assert len(smollm2(*KEPT)[1]) == 10


def test_a_folder_may_be_moved(smollm2, out, tmp_path):
    assert smollm2(*KEPT, fail=9)[0] == 1
    out.rename(tmp_path / "moved")
    status, rest = smollm2(*KEPT, out=tmp_path / "moved")
    assert status == 0 and len(rest) == 6


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"ended": [], "seconds": {}, "peak_memory_gb": 0}, "steps is missing"),
        ({"steps": {}, "seconds": [], "peak_memory_gb": 0}, "seconds=[] must be an object"),
        ({"steps": {}, "seconds": {"a": "1"}, "peak_memory_gb": 0}, 'a="1" must be a finite'),
        ({"steps": {"a": {"words": [1]}}, "seconds": {}, "peak_memory_gb": 0}, "words[0]=1 must"),
        ({"steps": {}, "seconds": {}, "peak_memory_gb": float("nan")}, "peak_memory_gb=NaN must"),
    ],
)
def test_a_record_of_another_version_or_edited_is_one_line(smollm2, out, capsys, record, words):
    out.mkdir()
    (out / "steps.json").write_text(json.dumps(record))
    error = refused(smollm2, capsys)
    assert words in error and "is of an earlier version or was edited" in error
    assert [path.name for path in out.iterdir()] == ["steps.json"]


@pytest.mark.parametrize("text", ['{"minutes": 60, "rollouts": "9"}', '{"minutes": 60}', "[]"])
def test_edited_settings_are_one_line(smollm2, out, capsys, text):
    assert smollm2(fail=5)[0] == 1
    (out / "settings.json").write_text(text)
    assert "settings.json" in refused(smollm2, capsys)


def test_more_keys_than_before_are_named(smollm2, out, capsys):
    assert smollm2(*KEPT)[0] == 0
    path = out / "settings.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"added": 1}))
    assert "was begun with added=1, and now it is added=null" in refused(smollm2, capsys, *KEPT)


def test_commands_that_differ_in_their_order_alone_differ():
    difference = module("steps").difference
    assert difference(["x", "--a", "1", "b=1"], ["x", "--a", "2", "b=1"]) == ("--a 1", "--a 2")
    assert difference(["lr=1", "lr=2"], ["lr=2", "lr=1"]) == ("lr=1 lr=2", "lr=2 lr=1")
    assert difference(["--flag", "--a", "1"], ["--a", "1"]) == ("--flag", "")


@pytest.mark.parametrize("text", ["{}", '{"max_delta": "0", "control": 1.0}', "[]"])
def test_an_edited_check_is_one_line(smollm2, out, capsys, text):
    assert smollm2(*KEPT)[0] == 0
    (out / "check.json").write_text(text)
    assert "check.json: " in refused(smollm2, capsys, *KEPT)
