"""The measurements of one run, as measure.py wrote them."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shape import COUNT, NUMBER, TEXT, read_shaped

from megatron_opdlm.checks import require
from megatron_opdlm.evaluation.plots import Records
from megatron_opdlm.reporting.logger import read_metrics

BEFORE, AFTER = "before.json", "after.json"
BETWEEN = re.compile(r"at_\d{4,}\.json")
SETTING = re.compile(r"autoregressive|static|dynamic\(\d+(\.\d+)?\)")
AGAIN = "measure again"
SAME = (
    *("teacher_weights", "parameters", "prompts", "num_questions", "block_size", "prediction"),
    *("max_new_tokens", "seed"),
)
"""Values that all measurements of one report have in common."""
_FIGURE, _MAYBE = NUMBER, (NUMBER, None)
_PLACE = {"kl": _MAYBE, "num_positions": COUNT}
SHAPE = {
    "teacher_weights": TEXT, "parameters": COUNT, "response_tokens": COUNT,
    "optimizer_steps": COUNT, "block_size": COUNT, "prediction": TEXT, "max_new_tokens": COUNT,
    "seed": COUNT, "device": TEXT, "threads": COUNT, "dtype": TEXT, "prompts": [TEXT],
    "num_questions": COUNT, "teacher_right": COUNT,
    "results": [{
        "writer": TEXT, "setting": TEXT, "temperature": _FIGURE, "nll": _FIGURE,
        "nll_error": _MAYBE, "mean_tokens": _FIGURE, "eos_rate": _FIGURE, "distinct_2": _MAYBE,
        "first_token": _FIGURE, "first_four": _FIGURE, "tokens_per_forward": _FIGURE,
        "tokens_per_second": _FIGURE, "tokens_per_cpu_second": _FIGURE, "responses": [TEXT],
        "page?": [{"setting": TEXT}],
        "agreement?": {
            "asked": COUNT, "right": COUNT, "share": _MAYBE, "standard_error": _MAYBE,
        },
    }],
    "states?": {"kl": _FIGURE, "num_positions": COUNT, "by_position": [_PLACE],
                "by_masked": [_PLACE]},
}  # fmt: skip
"""What a report reads."""
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


def read_measurement(path: Path) -> Measurement:
    """Reads a file of measure.py.

    Raises:
        ConversionError: it is missing or is no JSON object.
        ValueError: it was edited, or is of another version; the message names file and key.
    """
    values = read_shaped(path, SHAPE, AGAIN)
    for place, result in enumerate(values["results"]):
        at, name = f"{path}: results[{place}]", result["setting"]
        rule = "must be autoregressive, static or dynamic(threshold)"
        require(bool(SETTING.fullmatch(name)), f"{at}.setting", name, rule, AGAIN)
        number, expected = len(result["responses"]), len(values["prompts"])
        rule = f"must be one for each of {expected} prompts"
        require(number == expected, f"{at}.responses", number, rule, AGAIN)
    for key in ("by_position", "by_masked"):
        number = len(values["states"][key]) if "states" in values else values["block_size"]
        rule = f"must be as many as block_size={values['block_size']}"
        require(number == values["block_size"], f"{path}: states.{key}", number, rule, AGAIN)
    return Measurement(values)


def read_measured(folder: Path) -> Measured:
    """Reads before.json, after.json, at_NNNN.json and run/metrics.jsonl of a folder.

    Raises:
        ConversionError: a measurement is missing or is no JSON object.
        ValueError: a measurement is malformed or of something else than the others, or
            metrics.jsonl is malformed.
    """
    files = {path.name: path for path in sorted(folder.glob("at_*.json"))}
    for name, path in files.items():
        rule = "must be named by the rollouts before it, as at_0010.json"
        require(bool(BETWEEN.fullmatch(name)), "measurement", path, rule, "move it away")
    names = (BEFORE, AFTER, *files)
    measured = {name: read_measurement(folder / name) for name in names}
    for name, measurement in measured.items():
        for key in SAME:
            ours, theirs = measurement.values[key], measured[BEFORE].values[key]
            if ours != theirs:
                raise ValueError(
                    f"{folder / name}: {key}={_short(ours)} is not that of {BEFORE}, "
                    f"{_short(theirs)}; a report is about one model, measured in one way"
                )
    _require_order(folder, measured)
    return Measured(
        before=measured[BEFORE],
        after=measured[AFTER],
        between=[measured[name] for name in files],
        metrics=read_metrics(folder / "run" / "metrics.jsonl"),
    )


def _require_order(folder: Path, measured: dict[str, Measurement]) -> None:
    """Refuses measurements of other moments than their names say."""
    order = (BEFORE, *(name for name in measured if name not in (BEFORE, AFTER)), AFTER)
    for first, second in itertools.pairwise(order):
        tokens = measured[second].response_tokens
        least = measured[first].response_tokens
        rule = f"must be more than the {least} of {first}"
        require(tokens > least, f"{folder / second}: response_tokens", tokens, rule, AGAIN)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
