"""A teacher of any size and layout gives the losses and gradients of one process."""

import pytest
import torch

from megatron_opdlm.model.hf_config import read_config
from tests.distributed.train.test_parallel_training import (
    Recorder,
    largest_relative_difference,
    whole,
)
from tests.helpers import run_ranks
from tests.teachers import DP4, LAYOUTS, TEACHERS, TIED, UNTIED

CASES = [(name, UNTIED) for name in LAYOUTS if name != "1"]
CASES += [("DP4, teacher TP2 x PP2", TIED), ("PP2, teacher TP2", TIED)]


@pytest.mark.parametrize(("layout", "teacher"), CASES)
def test_layouts_of_the_teacher_agree_with_one_process(layout, teacher, teachers):
    config = read_config(teachers.models["student"].hf)
    (expected,), results = teachers.run("1", teacher), teachers.run(layout, teacher)
    assert len(expected["losses"]) == 3 and all(loss > 0.01 for loss in expected["losses"])
    for result in results:
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(result["grad_norms"], expected["grad_norms"], rtol=1e-4, atol=0)
    if "DP" not in layout and layout != "TP2, the vocabulary padded further":
        gradients = whole(results, "gradient", config), whole([expected], "gradient", config)
        name, worst = largest_relative_difference(*gradients)
        assert worst < 2e-5, name
    weights = whole(results, "weights", config), whole([expected], "weights", config)
    name, worst = largest_relative_difference(*weights)
    assert worst < 2e-5, name


def test_control_teachers_differ(teachers):
    first, second = (teachers.run("1", name)[0]["losses"] for name in TEACHERS)
    assert abs(first[0] - second[0]) > 1e-2


def gradients_with(rank, make_config, save, values, changes):
    """Loss and gradient of one step, for every way to change the teacher's rows on the way."""
    config = make_config(save=save, use_distributed_optimizer=False, **values)
    trainer = Recorder(config)
    states = trainer.select_states(trainer.collect())[:8]
    hidden_rows, teacher = type(trainer.teacher).hidden_rows, trainer.teacher
    runs, results = trainer.plan(states), []
    batches = trainer.make_batch(states, runs)
    for change in changes:
        type(teacher).hidden_rows = lambda self, *args, do=change: do(hidden_rows(self, *args))
        rows = trainer.run_student(batches, trainer.run_teacher(states, runs))
        results.append((rows.loss, trainer.pieces("main_grad")))
    return results


def same(rows):
    return rows


def shifted(rows):
    """Every row goes to its neighbour, and the first ones to the next document."""
    return [row.roll(1, 0) for row in rows]


def test_whole_gradients_of_data_parallel_students(teachers):
    folder, config = teachers.folder, read_config(teachers.models["student"].hf)
    make_config = teachers.config_of(UNTIED)
    (((loss, pieces),),) = run_ranks(gradients_with, 1, make_config, folder / "whole 1", {}, [same])
    results = run_ranks(gradients_with, 4, make_config, folder / "whole 4", DP4, [same, shifted])
    assert all(right[0] == pytest.approx(loss, rel=1e-6) for right, _ in results)
    (_, got), (wrong_loss, wrong) = results[0]
    expected, got, wrong = (whole([{"g": g}], "g", config) for g in (pieces, got, wrong))
    name, worst = largest_relative_difference(got, expected)
    assert worst < 2e-5, name
    # control: rows of other positions
    assert abs(wrong_loss - loss) > 1e-4
    assert largest_relative_difference(wrong, expected)[1] > 1e-2
