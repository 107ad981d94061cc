"""How many rollouts fit into a number of minutes. All estimates of time stand here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from shape import COUNT, read_shaped

from megatron_opdlm.checks import require, require_at_least

FEWEST_ROLLOUTS = 8
"""Below this the length ramp has no room, and the student says nothing."""
WARM_UP_ROLLOUTS = 2
"""Of the learning rate, in both configurations."""
MOST_MINUTES, MOST_ROLLOUTS = 1_000_000, 1_000_000
"""Two years; what is more is a slip."""
RAMP_SHARE = 0.6
"""Of the rollouts, until responses have their full length."""


@dataclass(frozen=True)
class Machine:
    """What a kind of machine runs, and how long that takes."""

    name: str
    config: str
    default_minutes: int
    fixed_minutes: float
    """Conversion, all measures, export and checks: all but the rollouts with their training."""
    seconds_per_rollout: float
    """Decoding and training, mean over the run."""
    measured_shares: tuple[float, ...] = ()
    """Of the rollouts, after which the student is measured on the way."""


CPU = Machine("2 CPU cores", "examples/configs/smollm2.yaml", 60, 27, 80, (0.25, 0.5))
"""From two runs of 33 and 28 rollouts, all but alone on the machine: 72.6 and 78.3 s each, and 22.5
and 25 minutes of everything else. The rest is room for the set-up of .venv, which took 2.6 minutes.
"""
GPU = Machine("a GPU", "examples/configs/smollm2_gpu.yaml", 8, 4, 6)
"""On an H100 a rollout took 4.5 s beside five other trainings, and the first one 24 s; the minutes
of everything else are a guess.
"""


@dataclass(frozen=True)
class Plan:
    """What a run does."""

    machine: Machine
    minutes: int
    rollouts: int

    @property
    def ramp(self) -> int:
        """Rollouts until responses have their full length."""
        return round(RAMP_SHARE * self.rollouts)

    @property
    def stages(self) -> list[int]:
        """Numbers of rollouts after which the student is measured; the last is all of them."""
        between = {round(share * self.rollouts) for share in self.machine.measured_shares}
        return [*sorted(between - {0, self.rollouts}), self.rollouts]

    @property
    def expected_minutes(self) -> float:
        """By the estimate; at most `minutes`, unless the number of rollouts was given."""
        return self.machine.fixed_minutes + self.rollouts * self.machine.seconds_per_rollout / 60

    def as_begun(self, settings: Path) -> Plan:
        """The same, or with the rollouts of a run that was begun for as many minutes.

        Args:
            settings: what the run noted, if there is one; estimates may have changed since.
        """
        if not settings.exists():
            return self
        fix = "choose another --out; the file was edited, or is of an earlier version"
        begun = read_shaped(settings, {"minutes": COUNT, "rollouts": COUNT}, fix)
        is_same = begun["minutes"] == self.minutes
        return replace(self, rollouts=begun["rollouts"]) if is_same else self

    def overrides(self) -> list[str]:
        """Keys of the whole training."""
        keys = [f"train_rollouts={self.rollouts}", f"max_response_tokens.ramp_steps={self.ramp}"]
        return [*keys, "lr_warmup_steps=1"] if self.rollouts < WARM_UP_ROLLOUTS else keys

    def __str__(self) -> str:
        return (
            f"plan for {self.minutes} minutes on {self.machine.name}: {self.rollouts} rollouts of "
            f"about {self.machine.seconds_per_rollout:g} s, responses grow over the first "
            f"{self.ramp}; {self.machine.fixed_minutes:g} minutes for everything else; about "
            f"{self.expected_minutes:.0f} minutes in all"
        )


def make_plan(machine: Machine, minutes: int | None, rollouts: int | None = None) -> Plan:
    """The plan for a budget; the same on every machine of a kind.

    Args:
        machine: kind of machine.
        minutes: all steps together; None for the machine's default.
        rollouts: how many instead of those that fit into the minutes.

    Raises:
        ValueError: too few minutes or rollouts, or absurdly many.
    """
    if rollouts is not None:
        require_at_least(1, "--rollouts", rollouts)
        fix = f"use at most {MOST_ROLLOUTS}"
        require(rollouts <= MOST_ROLLOUTS, "--rollouts", rollouts, "is too many", fix)
        seconds = machine.fixed_minutes * 60 + rollouts * machine.seconds_per_rollout
        return Plan(machine, -int(-seconds // 60), rollouts)
    minutes = machine.default_minutes if minutes is None else minutes
    fix = f"use at most {MOST_MINUTES}"
    require(minutes <= MOST_MINUTES, "--minutes", minutes, "is too many", fix)
    rollouts = int((minutes - machine.fixed_minutes) * 60 / machine.seconds_per_rollout)
    least = least_minutes(machine)
    rule = f"must be at least {least} on {machine.name}: {FEWEST_ROLLOUTS} rollouts"
    require(rollouts >= FEWEST_ROLLOUTS, "--minutes", minutes, rule, f"use {least} or more")
    return Plan(machine, minutes, rollouts)


def least_minutes(machine: Machine) -> int:
    """The smallest budget that is accepted."""
    seconds = machine.fixed_minutes * 60 + FEWEST_ROLLOUTS * machine.seconds_per_rollout
    return -int(-seconds // 60)
