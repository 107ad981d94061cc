"""examples/smollm2: the recipes, and the check of an export."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_opdlm.config.run import load_config
from megatron_opdlm.files.folder_lock import FolderLock
from tests.smollm2 import FOLDER, module
from tests.unit.examples.test_measures import record, values

ROOT = FOLDER.parents[1]
compare, budget, check = module("compare_recipes"), module("budget"), module("check")


def trials(tmp_path, **changes):
    teacher, prompts = tmp_path / "in" / "teacher", tmp_path / "in" / "prompts"
    if not teacher.exists():
        teacher.mkdir(parents=True)
        prompts.mkdir()
        (teacher / "config.json").write_text("{}")
        (teacher / "model.safetensors").write_text("a weight")
        for name in ("train", "heldout", "questions"):
            (prompts / f"{name}.jsonl").write_text('{"id": "a", "prompt": "b"}\n')
    values = {
        "prepared": tmp_path / "in", "out": tmp_path / "out", "recipes": None, "rollouts": 12,
        "questions": 160, "seed": 0, "jobs": 1,
    }  # fmt: skip
    return compare.make_trials(argparse.Namespace(**(values | changes)))


def test_every_recipe_is_a_configuration_of_its_own(tmp_path):
    every = trials(tmp_path)
    compare.require_different(every)
    base = load_config(compare.CONFIG, every[0].training_keys())
    assert every[0].name == "base" and base.train.train_rollouts == 12
    assert base.rollout.max_response_tokens.ramp_steps == 7 and base.train.save_interval == 0
    assert len({trial.folder for trial in every}) == len(every) > 15


def test_a_recipe_that_is_the_base_under_another_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "MACHINE", budget.GPU)
    monkeypatch.setattr(compare, "CONFIG", ROOT / budget.GPU.config)
    with pytest.raises(ValueError, match="--recipes=rows_16 has the values of .*smollm2_gpu.yaml"):
        compare.require_different(trials(tmp_path, recipes="base,rows_16"))
    compare.require_different(trials(tmp_path, recipes="base,rows_4,long_from_the_start"))


@pytest.mark.parametrize(
    ("recipes", "words"),
    [
        ("", "--recipes= must be one of base,"),
        ("base,", "--recipes= must be one of base,"),
        ("bas", "--recipes=bas must be one of base,"),
        ("cold,base,cold", "--recipes=cold is twice; give it once"),
    ],
)
def test_recipes_that_are_none_or_twice_are_refused(tmp_path, recipes, words):
    with pytest.raises(ValueError, match=words):
        trials(tmp_path, recipes=recipes)
    assert len(trials(tmp_path, recipes="cold,base")) == 2  # control


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A trial whose commands do nothing; its measurement is there."""
    monkeypatch.setattr(compare.Trial, "run", lambda self, *words: None)
    monkeypatch.setattr(compare, "teacher_digests", module("digests").folder_digests)
    (trial,) = trials(tmp_path, recipes="cold")
    trial.folder.mkdir(parents=True)
    config = load_config(compare.CONFIG, trial.training_keys())
    results = [record(name, right=4) for name in ("autoregressive", "static", "dynamic(0.9)")]
    found = values(500, results, kl=1.0) | {
        "seed": 0, "num_questions": 1, "block_size": 2, "prediction": config.rollout.prediction,
        "optimizer_steps": config.total_optimizer_steps,
    }  # fmt: skip
    trial = dataclasses.replace(trial, keys=(*trial.keys, "block_size=2", "denoising_steps=2"))
    (trial.folder / "measured.json").write_text(json.dumps(found))
    assert trial.result() == trial.result()
    assert trial.result()["recipe"] == "cold"
    return trial


def test_figures_of_other_settings_are_not_taken(kept):
    for change, words in (
        ({"rollouts": 30}, "rollouts=12, "), ({"questions": 328}, "questions=160, and now it is"),
        ({"keys": kept.keys[1:]}, "keys="),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"was begun with {words}"):
            dataclasses.replace(kept, **change).result()


def test_figures_of_another_configuration_are_not_taken(kept, tmp_path, monkeypatch):
    text = Path(compare.CONFIG).read_text().replace("lr: 3.0e-4", "lr: 2.0e-4")
    (tmp_path / "other.yaml").write_text(text)
    monkeypatch.setattr(compare, "CONFIG", tmp_path / "other.yaml")
    with pytest.raises(ValueError, match="begun with lr=0.0003, and now it is lr=0.0002; use the"):
        kept.result()


@pytest.mark.parametrize(
    "name", ["prompts/train.jsonl", "prompts/heldout.jsonl", "prompts/questions.jsonl",
             "teacher/config.json", "teacher/model.safetensors"],
)  # fmt: skip
def test_figures_of_other_prompts_or_another_teacher_are_not_taken(kept, name):
    path = kept.prepared / name
    before = path.read_text()
    path.write_text(before.replace("a", "c").replace("}", " }"))
    name = name.removesuffix(".jsonl")
    with pytest.raises(ValueError, match=rf"begun with {name}=.*\.\.\., and"):
        kept.result()
    path.write_text(before)
    assert kept.result()["recipe"] == "cold"  # control


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 1), ("num_questions", 2), ("block_size", 4), ("prediction", "same_position"),
     ("optimizer_steps", 47)],
)  # fmt: skip
def test_a_measurement_of_something_else_is_not_taken(kept, key, value):
    path = kept.folder / "measured.json"
    found = json.loads(path.read_text()) | {key: value}
    found.pop("states") if key == "block_size" else None
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"measured.json: {key}={value} must be .* measure again"):
        kept.result()


def test_a_table_without_a_question_that_the_teacher_gets_right():
    figures = {
        "recipe": "base", "response_tokens": 1234, "kl": 1.5, "nll_above_teacher": 0.5,
        "static": None, "dynamic": 50.0, "tokens_per_forward": 1.0, "minutes": 9.6,
    }  # fmt: skip
    assert compare.row(figures) == "| base | 1,234 | 1.50 | +0.50 | - | 50 | 1.00 | 10 |"


@pytest.fixture
def checked(tmp_path, tmp_path_factory, monkeypatch):
    """Runs check.py on made-up differences; the path of its file."""
    given = tmp_path_factory.mktemp("given")
    (given / "prompts").touch()
    (given / "config.json").write_text('{"auto_map": {"AutoModelForMaskedLM": "x.y"}}')
    monkeypatch.setattr(sys, "path", [str(FOLDER.parent / "quickstart"), *sys.path])
    from check_export import ExportCheck

    def run(delta, control):
        found = ExportCheck(max_delta=delta, control=control, num_equal=1, num_questions=1)
        fake = SimpleNamespace(check_export=lambda *arguments, **named: found)
        monkeypatch.setitem(sys.modules, "check_export", fake)
        monkeypatch.setattr(check, "BlockCausal", lambda folder: None)
        out = tmp_path / "check.json"
        words = ["check.py", "--run", str(given), "--export", str(given), "--out", str(out)]
        words += ["--prompts", str(given / "prompts")]
        monkeypatch.setattr(sys, "argv", words)
        check.main()
        return Path(out)

    monkeypatch.setattr(check.os, "environ", {})
    return run


@pytest.mark.parametrize("delta", [2e-3, float("nan"), float("inf")])
def test_an_export_that_differs_leaves_no_file(checked, tmp_path, delta):
    with pytest.raises(ValueError, match="logits of the export differ by"):
        checked(delta, 5.0)
    assert list(tmp_path.iterdir()) == []
    assert json.loads(checked(1e-5, 5.0).read_text())["max_delta"] == 1e-5  # control


def test_a_comparison_that_sees_nothing_is_no_check(checked, tmp_path):
    with pytest.raises(ValueError, match="cannot tell the masks apart"):
        checked(1e-5, 1e-5)
    assert list(tmp_path.iterdir()) == []


def test_two_comparisons_of_one_trial_at_once_are_refused(kept):
    lock = FolderLock(kept.folder, "--out")
    with pytest.raises(ValueError, match="is in use by another job"):
        kept.result()
    lock.close()
    assert kept.result()["recipe"] == "cold"  # control
