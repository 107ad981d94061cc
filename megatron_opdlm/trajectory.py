"""What a rollout leaves behind, and the choice of the noisy state that is trained on.

Shape letters: P prompt tokens, R decoded tokens, K block size, N blocks that hold decoded tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_opdlm import randomness
from megatron_opdlm.stream import Document, make_tags

STATE_SELECTION = ("per_block", "trajectory")


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One response and the denoising step at which each of its tokens was committed.

    Blocks are decoded whole: tokens after the end of sequence, or beyond the response limit, that
    lie in the last block stay here, because attention saw them. They are not response and carry no
    loss.

    Example, block size 4, prompt of 6: positions 4..7 are the first decoded block [p4 p5 r0 r1];
    response_ids holds r0 r1 | r2 ..

    Attributes:
        prompt_id: the prompt's id in the data.
        sample: index of the sample among those of the same prompt.
        prompt_ids: [P] int64.
        response_ids: [R] int64, P + R is a multiple of block_size.
        commit_step: [R] int64, denoising step within its block, from 0.
        num_response_tokens: response tokens, through the first end of sequence, at most the limit.
        ended: whether the response ended with an end-of-sequence token.
        block_size: K.
    """

    prompt_id: str
    sample: int
    prompt_ids: Tensor
    response_ids: Tensor
    commit_step: Tensor
    num_response_tokens: int
    ended: bool
    block_size: int

    def __post_init__(self) -> None:
        total = len(self.prompt_ids) + len(self.response_ids)
        assert len(self.prompt_ids) > 0, "a prompt holds at least one token"
        assert total % self.block_size == 0, "blocks are decoded whole"
        assert self.response_ids.shape == self.commit_step.shape, (
            "one commit step per decoded token"
        )
        assert 0 < self.num_response_tokens <= len(self.response_ids), "a response is not empty"
        assert bool((self.commit_step >= 0).all()), "no position is left masked"

    @property
    def first_block(self) -> int:
        """Index of the first block that holds decoded tokens."""
        return len(self.prompt_ids) // self.block_size

    @cached_property
    def token_ids(self) -> Tensor:
        """[P + R] int64: x_0, the terminal sequence."""
        return torch.cat([self.prompt_ids, self.response_ids])

    @cached_property
    def commit_grid(self) -> Tensor:
        """[N, K] int64: commit steps on the block grid, -1 at prompt positions."""
        num_prompt_tokens = len(self.prompt_ids) % self.block_size
        prompt = self.commit_step.new_full((num_prompt_tokens,), -1)
        return torch.cat([prompt, self.commit_step]).view(-1, self.block_size)

    @cached_property
    def num_steps(self) -> Tensor:
        """[N] int64: denoising steps that each block took."""
        return self.commit_grid.amax(dim=1) + 1

    @property
    def num_passes(self) -> int:
        """Denoising passes of the whole response; commits ride along with them."""
        return int(self.num_steps.sum())

    @property
    def text_ids(self) -> Tensor:
        """[num_response_tokens] int64: the response alone."""
        return self.response_ids[: self.num_response_tokens]


def select_state(trajectory: Trajectory, *, state_selection: str, key: int) -> Tensor:
    """Chooses the noisy state of a trajectory: for every block, the denoising step before which it
    is seen.

    `per_block`: every block picks uniformly among its own steps. `trajectory` (paper, Algorithm 1
    lines 5-6): one index for the whole trajectory; blocks before it are finished, the block at it
    is partly masked, blocks after it are fully masked.

    Args:
        trajectory: the recorded rollout.
        state_selection: one of STATE_SELECTION.
        key: random key, `randomness.key(...)`; the same key gives the same state.

    Returns:
        [N, K] bool, True where the position is masked in the selected state. Prompt positions are
        never masked.
    """
    num_steps = trajectory.num_steps
    if state_selection == "per_block":
        columns = torch.arange(len(num_steps))
        uniform = randomness.uniform(torch.tensor([key]), columns)[0]
        step = (uniform.double() * num_steps).long().clamp(max=num_steps - 1)
    elif state_selection == "trajectory":
        draw = float(randomness.uniform(torch.tensor([key]), torch.zeros(1, dtype=torch.int64)))
        chosen = min(int(draw * trajectory.num_passes), trajectory.num_passes - 1)
        before = torch.cumsum(num_steps, 0) - num_steps
        step = (chosen - before).clamp(min=0)
    else:
        raise ValueError(
            f"state_selection={state_selection!r}: use one of {', '.join(STATE_SELECTION)}"
        )
    # A block whose step is past its own last one is finished: nothing in it is masked.
    return trajectory.commit_grid >= step.unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A trajectory seen at one noisy state, ready for the student and the teacher.

    Attributes:
        trajectory: where it comes from.
        student: clean tokens followed by the noisy blocks that hold a loss position; its loss rows
            are the loss positions.
        teacher: clean tokens, causal, as far as a target is needed; its loss rows are aligned one
            to one with the student's.
        num_masked: [T] int64, masked positions in each row's block.
    """

    trajectory: Trajectory
    student: Document
    teacher: Document
    num_masked: Tensor

    @property
    def num_rows(self) -> int:
        """Number of loss positions."""
        return len(self.num_masked)


def teacher_row(position: Tensor) -> Tensor:
    """Returns the position whose causal logits predict `position`: the one before it.

    The student's logits at a position predict that very position; this is the only place where the
    shift of the autoregressive teacher enters. With block size 4 and a prompt of 6, the target of
    r0 (position 6) is the teacher's output at position 5."""
    return position - 1


def training_state(
    trajectory: Trajectory, masked: Tensor, *, mask_token_id: int, include_eos: bool
) -> TrainingState:
    """Lays out one trajectory at one noisy state.

    Loss positions are masked in the state, part of the response, and at or before the end of
    sequence (before it, if `include_eos` is False). Noisy blocks without a loss position are left
    out, and so are the clean tokens that no remaining noisy block can see.

    Args:
        trajectory: the recorded rollout.
        masked: [N, K] bool from `select_state`.
        mask_token_id: id shown at masked positions.
        include_eos: whether the end-of-sequence token carries loss.

    Returns:
        The documents of student and teacher. Both are empty if the state has no loss position.
    """
    block_size = trajectory.block_size
    num_prompt_tokens = len(trajectory.prompt_ids)
    grid_start = trajectory.first_block * block_size
    last_loss = num_prompt_tokens + trajectory.num_response_tokens
    if trajectory.ended and not include_eos:
        last_loss -= 1
    positions = torch.arange(grid_start, grid_start + masked.numel()).view_as(masked)
    has_loss = masked & (positions < last_loss)
    used = has_loss.any(dim=1)
    shown = trajectory.token_ids[grid_start:].view_as(masked).masked_fill(masked, mask_token_id)

    noisy_positions = positions[used].reshape(-1)
    clean_length = int(noisy_positions[-block_size]) if len(noisy_positions) else 0
    clean_positions = torch.arange(clean_length)
    loss_rows = clean_length + has_loss[used].reshape(-1).nonzero().squeeze(1)
    student = Document(
        token_ids=torch.cat([trajectory.token_ids[:clean_length], shown[used].reshape(-1)]),
        tags=torch.cat(
            [
                make_tags(0, clean_positions, noisy=False, block_size=block_size),
                make_tags(0, noisy_positions, noisy=True, block_size=block_size),
            ]
        ),
        loss_rows=loss_rows,
    )
    targets = teacher_row(positions[has_loss])
    teacher_length = int(targets.max()) + 1 if len(targets) else 0
    teacher = Document(
        token_ids=trajectory.token_ids[:teacher_length],
        tags=make_tags(0, torch.arange(teacher_length), noisy=False, block_size=1),
        loss_rows=targets,
    )
    return TrainingState(
        trajectory=trajectory,
        student=student,
        teacher=teacher,
        num_masked=masked.sum(1, keepdim=True).expand_as(masked)[has_loss],
    )
