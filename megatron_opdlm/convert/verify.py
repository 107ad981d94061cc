"""Compares the logits of a checkpoint with those of a Hugging Face directory.

Both networks run in float32 on the same random tokens, with a causal and with a block-causal mask.
A third run has the checkpoint's query, key and value rows in a wrong order. Its logits must differ;
otherwise the comparison could not find an error.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.checkpoint.layout import read_description, resolve_iteration
from megatron_opdlm.checkpoint.weights import freeze, load_model
from megatron_opdlm.convert.formats import format_of
from megatron_opdlm.convert.formats.shipped_code import shipped_class
from megatron_opdlm.diffusion.tags import make_tags, visible
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import read_json_object
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions
from megatron_opdlm.model.hf_config import HFConfig, read_config

_SHAPE_FIELDS = (
    *("family", "num_layers", "hidden_size", "ffn_hidden_size"),
    *("num_attention_heads", "num_query_groups", "kv_channels", "vocab_size"),
)
DEFAULT_BLOCK_SIZE = 4
"""Block size for a checkpoint that has not been trained yet."""
NUM_TOKENS = 64
_MASK_KEY = "mask_token_id"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Largest differences of logits, over all positions and the vocabulary without the mask."""

    causal: float
    block_causal: float
    control: float
    """Difference with the causal mask and with query, key and value rows in a wrong order."""
    block_size: int

    def passes(self, tolerance: float) -> bool:
        """Returns whether both masks agree within `tolerance` and the control does not."""
        return max(self.causal, self.block_causal) <= tolerance < self.control


def verify(checkpoint: str | Path, hf_dir: str | Path, *, seed: int = 0) -> Verification:
    """Compares a checkpoint with a Hugging Face directory, the base model's or an export.

    Args:
        checkpoint: checkpoint root or iteration folder.
        hf_dir: directory to compare with; no code from it is run.
        seed: seed of the random tokens.

    Raises:
        ConversionError: a path has another kind of model, or the models have different shapes.
    """
    folder, source = resolve_iteration(checkpoint), Path(hf_dir)
    config = read_config(source)
    description = read_description(folder)
    new_row = description.mask_token_id == config.vocab_size
    _require_same_shape(description.config, config, new_row=new_row)
    # always float32: a comparison in bfloat16 would hide errors of a few percent
    reference = _load_reference(source, config)
    options = BuildOptions(params_dtype=torch.float32)
    model = freeze(load_model(folder, options, process_groups.initialize())[0])
    # The mask token is left out: its row may differ from the base model's, and an export may have
    # moved it.
    masks = (description.mask_token_id, read_json_object(source / "config.json").get(_MASK_KEY))
    compared = torch.tensor([token for token in range(config.vocab_size) if token not in masks])
    generator = torch.Generator().manual_seed(seed)
    length = min(NUM_TOKENS, config.max_position_embeddings)
    tokens = compared[torch.randint(len(compared), (length,), generator=generator)]
    block_size = description.block_size or DEFAULT_BLOCK_SIZE
    deltas = [_delta(model, reference, tokens, compared, size) for size in (1, block_size)]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("linear_qkv.weight"):
                weight.copy_(weight.roll(config.kv_channels, dims=0))
    control = _delta(model, reference, tokens, compared, 1)
    return Verification(
        causal=deltas[0], block_causal=deltas[1], control=control, block_size=block_size
    )


def _require_same_shape(ours: HFConfig, theirs: HFConfig, *, new_row: bool) -> None:
    """Refuses models of different shapes. The checkpoint may have one more row, for the mask."""
    expected = replace(theirs, vocab_size=theirs.vocab_size + new_row)
    for name in _SHAPE_FIELDS:
        if getattr(ours, name) != getattr(expected, name):
            raise ConversionError(
                f"checkpoint and Hugging Face directory are different models: {name} is "
                f"{getattr(ours, name)} and {getattr(expected, name)}"
            )


def _load_reference(source: Path, config: HFConfig) -> Any:
    """The class that runs the directory's format: transformers' own, or one of ours."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    family = FAMILIES[config.family]
    model_type = read_json_object(source / "config.json")["model_type"]
    model_class = format_of(model_type, family).model_class
    if model_class is None:
        hf_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if int(transformers.__version__.split(".")[0]) < 5:  # it loses these from files of 5
            hf_config.rope_theta = config.rope_theta
            hf_config.rope_scaling = _version_4_scaling(config)
        hf_config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_pretrained(source, config=hf_config)
    else:
        ours = shipped_class(model_class(family))
        model = ours.from_pretrained(source, config=ours.config_class.from_pretrained(source))
    return model.float().eval()


def _version_4_scaling(config: HFConfig) -> dict[str, Any] | None:
    if config.rope_scaling is None:
        return None
    return {"rope_type": "llama3"} | asdict(config.rope_scaling)


@torch.no_grad()
def _delta(
    model: BlockDiffusionModel, reference: Any, tokens: Tensor, columns: Tensor, block_size: int
) -> float:
    """Returns the largest difference of the two networks' logits. Block size 1 is causal.

    tokens is [S] int64; columns are the ids that count.
    """
    device = torch.cuda.current_device()
    positions = torch.arange(len(tokens))
    tags = make_tags(0, positions, noisy=False, block_size=block_size)
    mask = torch.zeros(1, 1, len(tokens), len(tokens)).masked_fill(
        ~visible(tags, tags), torch.finfo(torch.float32).min
    )
    theirs = reference(tokens[None], attention_mask=mask, position_ids=positions[None]).logits[0]
    hidden = model(tokens.to(device), tags.to(device))
    ours = model.logits(model.select_rows(hidden, positions.to(device)))
    return float((ours.cpu()[:, columns] - theirs[:, columns]).abs().max())
