"""The sections of a configuration: one frozen dataclass per component, each with its own checks.

A default is written at its field and nowhere else. The text under a field is its documentation,
which `opdlm train --help` and docs/configuration.md show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from megatron_opdlm.checks import require
from megatron_opdlm.config.annotations import MAY_CHANGE, PATH, OneOf, ParametersOf
from megatron_opdlm.config.schedules import CURVES
from megatron_opdlm.config.section import Section
from megatron_opdlm.diffusion.prediction import PREDICTIONS, SAME_POSITION
from megatron_opdlm.diffusion.remasking import RULES, RemaskingRule
from megatron_opdlm.diffusion.temperature import TEMPERATURE_RULE, is_temperature
from megatron_opdlm.distributed.vocab import rollout_divisor


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The models, and the number formats that they use."""

    student: Annotated[str, PATH, MAY_CHANGE]
    """Model to train: a Hugging Face directory, a checkpoint, or a run folder."""
    teacher: Annotated[str | None, PATH, MAY_CHANGE] = None
    """Frozen autoregressive model, given in the same ways; null = the student's initial weights."""
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; auto = transformer_engine if CUDA is available, else local."""
    params_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of weights and activations; auto = bfloat16 on CUDA, float32 on a CPU."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """FP8 matrix products through Transformer Engine; hybrid = e4m3 forward, e5m2 backward."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] = "tensorwise"
    """Scaling of FP8 tensors: tensorwise = by each tensor, delayed = by a history of tensors (only
    for the student), blockwise = by blocks of 128. There is no mxfp8: it is for Blackwell, and
    Hopper has no such kernels."""
    teacher_fp8: Literal["auto", "none", "hybrid", "e4m3"] = "auto"
    """FP8 matrix products of the frozen teacher; auto = what fp8 says."""
    teacher_offload: Annotated[bool, MAY_CHANGE] = False
    """Keeps the teacher's weights in pinned host memory outside its own phase; needs CUDA."""
    max_teacher_nll: Annotated[float | None, MAY_CHANGE] = None
    """Highest mean loss on the first prompts, in nats per token, with which a teacher is accepted
    at the start; null = only a warning if it is no better than a uniform guess."""
    recompute_granularity: Annotated[Literal["none", "selective", "full"], MAY_CHANGE] = "none"
    """Activations to recompute in the backward pass: none, selective = the core attention, full =
    whole layers."""
    apply_rope_fusion: bool = False
    """Rotates queries and keys in one kernel of Transformer Engine, with angles in float32."""
    bias_swiglu_fusion: Annotated[bool, MAY_CHANGE] = False
    """Compiles Megatron's SwiGLU into one kernel; needs CUDA."""
    gradient_accumulation_fusion: Annotated[bool, MAY_CHANGE] = False
    """Adds a weight's gradient to its float32 sum inside the matrix product, in the layers of
    Transformer Engine."""
    mask_token: str = "<|MASK|>"
    """Token that marks a masked position. The import adds it to tokenizer and embeddings."""
    mask_init: Literal["keep", "mean"] | None = None
    """The mask token's embedding at import: keep = the row's own values; mean = the mean of all
    other rows; null = mean if the row is new, else keep."""
    import_cache: Annotated[str | None, PATH, MAY_CHANGE] = None
    """Folder of imported Hugging Face models. Jobs may share it; null = imported/ beside save."""

    @property
    def teacher_path(self) -> str:
        """Path of the teacher, which is the student unless there is another."""
        return self.teacher or self.student

    def _check(self) -> None:
        require(bool(self.student), "student", self.student, "must be a path", "name a directory")
        require(bool(self.mask_token), "mask_token", "''", "must not be empty", "use <|MASK|>")
        fix = "name a folder, or null"
        require(self.import_cache != "", "import_cache", "''", "must be a path or null", fix)
        if self.max_teacher_nll is not None:
            self._positive("max_teacher_nll")
        for name in ("apply_rope_fusion", "gradient_accumulation_fusion"):
            rule = "needs Transformer Engine, layer_spec=local"
            fix = f"set layer_spec=transformer_engine on a CUDA machine, or {name}=false"
            require(not getattr(self, name) or self.layer_spec != "local", name, True, rule, fix)
        for name in ("fp8", "teacher_fp8"):
            value = getattr(self, name)
            if value in ("none", "auto"):
                continue
            needs = "needs Transformer Engine and bfloat16"
            fix = f"set layer_spec=transformer_engine on a CUDA machine, or {name}=none"
            require(self.layer_spec != "local", name, value, f"{needs}, layer_spec=local", fix)
            fix = f"set params_dtype=bfloat16 or {name}=none"
            is_float32 = self.params_dtype == "float32"
            require(not is_float32, name, value, f"{needs}, params_dtype=float32", fix)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """The distribution of models and batches over ranks."""

    tensor_model_parallel_size: Annotated[int, MAY_CHANGE] = 1
    """Number of ranks that share every layer; must divide the key/value heads."""
    pipeline_model_parallel_size: Annotated[int, MAY_CHANGE] = 1
    """Number of ranks that hold consecutive groups of layers; must divide the number of layers."""
    rollout_tensor_model_parallel_size: Annotated[int | None, MAY_CHANGE] = None
    """Tensor-parallel size of rollouts. They then have no pipeline and use a second copy of the
    student, filled from rank to rank before each rollout. null = training's layout and no copy."""
    teacher_tensor_model_parallel_size: Annotated[int | None, MAY_CHANGE] = None
    """Tensor-parallel size of the teacher; null = the student's."""
    teacher_pipeline_model_parallel_size: Annotated[int | None, MAY_CHANGE] = None
    """Pipeline-parallel size of the teacher; null = the student's."""
    sequence_parallel: Annotated[bool, MAY_CHANGE] = False
    """Splits activations along the tokens between tensor-parallel ranks; needs more than one."""
    use_distributed_optimizer: bool = True
    """Splits optimizer states between data-parallel ranks."""
    micro_batch_tokens: Annotated[int, MAY_CHANGE] = 16384
    """Most tokens of a packed microbatch on one data-parallel rank; the longest response with its
    noisy states must fit."""
    overlap_grad_reduce: Annotated[bool, MAY_CHANGE] = False
    """Reduces gradients between data-parallel ranks during the backward pass."""
    make_vocab_size_divisible_by: int = 128
    """The padded vocabulary is a multiple of this times tensor_model_parallel_size."""
    distributed_timeout_minutes: Annotated[int, MAY_CHANGE] = 60
    """Minutes after which a collective that one rank never joins is an error."""

    @property
    def layout(self) -> tuple[int, int]:
        """Tensor- and pipeline-parallel size of training."""
        return self.tensor_model_parallel_size, self.pipeline_model_parallel_size

    @property
    def rollout_layout(self) -> tuple[int, int]:
        """Tensor- and pipeline-parallel size of rollouts."""
        size = self.rollout_tensor_model_parallel_size
        return self.layout if size is None else (size, 1)

    @property
    def teacher_layout(self) -> tuple[int, int]:
        """Tensor- and pipeline-parallel size of the teacher."""
        tp_size = self.teacher_tensor_model_parallel_size
        pp_size = self.teacher_pipeline_model_parallel_size
        return (
            self.tensor_model_parallel_size if tp_size is None else tp_size,
            self.pipeline_model_parallel_size if pp_size is None else pp_size,
        )

    @property
    def has_rollout_layout(self) -> bool:
        """Whether rollouts have another layout than training, and so their own weights."""
        return self.rollout_layout != self.layout

    @property
    def has_teacher_layout(self) -> bool:
        """Whether the teacher has another layout than the student."""
        return self.teacher_layout != self.layout

    def _check(self) -> None:
        self._at_least(1, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        self._at_least(1, "micro_batch_tokens", "make_vocab_size_divisible_by")
        self._at_least(1, "distributed_timeout_minutes")
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if getattr(self, f"teacher_{name}") is not None:
                self._at_least(1, f"teacher_{name}")
        if self.rollout_tensor_model_parallel_size is not None:
            self._at_least(1, "rollout_tensor_model_parallel_size")
            rollout_divisor(
                self.make_vocab_size_divisible_by,
                training=self.tensor_model_parallel_size,
                rollout=self.rollout_tensor_model_parallel_size,
            )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel",
            True,
            f"needs tensor_model_parallel_size > 1, got {self.tensor_model_parallel_size}",
            "set sequence_parallel=false or use more tensor-parallel ranks",
        )


@dataclass(frozen=True, kw_only=True)
class ResponseLengthConfig(Section):
    """The curriculum of response lengths (paper section 4.3), see `schedules.response_limit`."""

    _path: ClassVar[tuple[str, ...]] = ("rollout", "max_response_tokens")

    start: int = 100
    """Longest response of the first rollout, in tokens."""
    end: int = 4000
    """Longest response after the ramp, in tokens."""
    ramp_steps: int = 100
    """Number of rollouts until `end` is reached; 0 = `end` from the first rollout. The paper's
    table says 10."""
    curve: Annotated[str, OneOf(CURVES)] = "cos"
    """Shape of the ramp at progress x:"""

    def _check(self) -> None:
        self._at_least(1, "start")
        self._at_least(0, "ramp_steps")
        fix = f"use end={self.start} or more, or a smaller start"
        rule = f"must be at least max_response_tokens.start={self.start}"
        require(self.end >= self.start, "max_response_tokens.end", self.end, rule, fix)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section):
    """How the student generates the responses it is trained on."""

    block_size: int = 4
    """Tokens of a block, which are decoded together."""
    denoising_steps: int = 4
    """Most denoising steps of one block; at most block_size."""
    prediction: Annotated[str, OneOf(PREDICTIONS)] = SAME_POSITION
    """Which output of the student predicts a masked position, in rollouts and in training:"""
    remasking: Annotated[str, OneOf(RULES)] = "low_confidence_dynamic"
    """Which tokens are kept at a denoising step, with n = block_size / denoising_steps:"""
    remasking_parameters: Annotated[Mapping[str, Any], ParametersOf(RULES)] = field(
        default_factory=dict
    )
    """Parameters of the remasking rules. Each is a key of the configuration."""
    temperature: float = 1.0
    """Sampling temperature; 0 = the most likely token."""
    top_k: int = 0
    """Number of most likely tokens to sample from; 0 = all tokens."""
    top_p: float = 1.0
    """Probability, in (0, 1], of the set of most likely tokens to sample from; 1 = all tokens."""
    prompts_per_rollout: int = 128
    """Number of prompts of one rollout."""
    samples_per_prompt: int = 1
    """Number of responses per prompt."""
    max_prompt_tokens: int = 2000
    """Most tokens of a prompt, including the template. Longer prompts are dropped and reported at
    the start."""
    max_response_tokens: ResponseLengthConfig = field(default_factory=ResponseLengthConfig)
    """Longest response of each rollout; a nested key: {start, end, ramp_steps, curve}."""
    rollout_batch_size: Annotated[int, MAY_CHANGE] = 128
    """Most sequences decoded at once on one data-parallel rank."""
    kv_cache_gb: Annotated[float | None, MAY_CHANGE] = None
    """Most memory for keys and values on one rank, in GB of 10^9 bytes; fewer rows are decoded at
    once if necessary. null = 80 % of a GPU's free memory at the start of a rollout; 4 GiB, which is
    4.3 GB, on a CPU."""
    cuda_graphs: Annotated[bool | None, MAY_CHANGE] = None
    """Captures decoding passes as CUDA graphs, one per size; null = where that is possible: on CUDA
    with bfloat16, a decoding kernel, and neither fp8 nor sequence_parallel. Graphs need a spare
    sequence; if memory has room for a few sequences only, null leaves them out."""
    keep_kv_cache: Annotated[bool | None, MAY_CHANGE] = None
    """Keeps the key/value cache and the captured passes between rollouts, in memory that training
    then lacks; making them anew is expected to take seconds. null = if passes are captured, as soon
    as training steps have shown that the cache takes at most half of what they leave free."""
    enable_thinking: bool = False
    """Passed to the chat template (Qwen3: whether the response begins with thoughts)."""

    @property
    def rule(self) -> RemaskingRule:
        """The remasking rule, with its parameters."""
        return self.rule_of(self.remasking)

    def rule_of(self, name: str) -> RemaskingRule:
        """Returns a remasking rule with the parameters that it has in this configuration."""
        rule: RemaskingRule = ParametersOf(RULES).make(name, self.remasking_parameters)
        return rule

    def _check(self) -> None:
        self._at_least(1, "block_size", "denoising_steps", "prompts_per_rollout")
        self._at_least(1, "samples_per_prompt", "max_prompt_tokens", "rollout_batch_size")
        self._at_least(0, "top_k")
        temperature, rule = self.temperature, f"must be {TEMPERATURE_RULE}"
        require(is_temperature(temperature), "temperature", temperature, rule, "use e.g. 1.0")
        self._fraction("top_p")
        rule = "applies only to sampling, not to greedy decoding (temperature=0)"
        for name, neutral in (("top_k", 0), ("top_p", 1.0), ("samples_per_prompt", 1)):
            value, fix = getattr(self, name), f"use {name}={neutral:g}, or a temperature above 0"
            require(temperature > 0 or value == neutral, name, value, rule, fix)
        if self.kv_cache_gb is not None:
            self._positive("kv_cache_gb")
        require(
            self.denoising_steps <= self.block_size,
            "denoising_steps",
            self.denoising_steps,
            f"must be at most block_size={self.block_size}",
            f"use 1 to {self.block_size}; every step commits at least one token",
        )
