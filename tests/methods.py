"""Runs of opdlm_off, off_policy and sft, for tests of methods."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_opdlm.train.trainer as trainer_module
from megatron_opdlm.config.run import Config
from megatron_opdlm.diffusion.example import TrainingExample
from megatron_opdlm.diffusion.noising import select_states
from megatron_opdlm.diffusion.state_selection import NoisyStates
from megatron_opdlm.distill.step import StepRows
from megatron_opdlm.train.trainer import Trainer
from tests.distributed.train.test_parallel_training import LAYOUTS, Recorder
from tests.helpers import run_ranks
from tests.tiny import tiny_model, write_prompts
from tests.training import tiny_config

METHODS: dict[str, dict[str, Any]] = {
    "opdlm_off": {"method": "opdlm_off"},
    "off_policy": {"method": "off_policy"},
    "sft": {"method": "sft", "eos_loss": "exclude"},
    "sft from data": {
        "method": "sft",
        "sft_responses": "data",
        "loss_reduction": "token_mean",
        "teacher": None,
    },
}


def write_responses(path: Path) -> Path:
    """Prompts with responses of many lengths, beyond the limit too."""
    write_prompts(path)
    letters = [chr(c) for c in range(ord("a"), ord("z"))]
    texts = ["".join(letters[(i * j) % 7] for j in range(1 + 2 * i)) for i in range(16)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line | {"response": text} for line, text in zip(lines, texts, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Watched(Recorder):
    """Remembers noisy states, weight and divergence of every loss row, and how many responses the
    teacher decoded.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.states: list[NoisyStates] = []
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.num_decoded = 0
        if config.distill.responses == "teacher":
            stream = self.source._engine.stream

            def counting(queue: Any) -> Any:
                self.num_decoded += len(queue.requests)
                return stream(queue)

            self.source._engine.stream = counting

    def run_student(self, microbatches: Any, targets: Any) -> StepRows:
        rows = super().run_student(microbatches, targets)
        self.rows.append((torch.cat([batch.row_weight for batch in microbatches]), rows.kl))
        return rows

    def select_states(self, trajectories: Any) -> list[TrainingExample]:
        def remember(trajectory: Any, **kwargs: Any) -> NoisyStates:
            self.states.append(select_states(trajectory, **kwargs))
            return self.states[-1]

        trainer_module.select_states = remember
        return super().select_states(trajectories)


def run(rank: int, make_config: Any, save: Path, values: dict[str, Any]) -> dict[str, Any]:
    """A whole run, for `run_ranks`: what it went through."""
    trainer = Watched(make_config(save=save, **values))
    trainer.train()
    return {
        "losses": trainer.losses,
        "grad_norms": trainer.grad_norms,
        "rollouts": trainer.rollouts,
        "states": trainer.states,
        "rows": trainer.rows,
        "gradient": trainer.first,
        "weights": trainer.pieces("data"),
        "work": trainer.work.to_json(),
        "num_decoded": trainer.num_decoded,
        "has_teacher": trainer.teacher is not None,
    }


def train(
    rank: int,
    make_config: Any,
    save: Path,
    values: dict[str, Any],
    cls: type[Trainer] = Trainer,
) -> None:
    """A whole run, for `run_ranks`, of which the folder is all that stays."""
    cls(make_config(save=save, **values)).train()


def start(rank: int, make_config: Any, save: Path, values: dict[str, Any]) -> str | None:
    """The error of a start, for `run_ranks`."""
    try:
        Trainer(make_config(save=save, **values))
    except ValueError as error:
        return str(error)
    return None


class Methods:
    """Student, teacher and data; and runs, each made once.

    Attributes:
        folder: of the runs, each in `<layout> <method>`.
        model: the student.
        teacher: the teacher.
        data: prompts and responses.
        make_config: `save=, key=` -> Config.
    """

    def __init__(self, session_folder: Path) -> None:
        self.folder = session_folder / "methods"
        self.folder.mkdir()
        self.model = tiny_model(session_folder, num_hidden_layers=2, seed=24)
        self.teacher = tiny_model(session_folder, num_hidden_layers=2, seed=5)
        self.data = write_responses(self.folder / "prompts.jsonl")
        # Rows in the rollout's order, so that the first optimizer step is that of the first four.
        self.make_config = functools.partial(
            tiny_config,
            self.model.checkpoint,
            self.data,
            teacher=self.teacher.checkpoint,
            group_by_length=False,
        )
        self.run = functools.cache(self._run)

    def _run(self, layout: str, method: str) -> list[dict[str, Any]]:
        """Results of the ranks."""
        world_size, values = LAYOUTS[layout]
        save = self.folder / f"{layout} {method}"
        return run_ranks(run, world_size, self.make_config, save, values | METHODS[method])
