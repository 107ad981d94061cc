"""Which tokens end a response, where the files of a model disagree."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_opdlm.checkpoint.layout import read_description, resolve_iteration, write_description
from megatron_opdlm.convert.chat_template import end_of_turn
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.convert.tokenizer_files import TokenizerFiles
from megatron_opdlm.distill.student import load_student
from megatron_opdlm.files.errors import ConversionError
from tests.unit.convert.models import EOS, PAD, edit_json, write_hf, write_json

START = 258
"""Id of <|im_start|>; <|im_end|> is EOS and <|endoftext|> PAD."""
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content | trim }}<|im_end|>\n{% endfor %}"
)
PLAIN = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}### assistant:"
NO_SYSTEM = "{{ raise_exception('only one turn') if messages | length > 1 }}" + QWEN


def model(
    folder: Path, ids: Any, eos_token: str | None, template: str | None, generation: Any = None
) -> ModelSource:
    """A model that says this of its ends."""
    write_hf(folder, num_hidden_layers=1, eos_token_id=ids)
    write_json(folder / "generation_config.json", {"eos_token_id": generation})
    edit_json(folder / "tokenizer_config.json", eos_token=eos_token, chat_template=template)
    return ModelSource.open(folder)


CASES: dict[str, tuple[Any, Any, str | None, str | None, tuple[int, ...]]] = {
    # config.json, generation_config.json, eos_token, template -> all ids
    "Qwen3": (EOS, [EOS, PAD], "<|im_end|>", QWEN, (EOS, PAD)),
    "a base model, whose pad is its eos": (PAD, PAD, "<|endoftext|>", QWEN, (PAD, EOS)),
    "a base model without a template": (PAD, None, "<|endoftext|>", None, (PAD,)),
    "Llama 3 as it came out": (PAD, PAD, "<|endoftext|>", QWEN, (PAD, EOS)),
    "Llama 2": (PAD, None, "<|endoftext|>", LLAMA_2, (PAD,)),
    "fine-tuned with another end": (PAD, None, "<|im_end|>", PLAIN, (PAD, EOS)),
    "thoughts before the answer": (PAD, None, "<|endoftext|>", THINKING, (PAD, EOS)),
    "config.json has none": (None, None, "<|im_end|>", QWEN, (EOS,)),
    "the tokenizer names none": (EOS, None, None, PLAIN, (EOS,)),
    "only the template knows": (None, None, None, QWEN, (EOS,)),
    "a template that refuses": (PAD, None, "<|endoftext|>", NO_SYSTEM, (PAD,)),
    "a template that is broken": (PAD, None, "<|endoftext|>", "{% if %}", (PAD,)),
    "a token that is not in the vocabulary": (EOS, None, "</s>", QWEN, (EOS,)),
    "a template without an end": (EOS, None, "<|im_end|>", "{{ messages[0].content }}", (EOS,)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_end_that_the_files_name_ends_a_response(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids, generation, eos_token, template, expected = CASES[name]
    source = model(tmp_path / "hf", ids, eos_token, template, generation)
    assert source.response_ends.ids == source.config.eos_token_ids == expected
    import_hf(tmp_path / "hf", tmp_path / "checkpoint", progress=False)
    declared = source.stored_config.eos_token_ids
    said = [r.getMessage() for r in caplog.records if "responses end at" in r.getMessage()]
    assert len(said) == (expected != declared)
    if said:
        assert said[0].startswith(f"{tmp_path / 'hf'}: responses end at ids {list(declared)} by")
        assert "<|im_end|> (id 259), " in said[0] and "\n" not in said[0]
    # the checkpoint has them, and has nothing to be warned about
    imported = ModelSource.open(tmp_path / "checkpoint")
    assert imported.stored_config.eos_token_ids == imported.config.eos_token_ids == expected
    assert not imported.response_ends.found


def test_the_end_of_a_turn_is_a_special_token(tmp_path: Path) -> None:
    """An ordinary token behind the words could stand in a response."""
    for template, expected in (
        (QWEN, "<|im_end|>"),
        (LLAMA_2, "<|im_end|>"),  # the named eos
        (QWEN.replace("<|im_end|>", " <|endoftext|>"), "<|endoftext|>"),
        (QWEN.replace("<|im_end|>", "<think>"), None),  # added, but not special
        (QWEN.replace("<|im_end|>", "ab"), None),
        (PLAIN, None),
    ):
        model(tmp_path / "hf", EOS, "<|im_end|>", template)
        assert end_of_turn(TokenizerFiles(tmp_path / "hf")) == expected, template


def test_a_student_without_any_end_is_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "hf", None, None, PLAIN)
    rule = "hf: no token ends a response, .* eos_token_id in generation_config.json"
    with pytest.raises(ConversionError, match=rule):
        source.response_ends.require(source.path)
    with pytest.raises(ConversionError, match=rule):
        import_hf(tmp_path / "hf", tmp_path / "checkpoint", progress=False)
    assert not (tmp_path / "checkpoint").exists()
    # a teacher that is never asked for an end may have none
    import_hf(tmp_path / "hf", tmp_path / "teacher", add_mask=False, progress=False)
    assert ModelSource.open(tmp_path / "teacher").config.eos_token_ids == ()
    # control: with an end it is a student
    edit_json(tmp_path / "hf" / "generation_config.json", eos_token_id=EOS)
    import_hf(tmp_path / "hf", tmp_path / "checkpoint", progress=False)


def test_a_checkpoint_that_lacks_an_end_is_completed_when_it_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an import of an earlier version wrote it."""
    from types import SimpleNamespace

    model(tmp_path / "hf", EOS, "<|im_end|>", QWEN)
    import_hf(tmp_path / "hf", tmp_path / "checkpoint", progress=False)
    folder = resolve_iteration(tmp_path / "checkpoint")

    def load(eos_token_ids: tuple[int, ...], is_main: bool = True) -> tuple[int, ...]:
        description = read_description(folder)
        config = replace(description.config, eos_token_ids=eos_token_ids)
        write_description(folder, replace(description, config=config))
        cache = SimpleNamespace(checkpoint=lambda path, is_main: folder)
        monkeypatch.setattr(  # no weights are needed to see what is said of them
            "megatron_opdlm.distill.student.load_model",
            lambda folder, *rest: (None, read_description(folder)),
        )
        parallel: Any = SimpleNamespace(is_main=is_main)
        student = load_student("path", cache, None, parallel, None)  # type: ignore[arg-type]
        return student.description.config.eos_token_ids

    with caplog.at_level(logging.WARNING):
        assert load((PAD,)) == (PAD, EOS)
        assert "path: responses end at ids [257] by its eos_token_id, and also at" in caplog.text
        caplog.clear()
        assert load((PAD,), is_main=False) == (PAD, EOS)
        assert load((EOS, PAD)) == (EOS, PAD)
        assert not caplog.records
    edit_json(folder / "tokenizer/tokenizer_config.json", eos_token=None, chat_template=PLAIN)
    with pytest.raises(ConversionError, match="^path: no token ends a response"):
        load(())
