"""`opdlm generate` and `opdlm eval`, up to where the model is loaded."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm.config.schema import field_docs
from megatron_opdlm.config.sections import RolloutConfig
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.diffusion.remasking import RULES, make_rule
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.evaluation.cli import add_eval_parser
from megatron_opdlm.evaluation.labels import setting_name
from megatron_opdlm.evaluation.settings import chosen_rules
from megatron_opdlm.generate.arguments import decoding_options
from megatron_opdlm.generate.cli import _generate as generate
from megatron_opdlm.generate.cli import add_generate_parser, write_responses
from megatron_opdlm.generate.decoder import Decoder
from megatron_opdlm.responses.prompts import Prompt, PromptTokens, TokenizedPrompts
from megatron_opdlm.rollout.request import DecodingOptions
from tests.tiny import tiny_model
from tests.training import tiny_config


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
        "import sys, megatron_opdlm.generate.cli, megatron_opdlm.evaluation.cli;"
        "print([m for m in ('torch', 'numpy', 'rich', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_parser_knows_the_remasking_rules(capsys):
    """Every rule and parameter of the table, with what it does and its default."""
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            parse(command, "--help")
        text = " ".join(capsys.readouterr().out.split())
        for rule in RULES.values():
            assert rule.summary in text
            for field in dataclasses.fields(rule):
                assert f"--{field.name.replace('_', '-')} X" in text
                assert f"default: {field.default}" in text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ["static", "dynamic(0.9)"]),
        (["--dynamic"], ["dynamic(0.9)"]),
        (["--sequential", "--static"], ["static", "sequential"]),
        (["--confidence-threshold", "0.5", "0.7"], ["static", "dynamic(0.5)", "dynamic(0.7)"]),
        (["--entropy-bounded", "--entropy-bound", "2", "1"], ["entropy(2)", "entropy(1)"]),
    ],
)
def test_flags_of_eval_name_settings(argv, expected):
    rules = chosen_rules(parse("eval", "--task", "t=f", "--model", "m", *argv))
    assert [setting_name(DecodingOptions(rule=rule)) for rule in rules] == expected


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--model", "m"],
        ["generate", "--prompt", "p"],
        ["generate", "--model", "m", "--prompt", "p", "--prompts", "f"],
        ["generate", "--model", "m", "--prompt", "p", "--remasking", "other"],
        ["eval", "--model"],
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
        (["eval", "--task", "name"], "--task=name must name a file"),
        (["eval", "--task", "=f"], "--task =f must be NAME=FILE"),
        (["eval", "--task", "t=f", "--examples", "-1"], "examples=-1 must be at least 0; use 0"),
        (["eval", "--task", "t=f", "--task", "t=g"], "task=t is given twice; give it once"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_looked_at(argv, rule):
    with pytest.raises(ValueError, match=rule):
        run(*argv, "--model", "nowhere")


COMMANDS = {"generate": ["generate", "--prompt", "p"], "eval": ["eval", "--task", "t=f"]}


def refusal(command, *options):
    """The line that refuses options, before anything is read."""
    with pytest.raises(ValueError) as refused:
        run(*COMMANDS[command], *options, "--model", "nowhere")
    return str(refused.value)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("--max-new-tokens", "0", 1),
        ("--max-rows", "0", 1),
        ("--block-size", "0", 1),
        ("--denoising-steps", "-2", 1),
        ("--tensor-model-parallel-size", "0", 1),
        ("--pipeline-model-parallel-size", "-1", 1),
    ],
)
def test_numbers_out_of_range(command, option, value, least):
    name = option.removeprefix("--").replace("-", "_")
    line = f"{name}={value} must be at least {least}; use {least} or more"
    assert refusal(command, option, value) == line


def test_a_seed_below_zero_is_refused_as_in_training():
    for command, name in ("generate", "seed"), ("eval", "seeds"):
        line = refusal(command, f"--{name}", "-1", "--temperature", "1")
        assert line == f"{name}=-1 must be at least 0; use 0 or more"
    with pytest.raises(ValueError) as trained:
        tiny_config(Path("s"), Path("d"), Path("r"), seed=-1)
    assert str(trained.value) == "seed=-1 must be at least 0; use 0 or more"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_memory_must_be_a_number_above_zero(command, value):
    line = refusal(command, "--kv-cache-gb", value)
    assert line.startswith(f"kv_cache_gb={float(value)} must be positive and finite")


def test_memory_in_gb_says_which_gb(capsys):
    """The key-value cache is printed and planned in GB of 10^9 bytes and in GiB."""
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            parse(command, "--help")
        assert "in GB of 10^9 bytes" in " ".join(capsys.readouterr().out.split())
    assert "in GB of 10^9 bytes" in field_docs(RolloutConfig)["kv_cache_gb"]


UNUSED = [
    ("generate", ["--confidence-threshold", "0.9"], ["--remasking", "low_confidence_dynamic"]),
    ("generate", ["--entropy-bound", "0.2"], ["--remasking", "entropy_bounded"]),
    ("generate", ["--top-k", "0"], ["--temperature", "1"]),
    ("generate", ["--top-p", "1.0"], ["--temperature", "0.5"]),
    ("generate", ["--seed", "0"], ["--temperature", "1"]),
    ("eval", ["--confidence-threshold", "0.5", "0.7"], ["--dynamic"]),
    ("eval", ["--entropy-bound", "0.2"], ["--entropy-bounded"]),
    ("eval", ["--top-k", "5"], ["--temperature", "1"]),
    ("eval", ["--seeds", "1", "2"], ["--temperature", "1"]),
]


@pytest.mark.parametrize(("command", "option", "use"), UNUSED, ids=str)
def test_an_option_without_effect_is_refused_also_with_its_default(command, option, use):
    static = ["--static"] if command == "eval" else []
    name = option[0].removeprefix("--").replace("-", "_")
    line = refusal(command, *option, *static)
    assert line.startswith(f"{name}={' '.join(option[1:])} applies only to ")
    assert line.endswith("; leave it out") and "\n" not in line
    # control: where it has one, the model is asked for
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere|prompt file f does not"):
        run(*COMMANDS[command], *option, *static, *use, "--model", "nowhere")


def test_one_response_at_a_time_leaves_no_choice_of_rows():
    assert refusal("generate", "--max-rows", "4", "--show-steps") == (
        "max_rows=4 applies only to decoding many responses at once, not to one after the other "
        "(--show-steps); leave it out"
    )


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--seeds", "1", "2", "1", "--temperature", "1"], "seeds=1 is given twice; give it once"),
        (["--confidence-threshold", "0.9", "0.9"], "confidence_threshold=0.9 is given twice; "),
    ],
)
def test_a_setting_is_decoded_once(options, rule):
    assert refusal("eval", *options).startswith(rule)


@pytest.mark.parametrize("command", ["generate", "eval"])
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--temperature", "-1"], "temperature=-1.0 must be 0"),
        (["--temperature", "nan"], "temperature=nan must be 0"),
        (["--temperature", "1", "--top-p", "1.5"], "top_p=1.5 must be above 0 and at most 1"),
        (["--temperature", "1", "--top-k", "-1"], "top_k=-1 must be 0"),
        (["--denoising-steps", "9"], "denoising_steps=9 must be between 1 and block_size=8"),
    ],
)
def test_decoding_options_are_read_before_the_model_is_loaded(
    command, options, rule, tmp_path, tmp_path_factory, monkeypatch
):
    """A configuration with a block size is enough to refuse them; there are no weights."""
    monkeypatch.setattr(Decoder, "open", None)
    tiny = tiny_model(tmp_path_factory.getbasetemp()).hf
    config = json.loads((tiny / "config.json").read_text()) | {"block_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    source = {"generate": ["--prompts", str(questions)], "eval": ["--task", f"t={questions}"]}
    argv = [command, *source[command], "--model", str(tmp_path), "--max-new-tokens", "16"]
    with pytest.raises(ValueError, match=rule):
        run(*argv, *options)
    with pytest.raises(TypeError, match="not callable"):  # control: here it would be loaded
        run(*argv, "--denoising-steps", "8", "--temperature", "1")


@pytest.mark.parametrize("argv", [["generate", "--prompts", "f"], ["eval", "--task", "t=f"]])
def test_missing_files(argv):
    with pytest.raises(FileNotFoundError, match="prompt file f does not exist"):
        run(*argv, "--model", "nowhere")


STATIC = make_rule("low_confidence_static")


@pytest.fixture
def options_of(tmp_path):
    """What a command line makes of a student that was trained for blocks of 8."""
    (tmp_path / "config.json").write_text('{"block_size": 8}')

    def read(*argv, rule=STATIC):
        args = parse("generate", "--prompt", "p", "--model", str(tmp_path), *argv)
        source = ModelSource.open(str(tmp_path))
        return decoding_options(args, source, rule)

    return read


def test_decoding_options_are_those_that_were_given(options_of):
    """Each differs from its default, 0 too; what nobody gave is the student's or the default."""
    plain = options_of()
    assert (plain.block_size, plain.denoising_steps) == (8, 8)
    assert (plain.temperature, plain.top_k, plain.top_p) == (0.0, 0, 1.0)
    given = options_of("--block-size", "6", "--denoising-steps", "3")
    assert (given.block_size, given.denoising_steps) == (6, 3)
    assert options_of("--block-size", "6").denoising_steps == 6
    assert options_of("--denoising-steps", "3").block_size == 8
    sampled = options_of("--temperature", "0.5", "--top-k", "7", "--top-p", "0.25")
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.5, 7, 0.25)
    with pytest.raises(ValueError, match="top_p=0.0 must be above 0"):
        options_of("--temperature", "0.5", "--top-p", "0")
    assert plain.prediction == "same_position"
    assert options_of("--prediction", "next_position").prediction == "next_position"
    rule = make_rule("entropy_bounded", entropy_bound=0.0)
    assert options_of(rule=rule).rule == rule != STATIC


@pytest.mark.parametrize(
    ("trained", "given", "used"),
    [
        ("next_position", [], "next_position"),
        ("next_position", ["--prediction", "next_position"], "next_position"),
        ("same_position", [], "same_position"),
    ],
)
def test_a_student_predicts_as_it_was_trained(trained, given, used, options_of, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"prediction": "{trained}"}}')
    assert options_of(*given).prediction == used
    (other,) = {"next_position", "same_position"} - {trained}
    with pytest.raises(ValueError, match=f"prediction={other} is not that of .* with {trained}"):
        options_of("--prediction", other)


@pytest.mark.parametrize("text", ['"previous"', "[]", "3", "true"])
def test_an_unknown_prediction_of_a_model_is_refused(text, options_of, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"prediction": {text}}}')
    with pytest.raises(ValueError, match="prediction=.* must be one of same_position, next_pos"):
        options_of()


class Echo:
    """A decoder that leaves out the second prompt, and answers each other with its own id."""

    parallel = SimpleNamespace(is_main=True)

    def __init__(self):
        self.student = SimpleNamespace(tokenizer=self)

    def batch_decode(self, rows, **options):
        return [{10: "one", 30: "three"}[row[0]] for row in rows]

    def tokenize(self, prompts, options, **limits):
        tokens = [
            PromptTokens(index=index, id=prompt.id, ids=torch.tensor([5, 6, 7]))
            for index, prompt in enumerate(prompts)
        ]
        return TokenizedPrompts(kept=[tokens[0], tokens[2]], dropped=[("p2", 99)])

    def decode(self, prompts, options, **settings):
        self.settings = settings
        return [trajectory(prompt.id, 10 * int(prompt.id[1:])) for prompt in prompts]


def test_a_response_stands_beside_its_own_question_where_one_is_dropped(tmp_path, options_of):
    messages = [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"question {i}"}]
        for i in (1, 2, 3)
    ]
    prompts = [Prompt(id=f"p{i}", messages=m, where=f"f:{i}") for i, m in enumerate(messages, 1)]
    args = parse("generate", "--prompts", "f", "--model", "m", "--out", str(tmp_path / "out"))
    args.max_new_tokens, args.seed = 9, 4
    echo = Echo()
    generate(args, echo, options_of(), prompts)
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [(r["prompt_id"], r["prompt"], r["response"]) for r in records] == [
        ("p1", "question 1", "one"), ("p3", "question 3", "three"),
    ]  # fmt: skip
    assert (echo.settings["response_limit"], echo.settings["seed"]) == (9, 4)


def trajectory(prompt_id="a", first=1):
    return Trajectory(
        prompt_id=prompt_id,
        sample=0,
        prompt_ids=torch.tensor([5, 6, 7]),
        response_ids=torch.tensor([first, 2, 3, 4, 5]),
        commit_step=torch.tensor([0, 1, 0, 0, 1]),
        num_response_tokens=4,
        ended=True,
        block_size=4,
    )


def test_responses_are_written_whole(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("before")
    question = Prompt(id="a", messages=[{"role": "user", "content": "q\u20ac"}], where="q.jsonl:1")
    write_responses(str(path), [question], [trajectory()], ["r"])
    assert json.loads(path.read_text()) == {
        "prompt_id": "a", "prompt": "q\u20ac", "response": "r", "tokens": 4, "passes": 3,
        "ended": True, "block_size": 4, "num_prompt_tokens": 3,
        "response_ids": [1, 2, 3, 4, 5], "commit_step": [0, 1, 0, 0, 1],
    }  # fmt: skip
    with pytest.raises(ValueError):  # the second response is missing: the old file stays
        write_responses(str(path), [question] * 2, [trajectory()], ["r"])
    assert json.loads(path.read_text())["response"] == "r"
