"""What is found before a run starts: from files alone, and from what the models need."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_opdlm import cli
from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.model.gpt import BlockDiffusionModel
from megatron_opdlm.train import start
from megatron_opdlm.train.trainer import Trainer
from tests.helpers import run_ranks
from tests.tiny import tiny_model, write_prompts
from tests.training import tiny_config


@pytest.fixture(scope="module")
def named_otherwise(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model whose tokenizer calls its mask token <|mask|>, and an import of it."""
    folder = tmp_path_factory.mktemp("named_otherwise")
    model = tiny_model(tmp_path_factory.getbasetemp())
    paths = {"hf": folder / "hf", "checkpoint": folder / "checkpoint"}
    export(model.checkpoint, paths["hf"], format="a2d", block_size=4, progress=False)
    import_hf(paths["hf"], paths["checkpoint"], progress=False)
    return paths


@pytest.mark.parametrize("kind", ["hf", "checkpoint"])
def test_the_mask_token_must_be_the_students(
    kind: str, named_otherwise: dict[str, Path], tmp_path: Path
) -> None:
    data = write_prompts(tmp_path / "prompts.jsonl")
    student = named_otherwise[kind]
    config = tiny_config(student, data, tmp_path / "run")
    with pytest.raises(ValueError, match=r"^mask_token='.*; set mask_token='<\|mask\|>'$"):
        start.check(config)
    start.check(tiny_config(student, data, tmp_path / "run", mask_token="<|mask|>"))
    assert not (tmp_path / "imported").exists()


def without(hf: Path) -> None:
    """Takes away every chat template."""
    (hf / "chat_template.jinja").unlink(missing_ok=True)
    path = hf / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))


def in_config(value: object) -> Callable[[Path], None]:
    def write(hf: Path) -> None:
        without(hf)
        path = hf / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": value}))

    return write


def in_file(hf: Path) -> None:
    without(hf)
    (hf / "chat_template.jinja").write_text("{{ messages }}")


def beside_a_default(hf: Path) -> None:
    without(hf)
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")


NAMED = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages }}"}]
TEMPLATES: dict[str, tuple[Callable[[Path], None], bool]] = {
    "file": (in_file, True),
    "key": (in_config("{{ messages }}"), True),
    "named": (in_config(NAMED), True),
    "named, no default": (in_config(NAMED[:1]), False),
    "additional": (beside_a_default, False),
    "null": (in_config(None), False),
    "none": (without, False),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_looked_for_before_the_import(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The early answer is the one that the loaded tokenizer of the import would give."""
    from megatron_opdlm.distill.student import load_tokenizer
    from megatron_opdlm.responses.prompts import _require_tokenizer

    hf = tmp_path / "hf"
    shutil.copytree(tiny_model(tmp_path_factory.getbasetemp()).hf, hf)
    change, has_template = TEMPLATES[name]
    change(hf)
    import_hf(hf, tmp_path / "checkpoint", progress=False)
    tokenizer = load_tokenizer(tmp_path / "checkpoint/iter_0000000/tokenizer")
    if has_template:
        for student in (hf, tmp_path / "checkpoint"):
            ModelSource.open(student).require_chat_template()
        _require_tokenizer(tokenizer)
        return
    rule = "no chat_template; .* opdlm convert import --chat-template FILE"
    with pytest.raises(ValueError, match=rule):
        _require_tokenizer(tokenizer)
    for student in (hf, tmp_path / "checkpoint"):
        with pytest.raises(ValueError, match=f"{student}: tokenizer has {rule}"):
            ModelSource.open(student).require_chat_template()


def test_commands_look_for_it_before_the_import(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(tiny_model(tmp_path_factory.getbasetemp()).hf, hf)
    without(hf)
    data = write_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(ValueError, match="no chat_template"):
        start.check(tiny_config(hf, data, tmp_path / "run"))
    options = ["--model", str(hf), "--import-cache", str(tmp_path / "imported")]
    assert cli.main(["generate", "--prompt", "x", *options]) == 2
    assert "no chat_template" in capsys.readouterr().err
    assert not (tmp_path / "imported").exists() and not (tmp_path / "run").exists()


def train(rank: int, arguments: list[str]) -> tuple[int, str]:
    """Status of `opdlm train`, and what it says to the user."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = cli.main(["train", *arguments])
    return status, said.getvalue()


def test_a_run_folder_is_a_student(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its newest checkpoint is what training starts from, as decoding does."""
    run, path = tmp_path / "earlier", tmp_path / "config.yaml"
    shutil.copytree(tiny_model(tmp_path_factory.getbasetemp()).checkpoint, run / "checkpoints")
    (run / "config.yaml").touch()
    data = write_prompts(tmp_path / "prompts.jsonl")
    tiny_config(run, data, tmp_path / "run").save_yaml(path)
    folders = []
    monkeypatch.setattr(process_groups, "shutdown", lambda: None)
    monkeypatch.setattr(Trainer, "train", lambda self: folders.append(self.student.folder))

    def start_it(rank: int) -> tuple[int, str, list[Path]]:
        return *train(rank, [str(path)]), folders

    ((status, said, folders),) = run_ranks(start_it, 1)
    assert status == 0, said
    assert folders == [run / "checkpoints/iter_0000000"]


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1": (1, []),
    "TP2": (2, ["tensor_model_parallel_size=2"]),
    "PP2": (2, ["pipeline_model_parallel_size=2"]),
    "rollouts on TP2": (2, ["rollout_tensor_model_parallel_size=2"]),
}
LONGEST = 56  # 40 prompt and 14 response tokens, in blocks of 4
TOKEN_BYTES = 2 * 4 * 4 * 16 * 4  # keys and values, layers, heads, head size, float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_too_small_for_one_sequence_is_no_start(
    layout: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    student = tiny_model(tmp_path_factory.getbasetemp()).checkpoint
    save, path = tmp_path / "run", tmp_path / "config.yaml"
    tiny_config(student, write_prompts(tmp_path / "prompts.jsonl"), save).save_yaml(path)
    num_ranks, overrides = LAYOUTS[layout]
    needed = LONGEST * TOKEN_BYTES // num_ranks
    monkeypatch.setattr(Trainer, "train", lambda trainer: None)
    monkeypatch.setattr(process_groups, "shutdown", lambda: None)  # the ranks of a test stay

    def start_with(num_bytes: int) -> list[tuple[int, str]]:
        limit = f"kv_cache_gb={num_bytes / 1e9:.9f}"
        return run_ranks(train, num_ranks, [str(path), *overrides, limit])

    with monkeypatch.context() as patched:
        patched.setattr(BlockDiffusionModel, "forward", None)  # nothing is computed
        refused = start_with(needed - 1)
    for status, said in refused:
        *progress, line = said.splitlines()
        assert not any("Error" in text or "error" in text for text in progress)
        assert status == 2 and re.fullmatch(
            rf"error: kv_cache_gb=\S+ must hold at least one sequence: {LONGEST} prompt and "
            rf"response tokens need {needed / 1e9:.10g} GB; raise it, or lower max_prompt_tokens "
            r"or max_response_tokens\.end",
            line,
        )
    assert not save.exists()
    # control: with one byte more it starts, in the same folder
    assert [status for status, _ in start_with(needed)] == [0] * num_ranks
    assert (save / "config.yaml").is_file()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_refused_start_leaves_no_folder(
    num_ranks: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A teacher is judged when models are loaded and the folder is locked."""
    student = tiny_model(tmp_path_factory.getbasetemp()).checkpoint
    save, path = tmp_path / "runs" / "new", tmp_path / "config.yaml"
    tiny_config(student, write_prompts(tmp_path / "prompts.jsonl"), save).save_yaml(path)
    monkeypatch.setattr(Trainer, "train", lambda trainer: None)
    monkeypatch.setattr(process_groups, "shutdown", lambda: None)  # the ranks of a test stay
    refused = run_ranks(train, num_ranks, [str(path), "max_teacher_nll=0.001"])
    for status, said in refused:
        assert status == 2 and "max_teacher_nll" in said.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
    # control: without the limit it starts, and stays
    assert [status for status, _ in run_ranks(train, num_ranks, [str(path)])] == [0] * num_ranks
    assert (save / "config.yaml").is_file()


def test_responses_of_the_data_are_looked_at_before_a_start(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_model(tmp_path_factory.getbasetemp())
    data = write_prompts(tmp_path / "prompts.jsonl")
    start.check(tiny_config(model.checkpoint, data, tmp_path / "run", method="sft"))
    config = tiny_config(
        model.checkpoint, data, tmp_path / "run", method="sft", sft_responses="data"
    )
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: response=null must be text"):
        start.check(config)
