"""Every format: complete directories, the same logits, plain weights back bit by bit."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.formats import FORMATS, find_format
from megatron_opdlm.convert.formats.card import _without_folders
from megatron_opdlm.convert.formats.code.configuration_block_diffusion import BlockDiffusionConfig
from megatron_opdlm.convert.formats.code.modeling_block_diffusion import inverse_frequencies
from megatron_opdlm.convert.formats.shipped_code import shipped_code
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.hf_config import read_config
from megatron_opdlm.model.rope import RopeScaling
from megatron_opdlm.model.rope import inverse_frequencies as our_frequencies
from tests.unit.convert.exports import (
    BLOCK,
    block_mask,
    load_original,
    logits,
    random_tokens,
    student_checkpoint,
)
from tests.unit.convert.models import LLAMA3_SCALING, MASK, edit_json, read_weights, write_hf

FAMILIES = FORMATS["a2d"].families
TOKENIZER = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
}
CODE = {
    "configuration_block_diffusion.py",
    "modeling_block_diffusion.py",
    "decoding_block_diffusion.py",
    "remasking_block_diffusion.py",
}


@pytest.fixture(scope="module", params=FAMILIES)
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained student of each family, and its exports: base/student, a2d/student."""
    root = tmp_path_factory.mktemp(request.param)
    student_checkpoint(root, family=request.param, tie_word_embeddings=request.param != "llama")
    for name in ("base", "a2d"):
        export(root / "ckpt", root / name / "student", format=name, progress=False)
    return root


@pytest.fixture(scope="module")
def original(root: Path) -> Any:
    return load_original(root / "hf")


def load_a2d(directory: Path, auto_class: str = "AutoModelForMaskedLM") -> Any:
    import transformers

    model, info = getattr(transformers, auto_class).from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def a2d(root: Path) -> Any:
    return load_a2d(root / "a2d/student")


def test_directories_are_complete(root: Path) -> None:
    common = TOKENIZER | {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    found = {path.name for path in (root / "base/student").iterdir()}
    assert found == common
    found = {path.name for path in (root / "a2d/student").iterdir()}
    assert found == common | CODE | {"modeling_a2d.py"}


@pytest.mark.parametrize("name", ["base", "a2d"])
def test_weights_are_bit_equal(root: Path, name: str) -> None:
    found, expected = read_weights(root / name / "student"), read_weights(root / "hf")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def test_base_config_describes_the_same_model(root: Path) -> None:
    assert read_config(root / "base/student") == read_config(root / "hf")


@pytest.mark.parametrize("block", [1, BLOCK, 5])
def test_base_logits_equal_the_original(root: Path, original: Any, block: int) -> None:
    tokens = random_tokens()
    found = logits(load_original(root / "base/student"), tokens, block)
    torch.testing.assert_close(found, logits(original, tokens, block), rtol=0, atol=1e-5)
    assert (found - logits(original, tokens, block + 1)).abs().max() > 1e-2  # control


@pytest.mark.parametrize("block", [1, BLOCK, 5])
def test_a2d_logits_equal_the_original(a2d: Any, original: Any, block: int) -> None:
    tokens = random_tokens()
    found = logits(a2d, tokens, block)
    torch.testing.assert_close(found, logits(original, tokens, block), rtol=0, atol=1e-5)
    assert (found - logits(original, tokens, block + 1)).abs().max() > 1e-2  # control


def test_wrong_qkv_order_changes_the_logits(a2d: Any, original: Any) -> None:  # control
    tokens = random_tokens()
    weight = a2d.model.layers[0].self_attn.k_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(kept.roll(a2d.config.head_dim, 0))
        found = logits(a2d, tokens, BLOCK)
        weight.copy_(kept)
    assert (found - logits(original, tokens, BLOCK)).abs().max() > 1e-2


def test_a2d_is_bidirectional_without_a_4d_mask(a2d: Any, original: Any) -> None:
    """As the toolkit's masked-diffusion sampler relies on, with and without padding."""
    tokens = random_tokens()
    with torch.no_grad():
        plain = a2d(tokens).logits
        padded = torch.cat([tokens, tokens[:, :3]], 1)
        real = (torch.arange(17) < 14).long().expand(2, -1)
        masked = a2d(padded, attention_mask=real).logits[:, :14]
    expected = logits(original, tokens, 14)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-5)
    assert (plain - logits(original, tokens, BLOCK)).abs().max() > 1e-2  # control


def test_toolkit_sampler_calls(a2d: Any, original: Any) -> None:
    """Left padding, a boolean mask with empty rows, a prefix cache that is copied at every step."""
    import copy

    pad, tokens = 3, random_tokens(rows=2, length=8)
    prefix = torch.cat([torch.full((2, 2), pad), tokens[:, :6]], 1)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[:, :2] = False
    mask = block_mask(12, BLOCK) & valid[:, None, :, None] & valid[:, None, None, :]
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    block = torch.full((2, 4), MASK)
    with torch.no_grad():
        out = a2d(
            prefix, attention_mask=mask[..., :8, :8], position_ids=positions[:, :8], use_cache=True
        )
        for _ in range(2):  # the cache of the prefix must not grow
            found = a2d(
                block,
                attention_mask=mask[..., 8:, :],
                position_ids=positions[:, 8:],
                past_key_values=copy.deepcopy(out.past_key_values),
                use_cache=False,
            ).logits
        float_mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        expected = original(
            torch.cat([prefix, block], 1), attention_mask=float_mask, position_ids=positions
        ).logits
    torch.testing.assert_close(found, expected[:, 8:], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.logits[:, 2:], expected[:, 2:8], rtol=0, atol=1e-5)


def test_auto_model_of_a2d_has_logits(root: Path, a2d: Any) -> None:
    """The toolkit falls back to AutoModel and reads its logits."""
    model, tokens = load_a2d(root / "a2d/student", "AutoModel"), random_tokens()
    assert torch.equal(logits(model, tokens, BLOCK), logits(a2d, tokens, BLOCK))


@pytest.mark.parametrize("prompt_length", [2, 4, 7])
def test_a2d_generates(a2d: Any, original: Any, prompt_length: int) -> None:
    """Greedy decoding with a cache equals a full pass per step."""
    prompt = random_tokens(rows=1, length=prompt_length, seed=prompt_length, vocab=256)
    found = a2d.generate(prompt, max_new_tokens=9, eos_token_id=[])[0].tolist()
    total = -(-(prompt_length + 9) // BLOCK) * BLOCK
    tokens = prompt[0].tolist() + [MASK] * (total - prompt_length)
    for start in range(prompt_length // BLOCK * BLOCK, total, BLOCK):
        masked = [p for p in range(start, start + BLOCK) if p >= prompt_length]
        while masked:
            values = logits(original, torch.tensor([tokens[: start + BLOCK]]), BLOCK)[0]
            values[:, MASK] = float("-inf")
            confidence, token = values.softmax(-1).max(-1)
            best = max(masked, key=lambda p: float(confidence[p]))  # noqa: B023
            tokens[best] = int(token[best])
            masked.remove(best)
    assert found == tokens[: prompt_length + 9]


@pytest.mark.parametrize("scaled", [False, True])
def test_frequencies_equal_those_of_training(scaled: bool) -> None:
    rope = {"rope_theta": 500000.0} | (LLAMA3_SCALING if scaled else {"rope_type": "default"})
    config = BlockDiffusionConfig(head_dim=32, rope_parameters=rope)
    scaling = {key: value for key, value in LLAMA3_SCALING.items() if key != "rope_type"}
    expected = our_frequencies(
        width=32, theta=500000.0, scaling=RopeScaling(**scaling) if scaled else None
    )
    torch.testing.assert_close(
        inverse_frequencies(config, torch.device("cpu")), expected, rtol=1e-6, atol=0
    )


def test_exports_of_one_name_do_not_mix(root: Path, tmp_path: Path, a2d: Any) -> None:
    """transformers caches code under the directory's last name; `a2d/student` is loaded already."""
    other = tmp_path / "student"
    write_hf(tmp_path / "hf", seed=1)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    export(tmp_path / "ckpt", other, block_size=3, progress=False)
    from transformers import AutoModelForCausalLM

    sdar = AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True).eval()
    again, tokens = load_a2d(root / "a2d/student"), random_tokens()
    assert type(sdar).__name__ == "SDARForCausalLM" and sdar.config.block_size == 3
    assert type(again).__name__ == type(a2d).__name__ and again.config.block_size == BLOCK
    with torch.no_grad():
        expected = logits(load_original(tmp_path / "hf"), tokens, 3)
        torch.testing.assert_close(sdar(tokens).logits, expected, rtol=0, atol=1e-5)
        assert torch.equal(again(tokens).logits, a2d(tokens).logits)


def imports_of(name: str) -> set[str]:
    """Modules that a shipped file imports; relative ones begin with a dot."""
    found = set()
    for node in ast.walk(ast.parse(shipped_code(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


SHIPPED = sorted({name for item in FORMATS.values() for name in item.code_files})


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_code_needs_torch_and_transformers_alone(name: str) -> None:
    outside = {module.split(".")[0] for module in imports_of(name) if not module.startswith(".")}
    assert outside - sys.stdlib_module_names <= {"torch", "transformers"}


@pytest.mark.parametrize("name", ["sdar", "a2d"])
def test_shipped_code_is_whole(name: str) -> None:
    """transformers 4 copies what the entry file names, and not what those files name in turn."""
    carried = {f".{file.removesuffix('.py')}" for file in FORMATS[name].code_files}
    named = {n for n in imports_of(f"modeling_{name}.py") if n.startswith(".")}
    needed = {n for f in FORMATS[name].code_files for n in imports_of(f) if n.startswith(".")}
    assert needed <= named and named | {f".modeling_{name}"} == carried
    assert not any(n.startswith(".") for n in imports_of("configuration_block_diffusion.py"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_without_mask_exports_as_base(tmp_path: Path, family: str) -> None:
    tensors = write_hf(tmp_path / "hf", family=family, dtype=torch.bfloat16, shards=2)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", add_mask=False, progress=False)
    export(tmp_path / "ckpt", tmp_path / "out", format=family, progress=False)
    found = read_weights(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    original = (tmp_path / "hf/tokenizer.json").read_bytes()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == original
    card = (tmp_path / "out/README.md").read_text()
    assert "vllm serve out" in card and "block" not in card


def test_a_name_with_a_dot_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student_checkpoint(tmp_path)
    for name, warns in (("out", False), ("out-0.6B", True)):
        export(tmp_path / "ckpt", tmp_path / name, block_size=4, progress=False)
        assert ("a dot in its name" in caplog.text) == warns
    caplog.clear()
    export(tmp_path / "ckpt", tmp_path / "base-0.6B", format="base", progress=False)
    assert "a dot in its name" not in caplog.text  # it carries no code


def test_base_without_a_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_hf(tmp_path / "hf")
    for path in (tmp_path / "hf").glob("*token*"):
        path.unlink()
    import_hf(tmp_path / "hf", tmp_path / "ckpt", add_mask=False, progress=False)
    export(tmp_path / "ckpt", tmp_path / "out", format="base", progress=False)
    assert "no tokenizer" in caplog.text
    assert not list((tmp_path / "out").glob("*token*"))


@pytest.mark.parametrize(
    ("name", "family", "match"),
    [
        ("sdar", "llama", r"holds qwen3 models only.*llama.*\['a2d', 'base'\]"),
        ("sdar", "qwen2", r"holds qwen3 models only.*qwen2.*\['a2d', 'base'\]"),
        ("qwen3", "llama", "own family 'llama'"),
        ("onnx", "qwen3", "unknown; one of"),
    ],
)
def test_format_that_does_not_hold_the_model(name: str, family: str, match: str) -> None:
    with pytest.raises(ConversionError, match=match):
        find_format(name, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_format_names(family: str) -> None:
    assert find_format(family, family) is find_format("base", family) is FORMATS["base"]
    assert find_format("a2d", family) is FORMATS["a2d"]


@pytest.mark.parametrize("file", ["opdlm_model.json", "opdlm_state.json"])
@pytest.mark.parametrize("key", ["shift_logits", "student_arm_shift"])
def test_shifted_student_is_refused(tmp_path: Path, file: str, key: str) -> None:
    student_checkpoint(tmp_path)
    path = tmp_path / "ckpt/iter_0000000" / file
    lineage = json.loads(path.read_text()).get("lineage")

    def record(value: bool) -> None:
        changes = {key: value}
        edit_json(path, **(changes if lineage is None else {"lineage": lineage | changes}))

    record(True)
    for name in ("sdar", "a2d", "base"):
        with pytest.raises(ConversionError, match=f"{key}=True") as error:
            export(tmp_path / "ckpt", tmp_path / "out", format=name, progress=False)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    record(False)
    export(tmp_path / "ckpt", tmp_path / "out", progress=False)


def test_student_formats_need_a_mask_token(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", add_mask=False, progress=False)
    for name in ("sdar", "a2d"):
        with pytest.raises(ConversionError, match="no mask token"):
            export(tmp_path / "ckpt", tmp_path / "out", format=name, block_size=4, progress=False)


def card(directory: Path) -> str:
    return (directory / "README.md").read_text()


def test_cards(root: Path) -> None:
    family = json.loads((root / "hf/config.json").read_text())["model_type"]
    rows = (
        *("| base model | hf |", "| teacher | models/Qwen3-8B |", "| block size | 4 |"),
        *("| training data | data/prompts.jsonl |", "| response tokens | 12345 |"),
        *("| optimizer steps | 96 |", "| rollouts | 6 |", "| seed | 3 |"),
    )
    base, a2d = card(root / "base/student"), card(root / "a2d/student")
    for text in (base, a2d):
        assert "# student" in text and "@" not in text and "work" not in text.split("|")
        assert all(row in text for row in rows)
    assert "These are the weights of a block-diffusion student" in base
    assert "vllm" not in base and "trust_remote_code" not in base
    assert "sample.py --model_name_or_path student --block_size 4" in a2d
    assert ("--model_bases bd3lm" in a2d) == (family == "qwen3")
    assert "enable_thinking=True" in a2d


def test_a_card_keeps_the_folders_to_itself() -> None:
    assert _without_folders("/home/someone/models/Qwen3-8B") == "Qwen3-8B"
    assert _without_folders("models/Qwen3-8B") == "models/Qwen3-8B"


def test_card_of_an_untrained_model_says_so(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    export(tmp_path / "ckpt", tmp_path / "out", block_size=8, progress=False)
    assert "not trained any further" in card(tmp_path / "out")
    assert "megatron-opdlm. Position" not in card(tmp_path / "out")


def test_an_a2d_export_can_be_imported_again(root: Path, tmp_path: Path) -> None:
    import_hf(root / "a2d/student", tmp_path / "again", progress=False)
    export(tmp_path / "again", tmp_path / "out", format="base", progress=False)
    found, expected = read_weights(tmp_path / "out"), read_weights(root / "hf")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
