"""What a card can do at best, and what the survey's cases ask of it. Arithmetic alone.

For every case and both Hopper cards, the least time that operations and bytes allow; cases.py
prints the table of docs/gpu.md. A multiply-add is two operations. Standard library only.

Shape letters: L layers, D hidden size, N query heads, M key/value heads, V vocabulary, K block
size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "qwen3"
BF16_BYTES = 2
OPTIMIZER_BYTES = 30
"""Of a parameter and step: gradient, master weight and both moments in float32 are read, all but
the gradient are written, and so is the bfloat16 weight."""
BACKWARD_ATTENTION = 2.5
"""Backward pass of flash attention over its forward pass: five matrix products in place of two."""


@dataclass(frozen=True)
class Card:
    """Peak rates of a card, without sparsity.

    Attributes:
        name: for people.
        device_name: what CUDA calls it.
        bytes_per_s: of device memory.
        flops: bfloat16 matrix products, operations per second.
        fp8_flops: FP8 ones.
    """

    name: str
    device_name: str
    bytes_per_s: float
    flops: float = 989e12
    fp8_flops: float = 1979e12

    def seconds(self, flops: float, num_bytes: float = 0.0, *, fp8: bool = False) -> float:
        """Least time: operations and bytes at once."""
        return max(flops / (self.fp8_flops if fp8 else self.flops), num_bytes / self.bytes_per_s)


H100 = Card("H100 SXM", "NVIDIA H100 80GB HBM3", 3.35e12)
H200 = Card("H200", "NVIDIA H200", 4.8e12)
CARDS = (H100, H200)
"""Peaks are those of NVIDIA's data sheets. Other Hopper cards (PCIe, NVL) have other ones."""


def card_of(device_name: str) -> Card | None:
    """The card that CUDA calls so; None: its peaks are not known here."""
    return next((card for card in CARDS if card.device_name == device_name), None)


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder.

    Attributes:
        num_layers: L.
        hidden_size: D.
        num_heads: N.
        num_key_heads: M.
        head_size: of an attention head.
        ffn_size: inner width of the SwiGLU.
        vocab_size: V.
        is_tied: whether embedding and LM head are one matrix.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_heads: int
    head_size: int
    ffn_size: int
    vocab_size: int
    is_tied: bool

    @classmethod
    def of(cls, name: str, num_layers: int | None = None) -> Shape:
        """Reads examples/configs/qwen3.

        Args:
            name: "0.6B" and so on.
            num_layers: in place of the model's own.
        """
        path = CONFIGS / f"Qwen3-{name}.config.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        shape = cls(
            num_layers=raw["num_hidden_layers"],
            hidden_size=raw["hidden_size"],
            num_heads=raw["num_attention_heads"],
            num_key_heads=raw["num_key_value_heads"],
            head_size=raw["head_dim"],
            ffn_size=raw["intermediate_size"],
            vocab_size=raw["vocab_size"],
            is_tied=raw["tie_word_embeddings"],
        )
        return shape if num_layers is None else replace(shape, num_layers=num_layers)

    @property
    def body(self) -> int:
        """Parameters of all layers' matrices."""
        projections = (2 * self.num_heads + 2 * self.num_key_heads) * self.head_size
        return self.num_layers * self.hidden_size * (projections + 3 * self.ffn_size)

    @property
    def head(self) -> int:
        """Parameters of the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All but the norms'."""
        return self.body + self.head * (1 if self.is_tied else 2)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of a token, bfloat16."""
        return 2 * self.num_layers * self.num_key_heads * self.head_size * BF16_BYTES

    def attention_flops(self, pairs: float) -> float:
        """Forward operations of all layers for (query, key) pairs per layer."""
        return 4 * self.num_layers * self.num_heads * self.head_size * pairs


def decoding_pass(
    shape: Shape, card: Card, *, rows: float, tokens: float, head_rows: float, context: float
) -> float:
    """Least seconds of one decoding pass.

    Matrix products and attention follow each other, so each has its own bound. The weights are read
    once, the logits written once and read once, every row's keys and values read once.

    Args:
        shape: of the model.
        card: where it runs.
        rows: sequences.
        tokens: of the stream, clean and noisy.
        head_rows: positions whose logits are wanted.
        context: keys that a token sees.
    """
    products = card.seconds(
        2 * tokens * shape.body + 2 * head_rows * shape.head,
        BF16_BYTES * (shape.body + shape.head + 2 * head_rows * shape.vocab_size),
    )
    attention = card.seconds(
        shape.attention_flops(tokens * context), rows * context * shape.cache_bytes
    )
    return products + attention


def training_flops(shape: Shape, *, tokens: float, head_rows: float, pairs: float) -> float:
    """Operations of the student's forward and backward pass, and of the teacher's head.

    Args:
        shape: of the student, and of the teacher's head.
        tokens: of the stream.
        head_rows: loss positions.
        pairs: (query, key) pairs that may attend, per layer.
    """
    forward = 2 * tokens * shape.body + shape.attention_flops(pairs) + 2 * head_rows * shape.head
    return 3 * forward + 2 * head_rows * shape.head


def training_step(
    shape: Shape, card: Card, *, tokens: float, head_rows: float, pairs: float, fp8: bool = False
) -> float:
    """Least seconds of a step: both passes, then AdamW, which reads and writes its state once.

    Args:
        shape: of the student.
        card: where it runs.
        tokens: of the stream.
        head_rows: loss positions.
        pairs: (query, key) pairs that may attend, per layer.
        fp8: whether the layers' matrix products are FP8; attention and loss never are.
    """
    body = 6 * tokens * shape.body
    rest = training_flops(shape, tokens=tokens, head_rows=head_rows, pairs=pairs) - body
    update = OPTIMIZER_BYTES * shape.num_parameters / card.bytes_per_s
    return card.seconds(body, fp8=fp8) + card.seconds(rest) + update


def loss_flops(rows: int, width: int, vocab_size: int) -> float:
    """Both heads, and both gradients of the student's."""
    return 8.0 * rows * width * vocab_size


def doubled_pairs(prompt: int, response: int, block_size: int) -> int:
    """(query, key) pairs of a prompt and a response, clean and once noisy.

    Clean or noisy, a token of block b sees the tokens of b + 1 blocks. Lengths are whole blocks.
    """
    first, end = prompt // block_size, (prompt + response) // block_size
    seen = sum(range(1, end + 1)) + sum(range(first + 1, end + 1))
    return block_size * block_size * seen
