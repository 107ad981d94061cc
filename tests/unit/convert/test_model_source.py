"""One answer to what is at a path, whatever the path is."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_opdlm.checkpoint.layout import read_description, resolve_iteration, write_description
from megatron_opdlm.convert import tokenizer_files
from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.inspect import inspect
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.files.errors import ConversionError
from tests.unit.convert.models import EOS, MASK, PAD, tiny_config, write_hf

BLOCK = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, its import `checkpoint`, a run's folder `run`, and an export of that."""
    from dataclasses import replace

    root = tmp_path_factory.mktemp("models")
    write_hf(root / "hf", vocab_size=MASK, num_hidden_layers=1)
    import_hf(root / "hf", root / "checkpoint", progress=False)
    (root / "run").mkdir()
    (root / "run/config.yaml").touch()
    shutil.copytree(root / "checkpoint", root / "run/checkpoints")
    folder = root / "run/checkpoints/iter_0000000"
    write_description(folder, replace(read_description(folder), block_size=BLOCK))
    (folder / "opdlm_state.json").write_text('{"rollout_step": 7}')
    export(root / "run", root / "export", format="a2d", progress=False)
    return root


SAME = ("hf", "checkpoint", "checkpoint/iter_0000000", "run", "run/checkpoints", "export")


@pytest.mark.parametrize("name", SAME)
def test_every_kind_of_path_gives_the_same_answers(name: str, models: Path) -> None:
    source = ModelSource.open(str(models / name))
    config = source.config
    assert source.path == str(models / name)
    assert (config.vocab_size, config.eos_token_ids) == (MASK + 1, (EOS, PAD))
    assert source.vocab_size == source.num_ids == MASK + 1
    assert source.is_hf == (name in ("hf", "export")) != source.is_checkpoint
    assert source.fingerprint == ModelSource.open(models / "hf").fingerprint is not None
    assert source.chat_template == source.require_chat_template() == "{{ messages[0].content }}"
    is_trained = name.startswith(("run", "export"))
    assert source.block_size == (BLOCK if is_trained else None)
    named = {"hf": None, "export": "<|mask|>"}.get(name, "<|MASK|>")
    assert source.named_mask_token == named
    assert source.mask_token_id == (None if named is None else MASK)


def test_what_an_import_will_have(models: Path) -> None:
    """The hyperparameters of a directory are those of its import; as they stand they are not."""
    source = ModelSource.open(models / "hf")
    assert source.config == read_description(resolve_iteration(models / "checkpoint")).config
    assert source.stored_config.vocab_size == MASK
    assert ModelSource.open(models / "hf", mask_token="<think>").vocab_size == MASK


def test_a_run_is_its_latest_checkpoint_for_every_reader(models: Path) -> None:
    folder = models / "run/checkpoints/iter_0000000"
    assert resolve_iteration(models / "run") == ModelSource.open(models / "run").folder == folder
    assert resolve_iteration(models / "run", 0) == folder
    found = inspect(models / "run")
    assert found.kind == "torch_dist checkpoint" and found.path == str(folder)
    assert found.state == {"rollout_step": 7} and found.block_size == BLOCK


def test_a_run_without_a_checkpoint_is_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConversionError, match="holds neither"):
        ModelSource.open(tmp_path)


def test_a_bundled_description_stands_in_for_a_model_that_is_not_here(tmp_path: Path) -> None:
    (tmp_path / "M.config.json").write_text(json.dumps(tiny_config()))
    source = ModelSource.open("models/M", bundled=tmp_path)
    assert source.config.num_layers == 3 and source.config.eos_token_ids == (EOS,)
    assert source.kind == "bundled description" and not (source.is_hf or source.is_checkpoint)
    nothing = (source.tokenizer, source.fingerprint, source.num_ids, source.block_size)
    assert nothing == (None,) * 4 and source.require_chat_template() is None
    with pytest.raises(ConversionError, match="models/N holds neither"):
        ModelSource.open("models/N", bundled=tmp_path)


def test_files_are_read_once_and_only_for_an_answer(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    before = tokenizer_files.read_json_object

    def counting(path: Path) -> dict[str, object]:
        read.append(path.name)
        return before(path)

    monkeypatch.setattr(tokenizer_files, "read_json_object", counting)
    for name in ("hf", "checkpoint"):
        source = ModelSource.open(models / name)
        assert source.stored_config is source.stored_config and not read
        answers = [source.config, source.fingerprint, source.num_ids, source.named_mask_token]
        answers += [source.chat_template, source.response_ends]
        assert None not in answers[:3]
        assert sorted(read) == ["tokenizer.json", "tokenizer_config.json"]
        read.clear()
