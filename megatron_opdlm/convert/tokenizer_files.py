"""Reads the JSON files of a tokenizer, with clear errors."""

import reprlib
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import read_json_object

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")


class TokenizerFiles:
    """The files of one tokenizer. Each file is read once, when it is needed.

    A large tokenizer.json takes a third of a second and 100 MB of memory. So no such object should
    be kept for long.
    """

    def __init__(self, folder: str | Path) -> None:
        """Remembers the folder. Reads nothing yet."""
        self.folder = Path(folder)

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """Content of tokenizer.json, see `read_tokenizer`."""
        return read_tokenizer(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of tokenizer_config.json, see `read_tokenizer_config`."""
        return read_tokenizer_config(self.folder)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids of all tokens by their text, including added tokens."""
        return token_ids(self.folder, self.tokenizer)

    @property
    def named(self) -> dict[str, str]:
        """Texts of the tokens that tokenizer_config.json names, by key."""
        texts = {key: content_of(self.config.get(key)) for key in NAMED_TOKENS}
        return {key: text for key, text in texts.items() if text is not None}

    @property
    def special(self) -> dict[str, int]:
        """Ids of special added tokens, by text. Texts of users and models do not contain them."""
        added = self.tokenizer["added_tokens"]
        return {token["content"]: token["id"] for token in added if token.get("special")}

    def id_of(self, key: str) -> int | None:
        """Returns the id of a named token, e.g. "eos_token"; None if the config names none."""
        text = self.named.get(key)
        return None if text is None else self.ids.get(text)


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json, or {} if there is none.

    Raises:
        ConversionError: the file is malformed, or a special token is neither text nor an object.
    """
    path = directory / TOKENIZER_CONFIG
    config = read_json_object(path) if path.is_file() else {}
    for key in NAMED_TOKENS:
        if config.get(key) is not None and not _is_token(config[key]):
            raise ConversionError(
                f"{path}: {key}={reprlib.repr(config[key])} must be null, text, or an object with "
                "content"
            )
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key)
        if isinstance(tokens, dict) and key == "extra_special_tokens":  # name -> token
            tokens = list(tokens.values())
        if tokens is not None and not (isinstance(tokens, list) and all(map(_is_token, tokens))):
            raise ConversionError(f"{path}: {key}={reprlib.repr(tokens)} must be a list of tokens")
    if not isinstance(config.get("tokenizer_class"), str | None):
        raise ConversionError(f"{path}: tokenizer_class must be text")
    return config


def _is_token(token: Any) -> bool:
    return isinstance(token, str) or (
        isinstance(token, dict) and isinstance(token.get("content"), str)
    )


def read_tokenizer(directory: Path) -> dict[str, Any]:
    """Returns the content of tokenizer.json, with an empty `added_tokens` if the file has none.

    Raises:
        ConversionError: the file is missing or malformed.
    """
    path = directory / TOKENIZER_JSON
    if not path.is_file():
        raise ConversionError(
            f"{path}: file not found; save the tokenizer with AutoTokenizer(...).save_pretrained"
        )
    tokenizer = read_json_object(path)
    if not isinstance(tokenizer.get("model"), dict):
        raise ConversionError(f"{path}: key model must be an object")
    merges = tokenizer["model"].get("merges", [])
    if not isinstance(merges, list) or not all(isinstance(pair, str | list) for pair in merges):
        raise ConversionError(f"{path}: key model.merges must be a list of pairs")
    added = tokenizer.setdefault("added_tokens", [])
    if not isinstance(added, list) or not all(
        isinstance(token, dict)
        and _is_id(token.get("id"))
        and isinstance(token.get("content"), str)
        for token in added
    ):
        raise ConversionError(f"{path}: added_tokens must be a list of objects with id and content")
    return tokenizer


def token_ids(directory: Path, tokenizer: dict[str, Any]) -> dict[str, int]:
    """Returns the ids of all tokens by their text, including added tokens."""
    path, vocab = directory / TOKENIZER_JSON, tokenizer["model"].get("vocab")
    if isinstance(vocab, dict) and all(map(_is_id, vocab.values())):  # BPE, WordPiece, WordLevel
        ids = dict(vocab)
    elif isinstance(vocab, list) and all(  # Unigram
        isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocab
    ):
        ids = {entry[0]: i for i, entry in enumerate(vocab)}
    else:
        raise ConversionError(
            f"{path}: key model.vocab must map tokens to ids, or list [token, score] pairs"
        )
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    if not ids:
        raise ConversionError(f"{path}: the vocabulary is empty")
    return ids


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def content_of(token: Any) -> str | None:
    """Returns the text of a special token, which is a string or an object with a content key."""
    return token.get("content") if isinstance(token, dict) else token
