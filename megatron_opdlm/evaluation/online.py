"""Accuracy during training: the current weights answer a fixed set of questions."""

from __future__ import annotations

import logging
import time

from megatron_opdlm.config.run import Config
from megatron_opdlm.distill.student import Student
from megatron_opdlm.evaluation.labels import setting_name
from megatron_opdlm.evaluation.report_results import notes
from megatron_opdlm.evaluation.runner import evaluate
from megatron_opdlm.evaluation.settings import DEFAULT_RULES
from megatron_opdlm.evaluation.task import Task, load_task
from megatron_opdlm.generate.decoder import Decoder
from megatron_opdlm.rollout.layout import RolloutLayout
from megatron_opdlm.rollout.request import DecodingOptions

logger = logging.getLogger(__name__)


def load_questions(config: Config) -> Task | None:
    """Returns the first questions of `eval_data`; None if nothing is evaluated.

    Args:
        config: resolved configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see `load_task`; or a grader cannot run on this machine.
        ImportError: a grader needs a package that is not installed.
    """
    if config.train.eval_data is None:
        return None
    task = load_task(
        "eval", config.train.eval_data, config.train.eval_questions, key="eval_questions"
    )
    task.require_graders()
    return task


class OnlineEvaluation:
    """Greedy static and dynamic decoding of `eval_data`, every `eval_interval` rollouts.

    It uses the weights of rollouts, draws no random number and keeps no state. So a run with
    evaluation computes the same weights as a run without.
    """

    def __init__(self, config: Config, student: Student, layout: RolloutLayout) -> None:
        """Reads the questions, so that errors in them are found before any work.

        Args:
            config: resolved configuration.
            student: the student in training.
            layout: the student in the parallel layout of rollouts, which evaluation uses, too.
        """
        self.interval = config.train.eval_interval
        self.response_limit = config.rollout.max_response_tokens.end
        self.enable_thinking = config.rollout.enable_thinking
        self.total = config.train.train_rollouts
        self.settings = [
            DecodingOptions(
                block_size=config.rollout.block_size,
                denoising_steps=config.rollout.denoising_steps,
                prediction=config.rollout.prediction,
                rule=config.rollout.rule_of(name),
            )
            for name in DEFAULT_RULES
        ]
        self.task = load_questions(config)
        self.decoder = Decoder(
            student=student,
            decodable=student.decodable(layout),
            max_rows=config.rollout.rollout_batch_size,
            kv_cache_gb=config.rollout.kv_cache_gb,
            cuda_graphs=config.rollout.cuda_graphs,
        )

    def is_due(self, rollouts_done: int) -> bool:
        """Returns whether to evaluate now: before the first rollout, at the interval, at the end.

        A record has the index of the rollout after it, as a resumed run expects.
        """
        if self.task is None:
            return False
        return rollouts_done % self.interval == 0 or rollouts_done == self.total

    def run(self) -> dict[str, float]:
        """Answers the questions with the weights of the rollout layout. Call on all ranks.

        Rank 0 logs one line.

        Returns:
            Metrics by name; the same on every rank.
        """
        assert self.task is not None, "is_due() says whether there is anything to run"
        start = time.perf_counter()
        metrics: dict[str, float] = {"eval/questions": len(self.task.questions)}
        said, apart = [], []
        for options in self.settings:
            name = options.rule.label
            result = evaluate(
                self.decoder,
                self.task,
                options,
                response_limit=self.response_limit,
                enable_thinking=self.enable_thinking,
            )
            tokens_per_forward = result.tokens_per_forward
            assert tokens_per_forward is not None, "the passes of a student are known"
            metrics[f"eval/accuracy_{name}"] = result.accuracy
            metrics[f"eval/tokens_per_forward_{name}"] = tokens_per_forward
            metrics[f"eval/ungraded_{name}"] = len(result.ungraded_ids)
            metrics[f"eval/too_long_{name}"] = len(result.too_long_ids)
            said.append(
                f"{setting_name(options)} {100 * result.accuracy:.1f} % correct, "
                f"{tokens_per_forward:.2f} tokens per forward"
            )
            apart += notes([result])
        if self.decoder.parallel.is_main:
            logger.info("evaluation, %d questions: %s", result.num_questions, "; ".join(said))
            for note in apart:
                logger.warning("evaluation: %s", note)
        return metrics | {"eval/seconds": time.perf_counter() - start}
