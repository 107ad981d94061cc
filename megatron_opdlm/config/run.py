"""The configuration of a run, and its strict loader.

In YAML and on the command line every key is flat and unique (`lr`, `block_size`); the sections of
`config/sections.py` only group them in code (`config.optimizer.lr`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_opdlm.checks import require
from megatron_opdlm.config.decoding import DecodingModel
from megatron_opdlm.config.learning import DistillConfig, OptimizerConfig, TrainConfig
from megatron_opdlm.config.methods import METHODS
from megatron_opdlm.config.schema import (
    build,
    check_value,
    collect_keys,
    flatten,
    parse_text,
    unknown_key_error,
)
from megatron_opdlm.config.section import require_default_unless
from megatron_opdlm.config.sections import (
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
)

WARMUP_ROLLOUTS = 5
"""Rollouts of warm-up in the paper's Table 13."""

PRESETS: dict[str, dict[str, Any]] = {
    "official": {},  # the defaults of the fields
    "paper": {
        "state_selection": "trajectory",
        "loss_reduction": "token_sum",
        "max_response_tokens.curve": "linear",
        "max_response_tokens.ramp_steps": 10,
    },
}
"""Values that a preset sets. A key that the user gives wins over the preset."""
TEACHER_KEYS = ("teacher", "teacher_fp8", "teacher_offload")
TEACHER_LAYOUT = ("teacher_tensor_model_parallel_size", "teacher_pipeline_model_parallel_size")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration of a run."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig

    def __post_init__(self) -> None:
        self._check_rows()
        self._check_schedule()
        self._check_longest_row()
        self._check_responses()
        self._check_graphs()

    @property
    def rows_per_rollout(self) -> int:
        """Number of responses of one rollout, over all ranks."""
        return self.rollout.prompts_per_rollout * self.rollout.samples_per_prompt

    @property
    def optimizer_steps_per_rollout(self) -> int:
        """Number of optimizer steps after each rollout."""
        return self.rows_per_rollout // self.train.rows_per_optimizer_step

    @property
    def total_optimizer_steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return self.train.train_rollouts * self.optimizer_steps_per_rollout

    @property
    def lr_decay_steps(self) -> int:
        """Optimizer step at which the learning rate reaches min_lr."""
        given = self.optimizer.lr_decay_steps
        return self.total_optimizer_steps if given is None else given

    @property
    def lr_warmup_steps(self) -> int:
        """Number of optimizer steps of the linear warm-up."""
        given = self.optimizer.lr_warmup_steps
        of_the_paper = WARMUP_ROLLOUTS * self.optimizer_steps_per_rollout
        return min(of_the_paper, self.lr_decay_steps) if given is None else given

    @property
    def longest_row_tokens(self) -> int:
        """Upper bound of the tokens of one example's stream, [clean x0 | noisy xt].

        The clean part is prompt and response up to the end of their last block. The noisy part has,
        for every state, the blocks of the response. The first of them may begin with up to
        block_size - 1 prompt tokens.
        """
        prompt, response = self.rollout.max_prompt_tokens, self.rollout.max_response_tokens.end
        states = self.distill.states_per_response
        if self.distill.selection.takes_every_step:
            states = self.rollout.denoising_steps
        more = self.rollout.block_size - 1
        return prompt + response + more + states * (response + 2 * more)

    def resolved(self, *, cuda: bool, transformer_engine: bool | None = None) -> Config:
        """Returns the configuration with every automatic value replaced by its actual value.

        Args:
            cuda: whether the run's machine has CUDA devices.
            transformer_engine: whether it has Transformer Engine; None assumes so if it has CUDA.

        Raises:
            ValueError: this machine cannot run the configuration (such as FP8 without CUDA).
        """
        layer_spec: Literal["transformer_engine", "local"]
        dtype: Literal["bfloat16", "float32"]
        fix = "on a CPU they are in host memory already: use teacher_offload=false"
        rule = "applies only to weights on a GPU, and there is none"
        require(cuda or not self.model.teacher_offload, "teacher_offload", True, rule, fix)
        fused, rule = self.model.bias_swiglu_fusion, "compiles kernels of a GPU, and there is none"
        require(cuda or not fused, "bias_swiglu_fusion", True, rule, "use bias_swiglu_fusion=false")
        engine = cuda if transformer_engine is None else transformer_engine
        layer_spec, dtype = "local", "float32"
        if engine:
            layer_spec = "transformer_engine"
        if cuda:
            dtype = "bfloat16"
        has_teacher = self.distill.has_teacher
        auto_fp8, teacher = self.model.teacher_fp8 == "auto", self.model.teacher
        if teacher is None and has_teacher:
            teacher = self.model.student
        model = dataclasses.replace(
            self.model,
            teacher=teacher,
            teacher_fp8=self.model.fp8 if auto_fp8 and has_teacher else self.model.teacher_fp8,
            layer_spec=layer_spec if self.model.layer_spec == "auto" else self.model.layer_spec,
            params_dtype=dtype if self.model.params_dtype == "auto" else self.model.params_dtype,
        )
        optimizer = dataclasses.replace(
            self.optimizer,
            lr_warmup_steps=self.lr_warmup_steps,
            lr_decay_steps=self.lr_decay_steps,
        )
        is_16_bit, graphs = model.params_dtype != "float32", self.rollout.cuda_graphs
        rule, fix = "cannot be used with params_dtype=float32", "use bfloat16, or cuda_graphs=null"
        require(is_16_bit or not (cuda and graphs), "cuda_graphs", graphs, rule, fix)
        return dataclasses.replace(self, model=model, optimizer=optimizer)

    @property
    def decoders(self) -> tuple[DecodingModel, ...]:
        """The models that decode: the student if it writes responses or is evaluated, the teacher
        if it writes. If the data give the responses and nothing is evaluated, it is the student.
        """
        parallel, model = self.parallel, self.model
        student = DecodingModel(
            role="student",
            layout=parallel.rollout_layout,
            sequence_parallel=parallel.sequence_parallel and not parallel.has_rollout_layout,
            fp8=model.fp8,
        )
        if not self.distill.teacher_writes:
            return (student,)
        teacher = DecodingModel(
            role="teacher",
            layout=parallel.teacher_layout,
            sequence_parallel=parallel.sequence_parallel and parallel.teacher_layout[0] > 1,
            fp8=model.fp8 if model.teacher_fp8 == "auto" else model.teacher_fp8,
        )
        return (teacher,) if self.train.eval_data is None else (student, teacher)

    @property
    def writer(self) -> DecodingModel:
        """The model that decodes the responses.

        If the data give the responses, it is the student, which decodes for evaluation.
        """
        return self.decoders[-1]

    def _check_graphs(self) -> None:
        """Refuses cuda_graphs=true if passes cannot be captured on any machine."""
        if not self.rollout.cuda_graphs:
            return
        for decoder in self.decoders:
            obstacle = decoder.setting_against_graphs
            rule = f"cannot be used with {obstacle}"
            fix = "set cuda_graphs=null, which captures passes where this is possible"
            require(obstacle is None, "cuda_graphs", True, rule, fix)

    def to_flat_dict(self) -> dict[str, Any]:
        """Returns every key and its value; nested keys have a dot."""
        return {name: key.read(self) for name, key in collect_keys(Config).items()}

    def to_yaml(self) -> str:
        """Returns the configuration as the YAML text that `load_config` reads."""
        from omegaconf import OmegaConf

        nested: dict[str, Any] = {}
        for name, value in self.to_flat_dict().items():
            value = _escape(value) if isinstance(value, str) else value
            parent, _, inner = name.rpartition(".")
            (nested.setdefault(parent, {}) if parent else nested)[inner] = value
        return OmegaConf.to_yaml(OmegaConf.create(nested))

    def save_yaml(self, path: str | Path) -> None:
        """Writes `to_yaml()` to a file."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def _check_rows(self) -> None:
        rows, per_step = self.rows_per_rollout, self.train.rows_per_optimizer_step
        rule = f"must divide prompts_per_rollout x samples_per_prompt = {rows}"
        require(
            rows % per_step == 0,
            "rows_per_optimizer_step",
            per_step,
            rule,
            _divisor_fix(rows, per_step),
        )

    def _check_schedule(self) -> None:
        warmup = self.lr_warmup_steps
        rule = f"must be at most lr_decay_steps={self.lr_decay_steps}"
        if self.optimizer.lr_decay_steps is None:
            rule += " (null: the optimizer steps of the run)"
        fix = f"use {self.lr_decay_steps} or less, or train longer"
        require(warmup <= self.lr_decay_steps, "lr_warmup_steps", warmup, rule, fix)

    def _check_longest_row(self) -> None:
        budget, longest = self.parallel.micro_batch_tokens, self.longest_row_tokens
        rule = f"must hold the longest row: prompt, response and its states = {longest} tokens"
        fix = f"use {longest} or more, or lower max_prompt_tokens or max_response_tokens.end"
        require(budget >= longest, "micro_batch_tokens", budget, rule, fix)

    def _check_responses(self) -> None:
        given, distill = self.train.teacher_responses, self.distill
        rule = f"applies only to the teacher's responses; here the {distill.responses} gives them"
        is_used = given is None or distill.teacher_writes
        require(is_used, "teacher_responses", given, rule, "leave it out")
        if not distill.has_teacher:
            choice = f"method={distill.method}"
            if distill.method_record.has_choice_of_writer:
                choice = f"sft_responses={distill.sft_responses}"
            rule = f"applies only to the teacher, and {choice} has none"
            for section, names in ((self.model, TEACHER_KEYS), (self.parallel, TEACHER_LAYOUT)):
                for name in names:
                    require_default_unless(False, section, name, rule, "leave it out")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and `key=value` overrides into a checked configuration.

    A key takes its value from the first of: override, file, method, preset, field default.

    Args:
        path: YAML file, or None for overrides only.
        overrides: texts such as "lr=2e-5" or "max_response_tokens.end=64".

    Raises:
        ValueError: the configuration is wrong; the message names key, value, rule and fix.
        FileNotFoundError: there is no such file.
    """
    keys = collect_keys(Config)
    given = _read_yaml(Path(path)) if path is not None else {}
    for name in given:
        if name not in keys:
            raise unknown_key_error(name, keys)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name or name != name.strip():
            shown = override if override.strip() == override != "" else repr(override)
            raise ValueError(f"override {shown} is not key=value; write e.g. lr=1e-5")
        if name not in keys:
            raise unknown_key_error(name, keys)
        given[name] = parse_text(name, text, keys[name].annotation)
    chosen = {name: given.get(name, keys[name].default) for name in ("preset", "method")}
    for name, value in chosen.items():
        check_value(name, value, keys[name].annotation)
    preset = PRESETS[chosen["preset"]]
    before = {"state_selection": keys["state_selection"].default} | preset
    implied = METHODS[chosen["method"]].implied(before)
    config: Config = build(Config, preset | implied | given)
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist; examples/configs has examples")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path} is not a valid configuration file: {text}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(values).__name__}")
    return flatten(values, collect_keys(Config))


def _escape(text: str) -> str:
    """Returns a text that OmegaConf reads as it is: `${` would name another key."""
    return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", text)


def _divisor_fix(rows: int, near: int) -> str:
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    closest = sorted(divisors, key=lambda n: abs(n - near))[:2]
    return "use " + " or ".join(map(str, sorted(closest)))
