"""The code in a model card runs as it stands, in the folder that contains the export."""

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.formats import FORMATS
from megatron_opdlm.convert.formats.card import model_card
from megatron_opdlm.convert.formats.format import ExportedModel
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.model.hf_config import parse_config
from tests.unit.convert.exports import BLOCK, student_checkpoint
from tests.unit.convert.models import MASK, PAD, edit_json, tiny_config, write_hf

NAME = "it's my model"
NO_TEMPLATE = "The tokenizer of the base model has no chat template"


def blocks(card: str, language: str) -> list[str]:
    """The blocks of code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module", params=[True, False], ids=["template", "no template"])
def has_template(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def root(has_template: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/<format>/NAME: exports of a trained student, with a chat template or without."""
    root = tmp_path_factory.mktemp("cards")
    student_checkpoint(root)
    if not has_template:
        tokenizer = root / "ckpt/iter_0000000/tokenizer/tokenizer_config.json"
        edit_json(tokenizer, chat_template=None)
    for name in FORMATS:
        export(root / "ckpt", root / name / NAME, format=name, progress=False)
    return root


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a block leaves, run as a program in `folder`."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("name", ["sdar", "a2d"])
def test_generate(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, has_template: bool
) -> None:
    card = (root / name / NAME / "README.md").read_text()
    found = run(blocks(card, "python")[0], root / name, monkeypatch)
    prompt = found["tokenizer"].decode(found["prompt"][0])
    assert prompt == ("..." if has_template else "Once upon a time")
    assert torch.equal(found["output"][:, : found["prompt"].shape[1]], found["prompt"])
    assert (NO_TEMPLATE in card) != has_template
    assert ("apply_chat_template" in card) == has_template


def test_a_chat_template_that_is_not_there(root: Path, has_template: bool) -> None:  # control
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "base" / NAME)
    message = [{"role": "user", "content": "..."}]
    if has_template:
        assert tokenizer.apply_chat_template(message, tokenize=False) == "..."
    else:
        with pytest.raises(ValueError, match="chat_template is not set"):
            tokenizer.apply_chat_template(message)


def test_template_file(root: Path, tmp_path: Path) -> None:
    """A template may stand in a file of its own."""
    tokenizer = root / "ckpt/iter_0000000/tokenizer"
    (tokenizer / "chat_template.jinja").write_text("{{ messages[0].content }}")
    export(root / "ckpt", tmp_path / "out", progress=False)
    (tokenizer / "chat_template.jinja").unlink()
    card = (tmp_path / "out/README.md").read_text()
    assert "apply_chat_template" in card and NO_TEMPLATE not in card


def test_jetengine(root: Path, monkeypatch: pytest.MonkeyPatch, has_template: bool) -> None:
    """Its block with a stand-in that takes the names that jetengine 11563d1 takes."""
    calls: dict[str, Any] = {}

    class LLM:
        def __init__(self, model: str, *, mask_token_id: int, block_length: int) -> None:
            calls["model"] = (model, mask_token_id, block_length)

        def generate(self, prompts: list[list[int]], sampling: Any) -> list[dict[str, str]]:
            calls["prompts"] = prompts
            return [{"text": "answer"} for _ in prompts]

    def sampling_params(**options: Any) -> None:
        known = {"temperature", "topk", "topp", "max_tokens", "remasking_strategy"}
        known |= {"block_length", "denoising_steps", "dynamic_threshold"}
        assert set(options) <= known and options["block_length"] == BLOCK

    module = ModuleType("jetengine")
    module.LLM, module.SamplingParams = LLM, sampling_params  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jetengine", module)
    card = (root / "sdar" / NAME / "README.md").read_text()
    (code,) = (block for block in blocks(card, "python") if "jetengine" in block)
    run(code, root / "sdar", monkeypatch)
    assert calls["model"] == (NAME, MASK, BLOCK)
    (prompt,) = calls["prompts"]
    assert len(prompt) == (3 if has_template else 16)  # the tokenizer's tokens are bytes


def test_base(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks((root / "base" / NAME / "README.md").read_text(), "python")
    found = run(code, root / "base", monkeypatch)
    assert found["logits"].shape == (1, 16, 300) and bool(found["logits"].isfinite().all())
    expected = found["model"](found["tokens"][:, :BLOCK], attention_mask=torch.zeros(1, 1, 4, 4))
    torch.testing.assert_close(found["logits"][:, :BLOCK], expected.logits)
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", add_mask=False, progress=False)
    export(tmp_path / "ckpt", tmp_path / NAME, format="base", progress=False)
    (code,) = blocks((tmp_path / NAME / "README.md").read_text(), "python")
    assert run(code, tmp_path, monkeypatch)["tokenizer"].eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", [NAME, "my.model v1", 'a "b" $HOME', "@PYTHON_NAME@", "plain"])
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("is_trained", [True, False])
def test_names_are_quoted(name: str, format_name: str, is_trained: bool) -> None:
    model = ExportedModel(
        name=name,
        config=parse_config(tiny_config(vocab_size=151936, tie_word_embeddings=False), {}),
        mask_token_id=151669,
        block_size=8,
        is_trained=is_trained,
        dtype="bfloat16",
        pad_token_id=PAD,
    )
    card = model_card(model, FORMATS[format_name], has_chat_template=True)
    assert f"calls this folder `{name}`: run it in the folder that contains it, or" in card
    commands = blocks(card, "bash")
    assert commands or (format_name == "base" and is_trained)
    for command in commands:
        arguments = shlex.split(command.replace("\\\n", " "))
        assert name in arguments
        if "sglang" in command:
            assert f"{name}/sglang_dllm.yaml" in arguments
    for code in blocks(card, "python"):
        compile(code, "card", "exec")
        assert repr(name) in code
