"""What is found before a run starts, from files alone."""

from pathlib import Path

import pytest

from megatron_opdlm import start
from megatron_opdlm.convert.exporter import export
from tests.tiny import tiny_model, write_prompts
from tests.training import tiny_config


@pytest.fixture(scope="module")
def named_otherwise(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model whose tokenizer calls its mask token <|mask|>, and an import of it."""
    from megatron_opdlm.convert.importer import import_hf

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
    with pytest.raises(ValueError, match=r"set model\.mask_token='<\|mask\|>'"):
        start.check(config)
    start.check(tiny_config(student, data, tmp_path / "run", mask_token="<|mask|>"))
    assert not (tmp_path / "imported").exists()
