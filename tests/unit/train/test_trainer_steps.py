"""Methods of the trainer, one by one, on a stand-in that has what the method reads."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm.config.run import load_config
from megatron_opdlm.diffusion.tags import NOISY
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distill.step import StepRows
from megatron_opdlm.reporting.accounting import WorkCounters
from megatron_opdlm.reporting.logger import MaskedFractionHistogram, PhaseTimer
from megatron_opdlm.train.trainer import Trainer, has_loss

MASK, EOS = 99, 98


def make_config(*overrides):
    required = ["student=a", "data=b", "save=c", "train_rollouts=10", "micro_batch_tokens=99999"]
    return load_config(None, [*required, *overrides]).resolved(cuda=False)


def make_trajectory(prompt_id="p0", sample=0, ended=True):
    """Prompt of 6, 22 response tokens, blocks of 4: one or two commits at every step."""
    response = torch.arange(10, 32)
    response[-1] = EOS if ended else 1
    return Trajectory(
        prompt_id=prompt_id,
        sample=sample,
        prompt_ids=torch.arange(6),
        response_ids=response,
        commit_step=torch.arange(22) % 4,
        num_response_tokens=22,
        ended=ended,
        block_size=4,
    )


def stand_in(config=None, **values):
    config = config or make_config()
    return SimpleNamespace(
        config=config,
        rollout_step=0,
        student=SimpleNamespace(mask_token_id=MASK),
        timer=PhaseTimer(lambda: None),
        **values,
    )


# --- state selection ---


def masks(trainer, trajectory, rollout_step=0):
    """Which positions of the response the student sees masked, as a tuple."""
    trainer.rollout_step = rollout_step
    (state,) = Trainer.select_states(trainer, [trajectory])
    return tuple(state.student.token_ids.tolist())


@pytest.mark.parametrize("method", ["opdlm", "opdlm_off"])
def test_noisy_states_are_drawn_anew_for_every_response_of_every_rollout(method):
    """Two samples of one prompt, two prompts, two rollouts and two seeds with the same tokens:
    what is masked would be the same everywhere if any of them were left out of the key.
    """
    found = {}
    for seed, step, prompt, sample in itertools.product((1, 2), range(4), ("a", "b"), range(4)):
        trainer = stand_in(make_config(f"method={method}", f"seed={seed}"))
        trajectory = make_trajectory(prompt, sample)
        found[seed, step, prompt, sample] = masks(trainer, trajectory, step)
        assert masks(trainer, trajectory, step) == found[seed, step, prompt, sample]
    for place in range(4):  # whatever all other coordinates are, this one matters
        groups = {}
        for where, value in found.items():
            groups.setdefault(where[:place] + where[place + 1 :], set()).add(value)
        assert all(len(values) > 1 for values in groups.values()), place


@pytest.mark.parametrize(
    ("overrides", "last"),
    [((), True), (("eos_loss=exclude",), False)],
)
def test_the_end_of_sequence_carries_loss_if_it_shall(overrides, last):
    trainer = stand_in(make_config("state_selection=all", *overrides))
    (state,) = Trainer.select_states(trainer, [make_trajectory()])
    assert (EOS in state.target_ids.tolist()) == last
    assert MASK in state.student.token_ids.tolist()


@pytest.mark.parametrize("number", [1, 3])
def test_as_many_states_as_are_asked_for(number):
    trainer = stand_in(make_config(f"states_per_response={number}"))
    (state,) = Trainer.select_states(trainer, [make_trajectory()])
    assert state.num_states == number
    assert len(state.student.tags[:, NOISY].unique()) == number + 1  # and the clean part


def test_supervised_rows_are_those_of_the_nelbo():
    """1/t, and no mask that is forced: it would bias the bound."""
    config = make_config("method=sft", "sft_responses=data")
    rows, empty = [], 0
    for sample in range(200):
        (state,) = Trainer.select_states(stand_in(config), [make_trajectory(sample=sample)])
        assert state.denominator == 22 and state.num_states == 1
        rows += state.row_scale.tolist()
        noisy = state.student.tags[:, NOISY] > 0
        empty += int(noisy.sum()) < 4 * 6  # a block without a mask is left out
    assert min(rows) > 1 and max(rows) > 5
    assert empty > 20
    off = make_config("method=opdlm_off")
    for sample in range(50):
        (state,) = Trainer.select_states(stand_in(off), [make_trajectory(sample=sample)])
        assert set(state.row_scale.tolist()) == {1.0}
        noisy = state.student.tags[:, NOISY] > 0
        assert int(noisy.sum()) == 4 * 6, "every block has a mask"


# --- the order of optimizer steps ---


def test_every_rollout_takes_its_steps_in_another_order():
    """And every seed: 12 steps are in the same order by chance once in 479,001,600."""
    orders = set()
    for seed, step in itertools.product((1, 2), range(3)):
        config = make_config(f"seed={seed}", "rows_per_optimizer_step=1", "prompts_per_rollout=12")
        trainer = stand_in(config)
        trainer.rollout_step = step
        states = [SimpleNamespace(student=range(length)) for length in range(12)]
        batches = Trainer.cut(trainer, states)
        orders.add(tuple(len(state.student) for (state,) in batches))
    assert len(orders) == 6


def test_has_loss():
    with_rows, without = SimpleNamespace(num_rows=1), SimpleNamespace(num_rows=0)
    assert has_loss([without, with_rows]) and not has_loss([without]) and not has_loss([])


# --- what is logged ---


class Logged(dict):
    """A stand-in's `_log`."""

    def __call__(self, numbers):
        self.update(numbers)


class Counting:
    """An optimizer that only counts; every step has another rate."""

    num_steps = 0
    used = None

    def next_lr(self):
        return 1 / (1 + self.num_steps)

    def step(self, loss):
        self.used = self.next_lr()
        self.num_steps += 1
        return 0.25


def test_the_logged_learning_rate_is_that_of_the_step_that_was_taken():
    memory = SimpleNamespace(observe_training=lambda: None)
    trainer = stand_in(optimizer=Counting(), layout=SimpleNamespace(memory=memory))
    rows = StepRows(loss=1.0, kl=torch.ones(1), num_masked=torch.ones(1))
    for step in range(9):
        norm, lr = Trainer.update(trainer, rows)
        assert norm == 0.25 and lr == trainer.optimizer.used
        assert trainer.optimizer.num_steps == step + 1
        assert lr != trainer.optimizer.next_lr()  # control: the next one has another


def test_a_step_logs_the_mean_divergence_beside_the_loss():
    rows = StepRows(
        loss=0.125, kl=torch.tensor([1.0, 2.0, 6.0]), num_masked=torch.tensor([1, 2, 4])
    )
    trainer = stand_in(histogram=MaskedFractionHistogram(4), _log=Logged())
    Trainer.log_step(trainer, rows, 0.5, 0.25)
    assert trainer._log == {
        "train/loss": 0.125,
        "train/kl": 3.0,
        "train/loss_rows": 3,
        "train/grad_norm": 0.5,
        "train/lr": 0.25,
    }
    binned = trainer.histogram.drain()
    assert sorted(binned.values()) == [1.0, 2.0, 6.0]


def test_a_rollout_logs_its_own_limit_and_what_had_no_loss():
    trainer = stand_in(
        make_config("log_samples=2"),
        histogram=MaskedFractionHistogram(4),
        schedule=SimpleNamespace(response_limit=lambda step: 100 + step),
        flops=SimpleNamespace(metrics=lambda work: {}),
        work=WorkCounters(),
        optimizer=Counting(),
        parallel=SimpleNamespace(is_main=False),
        _log=Logged(),
    )
    trainer.rollout_step = 7
    counts = [[1, 0], [0, 0], [2, 3], [0], [1, 2]]
    batches = [[SimpleNamespace(num_rows=n) for n in batch] for batch in counts]
    # Two tokens at every step: one pass for the first block, two for each of the other five.
    pairs = torch.arange(22) % 4 // 2
    trajectories = [
        dataclasses.replace(make_trajectory(ended=ended), commit_step=pairs, num_response_tokens=20)
        for ended in (True, False, False)
    ]
    Trainer.log_rollout(trainer, trajectories, batches)
    logged = trainer._log
    assert logged["rollout/response_limit"] == 107
    assert logged["rollout/states_without_loss"] == 4
    assert logged["rollout/batches_without_loss"] == 2
    assert logged["rollout/eos_rate"] == 1 / 3
    assert logged["rollout/response_tokens_mean"] == logged["rollout/response_tokens_max"] == 20
    assert logged["rollout/tokens_per_forward"] == 20 / (1 + 2 * 5)


# --- when it saves and evaluates ---


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(0, [10]), (3, [3, 6, 9, 10]), (5, [5, 10]), (1, list(range(1, 11)))],
)
def test_it_saves_at_the_interval_and_at_the_end(interval, expected):
    saved = []
    trainer = stand_in(
        make_config(f"save_interval={interval}", "seed=5"),
        checkpoints=SimpleNamespace(save=lambda *what: saved.append((what[0], what[-1]))),
        optimizer=SimpleNamespace(num_steps=40),
        work=WorkCounters(),
        _description=lambda: None,
    )
    trainer.student.model = trainer.student.tokenizer_dir = None
    for done in range(1, 11):
        trainer.rollout_step = done
        Trainer.save_if_due(trainer)
    assert [iteration for iteration, _ in saved] == expected
    state = saved[-1][1]
    assert (state["rollout_step"], state["optimizer_steps"], state["seed"]) == (10, 40, 5)


def test_it_evaluates_the_weights_of_now():
    versions = []
    trainer = stand_in(
        evaluation=SimpleNamespace(is_due=lambda step: step == 4, run=lambda: {"eval/accuracy": 1}),
        layout=SimpleNamespace(refresh=versions.append),
        optimizer=SimpleNamespace(weights_version=lambda: 17),
        _log=Logged(),
    )
    Trainer.evaluate_if_due(trainer)
    assert versions == [] and trainer._log == {}
    trainer.rollout_step = 4
    Trainer.evaluate_if_due(trainer)
    assert versions == [17] and trainer._log == {"eval/accuracy": 1}
