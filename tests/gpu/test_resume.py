"""A checkpoint of Transformer Engine's Adam: the steps after it are those of a run that went on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opdlm.checkpoint.layout import TOKENIZER_DIR, read_description
from megatron_opdlm.checkpoint.weights import load_model
from megatron_opdlm.config.learning import OptimizerConfig
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions
from megatron_opdlm.train.checkpoints import CheckpointFolder
from megatron_opdlm.train.optimizer import StudentOptimizer
from tests.gpu.needs import needs_gpu, needs_transformer_engine

pytestmark = [needs_gpu, needs_transformer_engine]

CONFIG = OptimizerConfig(
    lr=3e-3, min_lr=1e-4, lr_warmup_steps=2, adam_beta1=0.8, adam_beta2=0.95, weight_decay=0.1
)
SAVED_AFTER, STEPS = 3, 6


class Run:
    """A student and its optimizer, whose gradients are random numbers of their step."""

    def __init__(self, parallel: Any, imported: Path, *, distributed: bool) -> None:
        options = BuildOptions(layer_spec="transformer_engine", params_dtype=torch.bfloat16)
        self.model: BlockDiffusionModel = load_model(imported, options, parallel)[0]
        self.optimizer = StudentOptimizer(
            self.model, CONFIG, use_distributed_optimizer=distributed, overlap_grad_reduce=False,
            decay_steps=STEPS,
        )  # fmt: skip

    def step_to(self, end: int) -> list[float]:
        """Gradient norms of the steps that it takes."""
        norms = []
        while self.optimizer.num_steps < end:
            self.optimizer.zero_grad()
            generator = torch.Generator("cuda").manual_seed(self.optimizer.num_steps)
            for parameter in self.model.parameters():
                parameter.main_grad.normal_(generator=generator)
            norms.append(self.optimizer.step(loss=0.5))
        return norms

    def adam(self) -> Any:
        (part,) = self.optimizer.optimizer.chained_optimizers
        return part.optimizer

    def moments(self) -> list[Tensor]:
        """Of every shard, in the order of the parameters."""
        states = [self.adam().state[p] for g in self.adam().param_groups for p in g["params"]]
        return [state[name].clone() for state in states for name in ("exp_avg", "exp_avg_sq")]

    def master_weights(self) -> list[Tensor]:
        """What Adam updates, in float32."""
        return [p.detach().clone() for g in self.adam().param_groups for p in g["params"]]

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    assert len(some) == len(others) > 0
    return all(map(torch.equal, some, others))


@pytest.fixture(scope="module", params=[True, False], ids=["distributed", "whole"])
def whole_run(
    request: Any, parallel: Any, imported: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, list[float], Path, list[list[Tensor]]]:
    """A run to its end that saves on its way, and what it held when it saved."""
    run = Run(parallel, imported, distributed=request.param)
    norms = run.step_to(SAVED_AFTER)
    held = [run.weights(), run.master_weights(), run.moments()]
    root = tmp_path_factory.mktemp("checkpoints")
    folder = CheckpointFolder(root, keep=1, parallel=parallel)
    folder.save(
        1, run.model, run.optimizer, read_description(imported), imported / TOKENIZER_DIR,
        {"optimizer_steps": SAVED_AFTER},
    )  # fmt: skip
    return run, norms + run.step_to(STEPS), root, held


def resume(parallel: Any, imported: Path, root: Path, like: Run) -> Run:
    """Another process' student: its weights and moments are other ones until they are read."""
    distributed = like.optimizer.ddp.ddp_config.use_distributed_optimizer
    run = Run(parallel, imported, distributed=distributed)
    folder = CheckpointFolder(root, keep=1, parallel=parallel)
    latest = folder.latest()
    assert latest is not None
    folder.load(latest, run.model, run.optimizer)
    return run


def test_a_resumed_run_takes_the_same_steps(
    whole_run: Any, parallel: Any, imported: Path, tmp_path: Path
) -> None:
    """Weights, master weights, moments and gradient norms, bit for bit."""
    went_on, norms, root, held = whole_run
    assert type(went_on.adam()).__module__.startswith("transformer_engine")
    copy = shutil.copytree(root, tmp_path / "copy")
    resumed = resume(parallel, imported, copy, went_on)
    assert resumed.optimizer.num_steps == SAVED_AFTER
    assert {group["step"] for group in resumed.adam().param_groups} == {SAVED_AFTER}
    now = [resumed.weights(), resumed.master_weights(), resumed.moments()]
    assert [same(*pair) for pair in zip(now, held, strict=True)] == [True] * 3
    assert resumed.step_to(STEPS) == norms[SAVED_AFTER:]
    assert same(resumed.weights(), went_on.weights())
    assert same(resumed.master_weights(), went_on.master_weights())
    assert same(resumed.moments(), went_on.moments())
    assert not same(went_on.weights(), held[0])


@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq", "step"])
def test_control_what_is_lost_shows(
    lost: str, whole_run: Any, parallel: Any, imported: Path
) -> None:
    """Moments that were not saved, and a bias correction that begins anew."""
    went_on, _, root, _ = whole_run
    resumed = resume(parallel, imported, root, went_on)
    for group in resumed.adam().param_groups:
        if lost == "step":
            group["step"] = 0
            continue
        for parameter in group["params"]:
            resumed.adam().state[parameter][lost].zero_()
    resumed.step_to(STEPS)
    assert not same(resumed.master_weights(), went_on.master_weights())
