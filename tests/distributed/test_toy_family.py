"""A model family that only this file knows, from import through training to export.

Nothing else had to be touched for it but the table: this is what adding one takes. It has Qwen2's
layers under names of its own, so all its numbers must be those of the Qwen2 with the same weights.
"""

import contextlib
import io
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_opdlm import cli
from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.formats import find_format
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.inspect import inspect
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.reporting.logger import read_metrics
from tests.helpers import run_ranks
from tests.tiny import TinyModel, tiny_model, write_prompts
from tests.unit.convert.models import edit_json, read_weights

QWEN2 = FAMILIES["qwen2"]
NAMES = {
    "model.layers.": "toy.stack.",
    "self_attn.": "sees.",
    "model.embed_tokens.": "toy.words.",
    "model.norm.": "toy.last_norm.",
    "lm_head.": "toy.says.",
}


def toy_name(name: str) -> str:
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


TOY = replace(
    QWEN2,
    name="toy",
    aliases=("toy-of-old",),
    class_name="Toy",
    config_keys=lambda config: {"toy_layers": config.num_layers},
    knows_layer_types=False,
    entries=tuple(replace(row, hf=tuple(map(toy_name, row.hf))) for row in QWEN2.entries),
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", TOY)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    base = tmp_path_factory.getbasetemp()
    return tiny_model(base, family="qwen2", num_hidden_layers=2, std=0.35)


@pytest.fixture
def toy_hf(qwen2: TinyModel, tmp_path: Path) -> Path:
    """The same weights under the toy's names."""
    folder = tmp_path / "toy_hf"
    shutil.copytree(qwen2.hf, folder)
    tensors = {toy_name(name): tensor for name, tensor in read_weights(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", model_type="toy", architectures=["ToyForCausalLM"])
    return folder


def command(rank: int, *argv: str) -> str:
    """What `opdlm ARGV` prints in a rank."""
    from megatron_opdlm.distributed import process_groups

    warnings.simplefilter("ignore")
    process_groups.shutdown = lambda: None  # the group is the test's
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["--traceback", *argv]) == 0
    return printed.getvalue()


def train(student: Path, folder: Path, prompts: Path) -> tuple[list[float], Path]:
    """Losses of one rollout, and the run's checkpoints."""
    keys = {
        "student": str(student), "data": str(prompts), "save": str(folder), "train_rollouts": 1,
        "prompts_per_rollout": 4, "rows_per_optimizer_step": 2, "max_prompt_tokens": 64,
        "max_response_tokens": {"start": 8, "end": 8}, "lr_warmup_steps": 0,
    }  # fmt: skip
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(keys))  # JSON is YAML
    run_ranks(command, 1, "train", str(path))
    records = read_metrics(folder / "metrics.jsonl")
    return [r["train/loss"] for r in records if "train/loss" in r], folder / "checkpoints"


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.usefixtures("toy")
def test_it_is_imported_and_exported_bit_by_bit(toy_hf: Path, tmp_path: Path) -> None:
    import_hf(toy_hf, tmp_path / "ckpt", progress=False)
    export(tmp_path / "ckpt", tmp_path / "base", format="base", progress=False)
    export(tmp_path / "ckpt", tmp_path / "own", format="toy", progress=False)
    original = read_weights(toy_hf)
    for name in ("base", "own"):
        assert_equal(read_weights(tmp_path / name), original)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["model_type"], config["toy_layers"]) == ("toy", 2)
        assert config["architectures"] == ["ToyForCausalLM"]
        assert not {"layer_types", "sliding_window"} & set(config)
    assert "toy.stack.1.sees.q_proj.bias" in original and "toy.says.weight" not in original
    export(tmp_path / "ckpt", tmp_path / "untied", format="toy", untie=True, progress=False)
    untied = read_weights(tmp_path / "untied")
    assert torch.equal(untied.pop("toy.says.weight"), original["toy.words.weight"])
    assert_equal(untied, original)


@pytest.mark.usefixtures("toy")
def test_inspect_knows_it(toy_hf: Path, qwen2: TinyModel) -> None:
    found = inspect(toy_hf)
    assert found.config["model_type"] == found.config["family"] == "toy"
    assert found.parameters == inspect(qwen2.hf).parameters
    text = found.to_text()
    assert "layers like the first" in text and "toy.stack.0.sees.q_proj.weight" in text
    assert "toy.last_norm.weight" in text and "toy.stack.1." not in text


@pytest.mark.usefixtures("toy")
def test_it_trains_as_the_model_that_it_is(toy_hf: Path, qwen2: TinyModel, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", count=4)
    import_hf(toy_hf, tmp_path / "ckpt", progress=False)
    losses, checkpoints = train(tmp_path / "ckpt", tmp_path / "toy_run", prompts)
    expected, others = train(qwen2.checkpoint, tmp_path / "qwen2_run", prompts)
    assert len(losses) == 2 and losses == expected
    export(checkpoints, tmp_path / "student", format="base", progress=False)
    export(others, tmp_path / "qwen2", format="base", progress=False)
    student = read_weights(tmp_path / "student")
    assert_equal(student, {toy_name(k): v for k, v in read_weights(tmp_path / "qwen2").items()})
    before = read_weights(toy_hf)
    assert any(not torch.equal(student[name], before[name]) for name in before)  # it learnt
    card = (tmp_path / "student/README.md").read_text()
    assert "export the checkpoint if it is a Qwen3 or Qwen2 or Llama, as `a2d`" in card
    # and back
    import_hf(tmp_path / "student", tmp_path / "again", progress=False)
    export(tmp_path / "again", tmp_path / "same", format="toy", progress=False)
    assert_equal(read_weights(tmp_path / "same"), student)


@pytest.mark.usefixtures("toy")
def test_an_alias_is_the_same_family(toy_hf: Path) -> None:
    edit_json(toy_hf / "config.json", model_type="toy-of-old")
    assert inspect(toy_hf).config["family"] == "toy"
    edit_json(toy_hf / "config.json", model_type="toy-of-new")  # control
    with pytest.raises(ConversionError, match="'toy-of-new' is not supported; one of .*of-old"):
        inspect(toy_hf)


@pytest.mark.usefixtures("toy")
def test_a_stored_head_of_a_tied_model(toy_hf: Path, tmp_path: Path) -> None:
    tensors = read_weights(toy_hf)
    tensors["toy.says.weight"] = tensors["toy.words.weight"].clone()
    save_file(tensors, toy_hf / "model.safetensors", metadata={"format": "pt"})
    import_hf(toy_hf, tmp_path / "ckpt", progress=False)
    tensors["toy.says.weight"][3] += 1
    save_file(tensors, toy_hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"toy.says.weight differs from toy.words.weight"):
        import_hf(toy_hf, tmp_path / "other", progress=False)


@pytest.mark.usefixtures("toy")
def test_a_mean_for_the_mask_is_in_its_embedding(toy_hf: Path, tmp_path: Path) -> None:
    import_hf(toy_hf, tmp_path / "ckpt", mask_init="mean", progress=False)
    export(tmp_path / "ckpt", tmp_path / "out", format="toy", progress=False)
    found, original = read_weights(tmp_path / "out"), read_weights(toy_hf)
    changed = {name for name in found if not torch.equal(found[name], original[name])}
    assert changed == {"toy.words.weight"}


# --- controls ---


def test_a_family_that_is_not_there(toy_hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"model_type='toy' is not supported; one of \['a2d"):
        import_hf(toy_hf, tmp_path / "ckpt", progress=False)


@pytest.mark.usefixtures("toy")
def test_names_of_another_family(qwen2: TinyModel, toy_hf: Path, tmp_path: Path) -> None:
    shutil.copy(qwen2.hf / "model.safetensors", toy_hf)
    with pytest.raises(ConversionError, match=r"missing.*toy\."):
        import_hf(toy_hf, tmp_path / "ckpt", progress=False)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("name", ["sdar", "a2d"])
def test_formats_without_code_for_it(name: str) -> None:
    with pytest.raises(ConversionError, match=rf"'{name}' holds .*toy model; use one of \['base'"):
        find_format(name, "toy")
