"""Computes what every rank of a run would hold, from the configuration: without GPU and weights.

The order of ranks is Megatron's: tensor-parallel ranks are neighbours, then come data-parallel
ranks, then pipeline ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_opdlm.config.run import Config
from megatron_opdlm.config.schedules import response_limit
from megatron_opdlm.distributed.process_groups import RankGrid
from megatron_opdlm.model.fp8 import check_fp8_fit
from megatron_opdlm.model.gpt import check_parallel_fit, padded_vocab_size
from megatron_opdlm.model.hf_config import HFConfig
from megatron_opdlm.model.parameter_count import count_parameters, vocab_rows
from megatron_opdlm.plan.cache import DTYPE_BYTES, longest, num_replicas, plan_cache
from megatron_opdlm.rollout.cache_size import CacheSize

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank's share of the models. Bytes count tensors that exist during the whole run."""

    rank: int
    tp_rank: int
    dp_rank: int
    pp_rank: int
    layers: range
    """Transformer layers of the rank, counted from 0."""
    vocab_rows: range | None
    """Rows of the padded vocabulary; None on a stage without embedding and head."""
    student_parameters: int
    teacher_parameters: int
    weight_bytes: int
    """Weights of the student, of the teacher, and of the student's copy for rollouts if there is
    one, in params_dtype; without the weights that teacher_offload moves to the host."""
    offloaded_bytes: int
    """Weights of the teacher that are on the device only while it runs, with teacher_offload."""
    gradient_bytes: int
    """Gradient buffer of the student, in float32."""
    optimizer_bytes: int
    """Adam's moments, and the float32 weights if params_dtype is bfloat16."""
    kv_cache: CacheSize
    """Key/value cache of the model that decodes."""
    keeps_cache: bool
    """Whether the cache is certainly kept between rollouts (`keep_kv_cache=true`)."""

    @property
    def total_bytes(self) -> int:
        """Bytes in the larger of two phases, rollout and teacher, without activations and work
        space.
        """
        lasting = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        cache, lent = self.kv_cache.num_bytes, self.offloaded_bytes
        return lasting + (cache + lent if self.keeps_cache else max(cache, lent))


def rank_table(
    config: Config, *, student: HFConfig, teacher: HFConfig, world_size: int, cuda: bool = True
) -> list[RankPlan]:
    """Returns the share of every rank of a run.

    Args:
        config: resolved configuration.
        student: hyperparameters of the student.
        teacher: hyperparameters of the teacher.
        world_size: number of ranks.
        cuda: whether the ranks are GPUs.

    Returns:
        One rank plan per rank, in rank order.

    Raises:
        ValueError: the configuration does not fit the models or the number of ranks.
    """
    check_models(config, student=student, teacher=teacher, cuda=cuda)
    tp_size, pp_size = config.parallel.layout
    if world_size < 1 or world_size % (tp_size * pp_size):
        raise ValueError(
            f"number of GPUs {world_size} must be a multiple of tensor_model_parallel_size x "
            f"pipeline_model_parallel_size = {tp_size} x {pp_size}; use a multiple of "
            f"{tp_size * pp_size}"
        )
    rollout_size, _ = config.parallel.rollout_layout
    if world_size % rollout_size:
        raise ValueError(
            f"rollout_tensor_model_parallel_size={rollout_size} must divide the number of GPUs, "
            f"{world_size}"
        )
    if config.distill.has_teacher:
        _grid(config.parallel.teacher_layout, world_size).check("teacher_")
    writer = teacher if config.writer.role == "teacher" else student
    cache = plan_cache(config, writer, num_replicas(config, world_size), cuda)
    return [
        _plan_rank(config, student, teacher, world_size, rank, cache) for rank in range(world_size)
    ]


def check_models(
    config: Config, *, student: HFConfig, teacher: HFConfig, cuda: bool = True
) -> None:
    """Refuses models that do not fit the configuration.

    `distill.vocabulary` checks whether the models fit each other.

    Args:
        config: resolved configuration.
        student: hyperparameters of the student.
        teacher: hyperparameters of the teacher.
        cuda: whether the run is on GPUs.

    Raises:
        ValueError: a model does not fit; the message names field, value, rule and fix.
    """
    top_k, vocab_size = config.distill.top_k_logits, min(student.vocab_size, teacher.vocab_size)
    if top_k >= vocab_size:
        raise ValueError(
            f"top_k_logits={top_k} must be below the teacher's vocabulary of {vocab_size} "
            "tokens; use 0 for all of them"
        )
    tp_size, pp_size = config.parallel.teacher_layout
    prefix = "teacher_" if config.parallel.has_teacher_layout else ""
    check_parallel_fit(teacher, tp_size=tp_size, pp_size=pp_size, prefix=prefix)
    tp_size, pp_size = config.parallel.layout
    check_parallel_fit(student, tp_size=tp_size, pp_size=pp_size)
    _check_fp8(config, student, teacher)
    for hf in (student, teacher):
        _check_lengths(config, hf)
    if (size := config.parallel.rollout_tensor_model_parallel_size) is not None:
        check_parallel_fit(student, tp_size=size, pp_size=1, prefix="rollout_")
    for decoder in config.decoders:
        model = teacher if decoder.role == "teacher" else student
        plan_cache(config, model, 1, cuda, decoder)


def format_table(plans: list[RankPlan]) -> str:
    """Returns the rank plans as a text table, with sizes in GiB and parameters in millions."""
    header = (
        "rank tp dp pp", "layers", "vocab rows", "student M", "teacher M",
        "weights", "gradients", "optimizer", "kv cache", "sum GiB",
    )  # fmt: skip
    rows = [header, *map(_format_rank, plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def format_totals(config: Config, plans: list[RankPlan], *, cuda: bool = True) -> str:
    """Returns the totals of a run as text: sizes, steps, and the most tokens that it trains on.

    Args:
        config: resolved configuration.
        plans: one rank plan per rank, made with the same `cuda`.
        cuda: whether the ranks are GPUs.
    """
    tokens = most_response_tokens(config)
    dp_size = 1 + max(plan.dp_rank for plan in plans)
    largest = max(plan.total_bytes for plan in plans)
    cache = plans[0].kv_cache
    is_known = config.rollout.kv_cache_gb is not None or not cuda
    free = "" if is_known else " if free memory holds them"
    weights = f"{config.model.params_dtype} on {'GPUs' if cuda else 'CPUs'}"
    return (
        f"{len(plans)} ranks = tp {config.parallel.tensor_model_parallel_size} x dp {dp_size} x pp "
        f"{config.parallel.pipeline_model_parallel_size}, {weights}; largest rank "
        f"{largest / _GIB:.2f} GiB before activations\n"
        f"rollouts on {num_replicas(config, len(plans))} replicas, {cache.num_sequences} "
        f"sequences at once on each{free}; key/value cache of a rank: "
        f"{cache.num_sequences}{' + 1' if cache.has_spare else ''} sequences x {cache.capacity} "
        f"tokens x {cache.bytes_per_token} bytes = {cache.num_bytes / _GIB:.2f} GiB "
        f"({cache.num_bytes / 1e9:.2f} GB in the unit of kv_cache_gb)\n"
        f"{config.train.train_rollouts} rollouts of {config.rows_per_rollout} responses, "
        f"{config.total_optimizer_steps} optimizer steps of {config.train.rows_per_optimizer_step} "
        f"rows, at most {tokens:,} response tokens\n"
    )


def most_response_tokens(config: Config) -> int:
    """Returns the most response tokens that a run trains on."""
    curriculum = config.rollout.max_response_tokens
    limits = [
        response_limit(
            step,
            start=curriculum.start,
            end=curriculum.end,
            ramp_steps=curriculum.ramp_steps,
            curve=curriculum.curve,
        )
        for step in range(config.train.train_rollouts)
    ]
    return sum(limits) * config.rows_per_rollout


def _plan_rank(
    config: Config,
    student: HFConfig,
    teacher: HFConfig,
    world_size: int,
    rank: int,
    cache: CacheSize,
) -> RankPlan:
    grid = _grid(config.parallel.layout, world_size)
    tp_rank, dp_rank, pp_rank = grid.place(rank)
    tp_size, pp_size, dp_size = grid.tp_size, grid.pp_size, grid.dp_size
    parallel, divisor = config.parallel, config.parallel.make_vocab_size_divisible_by
    student_parameters = count_parameters(
        student, divisor=divisor, tp_size=tp_size, pp_size=pp_size, pp_rank=pp_rank
    )
    head, body = _teacher_parameters(config, student, teacher, grid, rank)
    rollout_tp_size, rollout_pp_size = config.parallel.rollout_layout
    copied = 0
    if (rollout_tp_size, rollout_pp_size) != (tp_size, pp_size):
        rows = divisor * tp_size // rollout_tp_size  # as many as in training
        copied = count_parameters(
            student, divisor=rows, tp_size=rollout_tp_size, pp_size=rollout_pp_size, pp_rank=0
        )
    dtype_bytes = DTYPE_BYTES[config.model.params_dtype]
    state_bytes = (8 if dtype_bytes == 4 else 12) * student_parameters
    if parallel.use_distributed_optimizer:
        state_bytes = math.ceil(state_bytes / dp_size)
    layers_per_stage = student.num_layers // pp_size
    offloaded = dtype_bytes * body if config.model.teacher_offload else 0
    lasting = student_parameters + head + body + copied
    layers = range(pp_rank * layers_per_stage, (pp_rank + 1) * layers_per_stage)
    return RankPlan(
        rank=rank,
        tp_rank=tp_rank,
        dp_rank=dp_rank,
        pp_rank=pp_rank,
        layers=layers,
        vocab_rows=vocab_rows(
            student,
            divisor=divisor,
            tp_size=tp_size,
            pp_size=pp_size,
            tp_rank=tp_rank,
            pp_rank=pp_rank,
        ),
        student_parameters=student_parameters,
        teacher_parameters=head + body,
        weight_bytes=dtype_bytes * lasting - offloaded,
        offloaded_bytes=offloaded,
        gradient_bytes=4 * student_parameters,
        optimizer_bytes=state_bytes,
        kv_cache=cache,
        keeps_cache=bool(config.rollout.keep_kv_cache),
    )


def _teacher_parameters(
    config: Config, student: HFConfig, teacher: HFConfig, student_grid: RankGrid, rank: int
) -> tuple[int, int]:
    """Returns the parameters of the LM head that stays on a rank, and those of the rest.

    Both belong to the teacher. If its head is sharded in another way than the student's (because of
    a second layout or another number of rows), a second copy is read, which is sharded like the
    student's head and lies on the same ranks.
    """
    if not config.distill.has_teacher:
        return 0, 0
    divisor = config.parallel.make_vocab_size_divisible_by
    tp_size, pp_size = config.parallel.teacher_layout
    columns, own_columns = (
        padded_vocab_size(hf.vocab_size, divisor=divisor, tp_size=student_grid.tp_size)
        for hf in (student, teacher)
    )
    apart = config.parallel.has_teacher_layout or columns != own_columns
    _, _, pp_rank = _grid((tp_size, pp_size), student_grid.world_size).place(rank)
    body = count_parameters(
        teacher,
        divisor=divisor,
        tp_size=tp_size,
        pp_size=pp_size,
        pp_rank=pp_rank,
        with_head=not apart or config.distill.teacher_writes,
    )
    tp_rank, _, pp_rank = student_grid.place(rank)
    if pp_rank != student_grid.pp_size - 1:
        return 0, body
    head = columns // student_grid.tp_size * teacher.hidden_size
    return head, body if apart else body - head


def _grid(layout: tuple[int, int], world_size: int) -> RankGrid:
    return RankGrid(tp_size=layout[0], pp_size=layout[1], world_size=world_size)


def _check_fp8(config: Config, student: HFConfig, teacher: HFConfig) -> None:
    recipe, parallel = config.model.fp8_recipe, config.parallel
    for hf, fp8, tp_size in (
        (student, config.model.fp8, parallel.tensor_model_parallel_size),
        (teacher, config.model.teacher_fp8, parallel.teacher_layout[0]),
    ):
        if fp8 not in ("none", "auto"):
            check_fp8_fit(hf, recipe=recipe, tp_size=tp_size)


def _check_lengths(config: Config, hf: HFConfig) -> None:
    rollout, length = config.rollout, longest(config)
    if length > hf.max_position_embeddings:
        raise ValueError(
            f"max_prompt_tokens={rollout.max_prompt_tokens} and max_response_tokens.end="
            f"{rollout.max_response_tokens.end} make {length} tokens, which must be at most the "
            f"model's max_position_embeddings={hf.max_position_embeddings}; lower one of them"
        )


def _format_rank(plan: RankPlan) -> tuple[str, ...]:
    vocab = plan.vocab_rows
    sizes = (
        plan.weight_bytes, plan.gradient_bytes, plan.optimizer_bytes,
        plan.kv_cache.num_bytes, plan.total_bytes,
    )  # fmt: skip
    return (
        f"{plan.rank:4d} {plan.tp_rank:2d} {plan.dp_rank:2d} {plan.pp_rank:2d}",
        f"{plan.layers.start}-{plan.layers.stop - 1}",
        "none" if vocab is None else f"{vocab.start}-{vocab.stop - 1}",
        f"{plan.student_parameters / 1e6:.1f}",
        f"{plan.teacher_parameters / 1e6:.1f}",
        *(f"{size / _GIB:.2f}" for size in sizes),
    )
