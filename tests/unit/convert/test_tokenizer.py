"""The mask token gets the first free row; nothing else in the tokenizer moves."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_opdlm.convert.chat_template import set_chat_template
from megatron_opdlm.convert.tokenizer import MASK_TOKEN, add_mask_token, tokenizer_fingerprint
from megatron_opdlm.convert.tokenizer_files import TokenizerFiles
from megatron_opdlm.files.errors import ConversionError
from tests.unit.convert.models import EOS, MASK, PAD, edit_json, write_json, write_tokenizer

REAL = Path(__file__).parents[4] / "shared/data/qwen3_tokenizer"


def edit_tokenizer(directory: Path, content: str) -> None:
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([content])
    tokenizer.save(str(path))


def test_mask_gets_the_first_free_id(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a")
    assert add_mask_token(tmp_path / "a", tmp_path / "b", 300) == MASK
    before = Tokenizer.from_file(str(tmp_path / "a/tokenizer.json"))
    after = Tokenizer.from_file(str(tmp_path / "b/tokenizer.json"))
    assert after.get_vocab() == before.get_vocab() | {MASK_TOKEN: MASK}
    assert after.encode("ab<think><|MASK|>x").ids[:3] == [256, 260, MASK]
    assert "MASK" not in after.decode([256, MASK], skip_special_tokens=True)
    assert (
        TokenizerFiles(tmp_path / "b").id_of("mask_token") == MASK
        and TokenizerFiles(tmp_path / "b").id_of("pad_token") == PAD
    )


def test_layout_is_that_of_version_4(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a")
    edit_json(
        tmp_path / "a/tokenizer_config.json",
        extra_special_tokens=["<|im_start|>"],
        backend="tokenizers",
        is_local=True,
        tokenizer_class="TokenizersBackend",
    )
    path = tmp_path / "a/tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["additional_special_tokens"]
    write_json(path, values)
    add_mask_token(tmp_path / "a", tmp_path / "b", 300)
    config = json.loads((tmp_path / "b/tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["<|im_start|>", MASK_TOKEN]
    assert config["mask_token"] == MASK_TOKEN
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["added_tokens_decoder"][str(MASK)]["special"] is True
    assert config["chat_template"] == values["chat_template"]
    assert not {"extra_special_tokens", "backend", "is_local"} & set(config)
    added = json.loads((tmp_path / "b/added_tokens.json").read_text())
    assert added[MASK_TOKEN] == MASK and added["<think>"] == 260
    special = json.loads((tmp_path / "b/special_tokens_map.json").read_text())
    assert special["mask_token"] == MASK_TOKEN and special["eos_token"] == "<|im_end|>"


def test_an_existing_mask_is_kept(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a")
    edit_tokenizer(tmp_path / "a", MASK_TOKEN)
    edit_tokenizer(tmp_path / "a", "<later>")
    assert add_mask_token(tmp_path / "a", tmp_path / "b", 300) == MASK
    assert add_mask_token(tmp_path / "b", tmp_path / "c", 300) == MASK
    assert (tmp_path / "c/tokenizer.json").read_text() == (
        tmp_path / "b/tokenizer.json"
    ).read_text()
    vocabulary = Tokenizer.from_file(str(tmp_path / "c/tokenizer.json")).get_vocab()
    assert vocabulary["<later>"] == MASK + 1


def test_no_free_row(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a")
    assert add_mask_token(tmp_path / "a", tmp_path / "b", MASK + 1) == MASK
    assert add_mask_token(tmp_path / "a", tmp_path / "c", MASK) == MASK  # one row must be added
    with pytest.raises(ConversionError, match="ids up to 260, the embedding only 260 rows"):
        add_mask_token(tmp_path / "a", tmp_path / "d", MASK - 1)
    assert not (tmp_path / "d").exists()


def test_a_mask_beyond_the_embedding(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a")
    path = tmp_path / "a/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"][MASK_TOKEN] = 270
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ConversionError, match="has id 270, the embedding only 261 rows"):
        add_mask_token(tmp_path / "a", tmp_path / "b", MASK)


def test_fingerprint_of_an_ordinary_token_as_mask(tmp_path: Path) -> None:
    """Importing with such a token, and importing the result again, is the same language."""
    write_tokenizer(tmp_path / "a")
    add_mask_token(tmp_path / "a", tmp_path / "b", 300, "<think>")
    assert tokenizer_fingerprint(TokenizerFiles(tmp_path / "b")) == tokenizer_fingerprint(
        TokenizerFiles(tmp_path / "a"), "<think>"
    )
    assert tokenizer_fingerprint(TokenizerFiles(tmp_path / "b")) != tokenizer_fingerprint(
        TokenizerFiles(tmp_path / "a")
    )


def test_template_with_generation_marks(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a")
    template = tmp_path / "template.jinja"
    template.write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    set_chat_template(tmp_path / "a", template)
    assert "generation" in (tmp_path / "a/chat_template.jinja").read_text()
    template.write_text("{% generation %}{{ messages")
    with pytest.raises(ConversionError, match="template.jinja:1"):
        set_chat_template(tmp_path / "a", template)


def test_another_mask_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a")
    assert add_mask_token(tmp_path / "a", tmp_path / "b", 300, "<mask>") == MASK
    assert json.loads((tmp_path / "b/tokenizer_config.json").read_text())["mask_token"] == "<mask>"
    assert add_mask_token(tmp_path / "a", tmp_path / "c", 300, "<think>") == 260  # one it has
    assert add_mask_token(tmp_path / "b", tmp_path / "d", 300) == MASK  # the named one, by default
    with pytest.raises(ConversionError, match="mask token is '<mask>', not '<other>'"):
        add_mask_token(tmp_path / "b", tmp_path / "e", 300, "<other>")


@pytest.mark.parametrize("key", ["eos_token", "pad_token"])
def test_mask_must_differ_from_eos_and_pad(tmp_path: Path, key: str) -> None:
    write_tokenizer(tmp_path / "a")
    edit_json(tmp_path / "a/tokenizer_config.json", mask_token="<|endoftext|>")
    edit_json(tmp_path / "a/tokenizer_config.json", **{key: {"content": "<|endoftext|>"}})
    with pytest.raises(ConversionError, match="must differ"):
        add_mask_token(tmp_path / "a", tmp_path / "b", 300)


def test_fingerprint_ignores_mask_template_and_formatting(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a")
    add_mask_token(tmp_path / "a", tmp_path / "b", 300)
    path = tmp_path / "b/tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"] = ["a b"]  # the older spelling of ["a", "b"]
    write_json(path, values)
    edit_json(tmp_path / "b/tokenizer_config.json", chat_template="other")
    assert tokenizer_fingerprint(TokenizerFiles(tmp_path / "a")) == tokenizer_fingerprint(
        TokenizerFiles(tmp_path / "b")
    )


def test_fingerprint_sees_tokens_and_merges(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a")
    write_tokenizer(tmp_path / "b")
    edit_tokenizer(tmp_path / "b", "<new>")
    write_tokenizer(tmp_path / "c")
    values = json.loads((tmp_path / "c/tokenizer.json").read_text())
    values["model"]["merges"] = []
    write_json(tmp_path / "c/tokenizer.json", values)
    assert len({tokenizer_fingerprint(TokenizerFiles(tmp_path / name)) for name in "abc"}) == 3


@pytest.mark.parametrize("content", ["[]", "{}", '{"model": {}}', '{"model": {"vocab": {}}}'])
def test_malformed_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConversionError, match="tokenizer.json"):
        add_mask_token(tmp_path, tmp_path / "b", 300)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="file not found"):
        add_mask_token(tmp_path, tmp_path / "b", 300)
    assert EOS != PAD


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real Qwen3 tokenizer beside the checkout")
def test_real_qwen3_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert add_mask_token(REAL, tmp_path, 151936) == 151669
    before, after = (
        Tokenizer.from_file(str(REAL / "tokenizer.json")),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert after.mask_token_id == 151669 and len(after) == 151670
    assert after.eos_token_id == 151645 and after.pad_token_id == 151643
    template = json.loads((REAL / "tokenizer_config.json").read_text())["chat_template"]
    assert after.chat_template in (template, (REAL / "chat_template.jinja").read_text())
    assert after.get_vocab() == before.get_vocab() | {MASK_TOKEN: 151669}
    text = "<|im_start|>user\nWhat is 17 * 23?<|im_end|>\n<think>\n\n</think>\n\n391 \u00e9\u4f60"
    assert after.encode(text) == before.encode(text).ids
    assert after.decode(after.encode(text), skip_special_tokens=False) == text
    assert "<think>" in after.decode(after.encode(text), skip_special_tokens=True)
    assert after.decode([391, 151669], skip_special_tokens=True) == before.decode([391])
    for name in ("chat_template.jinja", "vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (REAL / name).read_bytes()
