"""Which file is read by which grader, from the arguments of `opdlm eval`."""

import argparse
import json

from megatron_opdlm.evaluation.cli import add_eval_parser
from megatron_opdlm.evaluation.task_arguments import check_task_arguments, load_tasks

GSM8K = {"question": "How many?", "answer": "It is 7 + 7 = 14.\n#### 14"}
OWN = {"prompt": "How many?", "answer": "14"}


def tasks(*argv):
    parser = argparse.ArgumentParser()
    add_eval_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["eval", *argv])
    check_task_arguments(args)
    return load_tasks(args)


def test_a_benchmark_keeps_its_grader_beside_files_of_another(tmp_path):
    """Read as a file of one's own, GSM8K's whole solution would be the answer."""
    published, own = tmp_path / "test.jsonl", tmp_path / "own.jsonl"
    published.write_text(json.dumps(GSM8K) + "\n")
    own.write_text(json.dumps(OWN) + "\n")
    argv = ["--task", f"gsm8k={published}", "--task", f"own={own}"]
    found = [(task.grader, task.questions[0].reference) for task in tasks(*argv)]
    assert found == [("number", "14"), ("number", "14")]
    found = [
        (task.grader, task.questions[0].reference) for task in tasks(*argv, "--grader", "exact")
    ]
    assert found == [("number", "14"), ("exact", "14")]
    (task,) = tasks("--task", f"gsm8k:exact={published}")  # control: asked for by name
    assert (task.grader, task.questions[0].reference) == ("exact", GSM8K["answer"])
