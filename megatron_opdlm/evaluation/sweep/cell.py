"""A cell of a sweep: one model, task, decoding setting and seed.

A cell has a name, by which it is found again, and content that the name does not say: the files of
the model, the questions and the arithmetic. If the content of a finished cell is another one now,
its figures must not stand beside those of other cells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_opdlm.evaluation.labels import TEACHER, setting_name
from megatron_opdlm.evaluation.sweep.digests import name_part
from megatron_opdlm.rollout.request import DecodingOptions

_CONTENT = {
    "model_files": "the files of its model",
    "questions": "its questions",
    "params_dtype": "its arithmetic (params_dtype)",
}
"""What a cell's name does not say, and its name in messages."""


@dataclass(frozen=True, kw_only=True)
class SweptModel:
    """A model of a sweep."""

    label: str
    """Name in tables and figures. What stands before `@` is its family, which figures over block
    size join."""
    path: str
    """Path as the user gave it."""
    is_teacher: bool
    """Whether transformers decodes it autoregressively, as a reference."""
    files: str
    """Digest of the model's files: their names, sizes and times."""

    @property
    def family(self) -> str:
        """Name that models of several block sizes share."""
        return self.label.partition("@")[0]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model, task, decoding setting and seed."""

    model: SweptModel
    task: str
    """Name of the task."""
    questions: str
    """Digest of the questions, their references and graders."""
    num_questions: int
    options: DecodingOptions | None
    """Decoding options; None for a teacher, which is greedy."""
    response_limit: int
    """Most response tokens."""
    enable_thinking: bool
    """Passed to the chat template."""
    seed: int
    params_dtype: str
    """Type of the weights in the computation: float32 or bfloat16."""

    @property
    def setting(self) -> str:
        """Short name of the setting, such as dynamic(0.9)."""
        return TEACHER if self.options is None else setting_name(self.options)

    @property
    def most_tokens(self) -> int:
        """Upper bound of the number of response tokens."""
        return self.num_questions * self.response_limit

    @property
    def without_seed(self) -> Cell:
        """The same cell for all seeds."""
        return replace(self, seed=0)

    @property
    def name(self) -> str:
        """Name of the cell's folder: legible, and unlike that of every other cell."""
        options = self.options
        parts = [self.model.label, self.task, self.setting]
        if options is not None:
            parts += [f"b{options.block_size}"]
            parts += [f"T{options.temperature:g}"] if options.temperature else []
        parts += ["think"] if self.enable_thinking else []
        parts += [f"s{self.seed}"]
        legible = ".".join(name_part(part).strip("_") for part in parts)
        values = {key: value for key, value in self.to_json().items() if key not in _UNNAMED}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
        return f"{legible.lstrip('.')}-{digest}"

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """Returns what a finished cell of this name was computed from, unlike this one.

        Args:
            found: what `to_json` returned when it was computed.
        """
        now = self.to_json()
        return [text for key, text in _CONTENT.items() if found.get(key) != now[key]]

    def to_json(self) -> dict[str, Any]:
        """Returns the cell as JSON values; `from_json` is the inverse."""
        return {
            "model": self.model.label,
            "path": self.model.path,
            "is_teacher": self.model.is_teacher,
            "model_files": self.model.files,
            "task": self.task,
            "questions": self.questions,
            "num_questions": self.num_questions,
            "options": None if self.options is None else self.options.to_json(),
            "max_new_tokens": self.response_limit,
            "enable_thinking": self.enable_thinking,
            "seed": self.seed,
            "params_dtype": self.params_dtype,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Cell:
        """Returns the cell that `to_json` returned."""
        options = values["options"]
        return cls(
            model=SweptModel(
                label=values["model"],
                path=values["path"],
                is_teacher=values["is_teacher"],
                files=values["model_files"],
            ),
            task=values["task"],
            questions=values["questions"],
            num_questions=values["num_questions"],
            options=None if options is None else DecodingOptions.from_json(options),
            response_limit=values["max_new_tokens"],
            enable_thinking=values["enable_thinking"],
            seed=values["seed"],
            params_dtype=values["params_dtype"],
        )


_UNNAMED = {*_CONTENT, "path", "num_questions"}
"""Keys of `Cell.to_json` that do not enter a cell's name."""
