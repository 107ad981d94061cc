"""KL(teacher || student) at the noisy states of the student's own rollouts, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pair import STUDENT, Pair
from torch import Tensor

from megatron_opdlm.diffusion.example import TrainingExample, make_example, predicted_position
from megatron_opdlm.diffusion.noising import select_states
from megatron_opdlm.diffusion.stream import pack
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distill.batching import plan_packing
from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.loss.fused import fused_divergence
from megatron_opdlm.model.pipeline import forward_only
from megatron_opdlm.reporting.progress import progress_bar

PASS_RESPONSES = 8
"""Responses between two movements of the progress bar."""


@dataclass(frozen=True)
class MaskedTokens:
    """The masked positions of all states, in no particular order."""

    kl: Tensor
    """[T] float64, KL(teacher || student) of every masked position, in nats."""
    place: Tensor
    """[T] int64, its position in its block, from 0."""
    num_masked: Tensor
    """[T] int64, number of masked positions in its block."""

    def to_json(self, block_size: int) -> dict[str, Any]:
        """Returns means and numbers of masked positions: of all, by position, by masked number."""
        return {
            "kl": float(self.kl.mean()),
            "num_positions": len(self.kl),
            "by_position": [_mean(self.kl, self.place == place) for place in range(block_size)],
            "by_masked": [
                _mean(self.kl, self.num_masked == number) for number in range(1, block_size + 1)
            ],
        }


def divergences(pair: Pair, trajectories: Sequence[Trajectory]) -> MaskedTokens:
    """Compares both models at every state of the trajectories, as training does.

    Every denoising step of every block is one state, and each of its masked positions up to the end
    of sequence has a divergence.

    Args:
        pair: the models.
        trajectories: the student's own responses.
    """
    examples = [_example(pair, trajectory) for trajectory in trajectories]
    parts = []
    with progress_bar(len(examples), "states", is_main=True, leave=False) as bar:
        for start in range(0, len(examples), PASS_RESPONSES):
            some = examples[start : start + PASS_RESPONSES]
            parts += _compare(pair, some)
            bar.update(len(some))
    return MaskedTokens(
        torch.cat([part.kl for part in parts]),
        torch.cat([part.place for part in parts]),
        torch.cat([part.num_masked for part in parts]),
    )


def _example(pair: Pair, trajectory: Trajectory) -> TrainingExample:
    """Lays out a response at all its states."""
    mask_token_id = pair.student.mask_token_id
    # The key has no effect: every state is taken.
    states = select_states(trajectory, state_selection="all", key=0, mask_token_id=mask_token_id)
    return make_example(
        trajectory,
        states,
        mask_token_id=mask_token_id,
        include_eos=True,
        prediction=pair.options[STUDENT].prediction,
    )


@torch.no_grad()
def _compare(pair: Pair, examples: Sequence[TrainingExample]) -> list[MaskedTokens]:
    """Runs both models on some responses."""
    student, teacher, device = pair.student, pair.teacher, torch.cuda.current_device()
    lengths = [len(example.student) for example in examples]
    packing = plan_packing(lengths, dp_size=1, token_budget=teacher.token_budget)
    targets = teacher.targets(teacher.hidden_rows([e.teacher for e in examples], packing))
    parts = []
    for places, target in zip(packing[0], targets, strict=True):
        some = [examples[i] for i in places]
        stream = pack([e.student for e in some], multiple=teacher.stream_multiple).to(device)
        (hidden,) = forward_only(student.model, [stream], pair.parallel)
        _, kl = fused_divergence(
            hidden,
            student.model.head_weight(),
            target,
            torch.ones(len(hidden), device=device),
            Divergence(),
            vocab_size=student.model.vocab_size_unpadded,
            mask_token_id=student.mask_token_id,
            tp_group=pair.parallel.tp_group,
        )
        # The teacher's rows say which positions are predicted, whatever predicts them.
        predicted = predicted_position(torch.cat([e.teacher.loss_rows for e in some]))
        num_masked = torch.cat([e.num_masked for e in some])
        parts.append(MaskedTokens(kl.double().cpu(), predicted % pair.block_size, num_masked))
    return parts


def _mean(kl: Tensor, chosen: Tensor) -> dict[str, Any]:
    number = int(chosen.sum())
    return {"kl": float(kl[chosen].mean()) if number else None, "num_positions": number}
