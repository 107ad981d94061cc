"""Reloads an export with transformers and compares it with the checkpoint it came from."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.diffusion.tags import make_tags
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.generate.decoder import Decoder
from megatron_opdlm.responses.prompts import load_prompts
from megatron_opdlm.rollout.request import DecodingOptions

TOLERANCE = 1e-3
"""Of logits, in float32."""


@dataclass(frozen=True)
class ExportCheck:
    """What the comparison found."""

    max_delta: float
    """Largest difference of a logit under the block-causal mask, over all positions."""
    control: float
    """The same with our model under the causal mask: it must be large."""
    num_equal: int
    """Questions whose greedy responses are the same, token for token."""
    num_questions: int

    def __str__(self) -> str:
        """For people."""
        return (
            f"logits under the block-causal mask: max |delta| = {self.max_delta:.1e} (control, "
            f"causal mask: {self.control:.1e})\ngenerate(): {self.num_equal} of "
            f"{self.num_questions} greedy responses are the same"
        )

    def require_equal(self) -> None:
        """Refuses an export that is another model, and a comparison that would not see it.

        Raises:
            ValueError: with the difference.
        """
        if not self.max_delta <= TOLERANCE:
            raise ValueError(
                f"logits of the export differ by {self.max_delta:g}; at most {TOLERANCE:g}"
            )
        if not self.control > TOLERANCE:
            raise ValueError(
                f"under a causal mask logits differ by {self.control:g} only, so the comparison of "
                "the export cannot tell the masks apart; use longer prompts"
            )


def load_export(export_dir: Path) -> Any:
    """Loads the export with its own modelling code, as any user of transformers would."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export_dir, trust_remote_code=True)
    return model.float().eval()


def check_export(
    exported: Any, checkpoint: Path, questions: str, *, num_questions: int, response_limit: int
) -> ExportCheck:
    """Compares logits and greedy responses on held-out questions.

    Args:
        exported: from `load_export`.
        checkpoint: run folder or checkpoint it was exported from.
        questions: prompt file.
        num_questions: how many of them.
        response_limit: most response tokens.
    """
    decoder = Decoder.open(str(checkpoint), params_dtype="float32")
    description = decoder.student.description
    block_size, prediction = description.block_size, description.prediction
    assert block_size is not None and prediction is not None, "a trained student has both"
    options = DecodingOptions(
        block_size=block_size, denoising_steps=block_size, prediction=prediction
    )
    prompts = decoder.tokenize(
        load_prompts(questions)[:num_questions], options, response_limit=response_limit
    ).kept
    trajectories = decoder.decode(prompts, options, response_limit=response_limit, seed=0)

    def largest(block_size: int) -> float:
        deltas = [
            logit_delta(decoder, exported, t.token_ids, block_size=block_size) for t in trajectories
        ]
        return float(torch.tensor(deltas).max())  # NaN stays

    return ExportCheck(
        max_delta=largest(block_size),
        control=largest(1),
        num_equal=count_equal(exported, trajectories, response_limit),
        num_questions=len(prompts),
    )


@torch.no_grad()
def logit_delta(decoder: Decoder, exported: Any, token_ids: Tensor, *, block_size: int) -> float:
    """Largest difference of the two models' logits on prompt and response."""
    device = torch.cuda.current_device()
    positions = torch.arange(len(token_ids))
    tags = make_tags(0, positions, noisy=False, block_size=block_size).to(device)
    model = decoder.student.model
    ours = model.logits(model.select_rows(model(token_ids.to(device), tags), positions.to(device)))
    theirs = exported(token_ids[None]).logits[0]
    return float((ours[:, : theirs.shape[1]].cpu() - theirs).abs().max())


def count_equal(exported: Any, trajectories: list[Trajectory], response_limit: int) -> int:
    """How many responses the exported model's own generate() repeats exactly."""
    by_length: dict[int, list[Trajectory]] = defaultdict(list)  # it takes prompts of one length
    for trajectory in trajectories:
        by_length[len(trajectory.prompt_ids)].append(trajectory)
    equal = 0
    for length, group in by_length.items():
        prompts = torch.stack([trajectory.prompt_ids for trajectory in group])
        output = exported.generate(prompts, max_new_tokens=response_limit)[:, length:]
        for trajectory, row in zip(group, output, strict=True):
            equal += torch.equal(row[: trajectory.num_response_tokens], trajectory.text_ids)
    return equal
