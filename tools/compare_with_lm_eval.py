"""Grades the same responses with lm-eval's own tasks and with our graders; lists every difference.

    compare_with_lm_eval.py --task gsm8k=test.jsonl --responses responses.jsonl
    compare_with_lm_eval.py --task ifeval=ifeval_input_data.jsonl --responses responses.jsonl

The responses are those that `opdlm eval` leaves, or lines {"id": ..., "response": ...} of any
engine, one per question; --num-questions N takes the first N questions. No model is loaded and no
network is used: lm-eval's task runs as it is, with its filters and metrics, on the same file, and
its model is one that says what the file says. Both graders see the whole response.

Figures that both have must agree; the exit status is 1 if they do not. For GSM8K, our own verdict
is compared with both of lm-eval's as well: they differ by definition, and are listed to be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.evaluation import task_arguments
from megatron_opdlm.evaluation.graders import GRADERS
from megatron_opdlm.evaluation.grading import grade_all
from megatron_opdlm.evaluation.harness.local_tasks import write_local_task
from megatron_opdlm.evaluation.harness.tasks import repeatable, require_lm_eval
from megatron_opdlm.evaluation.response_file import read_responses
from megatron_opdlm.evaluation.task import Answer, Response
from megatron_opdlm.files.folders import replacing, write_json
from megatron_opdlm.generate.arguments import require_folder

OWN = "correct"
"""Name of our own verdict."""
_TAIL = 100
"""Characters of a response that a listed difference shows, from its end."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A task that both have."""

    builtin: str
    """lm-eval's file of the task."""
    split: str
    """Split that lm-eval asks; every split of the local task has the same file."""
    others: tuple[str, ...]
    """Other splits that lm-eval's file names."""
    grader: str
    """Our grader."""
    same: tuple[str, ...]
    """Figures that both have, and that must agree."""
    read: tuple[str, ...] = ()
    """lm-eval's figures that our own verdict is compared with, to be read."""


PAIRS = {
    "gsm8k": Pair(
        builtin="gsm8k/gsm8k.yaml",
        split="test",
        others=("train",),
        grader="gsm8k",
        same=("exact_match,strict-match", "exact_match,flexible-extract"),
        read=("exact_match,strict-match", "exact_match,flexible-extract"),
    ),
    "ifeval": Pair(
        builtin="ifeval/ifeval.yaml",
        split="train",
        others=(),
        grader="ifeval",
        same=(
            *("prompt_level_strict_acc,none", "inst_level_strict_acc,none"),
            *("prompt_level_loose_acc,none", "inst_level_loose_acc,none"),
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Theirs:
    """What lm-eval says of one response."""

    verdicts: Mapping[str, tuple[bool, ...]]
    """Verdicts by metric and filter."""
    filtered: Mapping[str, Any]
    """What each filter made of the response."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compares; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        require_lm_eval()
        if args.json is not None:
            require_folder(args.json, "--json")
        pair, responses = read(args)
        with repeatable():
            theirs = ask_lm_eval(pair, responses, args.task.partition("=")[2])
        answers = grade(pair, responses)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    report = compare(pair, answers, theirs)
    for line in lines_of(report):
        print(line)
    if args.json is not None:
        with replacing(Path(args.json)) as partial:
            write_json(partial, report)
    return 0 if report["agree"] else 1


def read(args: argparse.Namespace) -> tuple[Pair, list[Response]]:
    """Reads questions and responses.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the task is not one that both have, or a file is malformed.
    """
    name, _, path = args.task.partition("=")
    if name not in PAIRS or not path:
        raise ValueError(f"--task={args.task} must be NAME=FILE, NAME one of {', '.join(PAIRS)}")
    found = argparse.Namespace(
        task=[args.task],
        grader=None,
        num_questions=args.num_questions,
        from_hub=False,
        unsafe_code_execution=False,
    )
    tasks = task_arguments.load_tasks(found)
    groups = read_responses(args.responses, tasks, allow_more=args.num_questions is not None)
    if len(groups) > 1:
        raise ValueError(f"{args.responses} has several seeds; give the responses of one")
    (responses,) = groups.values()
    return PAIRS[name], responses


def grade(pair: Pair, responses: Sequence[Response]) -> list[Answer]:
    """Grades with our grader."""
    grader = GRADERS[pair.grader]
    grader.require()
    asked = [
        dataclasses.replace(each, question=dataclasses.replace(each.question, grader=grader))
        for each in responses
    ]
    return list(map(Answer.of, asked, grade_all(asked, progress=True)))


def ask_lm_eval(pair: Pair, responses: Sequence[Response], path: str) -> list[Theirs]:
    """Runs lm-eval's task on the first questions of a file, with given responses.

    Args:
        pair: the task.
        responses: responses to the first questions of the file, in its order.
        path: file of the questions.
    """
    from lm_eval import evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Replay(LM):
        """A model that says what the file says."""

        def generate_until(self, requests: list[Instance]) -> list[str]:
            return [responses[request.doc_id or 0].text for request in requests]

        def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
            raise NotImplementedError

    with tempfile.TemporaryDirectory(prefix="lm_eval_") as scratch:
        splits = {split: path for split in (pair.split, *pair.others)}
        file = write_local_task(
            Path(scratch, "local_task.yaml"), pair.builtin, data_files=splits, num_fewshot=0
        )
        tasks = TaskManager(include_defaults=False).load([str(file)])
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(0)
        figures = evaluate(Replay(), tasks, limit=len(responses), bootstrap_iters=0)
    assert figures is not None, "one process has all figures"
    return _by_question(figures["samples"]["local_task"], len(responses))


def _by_question(samples: Sequence[Mapping[str, Any]], count: int) -> list[Theirs]:
    verdicts: list[dict[str, tuple[bool, ...]]] = [{} for _ in range(count)]
    filtered: list[dict[str, Any]] = [{} for _ in range(count)]
    for sample in samples:
        place, name = sample["doc_id"], sample["filter"]
        filtered[place][name] = sample["filtered_resps"][0]
        for metric in sample["metrics"]:
            value = sample[metric]
            each = value if isinstance(value, list) else [value]
            verdicts[place][f"{metric},{name}"] = tuple(map(bool, each))
    return [Theirs(verdicts=v, filtered=f) for v, f in zip(verdicts, filtered, strict=True)]


def compare(pair: Pair, answers: Sequence[Answer], theirs: Sequence[Theirs]) -> dict[str, Any]:
    """Returns the shares of both, the number of equal verdicts, and every difference.

    A question whose instruction lm-eval checks with a random letter is counted apart.
    """
    comparisons = []
    pairs = [(name, name, True) for name in pair.same]
    pairs += [(OWN, name, False) for name in pair.read]
    for ours, name, must in pairs:
        mine = [_own(answer, ours) for answer in answers]
        others = [each.verdicts[name] for each in theirs]
        comparisons.append(
            {
                "ours": ours,
                "lm_eval": name,
                "must_agree": must,
                "our_share": _share(mine),
                "their_share": _share(others),
                "equal": sum(a == b for a, b in zip(mine, others, strict=True)),
                "responses": len(answers),
                "at_random": [a.question.id for a in answers if _is_at_random(a)],
                "differences": [
                    _difference(answer, each, a, b)
                    for answer, each, a, b in zip(answers, theirs, mine, others, strict=True)
                    if a != b
                ],
            }
        )
    agree = all(
        difference["id"] in comparison["at_random"]
        for comparison in comparisons
        if comparison["must_agree"]
        for difference in comparison["differences"]
    )
    return {"agree": agree, "comparisons": comparisons}


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """Returns the report as text."""
    lines = []
    for each in report["comparisons"]:
        rule = "must agree" if each["must_agree"] else "differ by definition"
        shares = [f"{100 * each[name]:.2f} %" for name in ("our_share", "their_share")]
        lines.append(
            f"ours {each['ours']} {shares[0]}, lm-eval {each['lm_eval']} {shares[1]}: "
            f"{each['equal']} of {each['responses']} equal ({rule})"
        )
        for found in each["differences"]:
            note = ", lm-eval draws the letter" if found["id"] in each["at_random"] else ""
            lines.append(
                f"  {found['id']}: ours {found['ours']} ({found['extracted']}), lm-eval "
                f"{found['lm_eval']} ({found['filtered']}), reference {found['reference']}{note}; "
                f"response ends {found['tail']!r}"
            )
    return lines


def _own(answer: Answer, name: str) -> tuple[bool, ...]:
    if name == OWN:
        return (answer.correct,)
    found = answer.grade.verdicts
    return tuple(found[name] if name in found else found[name.removesuffix(",none")])


def _share(verdicts: Sequence[tuple[bool, ...]]) -> float:
    pooled = [each for verdict in verdicts for each in verdict]
    return sum(pooled) / len(pooled)


def _is_at_random(answer: Answer) -> bool:
    """Whether the question has a letter instruction about a character that is no letter."""
    items = getattr(answer.question.reference, "items", ())
    letters = [item.parameters.get("letter", "a") for item in items]
    return not all(letter.isalpha() for letter in letters)


def _difference(
    answer: Answer, theirs: Theirs, ours: tuple[bool, ...], others: tuple[bool, ...]
) -> dict[str, Any]:
    return {
        "id": answer.question.id,
        "ours": list(ours),
        "extracted": answer.grade.error or answer.grade.extracted,
        "lm_eval": list(others),
        "filtered": {name: str(text)[-_TAIL:] for name, text in theirs.filtered.items()},
        "reference": str(answer.question.reference),
        "tail": answer.text[-_TAIL:],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, metavar="NAME=FILE")
    parser.add_argument("--responses", required=True, metavar="FILE")
    parser.add_argument("--num-questions", type=int, metavar="N", help="the first N; default: all")
    parser.add_argument("--json", metavar="OUT", help="also write the report here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
