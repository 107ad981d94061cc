"""Whatever bytes or JSON the readers of conversion get: a valid result or a ConversionError.

Any other exception fails a test, and so does a reader that hangs. Examples are the same every time.
"""

import copy
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from megatron_opdlm.checkpoint.layout import (
    LATEST_FILE,
    MODEL_FILE,
    ModelDescription,
    read_description,
    resolve_iteration,
)
from megatron_opdlm.convert.chat_template import set_chat_template
from megatron_opdlm.convert.tokenizer import (
    MASK_TOKEN,
    add_mask_token,
    replace_mask_token,
    tokenizer_fingerprint,
)
from megatron_opdlm.convert.tokenizer_files import TokenizerFiles
from megatron_opdlm.convert.weights import HFWeights
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.safetensors_file import read_header
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.hf_config import HFConfig, parse_config, read_config
from tests.unit.convert.models import family_config, write_json, write_tokenizer, write_weights

fuzz = settings(
    max_examples=250,
    deadline=20_000,  # milliseconds: for a hang, not for a slow machine
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.sampled_from([2**31, 10**12, -(10**30), 10**400])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "\0", "a\nb", "BPE", "bfloat16", "a" * 5000, "full_attention"])
)
keys = st.text(max_size=3) | st.sampled_from(
    ["rope_type", "type", "factor", "rope_theta", "content", "id", "dtype", "shape", "vocab"]
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw: st.DrawFn, good: Any) -> Any:
    """A JSON value with up to three places removed, replaced or doubled."""
    root = [copy.deepcopy(good)]
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = root
        key: Any = 0
        while isinstance(parent[key], dict | list) and parent[key] and draw(st.integers(0, 3)):
            parent = parent[key]
            inside = sorted(parent) if isinstance(parent, dict) else range(len(parent))
            key = draw(st.sampled_from(list(inside)[:200]))
        match draw(st.sampled_from(["replace", "remove", "double"])):
            case "remove" if parent is not root:
                del parent[key]
            case "double" if isinstance(parent, list) and parent is not root:
                parent.append(copy.deepcopy(parent[key]))
            case _:
                parent[key] = draw(values)
    return root[0]


def spoilt(good: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with a piece replaced; and bytes of any kind."""
    cuts = st.tuples(st.integers(0, len(good)), st.integers(0, 9), st.binary(max_size=6))
    replaced = cuts.map(lambda cut: good[: cut[0]] + cut[2] + good[cut[0] + cut[1] :])
    return replaced | st.binary(max_size=40) | st.integers(0, len(good)).map(lambda n: good[:n])


def read_or_refuse(read: Callable[[], Any], path: Path | None = None) -> Any:
    """The result, or None after a ConversionError of one line, which names the path."""
    try:
        return read()
    except ConversionError as error:
        assert "\n" not in str(error) and str(path or "") in str(error)
        return None


def check_config(config: HFConfig | None) -> None:
    """A config that was accepted can be built from and stored."""
    if config is not None:
        assert HFConfig.from_json_dict(json.loads(json.dumps(config.to_json_dict()))) == config
        assert len(FAMILIES[config.family].hf_shapes(config)) < 10**5


CONFIGS = [family_config(family) for family in FAMILIES]
CONFIGS[0] |= {  # transformers 5
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "layer_types": ["full_attention"] * 3,
}
GENERATION = {"eos_token_id": [259, 257], "pad_token_id": 257, "bos_token_id": 5}


@fuzz
@given(st.sampled_from(CONFIGS).flatmap(mutated), mutated(GENERATION))
@example(CONFIGS[0] | {"rms_norm_eps": 10**400}, {})
def test_parsed_configs(raw: Any, generation: Any) -> None:
    if isinstance(raw, dict) and isinstance(generation, dict):
        check_config(read_or_refuse(lambda: parse_config(raw, generation)))


@fuzz
@given(spoilt(json.dumps(CONFIGS[-1]).encode()), spoilt(json.dumps(GENERATION).encode()))
def test_config_files(tmp_path: Path, config: bytes, generation: bytes) -> None:
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "generation_config.json").write_bytes(generation)
    check_config(read_or_refuse(lambda: read_config(tmp_path), tmp_path))


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F16", "shape": [], "data_offsets": [32, 34]},
}


def header_file(path: Path, blob: bytes, length: int | None = None, size: int = 34) -> None:
    length = len(blob) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + blob + bytes(size))


def check_header(path: Path) -> None:
    """What is accepted the safetensors library reads as the same tensors."""
    found = read_or_refuse(lambda: read_header(path), path)
    if found is not None:
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(found)
            for name, info in found.items():
                tensor = file.get_tensor(name)
                assert tuple(tensor.shape) == info.shape and tensor.dtype == info.dtype


@fuzz
@given(mutated(HEADER), st.sampled_from([34] * 5 + [0, 33, 35]))
@example(HEADER, 34)
@example(HEADER | {"__metadata__": {"a": "\ud800"}}, 34)
def test_headers(tmp_path: Path, header: Any, size: int) -> None:
    path = tmp_path / "x.safetensors"
    header_file(path, json.dumps(header).encode(), size=size)
    check_header(path)


@fuzz
@given(spoilt(json.dumps(HEADER).encode()), st.none() | st.integers(0, 2**64 - 1))
def test_header_bytes(tmp_path: Path, blob: bytes, length: int | None) -> None:
    path = tmp_path / "x.safetensors"
    header_file(path, blob, length)
    check_header(path)


def test_good_headers_are_read(tmp_path: Path) -> None:  # control
    header_file(tmp_path / "x", json.dumps(HEADER).encode())
    assert read_header(tmp_path / "x")["a"].shape == (2, 3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("data_offsets", ends) for ends in ([0, 23], [0, 25], [1, 24], [24, 0], [0], [0, 24, 0])),
        *(("shape", shape) for shape in ([3, 3], [-2, -3], [6, 1, 1.0], 6, None)),
        *(("dtype", dtype) for dtype in ("F16", "F64", "I8", "F8_E4M3", None, [])),
    ],
)
def test_entries_must_fit(tmp_path: Path, key: str, value: object) -> None:
    changed = HEADER | {"a": HEADER["a"] | {key: value}}
    header_file(tmp_path / "x", json.dumps(changed).encode())
    with pytest.raises(ConversionError, match="'a'"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    "entry",
    [
        '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, ' * 2,  # last ", " goes
        '"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 4]}, ',
    ],
)
def test_doubled_header_keys(tmp_path: Path, entry: str) -> None:
    """The format forbids them, for readers take one or the other."""
    header_file(tmp_path / "x", ("{" + entry[:-2] + "}").encode(), size=4)
    with pytest.raises(ConversionError, match="is there twice"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    ("length", "shape"),
    [(99_000_000, [1]), (2**63, [1]), (None, [10**9]), (None, [2**62, 2**62]), (None, [1] * 5000)],
)
def test_nothing_is_allocated_by_what_a_header_claims(
    tmp_path: Path, length: int | None, shape: list[int]
) -> None:
    count = 4
    for size in shape:
        count *= size
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, count]}}
    header_file(tmp_path / "x", json.dumps(header).encode(), length, size=4)
    tracemalloc.start()
    try:
        read_or_refuse(lambda: read_header(tmp_path / "x"))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


INDEX = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}, "metadata": {"total_size": 8}}


def read_all(directory: Path) -> bool:
    with HFWeights(directory) as weights:
        return all(torch.equal(weights.read(name), torch.zeros(2)) for name in weights.shapes)


@fuzz
@given(mutated(INDEX).map(lambda value: json.dumps(value).encode()) | spoilt(b'{"weight_map": {}}'))
@example(json.dumps(INDEX).encode())
def test_indices(tmp_path: Path, index: bytes) -> None:
    for name, file in INDEX["weight_map"].items():
        folder = tmp_path / file
        if not folder.exists():
            write_weights(tmp_path / "one", {name: torch.zeros(2)})
            (tmp_path / "one/model.safetensors").rename(folder)
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    assert read_or_refuse(lambda: read_all(tmp_path), tmp_path) in (None, True)


CONFIG = parse_config(CONFIGS[-1], {})
DESCRIPTION = ModelDescription(
    config=CONFIG, mask_token_id=7, tokenizer_fingerprint="f", block_size=4, lineage={"a": 1}
).to_json_dict()


def check_description(found: ModelDescription | None) -> None:
    if found is not None:
        assert ModelDescription.from_json_dict(found.to_json_dict()) == found
        assert found.mask_token_id is None or found.mask_token_id < found.config.vocab_size
        assert found.block_size is None or found.block_size > 0
        check_config(found.config)


@fuzz
@given(mutated(DESCRIPTION))
@example(DESCRIPTION)
def test_descriptions(description: Any) -> None:
    if isinstance(description, dict):
        read = read_or_refuse(lambda: ModelDescription.from_json_dict(description))
        check_description(read)


@fuzz
@given(spoilt(json.dumps(DESCRIPTION).encode()))
def test_description_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MODEL_FILE).write_bytes(content)
    check_description(read_or_refuse(lambda: read_description(tmp_path), tmp_path))


@fuzz
@given(st.binary(max_size=30) | st.integers(1, 6000).map(lambda n: b"1" * n) | spoilt(b"12"))
@example("\u0661\u0662".encode())  # digits, but none of Megatron's
def test_latest_iterations(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "iter_0000012").mkdir(exist_ok=True)
    (tmp_path / LATEST_FILE).write_bytes(content)
    found = read_or_refuse(lambda: resolve_iteration(tmp_path), tmp_path)
    assert found in (None, tmp_path / "iter_0000012")


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in `good`, of 40 tokens, so that a mutation hits more than the vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder / "good")
    path = folder / "good/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    chars = ["a", "b", "ab"] + [token for token in vocab if token not in ("a", "b", "ab")][:30]
    tokenizer["model"]["vocab"] = {token: i for i, token in enumerate(chars)}
    for i, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = len(chars) + i
    write_json(path, tokenizer)
    return folder


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def tokenizer_calls(folder: Path, out: Path) -> None:
    """All that is done with a tokenizer, each call a valid result or a ConversionError."""
    mask = read_or_refuse(lambda: add_mask_token(folder, out, 40))
    if mask is not None:
        assert mask <= 40 and TokenizerFiles(out).id_of("mask_token") == mask
        assert Tokenizer.from_file(str(out / "tokenizer.json")).token_to_id(MASK_TOKEN) in (
            *(mask, None),  # None: the tokenizer has a mask token of its own
        )
        read_or_refuse(lambda: replace_mask_token(out, out / "moved", "<moved>", 45))
    fingerprint = read_or_refuse(lambda: tokenizer_fingerprint(TokenizerFiles(folder)))
    assert fingerprint is None or len(fingerprint) == 64
    for key in ("pad_token", "mask_token"):
        found = read_or_refuse(lambda key=key: TokenizerFiles(folder).id_of(key))
        assert found is None or type(found) is int


@settings(fuzz, max_examples=120)
@given(st.data())
def test_tokenizers(tokenizer_dir: Path, tmp_path: Path, data: st.DataObject) -> None:
    good = {
        name: json.loads((tokenizer_dir / "good" / name).read_text()) for name in TOKENIZER_FILES
    }
    spoilt_name = data.draw(st.sampled_from(TOKENIZER_FILES))
    (tmp_path / "in").mkdir(exist_ok=True)
    for name, content in good.items():
        content = data.draw(mutated(content)) if name == spoilt_name else content
        write_json(tmp_path / "in" / name, content)
    tokenizer_calls(tmp_path / "in", tmp_path / "out")


@settings(fuzz, max_examples=120)
@given(st.data())
def test_tokenizer_files(tokenizer_dir: Path, tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "in").mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        content = (tokenizer_dir / "good" / name).read_bytes()
        (tmp_path / "in" / name).write_bytes(data.draw(spoilt(content)))
    tokenizer_calls(tmp_path / "in", tmp_path / "out")


@settings(fuzz, max_examples=120)
@given(spoilt(b"{% for m in messages %}{{ m['content'] }}{% endfor %}"))
def test_chat_templates(tokenizer_dir: Path, tmp_path: Path, template: bytes) -> None:
    add_mask_token(tokenizer_dir / "good", tmp_path / "out", 300)
    (tmp_path / "template").write_bytes(template)
    read_or_refuse(lambda: set_chat_template(tmp_path / "out", tmp_path / "template"))


def careless_config(raw: dict[str, Any], generation: dict[str, Any]) -> None:
    int(raw["hidden_size"])


@pytest.mark.parametrize(
    ("careless", "name"),
    [
        (careless_config, "parse_config"),
        (lambda path: [e["shape"] for e in json.loads(path.read_bytes()[8:-34])], "read_header"),
        (lambda values: HFConfig(**values["config"]), "ModelDescription.from_json_dict"),
    ],
)
def test_careless_readers_are_noticed(  # control
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, careless: Any, name: str
) -> None:
    monkeypatch.setattr(f"{__name__}.{name}", careless)
    tests = {"parse_config": test_parsed_configs, "read_header": test_headers}
    test: Any = tests.get(name, test_descriptions)
    with pytest.raises((KeyError, TypeError, ValueError, OverflowError, AttributeError)):
        test(tmp_path) if name == "read_header" else test()
