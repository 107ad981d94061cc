"""What the training of a model cost, as its run folder says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.reporting.logger import read_metrics


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """Tokens and FLOPs of a training, as the paper counts them (Eq. 7)."""

    tokens: int | None = None
    """Response tokens trained on; None if it is not known."""
    flops: int | None = None
    """FLOPs; None if it is not known."""

    def to_json(self) -> dict[str, Any]:
        """Returns the cost as JSON values; `from_json` is the inverse."""
        return {"tokens": self.tokens, "flops": self.flops}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainingCost:
        """Returns the cost that `to_json` returned."""
        return cls(tokens=values["tokens"], flops=values["flops"])


def read_cost(source: ModelSource) -> TrainingCost:
    """Reads what the training of a checkpoint cost up to this checkpoint.

    The run's metrics.jsonl stands beside the folder of its checkpoints. Models without one, and
    checkpoints that were not trained, have unknown costs.
    """
    if not source.is_checkpoint or "rollout_step" not in source.state:
        return TrainingCost()
    done = source.state["rollout_step"]
    metrics = source.folder.resolve().parents[1] / "metrics.jsonl"
    records = [
        record
        for record in read_metrics(metrics)
        if "perf/tokens_paper" in record and record["rollout_step"] < done
    ]
    if not records:
        return TrainingCost()
    last = records[-1]
    return TrainingCost(tokens=last["perf/tokens_paper"], flops=last.get("perf/flops_paper"))
