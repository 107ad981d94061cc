"""One denoising step: sample a token for every position, choose which of them to commit.

Shape letters: B rows, K block size, V vocabulary.
"""

import torch
from torch import Tensor


def choose_commits(
    confidence: Tensor, masked: Tensor, number: int, threshold: float | None
) -> Tensor:
    """Which masked positions take their sampled token now.

    Args:
        confidence: [B, K] probability of the sampled token.
        masked: [B, K] bool; nothing else is ever written.
        number: the most confident ones to commit; ties go to the lower position.
        threshold: also commit every position above it; None: no others.

    Returns:
        [B, K] bool.
    """
    confidence = confidence.masked_fill(~masked, -1.0)
    order = confidence.argsort(dim=1, descending=True, stable=True)
    commit = torch.zeros_like(masked).scatter(1, order[:, :number], True)
    if threshold is not None:
        commit = commit | (confidence > threshold)
    return commit & masked


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Sample with temperature, then top-k, then top-p.

    Args:
        logits: [B, K, V] float32.
        temperature: 0 for the argmax.
        top_k: 0 for all tokens.
        top_p: 1 for all tokens; the most likely token always stays.
        generator: random generator, None for torch's own.

    Returns:
        tokens [B, K] and their confidence [B, K]: the probability under the unfiltered softmax at
        temperature 1, so that it means the same under every sampling setting.
    """
    probabilities = logits.softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        scaled = logits / temperature
        if top_k > 0:
            kth = scaled.topk(min(top_k, scaled.shape[-1])).values[..., -1:]
            scaled = scaled.masked_fill(scaled < kth, float("-inf"))
        if top_p < 1:
            ordered, order = scaled.softmax(-1).sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p  # the first one never is
            outside = torch.zeros_like(outside).scatter(-1, order, outside)
            scaled = scaled.masked_fill(outside, float("-inf"))
        flat = scaled.softmax(-1).flatten(0, 1)
        tokens = torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])
    return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]
