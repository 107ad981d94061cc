"""Rows, steps and bounds that a configuration implies, against numbers worked out by hand."""

import pytest

from megatron_opdlm.config.run import load_config

REQUIRED = ["student=a", "data=b", "save=c", "micro_batch_tokens=999999"]


def load(*overrides, rollouts=100):
    return load_config(None, [*REQUIRED, f"train_rollouts={rollouts}", *overrides])


def test_the_papers_schedule():
    """128 responses and 16 steps per rollout; warm-up of 80 steps, the cosine ends with the run."""
    config = load()
    assert (config.rows_per_rollout, config.optimizer_steps_per_rollout) == (128, 16)
    assert (config.lr_warmup_steps, config.lr_decay_steps) == (80, 1600)


@pytest.mark.parametrize(
    ("overrides", "rollouts", "expected"),
    [
        (("samples_per_prompt=3",), 100, (384, 48, 4800, 240, 4800)),
        (("rows_per_optimizer_step=32",), 100, (128, 4, 400, 20, 400)),
        ((), 2, (128, 16, 32, 32, 32)),  # shorter than the warm-up
        (("lr_warmup_steps=7",), 100, (128, 16, 1600, 7, 1600)),
        (("lr_decay_steps=90",), 100, (128, 16, 1600, 80, 90)),
        (("lr_decay_steps=50",), 100, (128, 16, 1600, 50, 50)),
        (("prompts_per_rollout=6", "samples_per_prompt=4"), 3, (24, 3, 9, 9, 9)),
    ],
)
def test_rows_and_steps(overrides, rollouts, expected):
    config = load(*overrides, rollouts=rollouts)
    assert expected == (
        config.rows_per_rollout,
        config.optimizer_steps_per_rollout,
        config.total_optimizer_steps,
        config.lr_warmup_steps,
        config.lr_decay_steps,
    )
    resolved = config.resolved(cuda=False).optimizer
    assert (resolved.lr_warmup_steps, resolved.lr_decay_steps) == expected[3:]


@pytest.mark.parametrize(
    ("overrides", "clean", "noisy"),
    [
        # Prompt 9 and response 7 fill 16 tokens, with the last block's rest at most 19; a noisy
        # copy of the response's blocks has at most 3 prompt tokens and 3 beyond the end more.
        ((), 19, 13),
        (("states_per_response=3",), 19, 3 * 13),
        (("state_selection=all",), 19, 4 * 13),
        (("state_selection=all", "denoising_steps=2"), 19, 2 * 13),
        (("block_size=1", "denoising_steps=1"), 16, 7),
        (("block_size=8", "denoising_steps=4"), 23, 21),
    ],
)
def test_the_longest_row(overrides, clean, noisy):
    lengths = "max_prompt_tokens=9", "max_response_tokens.start=5", "max_response_tokens.end=7"
    assert load(*lengths, *overrides).longest_row_tokens == clean + noisy
    fits, short = (f"micro_batch_tokens={clean + noisy - less}" for less in (0, 1))
    load(*lengths, *overrides, fits)
    with pytest.raises(ValueError, match=f"prompt, response and its states = {clean + noisy} tok"):
        load(*lengths, *overrides, short)
