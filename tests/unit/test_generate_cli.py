"""`opdlm generate` and `opdlm eval`, up to where the model is loaded."""

import argparse
import json
import subprocess
import sys

import pytest
import torch

from megatron_opdlm.data import Prompt
from megatron_opdlm.denoise import REMASKING as RULES
from megatron_opdlm.evaluation.cli import add_eval_parser
from megatron_opdlm.generate import REMASKING, add_generate_parser, write_responses
from megatron_opdlm.trajectory import Trajectory


def parse(*argv):
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    add_generate_parser(subparsers)
    add_eval_parser(subparsers)
    return parser.parse_args(argv)


def run(*argv):
    args = parse(*argv)
    return args.run(args)


def test_the_parsers_import_nothing_heavy():
    program = (
        "import sys, megatron_opdlm.generate, megatron_opdlm.evaluation.cli;"
        "print([m for m in ('torch', 'numpy', 'rich', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_parser_knows_the_unmasking_rules():
    assert REMASKING == RULES


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--model", "m"],
        ["generate", "--prompt", "p"],
        ["generate", "--model", "m", "--prompt", "p", "--prompts", "f"],
        ["generate", "--model", "m", "--prompt", "p", "--remasking", "other"],
        ["eval", "--model", "m"],
    ],
)
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "rule"),
    [
        (["generate", "--prompt", " "], "--prompt is empty"),
        (["generate", "--prompt", "p", "--out", "no/such/x.jsonl"], "--out=.*no folder no/such"),
        (["generate", "--prompt", "p", "--max-new-tokens", "0"], "max_new_tokens=0 must be"),
        (["eval", "--task", "name"], "--task name must be NAME=FILE"),
        (["eval", "--task", "=f"], "--task =f must be NAME=FILE"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_looked_at(argv, rule):
    with pytest.raises(ValueError, match=rule):
        run(*argv, "--model", "nowhere")


@pytest.mark.parametrize("argv", [["generate", "--prompts", "f"], ["eval", "--task", "t=f"]])
def test_missing_files(argv):
    with pytest.raises(FileNotFoundError, match="prompt file f does not exist"):
        run(*argv, "--model", "nowhere")


def trajectory():
    return Trajectory(
        prompt_id="a",
        sample=0,
        prompt_ids=torch.tensor([5, 6, 7]),
        response_ids=torch.tensor([1, 2, 3, 4, 5]),
        commit_step=torch.tensor([0, 1, 0, 0, 1]),
        num_response_tokens=4,
        ended=True,
        block_size=4,
    )


def test_responses_are_written_whole(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("before")
    question = Prompt(id="a", messages=[{"role": "user", "content": "q\u20ac"}], line=1)
    write_responses(str(path), [question], [trajectory()], ["r"])
    assert json.loads(path.read_text()) == {
        "prompt_id": "a", "prompt": "q\u20ac", "response": "r", "tokens": 4, "passes": 3,
        "ended": True, "block_size": 4, "num_prompt_tokens": 3,
        "response_ids": [1, 2, 3, 4, 5], "commit_step": [0, 1, 0, 0, 1],
    }  # fmt: skip
    with pytest.raises(ValueError):  # the second response is missing: the old file stays
        write_responses(str(path), [question] * 2, [trajectory()], ["r"])
    assert json.loads(path.read_text())["response"] == "r"
