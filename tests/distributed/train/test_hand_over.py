"""Rollouts with weights of their own: copied when the student's have changed, and only then."""

import json

import pytest
import torch

from megatron_opdlm.train.trainer import Trainer
from tests.helpers import run_ranks
from tests.tiny import tiny_model, write_prompts
from tests.training import tiny_config


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = write_prompts(tmp_path_factory.mktemp("hand_over") / "q.jsonl")
    lines = [json.loads(line) | {"answer": "7"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def matches(trainer):
    """Whether rollouts have the student's weights, of this rank's half of the head."""
    mine = trainer.student.model.head_weight()
    return bool(torch.equal(trainer.layout.model.head_weight().chunk(2)[trainer.parallel.tp_rank],
                            mine))  # fmt: skip


def take_a_step(trainer, trajectories):
    states = trainer.select_states(trajectories)[:4]
    runs = trainer.plan(states)
    batch = trainer.make_batch(states, runs)
    trainer.update(trainer.run_student(batch, trainer.run_teacher(states, runs)))


def hand_over(rank, make_config):
    trainer = Trainer(make_config())
    trainer.metrics.open_at(0)
    copies, copy_weights = [], trainer.layout._copy_weights
    trainer.layout._copy_weights = lambda: (copies.append(1), copy_weights())
    seen = []

    def note():
        seen.append((len(copies), matches(trainer)))

    trainer.evaluate_if_due()
    note()
    trajectories = trainer.collect()
    note()
    take_a_step(trainer, trajectories)
    note()
    trainer.evaluate_if_due()
    trainer.collect()
    note()
    trainer.rollout_step += 1
    trainer.save_if_due()
    take_a_step(trainer, trajectories)
    trainer.collect()
    note()
    trainer._resume()  # back to the weights of before
    note()
    trainer.collect()
    note()
    return seen


def test_weights_are_copied_once_per_change(questions, tmp_path, tmp_path_factory):
    model = tiny_model(tmp_path_factory.getbasetemp())

    def make_config():
        return tiny_config(
            model.checkpoint, questions, tmp_path / "run", eval_data=questions, eval_interval=1,
            eval_questions=4, save_interval=1, tensor_model_parallel_size=2,
            rollout_tensor_model_parallel_size=1, train_rollouts=3,
        )  # fmt: skip

    for seen in run_ranks(hand_over, 2, make_config):
        assert seen == [
            (1, True),  # for the evaluation
            (1, True),  # nothing has changed: not for the rollout
            (1, False),  # control: after an update the copy is of before
            (2, True),
            (3, True),
            (3, False),  # control: a checkpoint was loaded
            (4, True),
        ]
