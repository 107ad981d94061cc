"""A training example: a response at its noisy states, laid out for student and teacher.

Shape letters: M states, N blocks with decoded tokens, K block size, T loss rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.diffusion.prediction import PREDICTIONS, SAME_POSITION
from megatron_opdlm.diffusion.state_selection import NoisyStates
from megatron_opdlm.diffusion.stream import Document
from megatron_opdlm.diffusion.tags import NOISY, make_tags
from megatron_opdlm.diffusion.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class TrainingExample:
    """A response at one or more noisy states."""

    trajectory: Trajectory
    """Trajectory of the response."""
    student: Document
    """Document for the student: clean tokens, then the noisy blocks with an output that predicts a
    loss position. Its loss rows are these outputs."""
    teacher: Document
    """Document for the teacher: clean tokens with causal tags, up to the last needed target. Its
    loss rows correspond one to one to the student's."""
    target_ids: Tensor
    """[T] int64, the response's token at each loss position."""
    num_masked: Tensor
    """[T] int64, number of masked positions in the block of each loss row."""
    row_scale: Tensor
    """[T] float32, factor of each loss row: 1, or 1/t for the NELBO."""
    denominator: int
    """Divisor of a mean over the response: its number of loss rows, or of response tokens for the
    NELBO."""
    num_states: int
    """Divisor of a sum over the response, so that more states do not make the loss larger: M, or 1
    for the NELBO, whose rows are already divided."""

    @property
    def num_rows(self) -> int:
        """Number of loss positions, over all states."""
        return len(self.num_masked)


def teacher_row(position: Tensor) -> Tensor:
    """Returns the position whose causal logits predict `position`: the one before it.

    The shift of the autoregressive teacher is applied only here and in `predicted_position`; that
    of the student is a choice, see `prediction.py`. Example: with block size 4 and a prompt of 6
    tokens, the target of r0 (position 6) is the teacher's output at position 5.
    """
    return position - 1


def predicted_position(row: Tensor) -> Tensor:
    """Returns the position that the teacher's output at `row` predicts: undoes `teacher_row`."""
    return row + 1


def make_example(
    trajectory: Trajectory,
    states: NoisyStates,
    *,
    mask_token_id: int,
    include_eos: bool,
    nelbo: bool = False,
    prediction: str = SAME_POSITION,
) -> TrainingExample:
    """Lays out one response at its noisy states.

    A loss position is masked in the state, belongs to the response, and is not after the end of
    sequence (if `include_eos` is False, it is before the end of sequence). Noisy blocks without an
    output that predicts a loss position are left out, and so are clean tokens that neither predict
    one nor are seen by a remaining noisy block.

    Args:
        trajectory: trajectory of the response.
        states: noisy states from `select_states`.
        mask_token_id: id of the mask token, which stands at masked positions.
        include_eos: whether the end-of-sequence token has a loss.
        nelbo: whether loss rows have the factor 1/t, and a mean divides by the number of response
            tokens. With cross-entropy the loss is then the block-diffusion NELBO per token (BD3-LM,
            arXiv 2503.09573, Eq. 8, linear schedule), averaged over the M states.
        prediction: a name of PREDICTIONS: which output predicts a loss position.

    Returns:
        The documents of student and teacher. Both are empty if there is no loss position.
    """
    masked = states.masked
    num_prompt_tokens = len(trajectory.prompt_ids)
    grid_start = trajectory.first_block * trajectory.block_size
    last_loss = num_prompt_tokens + trajectory.num_response_tokens
    if trajectory.ended and not include_eos:
        last_loss -= 1
    positions = torch.arange(grid_start, grid_start + masked[0].numel()).view_as(masked[0])
    has_loss = masked & (positions < last_loss)
    row_state, row_block, row_place = has_loss.nonzero(as_tuple=True)
    loss_positions = positions[row_block, row_place]
    row_scale, denominator = torch.ones(len(row_state)), len(row_state)
    if nelbo:
        assert states.time is not None, "the NELBO is about random masks"
        row_scale = 1 / (len(masked) * states.time[row_state, row_block])
        denominator = last_loss - num_prompt_tokens
    return TrainingExample(
        trajectory=trajectory,
        student=_student_document(
            trajectory, masked, has_loss, mask_token_id, PREDICTIONS[prediction].shift
        ),
        teacher=_teacher_document(trajectory, teacher_row(loss_positions)),
        target_ids=trajectory.token_ids[loss_positions],
        num_masked=masked.sum(-1)[row_state, row_block],
        row_scale=row_scale,
        denominator=denominator,
        num_states=1 if nelbo else len(masked),
    )


def _student_document(
    trajectory: Trajectory, masked: Tensor, has_loss: Tensor, mask_token_id: int, shift: int
) -> Document:
    """Returns the clean tokens that are needed, then the noisy blocks whose outputs are needed.

    `masked` and `has_loss` are [M, N, K] bool. An output predicts the position `shift` after it.
    """
    size, first = trajectory.block_size, trajectory.first_block
    row_state, row_block, row_place = has_loss.nonzero(as_tuple=True)
    clean_length = (first + int(row_block.max())) * size if len(row_block) else 0
    is_shown = has_loss[..., shift:].any(-1)
    state, block = is_shown.nonzero(as_tuple=True)
    x_0 = trajectory.token_ids[first * size :].view_as(masked[0])
    shown = x_0[block].masked_fill(masked[state, block], mask_token_id)
    starts = (first + block) * size
    positions = starts.repeat_interleave(size) + torch.arange(size).repeat(len(block))
    noisy_tags = make_tags(0, positions, noisy=0, block_size=size)
    noisy_tags[:, NOISY] = (state + 1).repeat_interleave(size)
    clean_tags = make_tags(0, torch.arange(clean_length), noisy=0, block_size=size)
    # The output before a block's first token is that of a clean token, in all states.
    offsets = (is_shown.flatten().cumsum(0).view_as(is_shown) - 1) * size
    noisy_row = clean_length + offsets[row_state, row_block] + row_place - shift
    clean_row = (first + row_block) * size - 1
    return Document(
        token_ids=torch.cat([trajectory.token_ids[:clean_length], shown.flatten()]),
        tags=torch.cat([clean_tags, noisy_tags]),
        loss_rows=torch.where(row_place < shift, clean_row, noisy_row),
    )


def _teacher_document(trajectory: Trajectory, rows: Tensor) -> Document:
    """Returns the clean tokens up to the last loss row."""
    length = int(rows.max()) + 1 if len(rows) else 0
    return Document(
        token_ids=trajectory.token_ids[:length],
        tags=make_tags(0, torch.arange(length), noisy=0, block_size=1),
        loss_rows=rows,
    )
