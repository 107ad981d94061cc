"""Measures a block-diffusion student against the chat model that it was made of.

    measure.py --teacher HF_DIR_OR_CKPT --student RUN_OR_CKPT --heldout FILE --questions FILE
        --out FILE.json [options]

Teacher and student decode the same held-out prompts with the same engine, all in one batch,
greedily and, unless --greedy-only is given, at temperature 1. The teacher says how likely every
response is. `report.py` makes a page of the measurements of a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from agreement import AskedQuestion, Grader, agreement, read_questions, right_questions
from decoding import (
    STATIC,
    TEMPERATURES,
    Decoding,
    Setting,
    decode,
    dynamic_settings,
    static_setting,
    teacher_setting,
)
from figures import figures
from likelihood import Likelihood
from measurement import SHAPE as MEASUREMENT
from pair import STUDENT, TEACHER, Pair, open_pair
from player import page_records
from shape import require_shape
from states import divergences

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.cli import list_of, run_script
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.diffusion.prediction import PREDICTIONS, SAME_POSITION
from megatron_opdlm.diffusion.remasking import LowConfidenceDynamic
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.files.folders import replacing
from megatron_opdlm.files.paths import require_file
from megatron_opdlm.generate.arguments import require_folder
from megatron_opdlm.reporting.progress import report_progress
from megatron_opdlm.responses.prompts import Prompt, PromptTokens, load_prompts

PARTS = (TEACHER, STATIC, "dynamic", "states")
THRESHOLDS = (0.7, 0.8, 0.9, 0.95)
ANSWER_TOKENS = 32
"""Most tokens of the response to a question with a short answer."""
WARM_UP_TOKENS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured."""

    prompts: Sequence[Prompt]
    """Held-out prompts."""
    questions: Sequence[AskedQuestion]
    is_right: Grader
    parts: Sequence[str]
    """Some of PARTS."""
    thresholds: Sequence[float]
    """Of dynamic decoding."""
    temperatures: Sequence[float]
    """Of the responses to held-out prompts; the first is 0."""
    limit: int
    """Most tokens of the response to a held-out prompt."""
    seed: int


def main() -> None:
    """Measures and writes the file."""
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.perf_counter()
    check(args)
    from questions import is_right

    work = Work(
        prompts=load_prompts(args.heldout)[: args.num_prompts],
        questions=read_questions(args.questions, args.num_questions),
        is_right=is_right,
        parts=args.which,
        thresholds=args.thresholds,
        temperatures=TEMPERATURES[:1] if args.greedy_only else TEMPERATURES,
        limit=args.max_new_tokens,
        seed=args.seed,
    )
    pair = open_pair(
        args.teacher, args.student, max_rows=args.num_prompts, block_size=args.block_size,
        prediction=args.prediction,
    )  # fmt: skip
    report_progress(f"loaded in {time.perf_counter() - started:.1f} s")
    found = header(args, pair) | measure(pair, work)
    found["seconds"] |= {"total": time.perf_counter() - started}
    fix = "look at the student's training: its outputs are no numbers"
    require_shape(found, MEASUREMENT, args.out, fix)
    with replacing(args.out) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--teacher", required=True, help="Hugging Face directory or checkpoint")
    parser.add_argument("--student", required=True, help="run folder or checkpoint")
    parser.add_argument("--heldout", required=True, help="prompts that the student never saw")
    parser.add_argument(
        "--questions", required=True, help="questions with `answer`, a list of accepted texts"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    parser.add_argument("--num-prompts", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument("--num-questions", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="default: 48")
    parser.add_argument(
        "--thresholds",
        type=list_of(float, "numbers"),
        default=list(THRESHOLDS),
        metavar="P,P",
        help=f"of dynamic decoding; default: {','.join(map(str, THRESHOLDS))}",
    )
    parser.add_argument(
        "--block-size", type=int, metavar="K", help="of a student that was not trained; default: 4"
    )
    parser.add_argument(
        "--prediction", choices=PREDICTIONS, help=f"in the same way; default: {SAME_POSITION}"
    )
    parser.add_argument(
        "--which",
        type=list_of(str, "parts"),
        default=list(PARTS),
        metavar="PART,PART",
        help=f"what is measured: {','.join(PARTS)}; default: all of it",
    )
    text = "nothing at temperature 1 but the rollout of `states`"
    parser.add_argument("--greedy-only", action="store_true", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuses wrong arguments before any work.

    Raises:
        ValueError: the message names argument, value, rule and fix.
    """
    for name in ("teacher", "student"):
        given = getattr(args, name)
        require(given != "", f"--{name}", "''", "must be a path", "name a folder")
    for name in ("heldout", "questions"):
        require_file(f"--{name}", getattr(args, name))
    for name in ("num_prompts", "num_questions", "max_new_tokens"):
        require_at_least(1, name, getattr(args, name))
    if args.block_size is not None:
        require_at_least(1, "block_size", args.block_size)
    require_at_least(0, "seed", args.seed)
    for value in args.thresholds:
        LowConfidenceDynamic(confidence_threshold=value)
        require(
            args.thresholds.count(value) == 1, "--thresholds", value, "is twice", "give it once"
        )
    for part in args.which:
        rule = f"must be some of {','.join(PARTS)}"
        require(part in PARTS, "--which", part, rule, "leave it out")
    require_folder(str(args.out), "--out")


def header(args: argparse.Namespace, pair: Pair) -> dict[str, Any]:
    """Returns what was measured with what, and how long the student had been trained."""
    state = ModelSource.open(args.student).state
    return {
        "teacher": args.teacher,
        "student": args.student,
        "teacher_weights": str(pair.teacher.fingerprint),
        "parameters": pair.teacher.fingerprint.num_parameters,
        "response_tokens": state.get("work", {}).get("response_tokens", 0),
        "optimizer_steps": state.get("optimizer_steps", 0),
        "block_size": pair.block_size,
        "prediction": pair.options[STUDENT].prediction,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(pair.student.model.config.params_dtype).removeprefix("torch."),
    }


def measure(pair: Pair, work: Work) -> dict[str, Any]:
    """Decodes, scores and compares everything.

    Returns:
        Figures of every setting, of the questions and of the states, with the responses.
    """
    greedy = pair.options[STUDENT]
    prompts = pair.decoders[STUDENT].tokenize(work.prompts, greedy, response_limit=work.limit).kept
    seconds: dict[str, float] = {}
    warm_up(pair, prompts, work.limit)
    likelihood, results, decodings = Likelihood(pair), [], {}
    reference = decode(pair, teacher_setting(pair), prompts, limit=work.limit, seed=work.seed)
    for setting in settings(pair, work):
        if setting == reference.setting:
            decoding = reference
        else:
            decoding = decode(pair, setting, prompts, limit=work.limit, seed=work.seed)
        started = time.perf_counter()
        nats = likelihood.nats(decoding.trajectories, setting.name)
        add(seconds, "likelihood", time.perf_counter() - started)
        add(seconds, "decoding", decoding.seconds)
        results.append(figures(decoding, nats, reference.responses))
        decodings[setting] = decoding
        say(results[-1])
    asked, answers, seconds["questions"] = answer(pair, work)
    texts = {setting: text_of(pair, d.trajectories) for setting, d in decodings.items()}
    for setting, result in zip(decodings, results, strict=True):
        result["responses"] = texts[setting]
        if setting.is_greedy:
            shown = [work.prompts[prompt.index] for prompt in prompts]
            result["page"] = page_records(pair.student.tokenizer, decodings[setting], shown)
        if setting in answers:
            given = text_of(pair, answers[setting])
            result["agreement"] = agreement(asked, given, work.is_right)
    found: dict[str, Any] = {
        "prompts": [work.prompts[prompt.index].messages[-1]["content"] for prompt in prompts],
        "num_questions": len(work.questions),
        "teacher_right": len(asked),
        "results": results,
        "seconds": seconds,
    }
    if "states" in work.parts:
        found["states"] = measure_states(pair, work, prompts, decodings, seconds)
    return found


def settings(pair: Pair, work: Work) -> list[Setting]:
    """Returns every setting whose responses are measured."""
    of_part = {
        TEACHER: [teacher_setting(pair)],
        STATIC: [static_setting(pair)],
        "dynamic": dynamic_settings(pair, work.thresholds),
    }
    greedy = [setting for part, some in of_part.items() if part in work.parts for setting in some]
    return [setting.at(temperature) for setting in greedy for temperature in work.temperatures]


def warm_up(pair: Pair, prompts: Sequence[PromptTokens], limit: int) -> None:
    """Decodes with both models, so that no first time is in a measurement.

    On a CPU a few tokens are enough. A GPU captures the passes of every size, so there it is all.
    """
    some, tokens = (prompts, limit) if torch.cuda.is_available() else (prompts[:1], WARM_UP_TOKENS)
    for setting in (teacher_setting(pair), static_setting(pair)):
        decode(pair, setting, some, limit=tokens, seed=0)


def answer(
    pair: Pair, work: Work
) -> tuple[list[AskedQuestion], dict[Setting, list[Trajectory]], float]:
    """Lets the teacher answer all questions, and every greedy setting those that it gets right.

    Returns:
        The questions that the teacher gets right, responses to them, and the seconds of all this.
    """
    started, decoder = time.perf_counter(), pair.decoders[STUDENT]
    tokens = decoder.tokenize(
        [question.prompt for question in work.questions],
        pair.options[STUDENT],
        response_limit=ANSWER_TOKENS,
    ).kept
    teacher = teacher_setting(pair)
    first = decode(pair, teacher, tokens, limit=ANSWER_TOKENS, seed=work.seed).trajectories
    questions = [work.questions[prompt.index] for prompt in tokens]
    asked = right_questions(questions, text_of(pair, first), work.is_right)
    kept = {question.prompt.id for question in asked}
    chosen = [prompt for prompt in tokens if prompt.id in kept]
    found = {}
    for setting in settings(pair, work):
        if setting == teacher:
            found[setting] = [t for t in first if t.prompt_id in kept]
        elif setting.is_greedy and chosen:
            decoded = decode(pair, setting, chosen, limit=ANSWER_TOKENS, seed=work.seed)
            found[setting] = decoded.trajectories
    report_progress(f"the teacher gets {len(asked)} of {len(questions)} questions right")
    return asked, found, time.perf_counter() - started


def measure_states(
    pair: Pair,
    work: Work,
    prompts: Sequence[PromptTokens],
    decodings: dict[Setting, Decoding],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Returns the divergence at the states of the student's static rollout at temperature 1."""
    rollout = static_setting(pair).at(1.0)
    decoding = decodings.get(rollout) or decode(
        pair, rollout, prompts, limit=work.limit, seed=work.seed
    )
    started = time.perf_counter()
    found = divergences(pair, decoding.trajectories).to_json(pair.block_size)
    seconds["states"] = time.perf_counter() - started
    report_progress(f"forward KL per masked token {found['kl']:.3f}, {seconds['states']:.1f} s")
    return found


def text_of(pair: Pair, trajectories: Sequence[Trajectory]) -> list[str]:
    """Returns the text of every response, without special tokens."""
    ids = [trajectory.text_ids.tolist() for trajectory in trajectories]
    if not ids:  # transformers would return one empty text
        return []
    texts: list[str] = pair.student.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def add(seconds: dict[str, float], name: str, more: float) -> None:
    """Adds to a sum of seconds."""
    seconds[name] = seconds.get(name, 0.0) + more


def say(result: dict[str, Any]) -> None:
    """Reports the figures of one setting."""
    report_progress(
        f"{result['writer']} {result['setting']}, T={result['temperature']:g}: "
        f"{result['nll']:.3f} nats per token, {result['mean_tokens']:.1f} tokens, "
        f"{result['tokens_per_forward']:.2f} per forward, {result['seconds']:.1f} s"
    )


if __name__ == "__main__":
    run_script(main)
