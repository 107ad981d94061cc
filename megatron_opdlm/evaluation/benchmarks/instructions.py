"""Instruction following: IFEval."""

from __future__ import annotations

from megatron_opdlm.evaluation.benchmarks.benchmark import Asked, Benchmark, Form, HubFiles
from megatron_opdlm.responses.entries import Entry


def _ifeval(entry: Entry) -> Asked:
    return Asked(
        text=entry.text("prompt"),
        answer={key: entry.values[key] for key in ("instruction_id_list", "kwargs")},
        id=entry.label("key"),
    )


IFEVAL = Benchmark(
    name="ifeval",
    title="IFEval",
    source="Zhou et al. 2023, github.com/google-research/google-research",
    licence="Apache-2.0",
    split="all questions",
    size=541,
    hub=(HubFiles(repository="google/IFEval", files=("ifeval_input_data.jsonl",)),),
    grader="ifeval",
    forms=(
        Form(
            name="google-research/instruction_following_eval, input_data.jsonl",
            keys=("key", "prompt", "instruction_id_list", "kwargs"),
            ask=_ifeval,
        ),
    ),
    response_limit=8_000,  # of the paper's launchers
)
BENCHMARKS = (IFEVAL,)
