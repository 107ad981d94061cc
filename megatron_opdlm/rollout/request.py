"""Input of a rollout: decoding options and requests.

Shape letters: P prompt tokens, K block size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_opdlm.config.annotations import ParametersOf
from megatron_opdlm.diffusion.prediction import PREDICTIONS, SAME_POSITION
from megatron_opdlm.diffusion.remasking import (
    RULES,
    LowConfidenceStatic,
    RemaskingRule,
    make_rule,
    rule_name,
)
from megatron_opdlm.rollout.sampler import Sampling

MAX_DENOISING_STEPS = 256  # the random key of a draw has eight bits for the step


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How blocks are denoised. Defaults are greedy static decoding, one token per step."""

    block_size: int = 4
    """K, tokens per block."""
    denoising_steps: int = 4
    """Most steps per block; the last one commits what is left."""
    prediction: str = SAME_POSITION
    """A name of PREDICTIONS: which output predicts a masked position. A causal model has its own
    rule and ignores this."""
    rule: RemaskingRule = LowConfidenceStatic()
    """Rule that chooses the positions that a step commits."""
    temperature: float = 0.0
    """Sampling temperature; 0 is argmax."""
    top_k: int = 0
    """Number of tokens that the top-k filter keeps; 0 keeps all."""
    top_p: float = 1.0
    """Probability mass that the top-p filter keeps; 1.0 keeps all."""

    def __post_init__(self) -> None:
        rules = (
            ("block_size", self.block_size, self.block_size >= 1, "at least 1"),
            (
                "denoising_steps",
                self.denoising_steps,
                1 <= self.denoising_steps <= min(self.block_size, MAX_DENOISING_STEPS),
                f"between 1 and block_size={self.block_size}, and at most {MAX_DENOISING_STEPS}",
            ),
            (
                *("prediction", self.prediction, self.prediction in tuple(PREDICTIONS)),
                f"one of {', '.join(PREDICTIONS)}",
            ),
        )
        for name, value, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name}={value} must be {rule}")
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        """Temperature and filters of a draw."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def to_json(self) -> dict[str, Any]:
        """Returns all options by name, with the rule's name as `remasking`.

        The parameters of all rules are included; those of other rules have their defaults.
        """
        values: dict[str, Any] = {}
        for option in dataclasses.fields(self):
            if option.name != "rule":
                values[option.name] = getattr(self, option.name)
                continue
            values["remasking"] = rule_name(self.rule)
            values |= {field.name: field.default for _, _, field in ParametersOf(RULES).fields()}
            values |= dataclasses.asdict(self.rule)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DecodingOptions:
        """Returns the options that `to_json` returned.

        Raises:
            ValueError: a value is out of its range.
        """
        names = {option.name for option in dataclasses.fields(cls)}
        rule = RULES[values["remasking"]]
        parameters = {field.name: values[field.name] for field in dataclasses.fields(rule)}
        return cls(
            rule=make_rule(values["remasking"], **parameters),
            **{name: value for name, value in values.items() if name in names},
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to decode."""

    prompt_id: str
    """The prompt's id in the data."""
    sample: int
    """Index of the sample among the samples of the same prompt."""
    prompt_ids: Tensor
    """[P] int64, token ids of the prompt; P > 0."""
    response_limit: int
    """Most response tokens."""
    key: int
    """Random key of this response, `randomness.key(seed, step, prompt_id, sample)`."""
