"""The tokenizer of a checkpoint: files are copied, and a mask token is added to the JSON.

transformers 4 cannot load the file layout of transformers 5; the reverse works. So no library saves
the files again. The original files are copied, and only the entries of the mask token are added, in
the older layout, which all versions and serving engines read.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_opdlm.convert.tokenizer_files import (
    NAMED_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TokenizerFiles,
    content_of,
    token_ids,
)
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import without_garbage_collection, write_json

MASK_TOKEN = "<|MASK|>"
"""The string that SDAR, TraDo and OPDLM use; id 151669 in Qwen3's vocabulary."""

_TOKENIZER_FILES = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
# names of classes in transformers 5, and in transformers 4
_CLASS_NAMES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def has_tokenizer(directory: Path) -> bool:
    """Returns whether a directory has a tokenizer that this module can read."""
    return (directory / TOKENIZER_JSON).is_file()


def copy_tokenizer(src_dir: Path, dst_dir: Path) -> None:
    """Copies tokenizer files, chat template and generation_config.json, byte for byte.

    Args:
        src_dir: Hugging Face directory.
        dst_dir: folder of the copy; it is made if it does not exist.
    """
    dst_dir.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (src_dir / name).is_file():
            shutil.copyfile(src_dir / name, dst_dir / name)  # follows a hub cache's links


@without_garbage_collection()
def add_mask_token(
    src_dir: str | Path, dst_dir: str | Path, vocab_size: int, mask_token: str = MASK_TOKEN
) -> int:
    """Copies a tokenizer, and adds a mask token with the id of the first free embedding row.

    If the tokenizer already names a mask token, or already has `mask_token`, it does not change.

    Args:
        src_dir: directory with tokenizer.json.
        dst_dir: folder of the copy; it is made if it does not exist.
        vocab_size: number of rows of the model's embedding.
        mask_token: text of the mask token.

    Returns:
        Id of the mask token: 151669 for Qwen3. It is `vocab_size` if no row is free; the embedding
        then needs a new row.

    Raises:
        ConversionError: there is no tokenizer.json, the tokenizer names another mask token, it has
            more tokens than the embedding has rows, or the id is that of eos, pad, bos or unk.
    """
    files, dst = TokenizerFiles(src_dir), Path(dst_dir)
    mask, mask_id = find_mask_token(files, vocab_size, mask_token)
    copy_tokenizer(files.folder, dst)
    _patch_tokenizer_json(dst, files.tokenizer, mask, mask_id)
    _patch_config(dst, files.config, files.tokenizer["added_tokens"], mask)
    loaded = _load(dst, files.folder)
    if loaded.token_to_id(mask) != mask_id:  # a vocabulary with holes numbers new tokens otherwise
        raise ConversionError(
            f"{files.folder}: the tokenizers library gives {mask!r} id {loaded.token_to_id(mask)} "
            f"where {mask_id} is free; the vocabulary has holes"
        )
    return mask_id


def find_mask_token(files: TokenizerFiles, vocab_size: int, mask_token: str) -> tuple[str, int]:
    """Returns text and id that `add_mask_token` would give the mask token. Writes nothing.

    Raises:
        ConversionError: see `add_mask_token`.
    """
    src, ids = files.folder, files.ids
    mask = _mask_text(files, mask_token)
    _require_rows(files, mask, vocab_size)
    mask_id = ids.get(mask, max(ids.values()) + 1)
    if mask_id > vocab_size:
        raise ConversionError(
            f"{src}: mask token {mask!r} has id {mask_id}, the embedding only {vocab_size} rows; "
            f"remove it from {TOKENIZER_JSON}, so that it gets the first free id, or enlarge the "
            f"embedding: model.resize_token_embeddings({mask_id + 1})"
        )
    for key, name in files.named.items():
        if key != "mask_token" and ids.get(name) == mask_id:
            raise ConversionError(f"{src}: mask token {mask!r} is also the {key}; they must differ")
    added = {token["content"] for token in files.tokenizer["added_tokens"]}
    if "mask_token" not in files.named and mask in ids and mask not in added:
        raise ConversionError(
            f"{src}: mask token {mask!r} is an ordinary token of the vocabulary, which prompts "
            "contain; choose another with --mask-token (training: mask_token)"
        )
    return mask, mask_id


def _require_rows(files: TokenizerFiles, mask: str, vocab_size: int) -> None:
    """Refuses ids without an embedding row, except the mask token's, which may get a new row."""
    beyond = {i: token for token, i in files.ids.items() if i >= vocab_size and token != mask}
    if not beyond:
        return
    top, first = max(beyond), beyond[min(beyond)]
    added = {token["content"] for token in files.tokenizer["added_tokens"]}
    has = f"{files.folder}: the tokenizer has ids up to {top}, the embedding only {vocab_size} rows"
    if not added.issuperset(beyond.values()):
        raise ConversionError(f"{has}; they are not of one model")
    roles = [f"{key} of {TOKENIZER_CONFIG}" for key, text in files.named.items() if text == first]
    named = f", and make another token {' and '.join(roles)}" if roles else ""
    raise ConversionError(
        f"{has}: the model never saw the added token {first!r} (id {min(beyond)}); if nothing "
        f"needs it, remove it from added_tokens of {TOKENIZER_JSON}{named}; else enlarge the "
        f"embedding: model.resize_token_embeddings({top + 1})"
    )


def replace_mask_token(src_dir: Path, dst_dir: Path, text: str, token_id: int) -> None:
    """Copies a tokenizer, and gives its mask token another text, another id or both.

    The old token is removed if the new one has its text or its id; otherwise it stays as an
    ordinary token. The tokenizers library numbers added tokens without gaps, so unused tokens fill
    free ids below the mask token's.

    Args:
        src_dir: directory with a tokenizer that names a mask token.
        dst_dir: folder of the copy; it is made if it does not exist.
        text: new text of the mask token.
        token_id: new id of the mask token.

    Raises:
        ConversionError: another token has the text or the id, or the mask token cannot change.
    """
    files = TokenizerFiles(src_dir)
    tokenizer, config, ids, old = (
        files.tokenizer, files.config, files.ids, files.named.get("mask_token"),
    )  # fmt: skip
    others = {token: i for token, i in ids.items() if token != old}
    if text in others:
        raise ConversionError(
            f"{src_dir}: {text!r} is token {others[text]}; the mask token needs that text"
        )
    if holders := [token for token, i in others.items() if i == token_id]:
        raise ConversionError(
            f"{src_dir}: id {token_id} is token {holders[0]!r}; the mask token needs that id"
        )
    added = tokenizer["added_tokens"]
    specials = [content_of(token) for token in config.get("additional_special_tokens") or []]
    if old == text or ids.get(old or "") == token_id:
        added = [token for token in added if token["content"] != old]
        specials = [token for token in specials if token != old]
    proper = token_ids(src_dir, tokenizer | {"added_tokens": []}).values()
    free = set(range(max(proper) + 1, token_id)).difference(token["id"] for token in added)
    added += [_added_token(i, _unused_token(i), special=False) for i in sorted(free)]
    tokenizer["added_tokens"] = added
    copy_tokenizer(src_dir, dst_dir)
    _patch_tokenizer_json(dst_dir, tokenizer, text, token_id)
    config["additional_special_tokens"] = specials
    _patch_config(dst_dir, config, tokenizer["added_tokens"], text)
    found = _load(dst_dir, src_dir).token_to_id(text)
    if found != token_id:  # the old one is in the vocabulary proper
        raise ConversionError(
            f"{src_dir}: the mask token {old!r} cannot become {text!r} with id {token_id}: the "
            f"tokenizers library gives it id {found}"
        )


@without_garbage_collection()
def tokenizer_fingerprint(files: TokenizerFiles, mask_token: str = MASK_TOKEN) -> str:
    """Returns a hash of what maps text to ids: vocabulary, merges and added tokens but the mask.

    Student and teacher may differ in the mask token, the chat template and file formatting only.

    Args:
        files: tokenizer files.
        mask_token: text of the mask token that an import will add, if the tokenizer names none yet.

    Returns:
        sha256 in hex.

    Raises:
        ConversionError: tokenizer.json is missing or malformed.
    """
    mask = files.named.get("mask_token") or mask_token
    model = files.tokenizer["model"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    content = {
        "type": model.get("type"),
        "ids": sorted(
            (i, token) for token, i in files.ids.items() if token not in (mask, _unused_token(i))
        ),
        "merges": merges,
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _unused_token(token_id: int) -> str:
    """Returns a token that fills a gap below the mask token; the library allows no gaps."""
    return f"<|unused_{token_id}|>"


def _mask_text(files: TokenizerFiles, mask_token: str) -> str:
    """Returns the mask token that the tokenizer names, or else the requested one."""
    src, named = files.folder, files.named.get("mask_token")
    if not (named or mask_token):
        raise ConversionError(f"{src}: the mask token needs a text")
    if named is None:
        if not mask_token.isprintable() or mask_token.strip() != mask_token:
            raise ConversionError(
                f"mask token {mask_token!r} must be printable text without spaces at its ends"
            )
        return mask_token
    if mask_token not in (named, MASK_TOKEN):
        raise ConversionError(
            f"{src}: the tokenizer's mask token is {named!r}, not {mask_token!r}; "
            "leave --mask-token away to use it"
        )
    return named


def _load(directory: Path, source: Path) -> Tokenizer:
    """Loads a copied tokenizer with the tokenizers library. Errors name its source."""
    try:
        return Tokenizer.from_file(str(directory / TOKENIZER_JSON))
    except Exception as error:
        if type(error) is not Exception:  # the library raises the plain class itself
            raise
        raise ConversionError(
            f"{source / TOKENIZER_JSON}: the tokenizers library cannot read it: {error}"
        ) from None


def _patch_tokenizer_json(dst: Path, tokenizer: dict[str, Any], mask: str, mask_id: int) -> None:
    """Adds the mask as a special token, so that it never merges, and decoding can skip it."""
    others = [token for token in tokenizer["added_tokens"] if token["content"] != mask]
    tokens = [*others, _added_token(mask_id, mask, special=True)]
    tokenizer["added_tokens"] = sorted(tokens, key=lambda token: token["id"])
    # No indentation, because Python's encoder would need seconds for 11 MB.
    text = json.dumps(tokenizer, ensure_ascii=False)
    (dst / TOKENIZER_JSON).write_text(text, encoding="utf-8")


def _added_token(token_id: int, text: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _patch_config(
    dst: Path, config: dict[str, Any], added: list[dict[str, Any]], mask: str
) -> None:
    """Writes tokenizer_config, special_tokens_map and added_tokens in the version 4 layout."""
    config = dict(config)
    for key in ("backend", "is_local"):  # transformers 5 writes them, and nothing reads them
        config.pop(key, None)
    if isinstance(config.get("extra_special_tokens"), list):  # the next key's name in version 5
        config.setdefault("additional_special_tokens", config.pop("extra_special_tokens"))
    name = config.get("tokenizer_class", "PreTrainedTokenizerFast")
    config["tokenizer_class"] = _CLASS_NAMES.get(name, name)
    specials = [content_of(token) for token in config.get("additional_special_tokens") or []]
    config["additional_special_tokens"] = specials + [mask] * (mask not in specials)
    config["mask_token"] = mask
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config["added_tokens_decoder"] = {
        str(token["id"]): {field: token.get(field, False) for field in fields} for token in added
    }
    write_json(dst / TOKENIZER_CONFIG, config)
    specials_map: dict[str, Any] = {
        key: content_of(config[key]) for key in NAMED_TOKENS if config.get(key) is not None
    }
    specials_map["additional_special_tokens"] = config["additional_special_tokens"]
    write_json(dst / "special_tokens_map.json", specials_map)
    ids = {token["content"]: token["id"] for token in added}
    write_json(dst / "added_tokens.json", ids)
