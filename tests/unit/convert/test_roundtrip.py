"""Hugging Face -> torch_dist -> Hugging Face: bit-equal, streaming, whole or not at all."""

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from megatron_opdlm.checkpoint.layout import (
    FORMAT_VERSION,
    ModelDescription,
    read_description,
    resolve_iteration,
    write_description,
)
from megatron_opdlm.convert import importer
from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.inspect import inspect
from megatron_opdlm.convert.tokenizer import tokenizer_fingerprint
from megatron_opdlm.convert.tokenizer_files import TokenizerFiles
from megatron_opdlm.convert.torch_dist import Piece, TorchDistReader
from megatron_opdlm.convert.weights import HFWeights
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.safetensors_file import SafetensorsWriter
from megatron_opdlm.model.families import FAMILIES
from tests.unit.convert.models import (
    EOS,
    MASK,
    PAD,
    edit_json,
    random_tensors,
    read_weights,
    tiny_config,
    write_hf,
    write_weights,
)


def round_trip(tmp_path: Path, **export_options: Any) -> dict[str, Tensor]:
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    options = {"format": "base", "progress": False} | export_options
    export(tmp_path / "ckpt", tmp_path / "out", **options)
    return read_weights(tmp_path / "out")


def assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_bit_equal(
    tmp_path: Path, family: str, tied: bool, dtype: torch.dtype, shards: int
) -> None:
    tensors = write_hf(
        tmp_path / "hf", family=family, dtype=dtype, shards=shards, tie_word_embeddings=tied
    )
    assert_bit_equal(round_trip(tmp_path), tensors)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [300, 384])
def test_bit_equal_for_gqa_and_vocabularies(tmp_path: Path, groups: int, vocab_size: int) -> None:
    tensors = write_hf(tmp_path / "hf", num_key_value_heads=groups, vocab_size=vocab_size)
    assert_bit_equal(round_trip(tmp_path), tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_redundant_head_is_dropped(tmp_path: Path, family: str) -> None:
    tensors = write_hf(tmp_path / "hf", family=family)
    stored = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    write_weights(tmp_path / "hf", stored)
    assert_bit_equal(round_trip(tmp_path), tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_grown_vocabulary_comes_back_with_its_new_row(tmp_path: Path, family: str) -> None:
    tensors = write_hf(tmp_path / "hf", family=family, vocab_size=MASK)
    found = round_trip(tmp_path)
    grown = found["model.embed_tokens.weight"]
    assert grown.shape[0] == MASK + 1
    assert_bit_equal(found | {"model.embed_tokens.weight": grown[:MASK]}, tensors)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == MASK + 1


def test_vocabulary_in_slices_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_opdlm.convert.weights.ROWS_BYTES", 64 * 4 * 7)  # 7 rows
    tensors = write_hf(tmp_path / "hf", tie_word_embeddings=False)
    assert_bit_equal(round_trip(tmp_path), tensors)
    metadata = FileSystemReader(resolve_iteration(tmp_path / "ckpt")).read_metadata()
    stored = metadata.state_dict_metadata["embedding.word_embeddings.weight"]
    assert len(stored.chunks) == 55  # 384 / 7


def test_padding_rows_are_zero_in_the_checkpoint_and_absent_from_the_export(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    found = round_trip(tmp_path)
    reader = TorchDistReader(resolve_iteration(tmp_path / "ckpt"))
    key = "embedding.word_embeddings.weight"
    assert reader.shape(key) == (384, 64)
    assert reader.read(key, (300, 0), (84, 64)).eq(0).all()
    assert found["model.embed_tokens.weight"].shape == (300, 64)


def test_sharded_export_has_an_index(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf", tie_word_embeddings=False)
    assert_bit_equal(round_trip(tmp_path, shard_bytes=50_000), tensors)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 3 and sorted(sizes)[-3] <= 50_000 + 2000  # the two vocabularies are larger
    with HFWeights(tmp_path / "out") as weights:
        assert weights.shapes.keys() == tensors.keys()


def test_an_export_can_be_imported_again(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf")
    round_trip(tmp_path)
    import_hf(tmp_path / "out", tmp_path / "again", progress=False)
    description = read_description(resolve_iteration(tmp_path / "again"))
    assert description.config == read_description(resolve_iteration(tmp_path / "ckpt")).config
    assert description.mask_token_id == MASK
    export(tmp_path / "again", tmp_path / "out2", format="base", progress=False)
    assert_bit_equal(read_weights(tmp_path / "out2"), tensors)


def test_optimizer_state_and_another_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = importer.write_torch_dist

    def write_training_checkpoint(folder: Path, pieces: list[Piece], *rest: Any) -> None:
        moved = [replace(piece, key="model." + piece.key) for piece in pieces]
        moved += [replace(p, key="optimizer.state.exp_avg." + p.key) for p in pieces]
        write(folder, moved, *rest)

    monkeypatch.setattr(importer, "write_torch_dist", write_training_checkpoint)
    tensors = write_hf(tmp_path / "hf")
    assert_bit_equal(round_trip(tmp_path), tensors)
    found = inspect(tmp_path / "ckpt")
    assert found.optimizer_tensors == 10 and len(found.tensors) == 10


def test_export_in_another_dtype(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf")
    found = round_trip(tmp_path, dtype="bfloat16")
    assert_bit_equal(found, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_description_of_an_import(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    assert (tmp_path / "ckpt/latest_checkpointed_iteration.txt").read_text() == "0"
    folder = resolve_iteration(tmp_path / "ckpt")
    assert folder == tmp_path / "ckpt/iter_0000000" and resolve_iteration(folder) == folder
    description = read_description(folder)
    assert description.mask_token_id == MASK and description.block_size is None
    assert description.config.eos_token_ids == (EOS, PAD)
    assert description.tokenizer_fingerprint == tokenizer_fingerprint(
        TokenizerFiles(tmp_path / "hf")
    )
    assert description.lineage == {"source": "hf", "mask_row": "free, kept"}
    assert ModelDescription.from_json_dict(description.to_json_dict()) == description


def test_teacher_without_mask(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", add_mask=False, progress=False)
    folder = resolve_iteration(tmp_path / "ckpt")
    assert read_description(folder).mask_token_id is None
    original = (tmp_path / "hf/tokenizer.json").read_bytes()
    assert (folder / "tokenizer/tokenizer.json").read_bytes() == original
    with pytest.raises(ConversionError, match="no mask token"):
        export(tmp_path / "ckpt", tmp_path / "out", block_size=4, progress=False)
    assert not (tmp_path / "out").exists()


class AliveCounter:
    """Counts how many of the tensors it was shown are alive at once."""

    def __init__(self) -> None:
        self.shown: list[weakref.ref[Tensor]] = []
        self.most = 0

    def show(self, tensor: Tensor) -> None:
        self.shown.append(weakref.ref(tensor))
        self.most = max(self.most, sum(ref() is not None for ref in self.shown))


def test_import_holds_one_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf", num_hidden_layers=8)
    counter, read = AliveCounter(), HFWeights.read

    def counting_read(self: HFWeights, *args: Any) -> Tensor:
        tensor = read(self, *args)
        counter.show(tensor)
        return tensor

    monkeypatch.setattr(HFWeights, "read", counting_read)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    assert len(counter.shown) == 8 * 11 + 2
    assert counter.most <= 4, "q, k, v and at most one piece on its way to the disk"


def test_export_holds_one_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf", num_hidden_layers=8)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    counter, read = AliveCounter(), TorchDistReader.read

    def counting_read(self: TorchDistReader, *args: Any) -> Tensor:
        tensor = read(self, *args)
        counter.show(tensor)
        return tensor

    monkeypatch.setattr(TorchDistReader, "read", counting_read)
    export(tmp_path / "ckpt", tmp_path / "out", format="base", progress=False)
    assert len(counter.shown) == 8 * 8 + 2
    assert counter.most <= 2


class DiskFull(OSError):
    pass


@pytest.mark.parametrize("after", [0, 3])
def test_a_failed_import_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    write_hf(tmp_path / "hf")
    read, calls = HFWeights.read, iter(range(1000))

    def failing(self: HFWeights, *args: object) -> Tensor:
        if next(calls) >= after:
            raise DiskFull(28, "No space left on device")
        return read(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(HFWeights, "read", failing)
    with pytest.raises(DiskFull):
        import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["hf"]


@pytest.mark.parametrize("error", [DiskFull(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)

    def failing(self: SafetensorsWriter, tensor: Tensor) -> None:
        raise error

    monkeypatch.setattr(SafetensorsWriter, "write", failing)
    with pytest.raises(type(error)):
        export(tmp_path / "ckpt", tmp_path / "out", block_size=4, progress=False)
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "hf"]


def test_an_output_that_holds_something_is_refused(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    (tmp_path / "ckpt").mkdir()
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)  # empty: fine
    with pytest.raises(ConversionError, match="not empty"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    with pytest.raises(ConversionError, match="not empty"):
        export(tmp_path / "ckpt", tmp_path / "hf", block_size=4, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match="not a directory"):
        import_hf(tmp_path / "hf", tmp_path / "file", progress=False)


def test_non_finite_weights_are_refused_on_the_way_in(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = float("nan")
    write_weights(tmp_path / "hf", tensors)
    with pytest.raises(ConversionError, match="model.layers.1.mlp.up_proj.weight holds 1 NaN"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    assert not (tmp_path / "ckpt").exists()


def test_values_that_overflow_the_exported_dtype_are_refused(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf")
    tensors["model.norm.weight"][0] = 1e6
    write_weights(tmp_path / "hf", tensors)
    with pytest.raises(ConversionError, match="model.norm.weight holds 1"):
        round_trip(tmp_path, dtype="float16")


def test_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf")
    name = "model.layers.1.self_attn.o_proj.weight"
    write_weights(tmp_path / "hf", tensors | {name: tensors[name].half()})
    with pytest.raises(ConversionError, match="o_proj"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)


def test_mask_must_not_be_an_eos_of_the_model(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", eos_token_id=MASK)
    with pytest.raises(ConversionError, match=f"mask token id {MASK}"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    assert not (tmp_path / "ckpt").exists()


def test_block_size_must_be_known_and_agree(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    with pytest.raises(ConversionError, match="--block-size"):
        export(tmp_path / "ckpt", tmp_path / "out", progress=False)
    folder = resolve_iteration(tmp_path / "ckpt")
    edit_json(folder / "opdlm_model.json", block_size=8)
    with pytest.raises(ConversionError, match="block_size=4"):
        export(tmp_path / "ckpt", tmp_path / "out", block_size=4, progress=False)
    export(tmp_path / "ckpt", tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out/config.json").read_text())["block_size"] == 8


def test_bad_checkpoints(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    folder = resolve_iteration(tmp_path / "ckpt")

    def export_fails(match: str, **options: Any) -> None:
        with pytest.raises(ConversionError, match=match):
            export(tmp_path / "ckpt", tmp_path / "out", block_size=4, **options)
        assert not (tmp_path / "out").exists()

    export_fails("no such iteration", iteration=5)
    edit_json(folder / "opdlm_model.json", format_version=FORMAT_VERSION + 1)
    export_fails("format_version")
    edit_json(folder / "opdlm_model.json", format_version=FORMAT_VERSION)
    description = read_description(folder)
    values = description.to_json_dict()
    values["config"] |= {"num_layers": 4, "tie_word_embeddings": False}
    write_description(folder, ModelDescription.from_json_dict(values))
    export_fails(r"1 missing: output_layer.weight; 8 wrong shape")
    write_description(folder, description)
    data = next(folder.glob("*.distcp"))
    content = data.read_bytes()
    data.write_bytes(content[:-10])
    export_fails("truncated")
    data.unlink()
    export_fails("missing")
    (tmp_path / "ckpt/latest_checkpointed_iteration.txt").write_text("../../etc")
    export_fails("must be a number")
    (tmp_path / "ckpt/latest_checkpointed_iteration.txt").unlink()
    export_fails("nor a checkpoint")


def test_export_needs_no_megatron(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "from megatron_opdlm.convert.exporter import export\n"
        f"export({str(tmp_path / 'ckpt')!r}, {str(tmp_path / 'out')!r}, format='base')\n"
        "import torch.distributed as d; assert not d.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert_bit_equal(read_weights(tmp_path / "out"), random_tensors(tiny_config(), torch.float32))
