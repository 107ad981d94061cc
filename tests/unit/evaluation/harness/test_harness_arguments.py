"""Arguments of `opdlm eval --harness`: what is refused before any work."""

import argparse

import pytest

from megatron_opdlm.evaluation.harness.arguments import (
    add_harness_arguments,
    check_harness,
    open_model,
    require_no_harness_arguments,
    task_names,
)
from megatron_opdlm.evaluation.settings import add_setting_arguments
from megatron_opdlm.evaluation.task_arguments import add_task_arguments
from megatron_opdlm.generate.arguments import add_model_arguments


def arguments(*argv):
    """The arguments of `opdlm eval` that matter here."""
    parser = argparse.ArgumentParser()
    add_task_arguments(parser)
    add_model_arguments(parser, required=False)
    add_setting_arguments(parser)
    add_harness_arguments(parser)
    for name in ("--responses", "--regrade", "--teacher", "--json", "--out"):
        parser.add_argument(name)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--examples", type=int, default=0)
    return parser.parse_args(argv)


HARNESS = ("--harness", "gsm8k, a/b.yaml", "--model", "nowhere")


def test_good_arguments_are_accepted():
    args = arguments(*HARNESS, "--seeds", "3", "--num-fewshot", "0", "--num-questions", "2")
    check_harness(args)
    assert args.seeds == [3]
    assert task_names(args) == ["gsm8k", "a/b.yaml"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--task", "a=b"), "--task=['a=b'] has no effect with --harness: lm-eval's tasks have"),
        (("--grader", "exact"), "--grader=exact has no effect with --harness"),
        (("--teacher", "x"), "--teacher=x has no effect with --harness: lm-eval measures it with"),
        (("--responses", "x"), "--responses=x has no effect with --harness"),
        (("--regrade", "x"), "--regrade=x has no effect with --harness"),
        (("--from-hub",), "--from-hub=true has no effect with --harness"),
        (("--examples", "1"), "--examples=1 has no effect with --harness"),
        (("--top-k", "3"), "--top-k=3 has no effect with --harness: lm-eval's tasks say how to"),
        (("--temperature", "1"), "--temperature=1.0 has no effect with --harness"),
        (("--seeds", "1", "2"), "--seeds=[1, 2] must be one seed"),
        (("--seeds", "-1"), "--seeds=-1 must be at least 0"),
        (("--unsafe-code-execution",), "--unsafe-code-execution=true has no effect with --harness"),
        (("--no-chat-template", "--fewshot-as-multiturn"),
         "--fewshot-as-multiturn=true needs the chat template"),
        (("--num-fewshot", "-1"), "num_fewshot=-1 must be at least 0"),
        (("--num-questions", "0"), "num_questions=0 must be at least 1"),
        (("--harness", " , "), "--harness= ,  must name a task"),
        (("--max-new-tokens", "0"), "max_new_tokens=0 must be at least 1"),
        (("--static", "--confidence-threshold", "0.9"), "confidence_threshold=0.9 applies only to"),
        (("--json", "missing/x"), "--json=missing/x: there is no folder missing"),
    ],
)  # fmt: skip
def test_arguments_without_effect_are_refused(argv, says):
    with pytest.raises(ValueError) as refused:
        check_harness(arguments(*HARNESS, *argv))
    assert str(refused.value).startswith(says)


def test_a_model_is_needed():
    with pytest.raises(ValueError, match="--model=null must be given; name a run folder"):
        check_harness(arguments("--harness", "gsm8k"))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--num-fewshot", "0"), "--num-fewshot=0 has an effect only with --harness; leave it out"),
        (("--gen-kwargs", "a=1"), "--gen-kwargs=a=1 has an effect only with --harness"),
        (("--no-chat-template",), "--chat-template=false has an effect only with --harness"),
        (("--harness-include", "x"), "--harness-include=['x'] has an effect only with --harness"),
    ],
)
def test_arguments_of_the_harness_need_it(argv, says):
    require_no_harness_arguments(arguments("--task", "a=b"))  # control
    with pytest.raises(ValueError) as refused:
        require_no_harness_arguments(arguments("--task", "a=b", *argv))
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "model_args: the following arguments are required: --model"),
        ({"model": "x", "blocksize": 4}, "model_args: unrecognized arguments: --blocksize 4"),
        ({"model": "x", "block_size": "four"}, "model_args: argument --block-size: invalid int"),
        ({"model": "x", "static": True, "dynamic": True},
         "model_args=model,static,dynamic must have one remasking rule"),
        ({"model": "x", "confidence_threshold": 0.9}, "confidence_threshold=0.9 applies only to"),
        ({"model": "", "dynamic": True}, "model='' must be a path"),
    ],
    ids=str,
)  # fmt: skip
def test_malformed_model_args_are_refused(given, says):
    with pytest.raises(ValueError) as refused:
        open_model(given, {"batch_size": 1, "device": None})
    assert str(refused.value).startswith(says)


def test_a_device_cannot_be_chosen():
    with pytest.raises(ValueError, match="device=cuda:0 cannot be chosen"):
        open_model({"model": "x"}, {"device": "cuda:0"})
