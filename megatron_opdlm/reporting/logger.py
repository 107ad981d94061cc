"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases, times of phases, loss by masking.

Names begin with train/, rollout/, perf/ or eval/.

Shape letters: T loss rows, K block size.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

PREFIXES = ("train/", "rollout/", "perf/", "eval/")


class MetricsLogger:
    """Appends records of numbers to the files of a run folder.

    A record belongs to a rollout, the unit in which runs resume, and to an optimizer step, the axis
    of the plots. A resumed run removes the records of an unfinished rollout. So metrics.jsonl never
    has a step twice.

    Args:
        run_dir: run folder, for metrics.jsonl and tensorboard/.
        enabled: whether this rank writes; if not, all calls do nothing.
        wandb_project: Weights & Biases project; None for no project.
        config: configuration by key, for Weights & Biases.
    """

    def __init__(
        self,
        run_dir: str | Path,
        enabled: bool,
        *,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.enabled = enabled
        self._wandb_project = wandb_project
        self._config = dict(config or {})
        self._file: IO[str] | None = None
        self._tensorboard: Any = None
        self._wandb_run: Any = None

    @property
    def path(self) -> Path:
        """Path of the metrics file."""
        return self.run_dir / "metrics.jsonl"

    def open_at(self, rollout_step: int) -> None:
        """Opens the files to continue with a rollout. Removes records of this and later rollouts.

        Args:
            rollout_step: index of the next rollout; 0 for a new run.

        Raises:
            ValueError: a line of metrics.jsonl is not a record (the last line may be incomplete).
            ImportError: wandb_project is set and wandb is not installed.
        """
        if not self.enabled:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_metrics(self.path) if r["rollout_step"] < rollout_step]
        part = self.path.with_suffix(".jsonl.part")
        part.write_text("".join(map(_to_line, kept)), encoding="utf-8")
        os.replace(part, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        next_step = max((r["optimizer_step"] for r in kept), default=-1) + 1
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=next_step)
        if self._wandb_project is not None:
            self._wandb_run = self._start_wandb(self._wandb_project)

    def log(self, metrics: Mapping[str, float], *, rollout_step: int, optimizer_step: int) -> None:
        """Writes one record. A number that is not finite is written as null.

        Args:
            metrics: numbers by name.
            rollout_step: index of the rollout that the metrics belong to.
            optimizer_step: number of optimizer steps done so far.
        """
        if self._file is None:
            assert not self.enabled, "open_at() comes first"
            return
        for name in metrics:
            assert name.startswith(PREFIXES), f"metric {name} must begin with one of {PREFIXES}"
        numbers = {name: _plain(value) for name, value in metrics.items()}
        record = {"rollout_step": rollout_step, "optimizer_step": optimizer_step} | numbers
        self._file.write(_to_line(record))
        self._file.flush()
        for name, number in numbers.items():
            if number is not None:
                self._tensorboard.add_scalar(name, number, optimizer_step)
        if self._wandb_run is not None:
            self._wandb_run.log(numbers, step=optimizer_step)

    def close(self) -> None:
        """Writes buffered records and closes the files."""
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()
            self._file = None
        if self._wandb_run is not None:
            self._wandb_run.finish()
            self._wandb_run = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start_wandb(self, project: str) -> Any:
        try:
            import wandb
        except ImportError:
            raise ImportError(
                f"wandb_project={project} needs wandb; pip install 'megatron-opdlm[wandb]'"
            ) from None
        id_file = self.run_dir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(wandb.util.generate_id())
        return wandb.init(
            project=project,
            dir=str(self.run_dir),
            id=id_file.read_text(),
            resume="allow",
            config=self._config,
        )


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads a metrics file. An incomplete last line, which a killed process left, is ignored.

    Returns:
        The records in order; an empty list if there is no file.

    Raises:
        ValueError: a line other than the last is not a record; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], 1):  # the text after the last newline is incomplete
        try:
            record = json.loads(line)
            valid = isinstance(record, dict) and {"rollout_step", "optimizer_step"} <= record.keys()
        except json.JSONDecodeError:
            valid = False
        if not valid:
            raise ValueError(
                f"{path}:{number}: is no metrics record; remove the line, or the file to start anew"
            )
        records.append(record)
    return records


class PhaseTimer:
    """Adds up the seconds of named phases of a training step.

    Args:
        synchronize: function that waits for the device. It is called at both ends of a phase, so
            that the device's work counts in the phase that started it. None on a CPU.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the body of a `with` statement. Equal names add up; a failed phase counts 0."""
        start = self._now()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def drain(self) -> dict[str, float]:
        """Returns perf/seconds_<phase>, in seconds since the last call, and resets all to zero."""
        seconds, self._seconds = self._seconds, {}
        return {f"perf/seconds_{name}": value for name, value in seconds.items()}

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


class MaskedFractionHistogram:
    """Mean divergence by the masked fraction of a loss row's block: 1/K, 2/K .. 1.

    It shows a student that only learns to fill in the last token of a block; a mean over all rows
    does not.

    Args:
        block_size: K, tokens per block.
        device: device of the sums; nothing is copied to the host before `drain`.
    """

    def __init__(self, block_size: int, device: torch.device | str = "cpu") -> None:
        self.block_size = block_size
        self.totals = torch.zeros(2, block_size, dtype=torch.float64, device=device)
        """[2, K] float64: sum of divergences in nats, and number of loss rows. Sum it over
        data-parallel ranks."""

    def add(self, kl_T: Tensor, num_masked_T: Tensor) -> None:
        """Adds loss rows.

        Args:
            kl_T: [T] float, divergence of each loss row, in nats.
            num_masked_T: [T] int64, number of masked positions in the block of each row, 1..K.
        """
        bins_T = num_masked_T.to(self.totals.device) - 1
        kl_T = kl_T.detach().to(self.totals)
        self.totals[0].index_add_(0, bins_T, kl_T)
        self.totals[1].index_add_(0, bins_T, torch.ones_like(kl_T))

    def drain(self) -> dict[str, float]:
        """Returns train/kl_masked_<fraction>, in nats per row, for bins with rows; resets all."""
        sums, counts = self.totals.tolist()
        self.totals.zero_()
        return {
            f"train/kl_masked_{(index + 1) / self.block_size:.3g}": total / count
            for index, (total, count) in enumerate(zip(sums, counts, strict=True))
            if count
        }


def _plain(value: Any) -> int | float | None:
    """Returns a Python number; None if the number is not finite."""
    number = value.item() if isinstance(value, Tensor) else value
    assert isinstance(number, int | float), f"a metric is a number, not {type(number).__name__}"
    return number if math.isfinite(number) else None


def _to_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
