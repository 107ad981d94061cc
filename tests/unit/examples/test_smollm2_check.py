"""check.py and measure.py as programs, on a tiny model."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from megatron_opdlm.convert.exporter import export
from tests import tiny
from tests.smollm2 import FOLDER, module

SIZES = {"num_hidden_layers": 2, "family": "llama"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """ROOT/run, marked as trained with blocks of 4, ROOT/export, and prompts."""
    made = tiny.tiny_model(tmp_path_factory.getbasetemp(), **SIZES)
    root = tmp_path_factory.mktemp("check")
    shutil.copytree(made.checkpoint, root / "run")
    described = next((root / "run").glob("iter_*/opdlm_model.json"))
    values = json.loads(described.read_text())
    described.write_text(json.dumps(values | {"block_size": 4, "prediction": "same_position"}))
    export(root / "run", root / "export", format="a2d", progress=False)
    shutil.copytree(made.hf, root / "hf")
    tiny.write_prompts(root / "prompts.jsonl")
    lines = [{"prompt": "a", "answer": ["b"], "kind": "k", "id": "1"}]
    (root / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def program(name, *arguments):
    """Status and errors of a script."""
    command = [sys.executable, FOLDER / name, *map(str, arguments)]
    environment = {"PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | environment
    )
    return done.returncode, done.stdout, done.stderr


def check(model, export, out):
    return program(
        "check.py", "--run", model / "run", "--export", export, "--prompts",
        model / "prompts.jsonl", "--out", out, "--max-new-tokens", 8, "--num-prompts", 3,
    )  # fmt: skip


def test_an_export_is_the_student_and_a_changed_one_is_not(model, tmp_path):
    status, said, error = check(model, model / "export", tmp_path / "check.json")
    assert status == 0, error
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["max_delta"] < 1e-3 < found["control"] and found["num_questions"] == 3
    assert found["num_equal"] == 3 and "3 of 3 greedy responses are the same" in said
    other = tmp_path / "other"
    shutil.copytree(model / "export", other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    status, _, error = check(model, other, tmp_path / "no.json")
    assert status == 2 and "logits of the export differ by" in error
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    ("export", "arguments", "words"),
    [
        ("nothing", (), "is no folder; give what `opdlm convert export"),
        ("hf", (), "has no AutoModelForMaskedLM of its own; give what"),
        ("export", ("--num-prompts", 0), "--num-prompts=0 must be at least 1"),
        ("export", ("--num-prompts", -1), "--num-prompts=-1 must be at least 1"),
        ("export", ("--max-new-tokens", 0), "--max-new-tokens=0 must be at least 1"),
        ("export", ("--prompts", "none"), "--prompts=none does not exist"),
        ("export", ("--out", "none/x.json"), "there is no folder none"),
        ("export", ("--out", ""), "--out='.' must be a file to write, not a folder"),
        ("export", ("--run", "nothing"), "nothing holds neither a Hugging Face"),
    ],
)
def test_a_wrong_argument_of_the_check_is_one_line(
    model, tmp_path, monkeypatch, export, arguments, words
):
    words_of = ["check.py", "--run", "r", "--export", model / export, "--prompts",
                model / "prompts.jsonl", "--out", tmp_path / "o.json", *arguments]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, words_of)))
    with pytest.raises(ValueError) as error:
        module("check").main()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_without_its_weights_is_one_line(model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model / "run", broken)
    for path in broken.glob("iter_*/*.distcp"):
        path.unlink()
    status, _, error = program(
        "measure.py", "--teacher", model / "run", "--student", broken, "--heldout",
        model / "prompts.jsonl", "--questions", model / "questions.jsonl", "--num-prompts", 2,
        "--out", tmp_path / "m.json",
    )  # fmt: skip
    last = error.splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and "distcp" in last, error
    assert "Traceback" not in error
