"""The sections of a configuration: one frozen dataclass per component, each with its own checks.

A default lives on its field and nowhere else; the text under a field is its documentation, shown by
`opdlm train --help` and in docs/configuration.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from megatron_opdlm.config_schema import (
    check_value,
    require,
    section_keys,
)
from megatron_opdlm.vocab import rollout_divisor


@dataclass(frozen=True, kw_only=True)
class _Section:
    """Checks the type of every field, then the rules of the section."""

    _path: ClassVar[tuple[str, ...]] = ("section",)

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for key in section_keys(cls, *self._path):
            if len(key.path) > len(self._path) + 1:
                continue  # of a nested section, which has checked itself
            name = key.path[-1]
            value = getattr(self, name)
            object.__setattr__(self, name, check_value(key.name, value, key.annotation))
        self._check()

    def _check(self) -> None:
        """Raises ValueError for a value outside its range."""

    def _at_least(self, minimum: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            key = ".".join((*self._path[1:], name))
            require(
                value >= minimum,
                key,
                value,
                f"must be at least {minimum}",
                f"use {minimum} or more",
            )

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value > 0, name, value, "must be positive", "use a number above 0")

    def _fraction(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(0 < value <= 1, name, value, "must lie in (0, 1]", "use e.g. 0.9")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """Which models, and in which number format they run."""

    student: str
    """Model to convert: a Hugging Face directory or a checkpoint of `opdlm convert import`."""
    teacher: str | None = None
    """Frozen autoregressive model, in the same two forms; null = the student's initial weights."""
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; auto = transformer_engine where CUDA is available, else local."""
    params_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of weights and activations; auto = bfloat16 on CUDA, float32 on a CPU."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """FP8 matrix products through Transformer Engine; hybrid = e4m3 forward, e5m2 backward."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] = "tensorwise"
    """Scaling of FP8 tensors: by the tensor, by a history of tensors (the student alone), or by
    blocks of 128. mxfp8 is for Blackwell; Hopper has no such kernels."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations to recompute in the backward pass: none, the core attention, or whole layers."""
    mask_token: str = "<|MASK|>"
    """Token that marks a masked position; import adds it to tokenizer and embeddings."""
    mask_init: Literal["keep", "mean"] | None = None
    """Its embedding at import: keep the free row, or a mean of the others; null = mean if new."""
    import_cache: str | None = None
    """Folder for imports of Hugging Face models, shared by jobs; null = imported/ beside save."""

    def _check(self) -> None:
        require(bool(self.student), "student", self.student, "must be a path", "name a directory")
        require(bool(self.mask_token), "mask_token", "''", "must not be empty", "use <|MASK|>")
        fix = "name a folder, or null"
        require(self.import_cache != "", "import_cache", "''", "must be a path or null", fix)
        if self.fp8 != "none":
            needs = "needs Transformer Engine and bfloat16"
            fix = "set layer_spec=transformer_engine on a CUDA machine, or fp8=none"
            require(self.layer_spec != "local", "fp8", self.fp8, f"{needs}, layer_spec=local", fix)
            fix = "set params_dtype=bfloat16 or fp8=none"
            is_float32 = self.params_dtype == "float32"
            require(not is_float32, "fp8", self.fp8, f"{needs}, params_dtype=float32", fix)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(_Section):
    """How the models and the batch are spread over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer; must divide the key/value heads."""
    pipeline_model_parallel_size: int = 1
    """Ranks that hold consecutive groups of layers; must divide the number of layers."""
    rollout_tensor_model_parallel_size: int | None = None
    """Tensor-parallel size of rollouts, which then have no pipeline: a second copy of the student,
    filled from rank to rank before each rollout. null = training's layout and no copy."""
    sequence_parallel: bool = False
    """Splits activations between tensor-parallel ranks along the tokens; needs more than one."""
    use_distributed_optimizer: bool = True
    """Splits optimizer states between data-parallel ranks."""
    micro_batch_tokens: int = 16384
    """Tokens of one packed microbatch on one data-parallel rank; the longest row must fit."""
    overlap_grad_reduce: bool = False
    """Reduces gradients between data-parallel ranks during the backward pass."""
    make_vocab_size_divisible_by: int = 128
    """The padded vocabulary is a multiple of this times tensor_model_parallel_size."""
    distributed_timeout_minutes: int = 60
    """Minutes before a collective that one rank never joins is an error."""

    def _check(self) -> None:
        self._at_least(1, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        self._at_least(1, "micro_batch_tokens", "make_vocab_size_divisible_by")
        self._at_least(1, "distributed_timeout_minutes")
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
class ResponseLengthConfig(_Section):
    """The rollout-length curriculum (paper section 4.3), read by `schedules.response_limit`."""

    _path: ClassVar[tuple[str, ...]] = ("rollout", "max_response_tokens")

    start: int = 100
    """Longest response of the first rollout, in tokens."""
    end: int = 4000
    """Longest response once the ramp is over, in tokens."""
    ramp_steps: int = 100
    """Rollouts until `end` is reached; 0 = from the first one. The paper's table says 10."""
    curve: Literal["linear", "cos", "sin"] = "cos"
    """Shape of the ramp at progress x: x, 1 - cos(x pi/2) (slow start) or sin(x pi/2)."""

    def _check(self) -> None:
        self._at_least(1, "start")
        self._at_least(0, "ramp_steps")
        fix = f"use end={self.start} or more, or a smaller start"
        rule = f"must be at least max_response_tokens.start={self.start}"
        require(self.end >= self.start, "max_response_tokens.end", self.end, rule, fix)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(_Section):
    """How the student generates the responses it is trained on."""

    block_size: int = 4
    """Tokens decoded together."""
    denoising_steps: int = 4
    """Most student forwards on one block; at most block_size."""
    remasking: Literal[
        "low_confidence_static", "low_confidence_dynamic", "entropy_bounded", "sequential"
    ] = "low_confidence_dynamic"
    """What becomes a token: the n surest; also all above a threshold; also as many as keep the sum
    of entropies below a bound; the n leftmost."""
    confidence_threshold: float = 0.9
    """Probability above which low_confidence_dynamic keeps a token, in (0, 1]."""
    entropy_bound: float = 0.35
    """Entropies, in nats, of the positions that entropy_bounded keeps at once sum to less."""
    temperature: float = 1.0
    """Sampling temperature; 0 = the most likely token."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that hold this probability together, in (0, 1]."""
    prompts_per_rollout: int = 128
    """Prompts of one rollout."""
    samples_per_prompt: int = 1
    """Responses per prompt."""
    max_prompt_tokens: int = 2000
    """Prompts with more tokens, template included, are dropped once at the start and reported."""
    max_response_tokens: ResponseLengthConfig = field(default_factory=ResponseLengthConfig)
    """Longest response by rollout; a nested key: {start, end, ramp_steps, curve}."""
    rollout_batch_size: int = 128
    """Most rows decoded at once on one data-parallel rank."""
    kv_cache_gb: float | None = None
    """Most memory for keys and values on one rank, in GB; fewer rows are decoded at once if need
    be. null = 80 % of a GPU's free memory at the start of a rollout; 4.3 on a CPU."""
    cuda_graphs: bool = False
    """Captures decoding passes as CUDA graphs, one per size; needs CUDA and bfloat16. Tested on a
    CPU with a stand-in only."""
    enable_thinking: bool = False
    """Passed to the chat template (Qwen3: whether the response begins with thoughts)."""

    def _check(self) -> None:
        self._at_least(1, "block_size", "denoising_steps", "prompts_per_rollout")
        self._at_least(1, "samples_per_prompt", "max_prompt_tokens", "rollout_batch_size")
        self._at_least(0, "temperature", "top_k", "entropy_bound")
        self._fraction("confidence_threshold", "top_p")
        if self.kv_cache_gb is not None:
            self._positive("kv_cache_gb")
        require(
            self.denoising_steps <= self.block_size,
            "denoising_steps",
            self.denoising_steps,
            f"must be at most block_size={self.block_size}",
            f"use 1 to {self.block_size}; every step commits at least one token",
        )


@dataclass(frozen=True, kw_only=True)
class DistillConfig(_Section):
    """Which states the student learns from, and the loss on them."""

    preset: Literal["official", "paper"] = "official"
    """Values for keys not given: the released launchers, or the paper's equations to the letter."""
    method: Literal["opdlm", "opdlm_off", "off_policy", "sft"] = "opdlm"
    """opdlm = the student's rollouts at states of their own trajectories; opdlm_off = its rollouts
    under random masks; off_policy = the teacher's responses under random masks; sft = cross-entropy
    on responses under random masks (the NELBO of block diffusion)."""
    sft_responses: Literal["teacher", "data"] = "teacher"
    """sft: responses sampled from the teacher, or the `response` of every entry of the data; then
    no teacher is loaded."""
    divergence: Literal["forward_kl", "reverse_kl", "mixed", "jsd"] = "forward_kl"
    """Per-token loss, in nats: KL(teacher || student), KL(student || teacher), a weighted sum of
    both, or Jensen-Shannon."""
    reverse_kl_weight: float = 0.5
    """mixed: w of (1 - w) KL(teacher || student) + w KL(student || teacher), in [0, 1]."""
    jsd_alpha: float = 0.5
    """jsd: weight a of the teacher in a KL(teacher || m) + (1 - a) KL(student || m), in (0, 1)."""
    top_k_logits: int = 0
    """Likeliest tokens of the teacher that the divergence tells apart; 0 = the full vocabulary."""
    top_k_mode: Literal["tail", "raw", "renormalized"] = "tail"
    """The other tokens: one outcome together; left out (as released; no divergence); or left out of
    both distributions."""
    state_selection: Literal["per_block", "trajectory", "all", "random"] = "per_block"
    """Noisy states: a denoising step drawn per block; one drawn for the whole trajectory; every
    step; or random masks, which all methods but opdlm have."""
    states_per_response: int = 1
    """Noisy states of one response; they share its clean pass. Not with state_selection: all."""
    eos_loss: Literal["include", "exclude"] = "include"
    """Whether the end-of-sequence position carries loss."""
    loss_reduction: Literal["sequence_mean", "token_mean", "token_sum"] = "sequence_mean"
    """Mean over rows of the mean per row, mean over all loss tokens, or sum per row, averaged."""

    @property
    def responses(self) -> Literal["student", "teacher", "data"]:
        """Who writes the responses."""
        if self.method in ("opdlm", "opdlm_off"):
            return "student"
        return "data" if self.sft_responses == "data" else "teacher"

    def _check(self) -> None:
        self._at_least(0, "top_k_logits")
        self._at_least(1, "states_per_response")
        require(
            0 <= self.reverse_kl_weight <= 1,
            "reverse_kl_weight", self.reverse_kl_weight, "must lie in [0, 1]", "use e.g. 0.5",
        )  # fmt: skip
        require(
            0 < self.jsd_alpha < 1,
            "jsd_alpha", self.jsd_alpha, "must lie in (0, 1)", "use e.g. 0.5",
        )  # fmt: skip
        is_random = self.state_selection == "random"
        require(
            is_random == (self.method != "opdlm"),
            "state_selection", self.state_selection,
            "must be random with the methods opdlm_off, off_policy and sft, and only there",
            f"leave it out with method={self.method}, or use another method",
        )  # fmt: skip
        is_plain = self.divergence == "forward_kl" and self.top_k_logits == 0
        rule = "must be forward_kl with all tokens: against one token it is the cross-entropy"
        fix = "leave divergence and top_k_logits out with method=sft"
        require(self.method != "sft" or is_plain, "divergence", self.divergence, rule, fix)
        rule, fix = "is about method=sft", f"leave it out with method={self.method}"
        is_used = self.method == "sft" or self.sft_responses == "teacher"
        require(is_used, "sft_responses", self.sft_responses, rule, fix)
        rule = "goes not with state_selection=all, which takes every denoising step"
        is_free = self.states_per_response == 1 or self.state_selection != "all"
        require(is_free, "states_per_response", self.states_per_response, rule, "use 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Section):
    """AdamW, its schedule and gradient clipping."""

    lr: float = 1e-5
    """Highest learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine, and ever after."""
    lr_warmup_steps: int | None = None
    """Optimizer steps of linear warm-up; null = those of 5 rollouts, as the paper counts (80)."""
    lr_decay_steps: int | None = None
    """Optimizer step at which the cosine ends; null = the last one of the run."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""

    def _check(self) -> None:
        self._positive("lr", "adam_eps")
        self._at_least(0, "min_lr", "weight_decay", "clip_grad")
        if self.lr_warmup_steps is not None:
            self._at_least(0, "lr_warmup_steps")
        rule = f"must be at most lr={self.lr}"
        require(self.min_lr <= self.lr, "min_lr", self.min_lr, rule, "lower min_lr or raise lr")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "must lie in [0, 1)", "use e.g. 0.9")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
    """Data, length and outputs of the run."""

    data: str
    """Prompt file: JSONL with prompt or messages, or a JSON list with question."""
    save: str
    """Run folder; must be new or hold the same run."""
    teacher_responses: str | None = None
    """File that keeps the teacher's responses, for off_policy and sft; jobs may share it. null =
    teacher_responses.jsonl in save."""
    train_rollouts: int
    """Rollouts of the run; each is followed by its optimizer steps."""
    rows_per_optimizer_step: int = 8
    """Responses per optimizer step, over all ranks; must divide the responses of a rollout."""
    seed: int = 1234
    """Every random choice is a function of it, the step, the prompt, the sample and the block."""
    save_interval: int = 10
    """Rollouts between checkpoints; 0 = only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    resume: Literal["auto", "never"] = "auto"
    """auto = continue from the run folder's newest checkpoint; never = refuse a used folder."""
    log_samples: int = 4
    """Responses written to the run folder's rollouts/ per rollout."""
    eval_data: str | None = None
    """Prompt file with answers, for evaluation during training."""
    eval_interval: int = 0
    """Rollouts between evaluations; 0 = none. Needs eval_data."""
    eval_questions: int = 128
    """Questions of one evaluation, from the start of eval_data."""
    wandb_project: str | None = None
    """Weights & Biases project; null = off. TensorBoard and metrics.jsonl are always written."""

    def _check(self) -> None:
        self._at_least(1, "train_rollouts", "rows_per_optimizer_step", "keep_checkpoints")
        self._at_least(0, "seed", "save_interval", "log_samples", "eval_interval")
        self._at_least(1, "eval_questions")
        for name in ("data", "save"):
            value = getattr(self, name)
            require(bool(value), name, "''", "must be a path", "name a file or folder")
        fix = "name a file, or null"
        given = self.teacher_responses
        require(given != "", "teacher_responses", "''", "must be a path or null", fix)
        fix = "set both eval_data and eval_interval, or neither"
        has_data, has_interval = self.eval_data is not None, self.eval_interval > 0
        rule = f"goes with eval_interval > 0, got {self.eval_interval}"
        require(has_data == has_interval, "eval_data", self.eval_data, rule, fix)
