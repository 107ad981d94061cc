"""A draw for 512 rows of Qwen3's vocabulary: 128 sequences with four masks each.

Shape letters: T rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.rollout.sampler import Draws, Sampling, sample_tokens
from tools.gpu.cases import BF16_BYTES, SAMPLED_ROWS, VOCAB
from tools.gpu.device import begin, generator
from tools.gpu.implementations import samplers
from tools.gpu.models import MASK_TOKEN
from tools.gpu.record import Check, Context, exact
from tools.gpu.timing import device_ms

TIE = 1e-4
"""Scores closer than this may come out in either order: the rounding of two float32 logarithms."""
CONFIDENCE_LIMIT = 1e-4
PART = 64


@dataclass(frozen=True)
class Exact:
    """Draws in float64.

    Attributes:
        tokens: [T].
        margin: [T] lead of the token's score over the next one's.
        confidence: [T] its probability.
    """

    tokens: Tensor
    margin: Tensor
    confidence: Tensor


def run(context: Context) -> None:
    """Tokens against float64, time and bandwidth of every implementation."""
    begin(context)
    logits = torch.randn(SAMPLED_ROWS, VOCAB, device="cuda", generator=generator()) * 3
    logits = logits.bfloat16()
    keys = torch.tensor([randomness.key(0, row) for row in range(SAMPLED_ROWS)])
    expected, others = _exact(logits, keys), _exact(logits, keys.roll(1))
    on_device = keys.cuda()

    def draw() -> Draws:
        return sample_tokens(
            logits, Sampling(temperature=1.0), keys=on_device, mask_token_id=MASK_TOKEN,
            vocab_size=VOCAB,
        )  # fmt: skip

    first: Tensor | None = None
    for implementation in samplers():
        if implementation.obstacle is not None:
            context.skipped(implementation.name, implementation.obstacle)
            continue
        with implementation.only():
            found = draw()
            ms = device_ms(draw, context.repeats(10))
        tokens = found.tokens.cpu()
        checks = _checks(tokens, found.confidence.double().cpu(), expected, others)
        if first is None:
            first = tokens
        else:
            different = (tokens != first) & (expected.margin > TIE)
            checks.append(exact("tokens that differ between the two", int(different.sum())))
        num_bytes = logits.numel() * BF16_BYTES
        context.timed(implementation.name, ms, checks, num_bytes=num_bytes, us=1e3 * ms)


def _checks(tokens: Tensor, confidence: Tensor, expected: Exact, others: Exact) -> list[Check]:
    """Against float64; the control is what other keys draw."""
    clear = expected.margin > TIE

    def wrong(of: Exact) -> int:
        return int(((tokens != of.tokens) & clear).sum())

    def away(of: Exact) -> float:
        return float(((confidence - of.confidence).abs() * clear).max())

    return [
        Check("wrong tokens", wrong(expected), 0.0, control=wrong(others)),
        Check("confidence", away(expected), CONFIDENCE_LIMIT, control=away(others)),
    ]


def _exact(logits: Tensor, keys: Tensor) -> Exact:
    """What is to be drawn; the bits of the noise are made on the CPU."""
    columns = torch.arange(logits.shape[1])
    found: list[list[Tensor]] = [[], [], []]
    for start in range(0, len(keys), PART):
        part = slice(start, start + PART)
        exact_logits = logits[part].double()
        exact_logits[:, MASK_TOKEN] = -torch.inf
        uniform = randomness.uniform(keys[part], columns).to(logits.device).double()
        best = (exact_logits - (-torch.log1p(-uniform)).log()).topk(2, dim=1)
        chosen = best.indices[:, :1]
        found[0].append(chosen[:, 0])
        found[1].append(best.values[:, 0] - best.values[:, 1])
        found[2].append(exact_logits.softmax(1).gather(1, chosen)[:, 0])
    return Exact(*(torch.cat(parts).cpu() for parts in found))
