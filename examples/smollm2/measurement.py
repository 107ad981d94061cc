"""The measurements of one run, as measure.py wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.evaluation.plots import Records
from megatron_opdlm.files.folders import read_json_object
from megatron_opdlm.reporting.logger import read_metrics

BEFORE, AFTER, BETWEEN = "before.json", "after.json", "at_*.json"
SHOWN_THRESHOLD = 0.9
"""The threshold that stands for dynamic decoding, if it was measured."""

Result = dict[str, Any]
"""Figures of one setting at one temperature, see `figures.figures`."""


@dataclass(frozen=True)
class Measurement:
    """One file of measure.py."""

    values: dict[str, Any]

    @property
    def response_tokens(self) -> int:
        """Tokens of the responses that the student was trained on."""
        return int(self.values["response_tokens"])

    @property
    def states(self) -> dict[str, Any] | None:
        """Divergences at the student's states; None if they were not measured."""
        return self.values.get("states")

    @property
    def greedy(self) -> list[Result]:
        """Results at temperature 0, in the order of the file."""
        return [result for result in self.values["results"] if result["temperature"] == 0]

    def find(self, setting: str, temperature: float = 0.0) -> Result | None:
        """Returns the result of a setting; None if it was not measured."""
        found = [
            result
            for result in self.values["results"]
            if (result["setting"], result["temperature"]) == (setting, temperature)
        ]
        return found[0] if found else None

    @property
    def by_threshold(self) -> list[tuple[float, Result]]:
        """Greedy dynamic results with their thresholds, in increasing order."""
        found = []
        for result in self.greedy:
            name, _, rest = result["setting"].partition("(")
            if name == "dynamic":
                found.append((float(rest.removesuffix(")")), result))
        return sorted(found, key=lambda item: item[0])

    @property
    def dynamic(self) -> Result | None:
        """The greedy dynamic result that is shown: at 0.9, or else at the highest threshold."""
        results = dict(self.by_threshold)
        return results.get(SHOWN_THRESHOLD) or (list(results.values()) or [None])[-1]

    def text_of(self, setting: str, prompt: str) -> str | None:
        """Returns the greedy response to a prompt; None if it was not decoded."""
        result, prompts = self.find(setting), self.values["prompts"]
        if result is None or prompt not in prompts:
            return None
        return str(result["responses"][prompts.index(prompt)])


@dataclass(frozen=True)
class Measured:
    """All measurements of a run, and what its training logged."""

    before: Measurement
    after: Measurement
    between: list[Measurement]
    """Of checkpoints between, if there are any."""
    metrics: Records
    """Records of metrics.jsonl."""

    @property
    def over_training(self) -> list[Measurement]:
        """Every measurement, by response tokens trained on."""
        every = [self.before, *self.between, self.after]
        return sorted(every, key=lambda measurement: measurement.response_tokens)

    def teacher(self) -> Result:
        """Returns the teacher's figures at temperature 0.

        Raises:
            ValueError: no measurement has them.
        """
        if (result := self.find_teacher(0.0)) is None:
            raise ValueError(f"{AFTER}: the teacher was not measured; run measure.py with teacher")
        return result

    def find_teacher(self, temperature: float) -> Result | None:
        """Returns the teacher's figures, from the first measurement that has them."""
        every = (self.after, self.before, *self.between)
        found = (m.find("autoregressive", temperature) for m in every)
        return next((result for result in found if result is not None), None)


def read_measured(folder: Path) -> Measured:
    """Reads before.json, after.json, at_*.json and run/metrics.jsonl of a folder.

    Raises:
        ConversionError: a measurement is missing or is no JSON object.
        ValueError: metrics.jsonl is malformed.
    """
    between = [Measurement(read_json_object(path)) for path in sorted(folder.glob(BETWEEN))]
    return Measured(
        before=Measurement(read_json_object(folder / BEFORE)),
        after=Measurement(read_json_object(folder / AFTER)),
        between=between,
        metrics=read_metrics(folder / "run" / "metrics.jsonl"),
    )
