"""Sizes of the survey's cases, shared by the items and by the table of what is expected of them.

    python3 tools/gpu/cases.py

prints that table, for docs/gpu.md. Standard library only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.gpu.roofline import (
    BACKWARD_ATTENTION,
    BF16_BYTES,
    CARDS,
    Card,
    Shape,
    decoding_pass,
    doubled_pairs,
    loss_flops,
    training_step,
)

BLOCK = 4
"""K: tokens per block, as in every example."""
COPY_BYTES, PRODUCT_SIZE = 2**31, 8192
"""Bytes of a copy's source; side of the three matrices of a product."""
ATTENTION = {"0.6B": (128, (256, 2048)), "8B": (128, (1024,))}
"""Decoding attention of one layer: rows and contexts by model."""
STREAM_MODEL, STREAM_PROMPT, STREAM_RESPONSES = "0.6B", 200, (4096, 16384)
"""Attention of a training stream, one layer: a prompt and a response, clean and noisy."""
VOCAB = 151_936
LOSS_ROWS, LOSS_WIDTHS = 4096, (1024, 4096)
SAMPLED_ROWS = 512
"""128 rows with four masks each."""
SMALL, SMALL_ROWS, SMALL_CONTEXTS = "0.6B", 128, (256, 2048)
LARGE, LARGE_ROWS, LARGE_CONTEXT = "8B", (32, 64, 128), 1024
TRAINED_PROMPT, TRAINED_RESPONSE = 200, 924
"""A document of a training step: 2,048 tokens, clean and noisy."""
TRAINED_DOCUMENTS = {"0.6B": 8, "8B": 4}
"""Of one step: 16,384 and 8,192 tokens. The 8B's optimizer leaves no room for more on 80 GB."""
MASKED_SHARE = 0.6
"""Of a response, at a random state of a random trajectory."""
LARGE_LAYERS = 8
"""Of the 8B's 36 in a training step."""
PASS_TOKENS = BLOCK + 1
"""Tokens of a row and pass at one commit per pass: the finished block rides along with the first of
the four passes of the next one."""
PASS_MASKS = (BLOCK + 1) / 2
"""Masked positions of a row and pass, likewise: 4, 3, 2, 1."""

Row = tuple[str, str, str, Callable[[Card], float]]
"""Item, case, formula, and the least milliseconds on a card."""


def trained(name: str) -> dict[str, float]:
    """Tokens, loss rows and pairs of a training step."""
    count = TRAINED_DOCUMENTS[name]
    tokens = TRAINED_PROMPT + 2 * TRAINED_RESPONSE
    pairs = doubled_pairs(TRAINED_PROMPT, TRAINED_RESPONSE, BLOCK)
    rows = round(MASKED_SHARE * TRAINED_RESPONSE)
    return {"tokens": count * tokens, "head_rows": count * rows, "pairs": count * pairs}


def attention_bytes(shape: Shape, rows: int, context: int) -> int:
    """Keys and values of one layer that a decoding pass reads."""
    return rows * context * shape.cache_bytes // shape.num_layers


def _machine() -> Iterator[Row]:
    yield (
        "machine", f"copy of {COPY_BYTES / 2**30:.0f} GiB", "read + write / bandwidth",
        lambda card: 2e3 * COPY_BYTES / card.bytes_per_s,
    )  # fmt: skip
    yield (
        "machine", f"bf16 product of {PRODUCT_SIZE:,}^3", "2 n^3 / peak",
        lambda card: 2e3 * PRODUCT_SIZE**3 / card.flops,
    )  # fmt: skip


def _kernels() -> Iterator[Row]:
    for name, (rows, contexts) in ATTENTION.items():
        for context in contexts:
            size = attention_bytes(Shape.of(name), rows, context)
            yield (
                "decoding-attention", f"{name}, {rows} rows, context {context:,}",
                "keys and values once / bandwidth",
                lambda card, size=size: 1e3 * size / card.bytes_per_s,
            )  # fmt: skip
    yield (
        "sampler", f"{SAMPLED_ROWS} rows of {VOCAB:,}, bf16", "logits once / bandwidth",
        lambda card: 1e3 * SAMPLED_ROWS * VOCAB * BF16_BYTES / card.bytes_per_s,
    )  # fmt: skip
    for width in LOSS_WIDTHS:
        yield (
            "loss", f"{LOSS_ROWS:,} rows of {VOCAB:,}, D = {width:,}", "8 T V D / peak",
            lambda card, width=width: 1e3 * loss_flops(LOSS_ROWS, width, VOCAB) / card.flops,
        )  # fmt: skip
    shape = Shape.of(STREAM_MODEL, 1)
    for response in STREAM_RESPONSES:
        flops = shape.attention_flops(doubled_pairs(STREAM_PROMPT, response, BLOCK))
        both = 1 + BACKWARD_ATTENTION
        for part, factor in (("forward", 1.0), ("forward and backward", both)):
            yield (
                "stream-attention", f"response of {response:,}, {part}",
                f"{4 * factor:.0f} N head pairs / peak",
                lambda card, flops=flops * factor: 1e3 * flops / card.flops,
            )  # fmt: skip


def _decoding() -> Iterator[Row]:
    cases = [(SMALL, SMALL_ROWS, context) for context in SMALL_CONTEXTS]
    cases += [(LARGE, rows, LARGE_CONTEXT) for rows in LARGE_ROWS]
    for name, rows, context in cases:
        shape = Shape.of(name)
        counts = {"rows": rows, "tokens": PASS_TOKENS * rows, "head_rows": PASS_MASKS * rows}
        yield (
            f"decoding-{name}", f"{rows} rows, context {context:,}",
            "max(products, weights + logits) + max(attention, cache)",
            lambda card, shape=shape, counts=counts, context=context: 1e3
            * decoding_pass(shape, card, context=context, **counts),
        )  # fmt: skip


def _training() -> Iterator[Row]:
    for name, layers in ((SMALL, None), (LARGE, LARGE_LAYERS)):
        shape, counts = Shape.of(name, layers), trained(name)
        for precision, fp8 in (("bf16", False), ("FP8", True)):
            yield (
                f"training-{name}", f"{counts['tokens']:,} tokens, {precision}",
                "(3 forward + teacher's head) / peak + optimizer / bandwidth",
                lambda card, shape=shape, counts=counts, fp8=fp8: 1e3
                * training_step(shape, card, fp8=fp8, **counts),
            )  # fmt: skip


def expected() -> list[Row]:
    """Every case with a bound."""
    return [*_machine(), *_kernels(), *_decoding(), *_training()]


def rate(item: str, case: str, ms: float) -> str:
    """What the least time means for users: tokens per second, or nothing."""
    if item.startswith("decoding-") and "rows" in case and item != "decoding-attention":
        return f"{1e3 * int(case.split()[0]) / ms:,.0f} tokens/s"
    return ""


def table() -> str:
    """Markdown, of both cards."""
    lines = [
        "| item | case | least time | " + " | ".join(f"{card.name}, ms" for card in CARDS) + " |",
        "|---|---|---|" + "---:|" * len(CARDS),
    ]
    for item, case, formula, bound in expected():
        cells = []
        for card in CARDS:
            ms = bound(card)
            about = rate(item, case, ms)
            cells.append(f"{ms:.3g}" + (f" ({about})" if about else ""))
        lines.append(f"| {item} | {case} | {formula} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
