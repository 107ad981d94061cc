"""Sections of the configuration that say how the student learns: see config/run.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_opdlm.checks import require
from megatron_opdlm.config.annotations import MAY_CHANGE, PATH, OneOf
from megatron_opdlm.config.section import Section, require_default_unless
from megatron_opdlm.diffusion.state_selection import STATE_SELECTIONS
from megatron_opdlm.loss.divergence_rules import JSD, MIXED, check_divergence
from megatron_opdlm.loss.reduction import LOSS_REDUCTIONS


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Section):
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
    """The other tokens: one outcome together; left out of the sum (as released; no divergence, and
    with reverse_kl it is least where the student is elsewhere); or of both distributions."""
    state_selection: Annotated[str, OneOf(STATE_SELECTIONS)] = "per_block"
    """Noisy states of a response:"""
    states_per_response: int = 1
    """Noisy states of one response; they share its clean pass. Not with state_selection: all."""
    eos_loss: Literal["include", "exclude"] = "include"
    """Whether the end-of-sequence position carries loss."""
    loss_reduction: Annotated[str, OneOf(LOSS_REDUCTIONS)] = "sequence_mean"
    """The loss of an optimizer step:"""

    @property
    def responses(self) -> Literal["student", "teacher", "data"]:
        """Who writes the responses."""
        if self.method in ("opdlm", "opdlm_off"):
            return "student"
        return "data" if self.sft_responses == "data" else "teacher"

    @property
    def takes_every_step(self) -> bool:
        """Whether a response is seen at every denoising step."""
        return STATE_SELECTIONS[self.state_selection].takes_every_step

    def _check(self) -> None:
        self._at_least(1, "states_per_response")
        self._check_loss()
        is_random, of_method = self.state_selection == "random", self.method != "opdlm"
        rule = f"must be random with method={self.method}"
        if is_random:
            rule = "is for the methods opdlm_off, off_policy and sft"
        fix = f"leave it out with method={self.method}, or use another method"
        require(is_random == of_method, "state_selection", self.state_selection, rule, fix)
        rule, fix = "is about method=sft", f"leave it out with method={self.method}"
        is_used = self.method == "sft" or self.sft_responses == "teacher"
        require(is_used, "sft_responses", self.sft_responses, rule, fix)
        rule = f"goes not with state_selection={self.state_selection}, which takes every step"
        is_free = self.states_per_response == 1 or not self.takes_every_step
        require(is_free, "states_per_response", self.states_per_response, rule, "use 1")

    def _check_loss(self) -> None:
        check_divergence(
            kind=self.divergence,
            reverse_kl_weight=self.reverse_kl_weight,
            jsd_alpha=self.jsd_alpha,
            top_k=self.top_k_logits,
            top_k_mode=self.top_k_mode,
        )
        if self.method == "sft":
            rule = "is not for method=sft, whose loss is the cross-entropy"
            for name in (
                "divergence",
                "top_k_logits",
                "reverse_kl_weight",
                "jsd_alpha",
                "top_k_mode",
            ):
                require_default_unless(False, self, name, rule, "leave it out")
        for name, is_used, where in (
            ("reverse_kl_weight", self.divergence == MIXED, f"divergence={MIXED}"),
            ("jsd_alpha", self.divergence == JSD, f"divergence={JSD}"),
            ("top_k_mode", self.top_k_logits > 0, "top_k_logits above 0"),
        ):
            require_default_unless(
                is_used, self, name, f"is about {where}", f"leave it out, or set {where}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
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
class TrainConfig(Section):
    """Data, length and outputs of the run."""

    data: Annotated[str, PATH, MAY_CHANGE]
    """Prompt file: JSONL with prompt or messages, or a JSON list with question."""
    save: Annotated[str, PATH, MAY_CHANGE]
    """Run folder; must be new or hold the same run."""
    teacher_responses: Annotated[str | None, PATH, MAY_CHANGE] = None
    """File that keeps the teacher's responses, for off_policy and sft; jobs may share it. null =
    teacher_responses.jsonl in save."""
    train_rollouts: Annotated[int, MAY_CHANGE]
    """Rollouts of the run; each is followed by its optimizer steps."""
    rows_per_optimizer_step: int = 8
    """Responses per optimizer step, over all ranks; must divide the responses of a rollout."""
    group_by_length: bool = True
    """Puts rows of like length into the same optimizer step, so that no data-parallel rank waits
    long for another, and takes the steps in random order; false = rows in the rollout's order."""
    seed: int = 1234
    """Every random choice is a function of it, the step, the prompt, the sample and the block."""
    save_interval: Annotated[int, MAY_CHANGE] = 10
    """Rollouts between checkpoints; 0 = only at the end."""
    keep_checkpoints: Annotated[int, MAY_CHANGE] = 2
    """Newest checkpoints to keep."""
    resume: Annotated[Literal["auto", "never"], MAY_CHANGE] = "auto"
    """auto = continue from the run folder's newest checkpoint; never = refuse a used folder."""
    log_samples: Annotated[int, MAY_CHANGE] = 4
    """Responses written to the run folder's rollouts/ per rollout."""
    eval_data: Annotated[str | None, PATH, MAY_CHANGE] = None
    """Prompt file with answers, for evaluation during training."""
    eval_interval: Annotated[int, MAY_CHANGE] = 0
    """Rollouts between evaluations; 0 = none. Needs eval_data."""
    eval_questions: Annotated[int, MAY_CHANGE] = 128
    """Questions of one evaluation, from the start of eval_data."""
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
        rule = f"goes with eval_interval > 0, got {self.eval_interval}"
        require(has_data == has_interval, "eval_data", self.eval_data, rule, fix)
        require_default_unless(
            has_data, self, "eval_questions", "is about eval_data", "leave it out"
        )
