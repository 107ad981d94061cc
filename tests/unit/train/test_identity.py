"""A run is known by what it reads, not by where that lies."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_opdlm.distributed import process_groups
from megatron_opdlm.train.identity import RunIdentity, digest_tokens
from megatron_opdlm.train.setup import require_same_prompts
from tests.helpers import run_ranks

PATHS = {"data": "d.jsonl", "student": "s", "teacher": "t"}
RUN = RunIdentity(prompts={"a": "1", "b": "2", "c": "3"}, student="5", teacher="6")


def refusal(now: RunIdentity, before: RunIdentity = RUN) -> str:
    with pytest.raises(ValueError) as error:
        now.require_same(before, Path("run"), PATHS)
    return str(error.value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    RUN.write(tmp_path / "identity.json")
    read = RunIdentity.read(tmp_path / "identity.json")
    assert read == RUN and list(read.prompts) == list(RUN.prompts)
    read.require_same(RUN, tmp_path, PATHS)
    assert [path.name for path in tmp_path.iterdir()] == ["identity.json"]


@pytest.mark.parametrize(
    "text",
    [
        '{"prompts": {}}',
        '{"prompts": null, "student": "a", "teacher": null}',
        '{"prompts": [1, 2], "student": "a", "teacher": null}',
        '{"prompts": {"a": 1}, "student": "a", "teacher": null}',
        '{"prompts": {"a": "1"}, "student": null, "teacher": null}',
        '{"prompts": {"a": "1"}, "student": "a", "teacher": 5}',
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "identity.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="identity.json is damaged"):
        RunIdentity.read(path)


def compare(rank: int, names: tuple[str, str]) -> str | None:
    process_groups.initialize()
    try:
        require_same_prompts(dataclasses.replace(RUN, prompts={names[rank]: "1"}))
    except ValueError as error:
        return str(error)
    return None


def test_ranks_that_rendered_other_prompts_are_refused() -> None:
    assert run_ranks(compare, 2, ("a", "a")) == [None, None]
    said = run_ranks(compare, 2, ("a", "b"))
    assert all(text and "ranks have rendered prompts to different tokens" in text for text in said)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({"a": "1", "b": "9", "c": "3"}, '1 changed ("b");'),
        ({"a": "1", "b": "2"}, '1 gone ("c");'),
        ({"a": "1", "b": "2", "c": "3", "d": "4"}, '1 new ("d");'),
        ({"a": "0", "x": "2", "c": "3"}, '1 changed ("a"), 1 new ("x"), 1 gone ("b");'),
        ({"b": "2", "a": "1", "c": "3"}, "they are the same in another order;"),
        ({str(i): "0" for i in range(9)}, '9 new ("0", "1", "2", "3", ...), 3 gone'),
    ],
)
def test_other_prompts_are_named(prompts: dict[str, str], said: str) -> None:
    text = refusal(dataclasses.replace(RUN, prompts=prompts))
    assert said in text and "data=d.jsonl" in text and "save=run" in text


def test_other_weights_are_named() -> None:
    assert "student had other weights (fingerprint 5) than student=s has now (7)" in refusal(
        dataclasses.replace(RUN, student="7")
    )
    text = refusal(dataclasses.replace(RUN, teacher=None))
    assert "teacher had other weights (fingerprint 6) than teacher=t has now (None)" in text


def test_a_digest_tells_tokens_and_parts_apart() -> None:
    ids = torch.tensor([3, 1, 4])
    assert digest_tokens([ids]) == digest_tokens([ids.clone()])
    others = [[ids.flip(0)], [ids[:2]], [ids[:2], ids[2:]], [ids, ids[:0]], []]
    assert len({digest_tokens(parts) for parts in [[ids], *others]}) == 1 + len(others)
