"""Tokens and GPU-hours of an experiment, before it runs.

Hours are those of one H100 that works at the bound of tools/gpu/roofline.py and decodes 128
responses at once, one token per forward pass. docs/gpu.md says how near to it a pass was measured.
A response that ends before its limit costs less, so tokens are upper bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_opdlm.cli import build_parser
from megatron_opdlm.config.run import load_config
from megatron_opdlm.evaluation.benchmarks import BENCHMARKS
from megatron_opdlm.evaluation.settings import chosen_rules
from megatron_opdlm.evaluation.sweep.arguments import each_setting, parse_labelled
from megatron_opdlm.plan.ranks import most_response_tokens
from tools.gpu.roofline import CONFIGS, H100, Shape, decoding_pass

ROWS = 128
PROMPT = 300
"""Tokens that a prompt is assumed to have."""


def training(config: str, keys: Sequence[str], size: str | None) -> str:
    """Returns the most tokens of a training run, its FLOPs as the paper counts them, and hours."""
    values = load_config(config, list(keys))
    tokens = most_response_tokens(values)
    text = f"at most {tokens / 1e6:,.0f}M response tokens"
    sizes = [size, _size_of(values.model.teacher_path)]
    if None in sizes or not values.distill.student_writes:
        return text  # the bound of a teacher that decodes, or of its size, is not known here
    student, teacher = (Shape.of(each).num_parameters for each in sizes if each is not None)
    flops = (2 * teacher + 6 * student) * tokens
    limit = values.rollout.max_response_tokens.end
    assert size is not None
    hours = tokens / tokens_per_second(size, limit, values.rollout.block_size) / 3600
    hours += H100.seconds(flops) / 3600
    return f"{text}, {flops:.1e} FLOPs (Eq. 7), {hours:,.0f} GPU-hours at the bound of an H100"


def sweep(command: Sequence[str], size_of: Callable[[str], str | None]) -> Iterator[str]:
    """Yields a line per benchmark of a sweep: cells, questions, tokens; and a line with the hours.

    Args:
        command: arguments of `opdlm`.
        size_of: function from a model's label to its size.
    """
    args = build_parser().parse_args(command)
    students = [parse_labelled(text)[0] for text in args.model]
    teachers = [parse_labelled(text)[0] for text in args.teacher or ()]
    tokens: dict[tuple[str, int], int] = {}
    for text in args.task:
        name = text.partition("=")[0]
        benchmark = BENCHMARKS[name]
        settings = list(each_setting(args, seeds=benchmark.seeds))
        seeds = [benchmark.seeds if setting.temperature else 1 for setting in settings]
        of_student = sum(seeds) * len(chosen_rules(args))
        cells = len(students) * of_student + len(teachers) * len(
            {s.enable_thinking for s in settings}
        )
        if benchmark.size is None:
            yield f"{name}: {cells} cells; its number of questions is not fixed"
            continue
        most = benchmark.size * benchmark.response_limit
        yield (
            f"{name}: {cells} cells of {benchmark.size:,} questions and at most "
            f"{benchmark.response_limit:,} tokens each, {cells * most:,} tokens"
        )
        for label in students:
            key = label, benchmark.response_limit
            tokens[key] = tokens.get(key, 0) + of_student * most
    yield _hours(tokens, size_of)


def tokens_per_second(size: str, limit: int, block_size: int) -> float:
    """Returns tokens per second of static decoding at the bound of an H100.

    A row of a pass has a block's noisy tokens and, on average, one clean one.
    """
    seconds = decoding_pass(
        Shape.of(size),
        H100,
        rows=ROWS,
        tokens=ROWS * (block_size + 1),
        head_rows=ROWS * (block_size + 1) / 2,
        context=PROMPT + limit / 2,
    )
    return ROWS / seconds


def _size_of(path: str) -> str | None:
    """Returns the size of a Qwen3 by its path; None if its configuration is not here."""
    size = Path(path).name.removeprefix("Qwen3-")
    return size if (CONFIGS / f"Qwen3-{size}.config.json").is_file() else None


def _hours(tokens: dict[tuple[str, int], int], size_of: Callable[[str], str | None]) -> str:
    hours = 0.0
    for (label, limit), count in tokens.items():
        size = size_of(label)
        if size is None:
            continue
        block_size = int(label.partition("@")[2] or 4)
        hours += count / tokens_per_second(size, limit, block_size) / 3600
    return (
        f"students, in all: at most {sum(tokens.values()):,} response tokens, {hours:,.0f} "
        "GPU-hours at the bound of an H100 if every response is that long"
    )
