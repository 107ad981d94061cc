"""Sections of the configuration that say how the student learns: see config/run.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron_opdlm.checks import require
from megatron_opdlm.config.annotations import MAY_CHANGE, PATH, OneOf, ParametersOf
from megatron_opdlm.config.methods import METHODS, Method, join
from megatron_opdlm.config.section import Section, require_default_unless
from megatron_opdlm.diffusion.state_selection import STATE_SELECTIONS, StateSelection
from megatron_opdlm.loss.divergence import DIVERGENCES, TOP_K_MODES, Divergence
from megatron_opdlm.loss.reduction import LOSS_REDUCTIONS


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Section):
    """The responses and noisy states that the student learns from, and the loss."""

    preset: Literal["official", "paper"] = "official"
    """Values of keys that are not given: those of the released launchers, or of the paper's
    equations."""
    method: Annotated[str, OneOf(METHODS)] = "opdlm"
    """Source of the responses, noisy states and targets:"""
    sft_responses: Literal["teacher", "data"] = "teacher"
    """For sft: teacher = responses sampled from the teacher; data = the `response` of every entry
    of the data, and no teacher is loaded."""
    divergence: Annotated[str, OneOf(DIVERGENCES)] = "forward_kl"
    """Per-token loss, in nats:"""
    divergence_parameters: Annotated[Mapping[str, Any], ParametersOf(DIVERGENCES)] = field(
        default_factory=dict
    )
    """Parameters of the divergences."""
    top_k_logits: int = 0
    """How many of the teacher's likeliest tokens the divergence distinguishes; 0 = all tokens."""
    top_k_mode: Annotated[str, OneOf(TOP_K_MODES)] = "tail"
    """How the other tokens count:"""
    state_selection: Annotated[str, OneOf(STATE_SELECTIONS)] = "per_block"
    """Noisy states at which a response is seen; the method limits the choice:"""
    states_per_response: int = 1
    """Number of noisy states of one response, which share its clean part. It must be 1 with
    state_selection: all."""
    eos_loss: Literal["include", "exclude"] = "include"
    """Whether the end-of-sequence position has a loss."""
    loss_reduction: Annotated[str, OneOf(LOSS_REDUCTIONS)] = "sequence_mean"
    """The loss of an optimizer step:"""

    @property
    def method_record(self) -> Method:
        """The record of the method."""
        return METHODS[self.method]

    @property
    def responses(self) -> str:
        """Writer of the responses: one of WRITERS."""
        method = self.method_record
        return self.sft_responses if method.has_choice_of_writer else method.writers[0]

    @property
    def student_writes(self) -> bool:
        """Whether the student decodes the responses, in denoising steps."""
        return self.responses == "student"

    @property
    def teacher_writes(self) -> bool:
        """Whether the teacher decodes the responses."""
        return self.responses == "teacher"

    @property
    def data_writes(self) -> bool:
        """Whether the prompt file gives the responses."""
        return self.responses == "data"

    @property
    def learns_from_tokens(self) -> bool:
        """Whether the targets are the responses' tokens, so that the loss is the cross-entropy."""
        return self.method_record.target == "tokens"

    @property
    def is_nelbo(self) -> bool:
        """Whether the loss is the NELBO of block diffusion: token targets under random masks."""
        return self.learns_from_tokens and not self.selection.reads_trajectory

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is loaded: it writes the responses, or gives the targets."""
        return self.teacher_writes or not self.learns_from_tokens

    def make_divergence(self) -> Divergence:
        """Returns the divergence of the loss."""
        kinds, values = ParametersOf(DIVERGENCES), self.divergence_parameters
        return Divergence(
            kind=kinds.make(self.divergence, values),
            top_k=self.top_k_logits,
            top_k_mode=self.top_k_mode,
        )

    @property
    def selection(self) -> StateSelection:
        """The record of the state selection."""
        return STATE_SELECTIONS[self.state_selection]

    def _check(self) -> None:
        self._at_least(1, "states_per_response")
        self._check_loss()
        self._check_method()
        rule = f"must be 1 with state_selection={self.state_selection}, which takes every step"
        is_free = self.states_per_response == 1 or not self.selection.takes_every_step
        require(is_free, "states_per_response", self.states_per_response, rule, "use 1")

    def _check_method(self) -> None:
        method, state, here = self.method_record, self.state_selection, f"method={self.method}"
        rule = f"must be {join(method.selections, 'or')} with {here}"
        if len(method.selections) > 1:
            users = [name for name, other in METHODS.items() if state in other.selections]
            kind = "method" if len(users) == 1 else "methods"
            rule = f"applies only to the {kind} {join(users)}" if users else rule
        fix = f"leave it out with {here}, or use another method"
        require(state in method.selections, "state_selection", state, rule, fix)
        users = [name for name, other in METHODS.items() if other.has_choice_of_writer]
        rule, fix = f"applies only to method={join(users, 'or')}", f"leave it out with {here}"
        require_default_unless(method.has_choice_of_writer, self, "sft_responses", rule, fix)
        rule, fix = f"must be {join(method.writers, 'or')} with {here}", "use one of them"
        is_one = not method.has_choice_of_writer or self.sft_responses in method.writers
        require(is_one, "sft_responses", self.sft_responses, rule, fix)

    def _check_loss(self) -> None:
        self.make_divergence()  # refuses values out of range
        kinds, values = ParametersOf(DIVERGENCES), self.divergence_parameters
        changed = kinds.changed(values)
        if self.learns_from_tokens:
            rule = f"does not apply to method={self.method}, whose loss is the cross-entropy"
            for name in ("divergence", "top_k_logits", "top_k_mode"):
                require_default_unless(False, self, name, rule, "leave it out")
            for name in changed:
                require(False, name, values[name], rule, "leave it out")
        for name, users in changed.items():
            where = f"divergence={join(users, 'or')}"
            is_used, fix = self.divergence in users, f"leave it out, or set {where}"
            require(is_used, name, values[name], f"applies only to {where}", fix)
        where = "top_k_logits above 0"
        is_used, fix = self.top_k_logits > 0, f"leave it out, or set {where}"
        require_default_unless(is_used, self, "top_k_mode", f"applies only to {where}", fix)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW, its schedule and gradient clipping."""

    lr: float = 1e-5
    """Highest learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine and after it."""
    lr_warmup_steps: int | None = None
    """Optimizer steps of linear warm-up; null = the steps of 5 rollouts, as in the paper (80)."""
    lr_decay_steps: int | None = None
    """Optimizer step at which the cosine ends; null = the last one of the run."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Number added to the root of the second moment."""
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
class TrainConfig(Section):
    """Data, length and outputs of the run."""

    data: Annotated[str, PATH, MAY_CHANGE]
    """Prompt file: JSONL, or a JSON list. Each entry has prompt, question or messages."""
    save: Annotated[str, PATH, MAY_CHANGE]
    """Run folder; it must be new, or belong to the same run."""
    teacher_responses: Annotated[str | None, PATH, MAY_CHANGE] = None
    """File of the teacher's responses, for off_policy and sft; several jobs may share it. null =
    teacher_responses.jsonl in save."""
    train_rollouts: Annotated[int, MAY_CHANGE]
    """Number of rollouts of the run. Optimizer steps follow each rollout."""
    rows_per_optimizer_step: int = 8
    """Responses per optimizer step, over all ranks; must divide the responses of a rollout."""
    group_by_length: bool = True
    """Puts rows of similar length into the same optimizer step, so that no data-parallel rank waits
    long for another, and takes the steps in random order; false = rows in the rollout's order."""
    seed: int = 1234
    """Every random choice depends on this, the step, the prompt, the sample and the block."""
    save_interval: Annotated[int, MAY_CHANGE] = 10
    """Rollouts between checkpoints; 0 = only at the end."""
    keep_checkpoints: Annotated[int, MAY_CHANGE] = 2
    """How many of the newest checkpoints to keep."""
    resume: Annotated[Literal["auto", "never"], MAY_CHANGE] = "auto"
    """auto = continue from the run folder's newest checkpoint; never = refuse a used folder."""
    log_samples: Annotated[int, MAY_CHANGE] = 4
    """Responses per rollout that are written to rollouts/ in the run folder."""
    eval_data: Annotated[str | None, PATH, MAY_CHANGE] = None
    """Prompt file with answers, for evaluation during training. An entry may name its grader;
    others are graded as numbers."""
    eval_interval: Annotated[int, MAY_CHANGE] = 0
    """Rollouts between evaluations; 0 = no evaluation. Needs eval_data."""
    eval_questions: Annotated[int, MAY_CHANGE] = 128
    """Number of questions of one evaluation; they are the first ones of eval_data."""
    wandb_project: Annotated[str | None, MAY_CHANGE] = None
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
        fix = "set both eval_data and eval_interval, or eval_data=null and eval_interval=0"
        has_data, has_interval = self.eval_data is not None, self.eval_interval > 0
        rule = f"must be given together with eval_interval > 0, got {self.eval_interval}"
        require(has_data == has_interval, "eval_data", self.eval_data, rule, fix)
        require_default_unless(
            has_data, self, "eval_questions", "applies only to eval_data", "leave it out"
        )
