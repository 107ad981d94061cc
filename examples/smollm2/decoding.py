"""One decoding of all prompts: the responses, and what they cost."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pair import STUDENT, TEACHER, Pair

from megatron_opdlm.diffusion.remasking import LowConfidenceDynamic
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.evaluation.labels import setting_name
from megatron_opdlm.reporting.progress import progress_bar
from megatron_opdlm.responses.prompts import PromptTokens
from megatron_opdlm.rollout.request import DecodingOptions

AUTOREGRESSIVE, STATIC = "autoregressive", "static"
TEMPERATURES = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Who decodes, and how."""

    writer: str
    """TEACHER or STUDENT."""
    options: DecodingOptions

    @property
    def name(self) -> str:
        """Name without the temperature: autoregressive, static or dynamic(0.9)."""
        return AUTOREGRESSIVE if self.writer == TEACHER else setting_name(self.options)

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the likeliest one."""
        return self.options.temperature == 0

    def at(self, temperature: float) -> Setting:
        """Returns the setting at another temperature."""
        options = dataclasses.replace(self.options, temperature=temperature)
        return dataclasses.replace(self, options=options)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The responses of one setting, one for every prompt, all decoded in one batch."""

    setting: Setting
    trajectories: list[Trajectory]
    seconds: float
    """Wall time of the batch."""
    cpu_seconds: float
    """Time of all threads of this process."""

    @property
    def responses(self) -> list[list[int]]:
        """Token ids of every response, through the end of sequence."""
        return [trajectory.text_ids.tolist() for trajectory in self.trajectories]


def teacher_setting(pair: Pair) -> Setting:
    """Returns the teacher's greedy setting, token by token."""
    return Setting(writer=TEACHER, options=pair.options[TEACHER])


def static_setting(pair: Pair) -> Setting:
    """Returns the student's greedy static setting."""
    return Setting(writer=STUDENT, options=pair.options[STUDENT])


def dynamic_settings(pair: Pair, thresholds: Sequence[float]) -> list[Setting]:
    """Returns the student's greedy dynamic setting for every threshold."""
    static = pair.options[STUDENT]
    rules = [LowConfidenceDynamic(confidence_threshold=threshold) for threshold in thresholds]
    return [
        Setting(writer=STUDENT, options=dataclasses.replace(static, rule=rule)) for rule in rules
    ]


def decode(
    pair: Pair, setting: Setting, prompts: Sequence[PromptTokens], *, limit: int, seed: int
) -> Decoding:
    """Decodes one response per prompt.

    Args:
        pair: the models.
        setting: who decodes, and how.
        prompts: tokenised prompts.
        limit: most response tokens.
        seed: seed of the sampling. Equal seeds give teacher and student the same
            noise at the first denoising step of a block.
    """
    name = f"{setting.writer} {setting.name}, T={setting.options.temperature:g}"
    start, cpu_start = time.perf_counter(), time.process_time()
    with progress_bar(len(prompts), name, is_main=True, leave=False) as bar:
        trajectories = pair.decoders[setting.writer].decode(
            prompts,
            setting.options,
            response_limit=limit,
            seed=seed,
            on_progress=lambda done: bar.update(done - bar.n),
        )
    return Decoding(
        setting=setting,
        trajectories=trajectories,
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu_start,
    )
