"""How many rollouts a number of minutes buys."""

import dataclasses
from pathlib import Path

import pytest

from megatron_opdlm.config.run import load_config
from tests.smollm2 import module

ROOT = Path(__file__).parents[3]


@pytest.fixture
def budget():
    return module("budget")


def test_a_plan_by_hand(budget):
    machine = budget.Machine(
        "a machine", "c.yaml", 60, fixed_minutes=10, seconds_per_rollout=90,
        measured_shares=(0.25, 0.5),
    )  # fmt: skip
    plan = budget.make_plan(machine, None)
    assert (plan.minutes, plan.rollouts, plan.ramp) == (60, 33, 20)  # 50 min / 90 s = 33.3
    assert plan.expected_minutes == pytest.approx(59.5)
    assert plan.overrides() == ["train_rollouts=33", "max_response_tokens.ramp_steps=20"]
    assert plan.stages == [8, 16, 33]
    few = budget.make_plan(machine, None, rollouts=1)
    assert (few.rollouts, few.stages, few.minutes) == (1, [1], 12)  # 11.5 minutes
    assert few.overrides()[-1] == "lr_warmup_steps=1"
    with pytest.raises(ValueError, match="rollouts=0 must be at least 1"):
        budget.make_plan(machine, None, rollouts=0)
    assert budget.make_plan(machine, 22).rollouts == budget.FEWEST_ROLLOUTS == 8
    with pytest.raises(ValueError, match=r"--minutes=21 must be at least 22 .*; use 22 or more"):
        budget.make_plan(machine, 21)


@pytest.mark.parametrize("name", ["CPU", "GPU"])
def test_every_budget_keeps_its_promise_and_is_a_valid_configuration(budget, name):
    machine = getattr(budget, name)
    least = budget.least_minutes(machine)
    with pytest.raises(ValueError, match=f"use {least} or more"):
        budget.make_plan(machine, least - 1)
    before = 0
    for minutes in (least, machine.default_minutes, 2 * machine.default_minutes, 600):
        plan = budget.make_plan(machine, minutes)
        assert plan.expected_minutes <= minutes < plan.expected_minutes + 3
        assert plan.rollouts >= before and 0 < plan.ramp < plan.rollouts
        before = plan.rollouts
        config = load_config(ROOT / machine.config, plan.overrides())
        assert config.train.train_rollouts == plan.rollouts
        assert config.lr_decay_steps == plan.rollouts * config.optimizer_steps_per_rollout
        assert config.rollout.max_response_tokens.ramp_steps == plan.ramp
    assert budget.make_plan(machine, None).minutes == machine.default_minutes
    for rollouts in (1, 2, 3):
        plan = budget.make_plan(machine, None, rollouts)
        assert load_config(ROOT / machine.config, plan.overrides()).train.train_rollouts == rollouts


def test_a_run_keeps_its_rollouts_when_an_estimate_changes(budget, tmp_path):
    plan, settings = budget.make_plan(budget.CPU, 60), tmp_path / "settings.json"
    assert plan.as_begun(settings) is plan
    settings.write_text('{"minutes": 60, "rollouts": 7}')
    assert plan.as_begun(settings) == dataclasses.replace(plan, rollouts=7)
    assert budget.make_plan(budget.CPU, 61).as_begun(settings).rollouts != 7  # control


def test_a_gpu_has_eight_minutes(budget):
    assert budget.GPU.default_minutes <= 8 and budget.CPU.default_minutes == 60
