"""The description of a checkpoint is read strictly, and a root means its latest iteration."""

import pytest

from megatron_opdlm.checkpoint.layout import (
    FORMAT_VERSION,
    LATEST_FILE,
    ModelDescription,
    iteration_name,
    read_description,
    resolve_iteration,
    write_description,
)
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.hf_config import parse_config
from tests.unit.convert.models import tiny_config

CONFIG = parse_config(tiny_config(), {})
DESCRIPTION = ModelDescription(
    config=CONFIG,
    mask_token_id=261,
    tokenizer_fingerprint="ab",
    block_size=4,
    lineage={"data": "d"},
)


def test_a_description_is_read_as_it_was_written(tmp_path):
    write_description(tmp_path, DESCRIPTION)
    assert read_description(tmp_path) == DESCRIPTION


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 300}, r"mask_token_id=300 must be null or an id in \[0, vocab_size=300"),
        ({"mask_token_id": -1}, "mask_token_id=-1 must be"),
        ({"mask_token_id": True}, "mask_token_id=True must be"),
        ({"block_size": 0}, "block_size=0 must be null or positive"),
        ({"block_size": 4.0}, "block_size=4.0 must be"),
        (
            {"prediction": "next"},
            "prediction='next' must be null or one of same_position",
        ),
        ({"prediction": []}, r"prediction=\[\] must be"),
        ({"format_version": True}, "format_version=True must be 1"),
        ({"tokenizer_fingerprint": 7}, "tokenizer_fingerprint=7 must be null or text"),
        ({"lineage": None}, "lineage=None must be an object"),
        (
            {"format_version": FORMAT_VERSION + 1},
            f"version={FORMAT_VERSION + 1} must be 1 to",
        ),
        ({"format_version": None}, "format_version=None must be 1"),
        ({"more": 1}, "fields .* must be"),
        ({"config": 1}, "config must be an object"),
    ],
)
def test_values_that_no_checkpoint_has(changes, message):
    with pytest.raises(ConversionError, match=message):
        ModelDescription.from_json_dict(DESCRIPTION.to_json_dict() | changes)


@pytest.mark.parametrize(("block_size", "prediction"), [(None, None), (4, "same_position")])
def test_a_description_that_is_older_than_predictions(block_size, prediction):
    """Version 1 had no such field: all trained weights had the paper's."""
    values = DESCRIPTION.to_json_dict() | {"format_version": 1, "block_size": block_size}
    del values["prediction"]
    assert ModelDescription.from_json_dict(values).prediction == prediction


@pytest.mark.parametrize("name", sorted(DESCRIPTION.to_json_dict()))
def test_a_field_that_is_missing(name):
    values = DESCRIPTION.to_json_dict()
    del values[name]
    with pytest.raises(ConversionError, match="must be"):
        ModelDescription.from_json_dict(values)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_token_id": 299},
        {"mask_token_id": 0},
        {"mask_token_id": None, "block_size": None, "tokenizer_fingerprint": None},
    ],
)
def test_control_values_at_the_border(changes):
    read = ModelDescription.from_json_dict(DESCRIPTION.to_json_dict() | changes)
    assert {name: getattr(read, name) for name in changes} == changes


def test_a_root_means_its_latest_iteration(tmp_path):
    assert iteration_name(12) == "iter_0000012", "as Megatron names it"
    for iteration in (0, 10, 12):
        (tmp_path / iteration_name(iteration)).mkdir()
    for latest in (10, 12, 0):
        (tmp_path / LATEST_FILE).write_text(f"{latest}\n")
        assert resolve_iteration(tmp_path) == tmp_path / iteration_name(latest)
        assert resolve_iteration(tmp_path, 12) == tmp_path / iteration_name(12)
    with pytest.raises(ConversionError, match="iter_0000011: no such iteration; found .*0000012"):
        resolve_iteration(tmp_path, 11)
