"""What every rank of a run would hold, from the configuration alone: no GPU, no weights.

The layout is Megatron's: tensor-parallel ranks are neighbours, then data-parallel, then pipeline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_opdlm.blocks import round_up
from megatron_opdlm.config import Config
from megatron_opdlm.convert.families import FAMILIES
from megatron_opdlm.convert.files import read_json_object
from megatron_opdlm.convert.hf import HFConfig, parse_config
from megatron_opdlm.convert.importer import imported_config
from megatron_opdlm.convert.layout import read_description, resolve_iteration
from megatron_opdlm.convert.names import EMBEDDING, Plain, VocabRows
from megatron_opdlm.convert.path_kind import describe, is_checkpoint, is_hf_directory
from megatron_opdlm.convert.tokenizer import MASK_TOKEN
from megatron_opdlm.fp8 import check_fp8_fit
from megatron_opdlm.model import check_parallel_fit, padded_vocab_size
from megatron_opdlm.rollout.cache import CUDA_PAGE
from megatron_opdlm.schedules import response_limit

_BYTES = {"float32": 4, "bfloat16": 2}
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """A rank's key/value cache at the longest prompts and responses that the limits allow."""

    num_sequences: int
    """That its replica decodes at once."""
    has_spare: bool
    """Whether there is room for one more, which CUDA graphs write to and nobody reads."""
    capacity: int
    """Tokens per sequence."""
    bytes_per_token: int

    @property
    def num_bytes(self) -> int:
        """Of all sequences; only during a rollout."""
        return (self.num_sequences + self.has_spare) * self.capacity * self.bytes_per_token


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank's share of the models. Bytes are of tensors that live as long as the run."""

    rank: int
    tp_rank: int
    dp_rank: int
    pp_rank: int
    layers: range
    """Transformer layers, from 0."""
    vocab_rows: range | None
    """Rows of the padded vocabulary; None on a stage without embedding and head."""
    student_parameters: int
    teacher_parameters: int
    weight_bytes: int
    """Student, teacher and the student's copy for rollouts if there is one, in params_dtype."""
    gradient_bytes: int
    """The student's gradient buffer, float32."""
    optimizer_bytes: int
    """Adam's moments, and the float32 weights where params_dtype is bfloat16."""
    kv_cache: CachePlan

    @property
    def total_bytes(self) -> int:
        """All of them; activations and work space come on top."""
        lasting = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        return lasting + self.kv_cache.num_bytes


def rank_table(
    config: Config, *, student: HFConfig, teacher: HFConfig, world_size: int, cuda: bool = True
) -> list[RankPlan]:
    """Lays a run out over ranks.

    Args:
        config: resolved configuration.
        student: the student's hyperparameters.
        teacher: the teacher's.
        world_size: number of ranks.
        cuda: whether they are GPUs.

    Returns:
        One plan per rank, in rank order.

    Raises:
        ValueError: the models do not fit the configuration, or the ranks do not.
    """
    check_models(config, student=student, teacher=teacher, cuda=cuda)
    tp_size = config.parallel.tensor_model_parallel_size
    pp_size = config.parallel.pipeline_model_parallel_size
    if world_size < 1 or world_size % (tp_size * pp_size):
        raise ValueError(
            f"number of GPUs {world_size} must be a multiple of tensor_model_parallel_size x "
            f"pipeline_model_parallel_size = {tp_size} x {pp_size}; use a multiple of "
            f"{tp_size * pp_size}"
        )
    rollout_size, _ = _rollout_layout(config)
    if world_size % rollout_size:
        raise ValueError(
            f"rollout_tensor_model_parallel_size={rollout_size} must divide the number of GPUs, "
            f"{world_size}"
        )
    dp_size = world_size // (tp_size * pp_size)
    decoder = _decoder(config, student, teacher)
    cache = _plan_cache(config, decoder, _num_replicas(config, world_size), cuda)
    plans = []
    for rank in range(world_size):
        tp_rank, dp_rank = rank % tp_size, rank // tp_size % dp_size
        pp_rank = rank // (tp_size * dp_size)
        plans.append(
            _plan_rank(config, student, teacher, (tp_rank, dp_rank, pp_rank), dp_size, rank, cache)
        )
    return plans


def check_models(
    config: Config, *, student: HFConfig, teacher: HFConfig, cuda: bool = True
) -> None:
    """Refuses models that do not go with each other or with the configuration.

    Args:
        config: resolved configuration.
        student: the student's hyperparameters.
        teacher: the teacher's.
        cuda: whether the run is on GPUs.

    Raises:
        ValueError: naming field, value, rule and fix.
    """
    top_k = config.distill.top_k_logits
    if top_k >= teacher.vocab_size:
        raise ValueError(
            f"top_k_logits={top_k} must be below the teacher's vocabulary of {teacher.vocab_size} "
            "tokens; use 0 for all of them"
        )
    for hf in (student, teacher):
        check_parallel_fit(
            hf,
            tp_size=config.parallel.tensor_model_parallel_size,
            pp_size=config.parallel.pipeline_model_parallel_size,
        )
        if config.model.fp8 != "none":
            check_fp8_fit(
                hf,
                recipe=config.model.fp8_recipe,
                tp_size=config.parallel.tensor_model_parallel_size,
            )
        _check_lengths(config, hf)
    if (size := config.parallel.rollout_tensor_model_parallel_size) is not None:
        check_parallel_fit(student, tp_size=size, pp_size=1)
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"teacher has vocab_size={teacher.vocab_size}, which must equal the student's "
            f"{student.vocab_size}; use two models of one family, both imported with a mask token"
        )
    _plan_cache(config, _decoder(config, student, teacher), 1, cuda)


def find_model_config(
    model: str, *, mask_token: str = MASK_TOKEN, bundled: Path | None = None
) -> HFConfig:
    """Reads the hyperparameters of a checkpoint, or those that a Hugging Face directory will have.

    Args:
        model: path of the directory.
        mask_token: that its import will add.
        bundled: folder with `<directory name>.config.json` for models that are not on this machine.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no model of a known family.
    """
    path = Path(model)
    if is_hf_directory(path):
        return imported_config(path, mask_token)
    if is_checkpoint(path):
        return read_description(resolve_iteration(path)).config
    if bundled is not None and (copy := bundled / f"{path.name}.config.json").is_file():
        return parse_config(read_json_object(copy), {})
    raise FileNotFoundError(describe(path))


def format_table(plans: list[RankPlan]) -> str:
    """Writes the plans as a text table; sizes in GiB, parameters in millions."""
    header = (
        "rank tp dp pp", "layers", "vocab rows", "student M", "teacher M",
        "weights", "gradients", "optimizer", "kv cache", "sum GiB",
    )  # fmt: skip
    rows = [header, *map(_format_rank, plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def format_totals(config: Config, plans: list[RankPlan]) -> str:
    """Writes what the run amounts to: sizes, steps, and the most tokens it can train on."""
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
    tokens = sum(limits) * config.rows_per_rollout
    dp_size = 1 + max(plan.dp_rank for plan in plans)
    largest = max(plan.total_bytes for plan in plans)
    cache = plans[0].kv_cache
    free = " if free memory holds them" if config.rollout.kv_cache_gb is None else ""
    return (
        f"{len(plans)} ranks = tp {config.parallel.tensor_model_parallel_size} x dp {dp_size} x pp "
        f"{config.parallel.pipeline_model_parallel_size}; largest rank {largest / _GIB:.2f} GiB "
        "before activations\n"
        f"rollouts on {_num_replicas(config, len(plans))} replicas, {cache.num_sequences} "
        f"sequences at once on each{free}; key/value cache of a rank: "
        f"{cache.num_sequences}{' + 1' if cache.has_spare else ''} sequences x {cache.capacity} "
        f"tokens x {cache.bytes_per_token} bytes = {cache.num_bytes / _GIB:.2f} GiB\n"
        f"{config.train.train_rollouts} rollouts of {config.rows_per_rollout} responses, "
        f"{config.total_optimizer_steps} optimizer steps of {config.train.rows_per_optimizer_step} "
        f"rows, at most {tokens:,} response tokens\n"
    )


def _plan_rank(
    config: Config,
    student: HFConfig,
    teacher: HFConfig,
    place: tuple[int, int, int],
    dp_size: int,
    rank: int,
    cache: CachePlan,
) -> RankPlan:
    tp_rank, dp_rank, pp_rank = place
    parallel = config.parallel
    tp_size, pp_size = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    student_parameters = _count_parameters(config, student, tp_size, pp_size, pp_rank)
    teacher_parameters = 0
    if config.distill.responses != "data":
        teacher_parameters = _count_parameters(config, teacher, tp_size, pp_size, pp_rank)
    rollout_tp_size, rollout_pp_size = _rollout_layout(config)
    copied = 0
    if (rollout_tp_size, rollout_pp_size) != (tp_size, pp_size):
        copied = _count_parameters(config, student, rollout_tp_size, rollout_pp_size, 0)
    dtype_bytes = _BYTES[config.model.params_dtype]
    state_bytes = (8 if dtype_bytes == 4 else 12) * student_parameters
    if parallel.use_distributed_optimizer:
        state_bytes = math.ceil(state_bytes / dp_size)
    layers_per_stage = student.num_layers // parallel.pipeline_model_parallel_size
    layers = range(pp_rank * layers_per_stage, (pp_rank + 1) * layers_per_stage)
    return RankPlan(
        rank=rank,
        tp_rank=tp_rank,
        dp_rank=dp_rank,
        pp_rank=pp_rank,
        layers=layers,
        vocab_rows=_vocab_rows(config, student, tp_rank, pp_rank),
        student_parameters=student_parameters,
        teacher_parameters=teacher_parameters,
        weight_bytes=dtype_bytes * (student_parameters + teacher_parameters + copied),
        gradient_bytes=4 * student_parameters,
        optimizer_bytes=state_bytes,
        kv_cache=cache,
    )


def _rollout_layout(config: Config) -> tuple[int, int]:
    """Tensor and pipeline parallel size of rollouts."""
    parallel = config.parallel
    if parallel.rollout_tensor_model_parallel_size is not None:
        return parallel.rollout_tensor_model_parallel_size, 1
    return parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size


def _decoder(config: Config, student: HFConfig, teacher: HFConfig) -> HFConfig:
    """The model that writes the responses; the student, for evaluation, where the data do."""
    return teacher if config.distill.responses == "teacher" else student


def _decoding_layout(config: Config) -> tuple[int, int]:
    """Tensor and pipeline parallel size of that model: a teacher decodes where it is."""
    if config.distill.responses != "teacher":
        return _rollout_layout(config)
    parallel = config.parallel
    return parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size


def _count_parameters(
    config: Config, hf: HFConfig, tp_size: int, pp_size: int, pp_rank: int
) -> int:
    """Parameters of one rank. Norms are whole on every tensor-parallel rank, all else is split."""
    is_first, is_last = pp_rank == 0, pp_rank == pp_size - 1
    total = 0
    for entry in FAMILIES[hf.family].entries_for(hf):
        shape = entry.transform.megatron_shape(hf)
        if isinstance(entry.transform, VocabRows):
            shape = (_padded_vocab(config, hf), *shape[1:])
        whole = isinstance(entry.transform, Plain) and len(shape) == 1
        share = math.prod(shape) // (1 if whole else tp_size)
        if entry.per_layer:
            total += share * (hf.num_layers // pp_size)
        elif entry.hf == (EMBEDDING,):
            # Tied embeddings have a second copy on the last stage, whose head they are.
            total += share * (is_first or (is_last and hf.tie_word_embeddings))
        else:
            total += share * is_last
    return total


def _padded_vocab(config: Config, hf: HFConfig) -> int:
    return padded_vocab_size(
        hf.vocab_size,
        divisor=config.parallel.make_vocab_size_divisible_by,
        tp_size=config.parallel.tensor_model_parallel_size,
    )


def _vocab_rows(config: Config, hf: HFConfig, tp_rank: int, pp_rank: int) -> range | None:
    parallel = config.parallel
    if pp_rank not in (0, parallel.pipeline_model_parallel_size - 1):
        return None
    share = _padded_vocab(config, hf) // parallel.tensor_model_parallel_size
    return range(tp_rank * share, (tp_rank + 1) * share)


def _plan_cache(config: Config, hf: HFConfig, num_replicas: int, cuda: bool) -> CachePlan:
    """What `KVCache.for_model` allocates; it, too, refuses a limit below one sequence."""
    rollout, (tp_size, pp_size) = config.rollout, _decoding_layout(config)
    longest, has_spare, limit_gb = _longest(config), rollout.cuda_graphs, rollout.kv_cache_gb
    capacity = round_up(longest, CUDA_PAGE) if cuda else longest
    per_token = 2 * (hf.num_layers // pp_size) * (hf.num_query_groups // tp_size) * hf.kv_channels
    per_token *= _BYTES[config.model.params_dtype]
    num_sequences = min(
        rollout.rollout_batch_size, math.ceil(config.rows_per_rollout / num_replicas)
    )
    if limit_gb is not None:
        fitting = int(limit_gb * 1e9) // (per_token * capacity) - has_spare
        num_sequences = min(num_sequences, fitting)
    if num_sequences < 1:
        spare = " and the spare one of cuda_graphs" if has_spare else ""
        needed = per_token * capacity * (1 + has_spare)
        raise ValueError(
            f"kv_cache_gb={limit_gb} must hold at least one sequence{spare}: {longest} prompt and "
            f"response tokens need {needed / 1e9:.10g} GB; raise it, or lower max_prompt_tokens "
            "or max_response_tokens.end"
        )
    return CachePlan(
        num_sequences=num_sequences,
        has_spare=has_spare,
        capacity=capacity,
        bytes_per_token=per_token,
    )


def _num_replicas(config: Config, world_size: int) -> int:
    """Copies of the model that decode, each on its share of the ranks."""
    tp_size, pp_size = _decoding_layout(config)
    return world_size // (tp_size * pp_size)


def _longest(config: Config) -> int:
    """Tokens that the longest prompt and response fill; the last block is decoded whole."""
    rollout = config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens.end
    return round_up(longest, rollout.block_size)


def _check_lengths(config: Config, hf: HFConfig) -> None:
    rollout, longest = config.rollout, _longest(config)
    if longest > hf.max_position_embeddings:
        raise ValueError(
            f"max_prompt_tokens={rollout.max_prompt_tokens} and max_response_tokens.end="
            f"{rollout.max_response_tokens.end} make {longest} tokens, which must be at most the "
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
