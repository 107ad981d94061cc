"""examples/smollm2/check_greedy.py with a Llama that has the heads of SmolLM2: 9 and 3."""

import sys

import pytest

from megatron_opdlm.responses.prompts import load_prompts
from tests.smollm2 import module
from tests.tiny import tiny_model, write_prompts

SHAPE = {
    "family": "llama", "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36,
    "intermediate_size": 48, "num_hidden_layers": 2,
}  # fmt: skip
check_greedy = module("check_greedy")


def test_three_processes_and_another_model(tmp_path, tmp_path_factory, monkeypatch, capsys):
    """Three processes give what transformers gives, and another model does not."""
    folder = tmp_path_factory.getbasetemp()
    one, other = (tiny_model(folder, **SHAPE, seed=seed) for seed in (1, 2))
    file = str(write_prompts(tmp_path / "prompts.jsonl", count=4))
    words = ["check_greedy.py", "--model", str(one.checkpoint), "--hf", str(one.hf)]
    words += ["--prompts", file, "--max-new-tokens", "6", "--tensor-parallel", "3"]
    monkeypatch.setattr(sys, "argv", words)
    assert check_greedy.main() == 0
    assert "tensor parallel 3: 4 of 4 responses" in capsys.readouterr().out
    wrong, _ = check_greedy.transformers_answers(other.hf, load_prompts(file), 6)
    monkeypatch.setattr(check_greedy, "our_answers", lambda *unused: wrong)
    assert check_greedy.main() == 1
    assert "tensor parallel 3: 0 of 4 responses" in capsys.readouterr().out


def test_mistakes_are_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"num_key_value_heads": 3}')
    file = str(write_prompts(tmp_path / "prompts.jsonl", count=1))
    words = ["check_greedy.py", "--model", "m", "--hf", str(tmp_path), "--prompts", file]
    for option, value, message in (
        ("--tensor-parallel", "1,0", "--tensor-parallel=0 must be at least 1"),
        ("--tensor-parallel", "1,2", "=2 must divide the 3 key/value heads of .*use some of 1, 3"),
        ("--num-prompts", "0", "--num-prompts=0 must be at least 1"),
        ("--prompts", "none.jsonl", "--prompts=none.jsonl does not exist; check the path"),
    ):
        monkeypatch.setattr(sys, "argv", [*words, option, value])
        with pytest.raises(ValueError, match=message):
            check_greedy.main()


def test_a_command_that_fails_says_why(tmp_path):
    prompts = load_prompts(str(write_prompts(tmp_path / "prompts.jsonl", count=1)))
    with pytest.raises(ValueError, match=r"1 processes ended with: .*error: .*no-such-model"):
        check_greedy.our_answers(str(tmp_path / "no-such-model"), prompts, 4, 1)
