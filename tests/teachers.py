"""A tiny student, teachers of other sizes, and the layouts that both are trained in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opdlm.config.run import Config
from tests.distributed.train.test_parallel_training import run
from tests.helpers import run_ranks
from tests.tiny import tiny_model, write_prompts
from tests.training import tiny_config

TEACHERS: dict[str, dict[str, Any]] = {
    "deeper, untied": {
        "seed": 13,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "smaller, tied": {"seed": 8, "hidden_size": 24, "num_hidden_layers": 2},
}
UNTIED, TIED = TEACHERS


def sizes(tp_size: int, pp_size: int) -> dict[str, Any]:
    """The student's layout."""
    return {"tensor_model_parallel_size": tp_size, "pipeline_model_parallel_size": pp_size}


def teacher_sizes(tp_size: int, pp_size: int) -> dict[str, Any]:
    """The teacher's layout."""
    return {f"teacher_{name}": size for name, size in sizes(tp_size, pp_size).items()}


FEW_TOKENS: dict[str, Any] = {"micro_batch_tokens": 80}
DP4 = teacher_sizes(2, 2) | FEW_TOKENS
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "TP2, teacher TP1": (2, sizes(2, 1) | teacher_sizes(1, 1)),
    "PP2, teacher TP2": (2, sizes(1, 2) | teacher_sizes(2, 1) | FEW_TOKENS),
    "DP4, teacher TP2 x PP2": (4, DP4),
    "TP2 x PP2 sequence parallel, teacher PP2": (
        4,
        sizes(2, 2) | teacher_sizes(1, 2) | FEW_TOKENS | {"sequence_parallel": True},
    ),
    "TP2, the same for the teacher": (2, sizes(2, 1)),
    "TP2, the vocabulary padded further": (
        2,
        sizes(1, 1) | teacher_sizes(2, 1) | {"make_vocab_size_divisible_by": 200},
    ),
}


class Teachers:
    """Models by name, the student among them, and runs of one rollout, each made once.

    Attributes:
        folder: for run folders.
        models: name -> model.
    """

    def __init__(self, session_folder: Path) -> None:
        self.folder = session_folder / "teachers"
        self.folder.mkdir()
        self.models = {"student": tiny_model(session_folder, num_hidden_layers=2)} | {
            name: tiny_model(session_folder, **values) for name, values in TEACHERS.items()
        }
        self._data = write_prompts(self.folder / "prompts.jsonl")
        self.run = functools.cache(self._run)

    def config_of(self, teacher: str) -> Callable[..., Config]:
        """`save=, key=` -> the configuration of a run with this teacher."""
        return functools.partial(
            tiny_config,
            self.models["student"].checkpoint,
            self._data,
            teacher=self.models[teacher].checkpoint,
            train_rollouts=1,
        )

    def _run(self, layout: str, teacher: str) -> list[dict[str, Any]]:
        """Results of the ranks."""
        world_size, values = LAYOUTS[layout]
        work = {"save": self.folder / f"{layout} {teacher}", "values": values}
        return run_ranks(run, world_size, self.config_of(teacher), work)
