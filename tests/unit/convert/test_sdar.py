"""An `sdar` export: directory, logits, and block decoding."""

import dataclasses
import inspect
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.formats.card import model_card
from megatron_opdlm.convert.formats.code.decoding_block_diffusion import sample
from megatron_opdlm.convert.formats.format import ExportedModel
from megatron_opdlm.convert.formats.sdar import SDAR
from megatron_opdlm.convert.formats.shipped_code import REMASKING_FILE
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.diffusion import remasking
from megatron_opdlm.diffusion.remasking import (
    RULES,
    EntropyBounded,
    LowConfidenceDynamic,
    LowConfidenceStatic,
    RemaskingRule,
    Sequential,
    rule_name,
)
from megatron_opdlm.model.hf_config import parse_config
from megatron_opdlm.rollout.request import DecodingOptions, Request
from tests.oracle import decode, hf_logits
from tests.unit.convert.models import EOS, MASK, PAD, edit_json, tiny_config, write_hf

BLOCK = 4
DYNAMIC = {"remasking": "low_confidence_dynamic"}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sdar")
    write_hf(root / "hf", tie_word_embeddings=request.param)
    import_hf(root / "hf", root / "ckpt", progress=False)
    folder = root / "ckpt/iter_0000000"
    (folder / "opdlm_state.json").write_text(json.dumps({"tokens": 12345, "rng": [1, 2]}))
    edit_json(
        folder / "opdlm_model.json",
        lineage={"source": "hf", "teacher": "Qwen3-8B"},
        block_size=BLOCK,
    )
    export(root / "ckpt", root / "student", untie=not request.param, progress=False)
    return root / "student"


@pytest.fixture(scope="module")
def model(exported: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        exported, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return loaded.eval()


@pytest.fixture(scope="module")
def qwen3(exported: Path) -> Any:
    """transformers' own Qwen3 on the directory the weights came from."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config.from_pretrained(exported.parent / "hf")
    config._attn_implementation = "eager"
    return Qwen3ForCausalLM.from_pretrained(exported.parent / "hf", config=config).eval()


def reference_logits(qwen3: Any, tokens: Tensor, block: int) -> Tensor:
    """[B, S, V] under an explicit block-causal 4-D mask."""
    blocks = torch.arange(tokens.shape[1]) // block
    hidden = blocks[None] > blocks[:, None]
    mask = torch.zeros(len(tokens), 1, *hidden.shape).masked_fill(
        hidden, torch.finfo(torch.float32).min
    )
    with torch.no_grad():
        return qwen3(tokens, attention_mask=mask).logits


def test_directory_is_complete(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("modeling_sdar.py", "sglang_dllm.yaml"),
        *("configuration_block_diffusion.py", "modeling_block_diffusion.py"),
        *("decoding_block_diffusion.py", "remasking_block_diffusion.py"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        "added_tokens.json",
    }
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [EOS, PAD] and generation["pad_token_id"] == PAD
    assert generation["temperature"] == 0.6
    assert (exported / "sglang_dllm.yaml").read_text() == "threshold: 0.95\nblock_size: 4\n"


def test_model_card(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    for text in ("# student", "| teacher | Qwen3-8B |", "| tokens | 12345 |", "| block size | 4 |"):
        assert text in card
    assert f"here it is {MASK}" in card and "@" not in card
    assert "lmdeploy serve" not in card and "sglang.launch_server" not in card
    assert f"LLM('student', mask_token_id={MASK}, block_length=4)" in card


@pytest.mark.parametrize("tied", [True, False])
def test_model_card_of_a_model_that_engines_serve(tied: bool) -> None:
    model = ExportedModel(
        name="student",
        config=parse_config(tiny_config(vocab_size=151936, tie_word_embeddings=tied), {}),
        mask_token_id=151669,
        block_size=8,
        is_trained=True,
        dtype="bfloat16",
        pad_token_id=PAD,
    )
    card = model_card(model, SDAR, has_chat_template=True)
    assert "--dllm-block-length 8" in card
    assert ("--dllm-algorithm LowConfidence" in card) != tied
    assert ("without\n`--no-untie`" in card) == tied
    assert "cannot serve" not in card and "@" not in card


def test_generic_config_class_keeps_the_keys(exported: Path) -> None:
    """LMDeploy without trust_remote_code."""
    from transformers import PretrainedConfig

    config = PretrainedConfig.from_pretrained(exported)
    assert config.block_size == BLOCK and config.rope_theta == 1000000


def test_config_class(model: Any) -> None:
    assert model.config.rope_theta == 1000000 and model.config.sliding_window is None
    assert model.config.rope_parameters["rope_theta"] == 1000000
    assert model.config.mask_token_id == MASK and model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [EOS, PAD]


def test_tie_is_kept(model: Any, exported: Path) -> None:
    tied = json.loads((exported / "config.json").read_text())["tie_word_embeddings"]
    same = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert same == tied


def test_tokenizer_loads(exported: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (MASK, EOS)
    assert tokenizer.pad_token_id == PAD


@pytest.mark.parametrize("block", [1, 4, 5])
def test_logits_equal_transformers_qwen3(model: Any, qwen3: Any, block: int) -> None:
    tokens = torch.randint(300, (2, 14), generator=torch.Generator().manual_seed(0))
    expected = reference_logits(qwen3, tokens, block)
    trained, model.config.block_size = model.config.block_size, block
    with torch.no_grad():
        found = model(tokens).logits
    model.config.block_size = trained
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    other = reference_logits(qwen3, tokens, block + 1)  # control
    assert (found - other).abs().max() > 1e-2


def test_wrong_qkv_order_changes_the_logits(model: Any, qwen3: Any) -> None:  # control
    tokens = torch.randint(300, (1, 14), generator=torch.Generator().manual_seed(0))
    weight = model.model.layers[0].self_attn.k_proj.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(original.roll(model.config.head_dim, 0))
        found = model(tokens).logits
        weight.copy_(original)
    assert (found - reference_logits(qwen3, tokens, BLOCK)).abs().max() > 1e-2


def test_cache_equals_full_forward(model: Any) -> None:
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(tokens).logits
        first = model(tokens[:, :8], use_cache=True)
        second = model(tokens[:, 8:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, full[:, 8:], rtol=0, atol=1e-5)
    assert first.past_key_values.get_seq_length() == 12


def test_padding_mask(model: Any) -> None:
    tokens = torch.randint(300, (2, 10), generator=torch.Generator().manual_seed(1))
    padded = torch.ones(2, 10, dtype=torch.int64)
    padded[1, 8:] = 0
    with torch.no_grad():
        found, alone = model(tokens, attention_mask=padded).logits, model(tokens[1:, :8]).logits
    torch.testing.assert_close(found[1:, :8], alone, rtol=0, atol=1e-5)


def brute_force(
    qwen3: Any, prompt: list[int], limit: int, steps: int, threshold: float | None
) -> list[int]:
    """Greedy block decoding with a full forward pass per step and rules written out as loops."""
    length = len(prompt)
    total = -(-(length + limit) // BLOCK) * BLOCK
    tokens = prompt + [MASK] * (total - length)
    for start in range(length // BLOCK * BLOCK, total, BLOCK):
        masked = [p for p in range(start, start + BLOCK) if p >= length]
        for step in range(steps):
            if not masked:
                break
            logits = reference_logits(qwen3, torch.tensor([tokens[: start + BLOCK]]), BLOCK)[0]
            logits[:, MASK] = float("-inf")
            confidence, token = logits.softmax(-1).max(-1)
            count = BLOCK // steps + (step < BLOCK % steps)
            if step == steps - 1:
                count = BLOCK
            ranked = sorted(masked, key=lambda p: (-float(confidence[p]), p))  # noqa: B023
            chosen = set(ranked[:count])
            if threshold is not None:
                chosen |= {p for p in masked if confidence[p] > threshold}
            for position in chosen:
                tokens[position] = int(token[position])
            masked = [p for p in masked if p not in chosen]
        if any(t in (EOS, PAD) for t in tokens[max(start, length) : start + BLOCK]):
            total = start + BLOCK
            break
    response = tokens[length : min(total, length + limit)]
    for i, token_id in enumerate(response):
        if token_id in (EOS, PAD):
            return response[: i + 1]
    return response


@pytest.mark.parametrize("prompt_length", [2, 4, 5, 6, 7])
@pytest.mark.parametrize(
    ("steps", "threshold"), [(4, None), (3, None), (1, None), (4, 0.02), (2, 0.5)]
)
def test_generate_equals_full_recompute(
    model: Any, qwen3: Any, prompt_length: int, steps: int, threshold: float | None
) -> None:
    generator = torch.Generator().manual_seed(prompt_length)
    prompts = torch.randint(256, (2, prompt_length), generator=generator)
    found = model.generate(
        prompts,
        max_new_tokens=9,
        denoising_steps=steps,
        **(
            {"remasking": "low_confidence_static"}
            if threshold is None
            else {"remasking": "low_confidence_dynamic", "confidence_threshold": threshold}
        ),
    )
    assert torch.equal(found[:, :prompt_length], prompts)
    for row, prompt in zip(found, prompts, strict=True):
        expected = brute_force(qwen3, prompt.tolist(), 9, steps, threshold)
        response = row[prompt_length:].tolist()
        assert response[: len(expected)] == expected
        assert set(response[len(expected) :]) <= {PAD}
        assert MASK not in response


RULE_CASES = [
    LowConfidenceStatic(),
    *(LowConfidenceDynamic(confidence_threshold=value) for value in (0.015, 0.02)),
    *(EntropyBounded(entropy_bound=value) for value in (4.0, 12.0, 17.0)),
    Sequential(),
]


def oracle_response(qwen3: Any, prompt: Tensor, rule: RemaskingRule, steps: int) -> list[int]:
    """The engine's own oracle, which the engine equals: no cache, a full pass per step."""
    with torch.no_grad():
        ids, _, length, _ = decode(
            lambda ids, tags: hf_logits(qwen3, ids, tags),
            Request(prompt_id="p", sample=0, prompt_ids=prompt, response_limit=9, key=0),
            DecodingOptions(block_size=BLOCK, denoising_steps=steps, rule=rule),
            mask_token_id=MASK,
            eos_token_ids=(EOS, PAD),
        )
    return ids[:length]


@pytest.mark.parametrize("rule", RULE_CASES, ids=str)
def test_every_rule_decodes_as_in_the_engine(model: Any, qwen3: Any, rule: RemaskingRule) -> None:
    generator = torch.Generator().manual_seed(0)
    for steps, prompt_length in itertools.product((4, 3), (2, 5)):
        prompt = torch.randint(256, (prompt_length,), generator=generator)
        found = model.generate(
            prompt[None],
            max_new_tokens=9,
            denoising_steps=steps,
            remasking=rule_name(rule),
            **dataclasses.asdict(rule),
        )[0, prompt_length:].tolist()
        assert found == oracle_response(qwen3, prompt, rule, steps)


def test_the_rules_of_the_cases_decode_differently(qwen3: Any) -> None:  # control
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(256, (length,), generator=generator) for length in range(2, 8)]
    found = {str([oracle_response(qwen3, p, rule, 4) for p in prompts]) for rule in RULE_CASES}
    assert len(found) == len(RULE_CASES)
    assert {type(rule) for rule in RULE_CASES} == set(RULES.values())


def test_generate_cuts_after_eos(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = torch.tensor([[5, 6, 7]])
    free = model.generate(prompts, max_new_tokens=9)[0, 3:].tolist()
    eos = free[1]
    cut = model.generate(prompts, max_new_tokens=9, eos_token_id=eos)[0, 3:].tolist()
    assert cut == free[: free.index(eos) + 1]


def test_generate_with_sampling_is_reproducible(model: Any) -> None:
    prompts = torch.tensor([[5, 6, 7]])
    runs = [
        model.generate(
            prompts,
            max_new_tokens=8,
            temperature=1.0,
            top_k=50,
            top_p=0.9,
            generator=torch.Generator().manual_seed(seed),
        ).tolist()
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_generate_passes_per_block(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block costs its denoising steps: no separate pass for the cache, none for the prompt."""
    calls = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: calls.append(a) or forward(*a, **k))
    model.generate(torch.tensor([[5, 6, 7, 8, 9]]), max_new_tokens=7, eos_token_id=[])
    assert len(calls) == 3 + 4  # three masks in the first block, four in the second
    assert [call[0].shape[1] for call in calls] == [8, 4, 4, 8, 4, 4, 4]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"remasking": "random"}, "remasking='random' is not a rule; use one of low_confidence_st"),
        ({"remasking": "low_confidence_static", "confidence_threshold": 0.5}, "is no option of"),
        ({"do_sample": False}, "do_sample=False is no option of remasking=low_confidence_static"),
        ({"remasking": "entropy_bounded", "entropy_bound": -1}, "entropy_bound=-1 must be"),
        ({"denoising_steps": 5}, "denoising_steps"),
        ({"attention_mask": torch.tensor([[0, 1]])}, "attention_mask"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        *(({"temperature": value}, "temperature=") for value in (-1, float("nan"), float("inf"))),
        ({"top_k": -1}, "top_k=-1 must be"),
        *(({"top_p": value}, "top_p=") for value in (0, -0.1, 2, float("nan"))),
        *(
            (DYNAMIC | {"confidence_threshold": value}, "confidence_threshold=.* must lie in")
            for value in (0, 1.1, -1)
        ),
    ],
)
def test_generate_refuses(model: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        model.generate(torch.tensor([[5, 6]]), **options)
    assert "\n" not in str(error.value)


def test_generate_takes_the_ends_of_the_ranges(model: Any) -> None:  # control
    options = DYNAMIC | {"max_new_tokens": 1, "top_p": 1, "top_k": 0, "confidence_threshold": 1}
    for temperature in (0, 1e-3, 100):
        found = model.generate(torch.tensor([[5, 6]]), temperature=temperature, **options)
        assert found.shape == (1, 3)


def test_ties_go_to_the_lower_position_and_prompts_are_never_written(model: Any) -> None:
    """In the code that the export carries."""
    code = sys.modules[type(model).generate.__module__]
    assert code.make_rule.__module__.startswith("transformers_modules.")
    static = code.make_rule("low_confidence_static")
    dynamic = code.make_rule("low_confidence_dynamic", confidence_threshold=0.4)
    confidence = torch.tensor([[0.9, 0.5, 0.5, 0.5]])
    masked = torch.tensor([[False, True, True, True]])

    def commits(rule: Any, steps: int) -> Any:
        first = torch.zeros(1, dtype=torch.int64)
        chosen = code.choose_commits(confidence, masked, first, rule=rule, denoising_steps=steps)
        return chosen.tolist()

    assert commits(static, 2) == [[False, True, True, False]]
    assert commits(static, 1) == masked.tolist()
    assert commits(dynamic, 4) == masked.tolist()


def test_the_export_carries_the_rules_as_they_are(exported: Path) -> None:
    assert (exported / REMASKING_FILE).read_text() == inspect.getsource(remasking)


def test_sampling_filters() -> None:
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0]).log().expand(1, 2000, 4)
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])

    def seen(**options: Any) -> set[int]:
        defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        generator = torch.Generator().manual_seed(0)
        tokens, confidence = sample(logits, **(defaults | options), generator=generator)
        assert torch.allclose(confidence, probabilities[tokens])  # unfiltered, temperature 1
        return set(tokens.flatten().tolist())

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.5) == {0, 1}
    assert seen(top_p=1e-6) == {0}
    assert seen(temperature=0) == {0}


def test_saving_and_loading_again(model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    if model._auto_class is None:
        pytest.skip("this transformers saves models without the code they were loaded with")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
