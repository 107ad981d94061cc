"""Arguments of `opdlm sweep`: what is refused, and which settings they make."""

import argparse
import dataclasses
import json

import pytest

from megatron_opdlm import cli
from megatron_opdlm.evaluation.sweep.arguments import (
    check_sweep_arguments,
    each_setting,
    parse_labelled,
)
from megatron_opdlm.evaluation.sweep.cli import add_sweep_parser
from megatron_opdlm.evaluation.sweep.plan import make_plan
from tests import sweeps

BASE = ["--model", "a=models/a", "--task", "t=q.jsonl"]


def parsed(*argv):
    parser = argparse.ArgumentParser()
    add_sweep_parser(parser.add_subparsers())
    return parser.parse_args(["sweep", *argv])


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--task", "t=q"], "--model=null must be given"),
        (["--model", "a=m"], "--task=null must be given"),
        ([*BASE, "--model", "a=n"], "--model=a=n has the label of another model, a; write e.g."),
        ([*BASE, "--teacher", "x/lr=1/a"], "--teacher=x/lr=1/a has the label of another model, a; "
         "write e.g. --teacher another_label=x/lr=1/a"),
        (["--model", "a\nb=m", "--task", "t=q"], r"--model='a\nb' has a character that cannot be"),
        (["--model", "a=m", "--task", "t\x1b=q"], r"--task='t\x1b' has a character that cannot be"),
        (["--model", "a=", "--task", "t=q"], "--model=a= must be LABEL=PATH"),
        ([*BASE, "--training-tokens", "a"], "--training-tokens=a must be LABEL=N"),
        ([*BASE, "--training-tokens", "a=0.5"], "--training-tokens=a=0.5 must be LABEL=N"),
        ([*BASE, "--training-tokens", "a=nan"], "--training-tokens=a=nan must be LABEL=N"),
        ([*BASE, "--training-tokens", "b=1"], "--training-tokens=b must be a model's label; use"),
        ([*BASE, "--training-tokens", "a=1", "--training-tokens", "a=2"], "gives a model's tokens"),
        ([*BASE, "--block-size", "4", "4"], "block_size=4 is given twice"),
        ([*BASE, "--temperature", "1", "1.0"], "temperature=1.0 is given twice"),
        ([*BASE, "--block-size", "0"], "block_size=0 must be at least 1"),
        ([*BASE, "--max-new-tokens", "9", "0"], "max_new_tokens=0 must be at least 1"),
        ([*BASE, "--seeds", "1", "2"], "seeds=1 2 applies only to sampling"),
        ([*BASE, "--temperature", "0", "1", "--seeds", "1", "1"], "seeds=1 is given twice"),
        ([*BASE, "--static", "--confidence-threshold", "0.8"], "applies only to --dynamic"),
        ([*BASE, "--dynamic", "--confidence-threshold", "0.8", "0.8"], "0.8 is given twice"),
        ([*BASE, "--seeds-temperature", "0"], "--seeds-temperature=0.0 must be positive"),
        ([*BASE, "--samples", "-1"], "--samples=-1 must be at least 0"),
        ([*BASE, "--task", "t=r"], "task=t is given twice"),
        ([*BASE, "--report-only"], "--model=a=models/a has no effect with --report-only"),
        (["--tiny", "--seeds", "1"], "--seeds=1 has no effect with --tiny"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(capsys, argv, text):
    assert cli.main(["sweep", *argv]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["a b", "\u00e9\u4e2d", "<a>|$x$"])
def test_control_a_name_with_any_other_character_is_fine(name):
    check_sweep_arguments(parsed("--model", f"{name}=m", "--task", f"{name}=q"))


def test_a_temperature_for_seeds_that_no_task_has_is_refused():
    args = parsed(*BASE, "--seeds-temperature", "1")
    with pytest.raises(ValueError, match="--seeds-temperature=1.0 has no effect: no task asks"):
        make_plan(args, [sweeps.task()])
    args.model = None  # control: with a benchmark of several seeds there is a plan
    assert make_plan(args, [dataclasses.replace(sweeps.task(), seeds=8)]).cells == []


def test_a_model_that_is_not_there(capsys, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}) + "\n")
    argv = ["--model", f"a={tmp_path / 'gone'}", "--task", f"t={path}", "--out", tmp_path / "o"]
    assert cli.main(["sweep", *map(str, argv)]) == 2
    assert (
        "gone holds neither a Hugging Face config.json nor a checkpoint" in capsys.readouterr().err
    )
    assert not (tmp_path / "o").exists()


def test_a_report_that_nobody_asked_for(capsys, tmp_path):
    assert cli.main(["sweep", "--report-only", "--out", str(tmp_path)]) == 2
    assert "report has no plan.json; start the sweep without" in capsys.readouterr().err


def test_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=y").mkdir()
    assert parse_labelled("a=runs/b") == ("a", "runs/b")
    assert parse_labelled("runs/b/") == ("b", "runs/b/")
    assert parse_labelled("runs/lr=1/c") == ("c", "runs/lr=1/c")
    assert parse_labelled("x=y") == ("x=y", "x=y")  # a folder that is there
    assert parse_labelled("OPDLM-4B@8=runs/lr=1") == ("OPDLM-4B@8", "runs/lr=1")


def test_settings_are_all_combinations():
    args = parsed(*BASE, "--block-size", "2", "4", "--temperature", "0", "1", "--thinking", "both",
                  "--max-new-tokens", "9", "--seeds", "5", "6", "--top-p", "0.9")  # fmt: skip
    check_sweep_arguments(args)
    found = [
        (s.block_size, s.temperature, s.max_new_tokens, s.enable_thinking, s.seeds, s.top_p)
        for s in each_setting(args)
    ]
    sampled = ([5, 6], 0.9)
    assert found == [
        (block, temperature, 9, thinks, *(sampled if temperature else (None, None)))
        for block in (2, 4)
        for temperature in (0.0, 1.0)
        for thinks in (False, True)
    ]


def test_without_options_there_is_one_setting():
    (setting,) = each_setting(parsed(*BASE))
    assert (setting.block_size, setting.temperature, setting.max_new_tokens) == (None, 0.0, None)
    assert setting.enable_thinking is False


def test_benchmarks_of_several_seeds_have_a_temperature_of_their_own():
    args = parsed(*BASE, "--seeds-temperature", "1", "--top-p", "0.9")
    check_sweep_arguments(args)
    (greedy,) = each_setting(args)
    assert (greedy.temperature, greedy.top_p) == (0.0, None)
    (sampled,) = each_setting(args, seeds=8)
    assert (sampled.temperature, sampled.top_p) == (1.0, 0.9)
