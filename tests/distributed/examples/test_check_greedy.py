"""examples/smollm2/check_greedy.py with a Llama that has the heads of SmolLM2: 9 and 3."""

import subprocess
import sys

import pytest

from tests.smollm2 import FOLDER
from tests.tiny import tiny_model, write_prompts

SHAPE = {
    "family": "llama", "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36,
    "intermediate_size": 48, "num_hidden_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    return [tiny_model(folder, **SHAPE, seed=seed) for seed in (1, 2)]


def check(model, hf, prompts, *options):
    command = [sys.executable, FOLDER / "check_greedy.py", "--model", model, "--hf", hf]
    command += ["--prompts", prompts, "--num-prompts", "4", "--max-new-tokens", "6", *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


def test_one_and_three_processes_and_another_model(models, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    one, other = models
    same = check(one.checkpoint, one.hf, prompts, "--tensor-parallel", "1,3")
    assert same.returncode == 0, same.stderr
    for size in (1, 3):
        assert f"tensor parallel {size}: 4 of 4 responses" in same.stdout
    control = check(other.checkpoint, one.hf, prompts)
    assert control.returncode == 1 and "tensor parallel 1: 0 of 4 responses" in control.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tensor-parallel", "0"], "error: tensor_parallel=0 must be at least 1"),
        (["--tensor-parallel", "a"], "invalid numbers value: 'a'"),
        (["--tensor-parallel", "2"], "must divide"),
    ],
)
def test_mistakes_are_one_line(models, tmp_path, options, words):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    done = check(models[0].checkpoint, models[0].hf, prompts, *options)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]
