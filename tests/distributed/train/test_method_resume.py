"""Runs of every method that die and go on, and steps without any loss."""

import os
import signal

import pytest

import megatron_opdlm.train.trainer as trainer_module
from megatron_opdlm.diffusion.noising import select_states
from megatron_opdlm.train.trainer import Trainer
from tests.distributed.train.test_checkpoints import records
from tests.distributed.train.test_parallel_training import Recorder
from tests.helpers import run_ranks
from tests.methods import METHODS, train
from tests.rollouts import MASK


class Killed(Trainer):
    """Dies in the second rollout, its responses decoded and on disk, between two steps."""

    def log_step(self, rows, grad_norm, lr):
        super().log_step(rows, grad_norm, lr)
        if self.optimizer.num_steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(method, methods, tmp_path):
    make_config = methods.make_config
    values = METHODS[method] | {"train_rollouts": 3, "save_interval": 1, "lr_decay_steps": 9}
    run_ranks(train, 1, make_config, tmp_path / "whole", values, Recorder)  # saves nothing
    with pytest.raises(AssertionError, match="rank 0 died without a result"):
        run_ranks(train, 1, make_config, tmp_path / "killed", values, Killed)
    file = tmp_path / "killed" / "teacher_responses.jsonl"
    if method in ("off_policy", "sft"):
        assert len(file.read_text().splitlines()) == 1 + 24
        file.write_bytes(file.read_bytes()[:-9])  # and the last line was torn
    run_ranks(train, 1, make_config, tmp_path / "killed", values)
    expected = records(tmp_path / "whole")
    assert records(tmp_path / "killed") == expected
    # Two rollouts are an epoch with some prompts left: the third takes old ones and new ones.
    assert [r["perf/tokens_teacher"] for r in expected if "perf/tokens_teacher" in r]
    has_speed = any("rollout/tokens_per_forward" in record for record in expected)
    assert has_speed == (method == "opdlm_off")
    if method in ("off_policy", "sft"):
        one, other = (tmp_path / name / "teacher_responses.jsonl" for name in ("whole", "killed"))
        assert sorted(one.read_text().splitlines()) == sorted(other.read_text().splitlines())


# --- states without any loss ---


class FewMasks(Trainer):
    """Nothing is masked in the first optimizer step of every rollout."""

    def collect(self):
        count, choose = iter(range(12)), select_states

        def first_four_unmasked(trajectory, **kwargs):
            states = choose(trajectory, **kwargs)
            if next(count) < 4:
                absent = trajectory.token_ids[-states.masked[0].numel() :] == MASK
                states.masked[:] = absent.view_as(states.masked[0])
            return states

        trainer_module.select_states = first_four_unmasked
        return super().collect()


def test_steps_without_loss_are_left_out_and_counted(methods, tmp_path):
    for world_size in (1, 2):
        save = tmp_path / str(world_size)
        run_ranks(train, world_size, methods.make_config, save, METHODS["sft from data"], FewMasks)
        found = records(save)
        rollouts = [r for r in found if "rollout/batches_without_loss" in r]
        assert [r["rollout/batches_without_loss"] for r in rollouts] == [1, 1]
        assert all(r["rollout/states_without_loss"] >= 4 for r in rollouts)
        losses = [r["train/loss"] for r in found if "train/loss" in r]
        assert len(losses) == 4 and all(loss > 0 for loss in losses)
