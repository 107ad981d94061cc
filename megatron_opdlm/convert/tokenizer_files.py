"""The JSON files of a tokenizer, read with errors a person can act on."""

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
    """The files of one tokenizer, each read once, when something first asks for it.

    A large tokenizer.json is a third of a second and 100 MB of objects: keep none of these for
    long.
    """

    def __init__(self, folder: str | Path) -> None:
        """Names the folder; nothing is read yet."""
        self.folder = Path(folder)

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json, see `read_tokenizer`."""
        return read_tokenizer(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, see `read_tokenizer_config`."""
        return read_tokenizer_config(self.folder)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every token string -> id, added tokens included."""
        return token_ids(self.folder, self.tokenizer)

    @property
    def named(self) -> dict[str, str]:
        """Key -> text of the tokens that tokenizer_config.json names; those it names alone."""
        texts = {key: content_of(self.config.get(key)) for key in NAMED_TOKENS}
        return {key: text for key, text in texts.items() if text is not None}

    @property
    def special(self) -> dict[str, int]:
        """Text -> id of the added tokens that no text of a user or a model spells."""
        added = self.tokenizer["added_tokens"]
        return {token["content"]: token["id"] for token in added if token.get("special")}

    def id_of(self, key: str) -> int | None:
        """Id of a token that tokenizer_config.json names, e.g. "eos_token"; None if it does not."""
        text = self.named.get(key)
        return None if text is None else self.ids.get(text)


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, or {} where there is none.

    Raises:
        ConversionError: malformed, or special tokens that are neither text nor objects.
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
    """tokenizer.json, with `added_tokens` though the file may lack them.

    Raises:
        ConversionError: missing or malformed.
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
    """Every token string -> id, added tokens included."""
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
    """A special token is a string, or an object with a content key."""
    return token.get("content") if isinstance(token, dict) else token
