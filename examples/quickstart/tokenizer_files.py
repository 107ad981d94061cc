"""Trains the quickstart's byte-level BPE tokenizer and writes its files as Qwen3 ships them.

Same normalizer, pre-tokenizer (each digit alone), special tokens, order and chat template as the
released Qwen3 tokenizer; only the merges are few and learnt from the task's text.
"""

from __future__ import annotations

import json
from pathlib import Path

from task import Problem
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import ByteLevel as ByteLevelProcessor

NUM_MERGES = 220
"""Upper limit: training stops early once every word of the task is one token."""
CHAT_TEMPLATE = Path(__file__).resolve().parent / "teacher" / "chat_template.jinja"
QWEN3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN_ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip
CHAT_WORDS = "user\nassistant\n\n\nsystem\n"


def train_bpe(problems: list[Problem]) -> Tokenizer:
    """A tokenizer with the 256 bytes, NUM_MERGES merges and Qwen3's added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(QWEN3_PATTERN), behavior="isolated"),
            ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.post_processor = ByteLevelProcessor(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    trainer = trainers.BpeTrainer(
        vocab_size=256 + NUM_MERGES,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for problem in problems for text in (problem.prompt, problem.response)]
    tokenizer.train_from_iterator([*texts, *[CHAT_WORDS] * len(problems)], trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in PLAIN_ADDED_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer, chat_template: str) -> dict[str, object]:
    """The content of ``tokenizer_config.json``, in the layout transformers 4 and 5 both read."""
    added = {
        str(token_id): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 512,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _token(content: str) -> dict[str, object]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **flags}


def write_tokenizer(out: Path, problems: list[Problem]) -> None:
    """Trains on the problems' text and writes the six tokenizer files into ``out``."""
    chat_template = CHAT_TEMPLATE.read_text()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_bpe(problems)
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer.model.save(str(out))
    special_map = {
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "eos_token": _token("<|im_end|>"),
        "pad_token": _token("<|endoftext|>"),
    }
    files = {
        "tokenizer_config.json": tokenizer_config(tokenizer, chat_template),
        "special_tokens_map.json": special_map,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    (out / "chat_template.jinja").write_text(chat_template)
