"""One training loop: responses -> teacher -> student -> loss -> optimizer -> log -> save.

Methods (config/methods.py) differ in the writer of the responses, the noisy states, and the target.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch

from megatron_opdlm.checkpoint.layout import ModelDescription, read_description
from megatron_opdlm.config.run import Config
from megatron_opdlm.convert.import_cache import ImportCache
from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.example import TrainingExample, make_example
from megatron_opdlm.diffusion.noising import select_states
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distill.batching import (
    Microbatch,
    Packing,
    group,
    make_microbatches,
    plan_packing,
)
from megatron_opdlm.distill.load_teacher import load_teacher
from megatron_opdlm.distill.step import StepRows, forward_backward
from megatron_opdlm.distill.student import build_options, load_student
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.distributed.process_groups import ParallelState, from_main
from megatron_opdlm.evaluation.online import OnlineEvaluation
from megatron_opdlm.loss.fused import Target
from megatron_opdlm.model.gpt import training_stream_multiple
from megatron_opdlm.reporting.accounting import FlopsReport, WorkCounters
from megatron_opdlm.reporting.logger import MaskedFractionHistogram, MetricsLogger, PhaseTimer
from megatron_opdlm.reporting.progress import progress_bar, report_progress
from megatron_opdlm.responses.source import response_metrics
from megatron_opdlm.responses.sources import SourceParts, find_responses
from megatron_opdlm.rollout.layout import RolloutLayout
from megatron_opdlm.train.checkpoints import CheckpointFolder
from megatron_opdlm.train.optimizer import StudentOptimizer
from megatron_opdlm.train.run_folder import RunFolder
from megatron_opdlm.train.setup import check_teacher, identify, student_weights
from megatron_opdlm.train.targets import TARGET_SOURCES

logger = logging.getLogger(__name__)


class Trainer:
    """One run. Every rank holds the same trajectories and plans the same batches; rank 0 writes.

    There is no random state: randomness is a function of (seed, step, prompt id, sample, block). So
    a checkpoint needs only the weights, the optimizer state and three counters.

    Attributes:
        config: resolved configuration.
        parallel: process groups.
        rollout_step: rollouts finished.
        work: tokens and passes since the start of the run, over all ranks.
    """

    def __init__(self, config: Config) -> None:
        """Joins the job, loads models and data, and resumes. Input errors are raised here.

        Args:
            config: resolved configuration.
        """
        self.config = config
        self.parallel: ParallelState = process_groups.initialize(
            tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
            seed=config.train.seed,
            timeout_minutes=config.parallel.distributed_timeout_minutes,
        )
        self.folder = RunFolder(config.train.save)
        from_main(self.folder.lock, is_main=self.parallel.is_main)
        from_main(lambda: self.folder.check(config), is_main=self.parallel.is_main)
        cache = ImportCache(
            folder=self.folder.imported(config),
            mask_token=config.model.mask_token,
            mask_init=config.model.mask_init,
        )
        self._load_models(cache)
        self.evaluation = OnlineEvaluation(config, self.student, self.layout)
        self.optimizer = StudentOptimizer(
            self.student.model,
            config.optimizer,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            overlap_grad_reduce=config.parallel.overlap_grad_reduce,
            decay_steps=config.lr_decay_steps,
        )
        self.schedule, self.source = find_responses(
            SourceParts(
                config=config,
                parallel=self.parallel,
                response_file=self.folder.teacher_responses(config),
                student=self.student,
                layout=self.layout,
                weights_version=self.optimizer.weights_version,
                teacher=self.teacher,
            )
        )
        self.checkpoints = CheckpointFolder(
            self.folder.checkpoints, keep=config.train.keep_checkpoints, parallel=self.parallel
        )
        self.divergence = config.distill.make_divergence()
        self.timer = PhaseTimer(torch.cuda.synchronize)
        self.target_source = TARGET_SOURCES[config.distill.method_record.target](
            parallel=self.parallel, teacher=self.teacher, timer=self.timer
        )
        self.histogram = MaskedFractionHistogram(config.rollout.block_size)
        self.metrics = MetricsLogger(
            self.folder.root,
            self.parallel.is_main,
            wandb_project=config.train.wandb_project,
            config=config.to_flat_dict(),
        )
        self.rollout_step = 0
        self.work = WorkCounters()
        self._first_figures = self._settle()

    def train(self) -> None:
        """Runs the job to its last rollout."""
        total = self.config.train.train_rollouts
        self.metrics.open_at(self.rollout_step)
        if self.rollout_step == 0:
            self._log(self._first_figures)
        is_main = self.parallel.is_main
        bar = progress_bar(total, "rollouts", is_main=is_main, initial=self.rollout_step)
        with self.metrics, bar:
            while self.rollout_step < total:
                self.evaluate_if_due()
                trajectories = self.collect()
                batches = self.cut(self.select_states(trajectories))
                for batch in filter(has_loss, batches):
                    packing = self.plan(batch)
                    targets = self.run_teacher(batch, packing)
                    rows = self.run_student(self.make_batch(batch, packing), targets)
                    self.count(batch, packing)
                    self.log_step(rows, *self.update(rows))
                    bar.set_postfix(loss=f"{rows.loss:.4f}")
                self.log_rollout(trajectories, batches)
                self.rollout_step += 1
                self.save_if_due()
                bar.update()
            self.evaluate_if_due()
        if self.parallel.is_main:
            logger.info("finished; the student is in %s", self.folder.checkpoints)

    def collect(self) -> list[Trajectory]:
        """Collects one response per row of the schedule; the same list on every rank."""
        with self.timer.phase("rollout"):
            collected = self.source.collect(self.rollout_step)
        self.work.add(collected.work)
        return collected.trajectories

    def select_states(self, trajectories: Sequence[Trajectory]) -> list[TrainingExample]:
        """Selects noisy states of every trajectory, and lays them out for student and teacher."""
        config, seed = self.config.distill, self.config.train.seed
        examples = []
        for trajectory in trajectories:
            which = trajectory.prompt_id, trajectory.sample
            key = randomness.key(seed, "state", self.rollout_step, *which)
            selected = select_states(
                trajectory,
                state_selection=config.state_selection, key=key,
                num_states=config.states_per_response, at_least_one=not config.is_nelbo,
                mask_token_id=self.student.mask_token_id,
            )  # fmt: skip
            examples.append(
                make_example(
                    trajectory,
                    selected,
                    mask_token_id=self.student.mask_token_id,
                    include_eos=config.eos_loss == "include",
                    nelbo=config.is_nelbo,
                    prediction=self.config.rollout.prediction,
                )
            )
        return examples

    def cut(self, examples: Sequence[TrainingExample]) -> list[list[TrainingExample]]:
        """Cuts the examples of a rollout into optimizer steps."""
        train = self.config.train
        lengths = [len(example.student) for example in examples]
        key = randomness.key(train.seed, "optimizer steps", self.rollout_step)
        by_length = key if train.group_by_length else None
        groups = group(lengths, train.rows_per_optimizer_step, by_length)
        return [[examples[i] for i in rows] for rows in groups]

    def plan(self, examples: Sequence[TrainingExample]) -> Packing:
        """Plans which examples of an optimizer step go into which microbatch of which rank."""
        return plan_packing(
            [len(example.student) for example in examples],
            dp_size=self.parallel.dp_size,
            token_budget=self.config.parallel.micro_batch_tokens,
            equal_counts=self.config.model.fp8_recipe == "delayed",
        )

    def make_batch(self, examples: Sequence[TrainingExample], packing: Packing) -> list[Microbatch]:
        """Packs this data-parallel rank's share of an optimizer step into token streams."""
        return make_microbatches(
            examples,
            packing,
            dp_rank=self.parallel.dp_rank,
            multiple=self.training_multiple,
            loss_reduction=self.config.distill.loss_reduction,
        )

    def run_teacher(self, examples: Sequence[TrainingExample], packing: Packing) -> list[Target]:
        """Returns the targets of this rank's microbatches, from the teacher or the responses."""
        return self.target_source.of(examples, packing)

    def run_student(
        self, microbatches: Sequence[Microbatch], targets: Sequence[Target]
    ) -> StepRows:
        """Runs the student's forward pass, the divergence and the backward pass."""
        with self.timer.phase("student"):
            self.optimizer.zero_grad()
            return forward_backward(
                self.optimizer.ddp,
                microbatches,
                targets,
                self.parallel,
                divergence=self.divergence,
                mask_token_id=self.student.mask_token_id,
            )

    def count(self, examples: Sequence[TrainingExample], packing: Packing) -> None:
        """Counts the passes of an optimizer step on all ranks; the packing says them all."""
        self.work.add_student_step(
            [example.student for example in examples],
            packing,
            multiple=self.training_multiple,
            block_size=self.config.rollout.block_size,
        )
        self.target_source.count(examples, packing, self.work)

    def update(self, rows: StepRows) -> tuple[float, float]:
        """Clips the gradient and steps; refuses a loss or gradient that is not finite.

        Returns (gradient norm, lr).
        """
        lr = self.optimizer.next_lr()
        with self.timer.phase("optimizer"):
            norm = self.optimizer.step(rows.loss)
            self.layout.memory.observe_training()
        return norm, lr

    def log_step(self, rows: StepRows, grad_norm: float, lr: float) -> None:
        """Logs one record per optimizer step."""
        self.histogram.add(rows.kl, rows.num_masked)
        self._log(
            {
                "train/loss": rows.loss,
                "train/kl": float(rows.kl.mean()),
                "train/loss_rows": len(rows.kl),
                "train/grad_norm": grad_norm,
                "train/lr": lr,
            }
        )

    def log_rollout(
        self, trajectories: Sequence[Trajectory], batches: Sequence[Sequence[TrainingExample]]
    ) -> None:
        """Logs one record per rollout, and writes a few responses for people to read."""
        of_responses = response_metrics(trajectories, by_student=self.config.distill.student_writes)
        self._log(
            {
                **of_responses,
                "rollout/response_limit": self.schedule.response_limit(self.rollout_step),
                "rollout/states_without_loss": sum(s.num_rows == 0 for b in batches for s in b),
                "rollout/batches_without_loss": sum(not has_loss(batch) for batch in batches),
                **self.histogram.drain(),
                **self.flops.metrics(self.work),
                **self.timer.drain(),
            }
        )
        if self.parallel.is_main:
            speed = of_responses.get("rollout/tokens_per_forward")
            report_progress(
                f"rollout {self.rollout_step + 1} of {self.config.train.train_rollouts}, "
                f"optimizer step {self.optimizer.num_steps}"
                + ("" if speed is None else f": {speed:.2f} tokens per forward")
            )
            samples = trajectories[: self.config.train.log_samples]
            self.folder.write_samples(self.rollout_step, samples, self.student.tokenizer)

    def evaluate_if_due(self) -> None:
        """Evaluates the current weights every `eval_interval` rollouts."""
        if self.evaluation.is_due(self.rollout_step):
            self.layout.refresh(self.optimizer.weights_version())
            self._log(self.evaluation.run())

    def save_if_due(self) -> None:
        """Saves weights, optimizer and counters every `save_interval` rollouts and at the end."""
        interval, done = self.config.train.save_interval, self.rollout_step
        if done < self.config.train.train_rollouts and (not interval or done % interval):
            return
        with self.timer.phase("save"):
            self.checkpoints.save(
                done,
                self.student.model,
                self.optimizer,
                self._description(),
                self.student.tokenizer_dir,
                {
                    "rollout_step": done,
                    "optimizer_steps": self.optimizer.num_steps,
                    "seed": self.config.train.seed,
                    "work": self.work.to_json(),
                },
            )

    def _load_models(self, cache: ImportCache) -> None:
        config = self.config.model
        options = build_options(config, self.config.parallel)
        self.training_multiple = training_stream_multiple(options, self.parallel.tp_size)
        self.student = load_student(
            config.student, cache, options, self.parallel, config.mask_token
        )
        self.teacher: Teacher | None = None
        if self.config.distill.has_teacher:
            self.teacher = load_teacher(self.config, cache, options, self.parallel, self.student)
        self.layout = RolloutLayout(
            self.student.model,
            self.student.description.config,
            options,
            self.parallel,
            tensor_model_parallel_size=self.config.parallel.rollout_tensor_model_parallel_size,
            keep_memory=self.config.rollout.keep_kv_cache,
        )
        self.flops = FlopsReport.of(
            self.student.description.config,
            None if self.teacher is None else self.teacher.description.config,
            config.recompute_granularity,
        )

    def _settle(self) -> dict[str, float]:
        """Checks that the folder belongs to this run, resumes from it, and claims it.

        Returns:
            The figures of the teacher's check before the first rollout, as metrics.
        """
        config, is_main = self.config, self.parallel.is_main
        weights = student_weights(self.student, config.model.student)
        identity = identify(weights, self.teacher, self.schedule, self.source)
        from_main(lambda: self.folder.check_identity(identity, config), is_main=is_main)
        if self._resume():
            weights = student_weights(self.student, config.model.student)
        figures = check_teacher(self.teacher, weights, self.schedule, config.model)
        from_main(lambda: self.folder.claim(config, identity), is_main=is_main)
        return figures

    def _resume(self) -> bool:
        """Resumes from the newest checkpoint; returns whether there is one."""
        latest = self.checkpoints.latest()
        if latest is None:
            return False
        if read_description(latest).config != self.student.description.config:
            raise ValueError(
                f"save={self.folder.root}: {latest} is a checkpoint of another model than "
                f"student={self.config.model.student}; choose another folder"
            )
        values = self.checkpoints.load(latest, self.student.model, self.optimizer)
        self.rollout_step = int(values["rollout_step"])
        self.work = WorkCounters.from_json(values["work"])
        logger.info("resumed from %s after %d rollouts", latest, self.rollout_step)
        return True

    def _description(self) -> ModelDescription:
        before = self.student.description
        return dataclasses.replace(
            before,
            block_size=self.config.rollout.block_size,
            prediction=self.config.rollout.prediction,
            lineage=before.lineage
            | ({} if self.teacher is None else {"teacher": self.teacher.path})
            | {
                "data": self.config.train.data,
                "method": self.config.distill.method,
                "enable_thinking": self.config.rollout.enable_thinking,
                "optimizer_steps": self.optimizer.num_steps,
                "response_tokens": self.work.response_tokens,
            },
        )

    def _log(self, numbers: dict[str, Any]) -> None:
        steps = {"rollout_step": self.rollout_step, "optimizer_step": self.optimizer.num_steps}
        self.metrics.log(numbers, **steps)


def has_loss(batch: Sequence[TrainingExample]) -> bool:
    """Returns whether a step has any loss position; a step without is left out, and counted."""
    return any(example.num_rows for example in batch)
