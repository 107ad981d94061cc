"""Dense Qwen and Llama models on Megatron's `GPTModel`, with our core attention over tags.

Only this file and `convert/` know the construction, the parameter names and the forward pass of the
network.

Shape letters: S stream tokens, T loss rows, D hidden, V vocab; V_local = padded V / tensor-parallel
size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from megatron_opdlm.diffusion.blocks import round_up
from megatron_opdlm.diffusion.tags import POSITION
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.attention import AttentionPlan, TagAttention
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.flex import FLEX_BLOCK
from megatron_opdlm.model.fp8 import ALIGNMENT
from megatron_opdlm.model.hf_config import HFConfig
from megatron_opdlm.model.rope import inverse_frequencies


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of building a model, besides its hyperparameters. The names are Megatron's."""

    layer_spec: str = "local"
    """"local" or "transformer_engine"."""
    params_dtype: torch.dtype = torch.float32
    """Data type of weights and activations."""
    sequence_parallel: bool = False
    """Whether activations between layers are sharded over the tensor-parallel group."""
    fp8: str | None = None
    """FP8 format of matrix products: None, "hybrid" or "e4m3". FP8 needs Transformer Engine."""
    fp8_recipe: str = "tensorwise"
    """Transformer Engine's scaling recipe."""
    recompute_granularity: str | None = None
    """Activations to recompute in the backward pass: None, "selective" or "full"."""
    apply_rope_fusion: bool = False
    """Whether queries and keys are rotated in one kernel, which needs Transformer Engine."""
    bias_swiglu_fusion: bool = False
    """Whether SwiGLU is compiled into one kernel."""
    gradient_accumulation_fusion: bool = False
    """Whether weight gradients are added to `main_grad` inside the matrix product, which needs
    Transformer Engine's layers."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this times the tensor-parallel size."""


class RMSNorm(torch.nn.Module):
    """RMSNorm for the local layer spec that also works with sequence parallelism.

    Megatron's wrapper of torch's norm refuses sequence parallelism. This class marks its weight, so
    that Megatron sums the weight's gradient over the tensor-parallel group. The mean square is
    computed in float32."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any
    ) -> None:
        """Makes the weight [hidden_size]. Arguments for other norms are ignored."""
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises the last dimension of [..., D]; the result has the same shape and dtype."""
        normed = F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=self.eps)
        return normed.to(hidden.dtype) * self.weight


class BlockDiffusionModel(GPTModel):
    """`GPTModel` whose forward pass takes a tagged stream and returns hidden states.

    The method `logits` applies the LM head separately, to the rows that need it. Both student and
    teacher are of this class: tags of block size 1 make the model causal."""

    vocab_size_unpadded: int
    tp_group: torch.distributed.ProcessGroup
    inverse_frequency: Tensor

    def forward(self, token_ids: Tensor, tags: Tensor, plan: AttentionPlan | None = None) -> Tensor:
        """Runs this pipeline stage on one stream.

        Args:
            token_ids: [S] int64; only the first stage reads them.
            tags: [S, 5] int64, see tags.py.
            plan: attention plan, which all layers share; None makes it from the tags.

        Returns:
            [S, 1, D] hidden states, after the final norm on the last stage; [S / TP, 1, D] with
            sequence parallelism. Collectives: those of the tensor-parallel layers.
        """
        plan = plan or AttentionPlan(tags=tags)
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids=token_ids.unsqueeze(0), position_ids=None)
        return self.decoder(
            hidden_states=embedded,
            attention_mask=tags,
            rotary_pos_emb=self._rotary_angles(tags[:, POSITION]),
            packed_seq_params=plan,
        )

    def _rotary_angles(self, positions: Tensor) -> Tensor:
        """Returns RoPE angles [S, 1, 1, kv_channels] float32 at positions [S] int64."""
        angles = torch.outer(positions.float(), self.inverse_frequency)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]

    def select_rows(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Gathers the rows of a stream that the LM head is applied to. Last stage only.

        Args:
            hidden: hidden states from `forward`.
            rows: [T] int64, stream indices.

        Returns:
            [T, D], replicated over the tensor-parallel group. The backward pass sums the ranks'
            partial gradients: by reduce-scatter with sequence parallelism, else by all-reduce.
        """
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.tp_group
            )
            return whole[:, 0][rows]
        # Select first, so that the all-reduce of the backward pass moves T rows instead of S.
        return copy_to_tensor_model_parallel_region(hidden[:, 0][rows], group=self.tp_group)

    def logits(self, rows: Tensor) -> Tensor:
        """Applies this rank's shard of the LM head. Last stage only.

        Args:
            rows: [T, D] from `select_rows`.

        Returns:
            [T, V_local] in params_dtype: columns [tp_rank * V_local, (tp_rank + 1) * V_local) of
            the padded vocabulary. It uses no collectives.
        """
        return F.linear(rows, self.head_weight())

    def head_weight(self) -> Tensor:
        """Returns this rank's shard of the LM head, [V_local, D].

        With tied weights it is the weight of the embedding.
        """
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def has_transformer_engine() -> bool:
    """Returns whether Transformer Engine's layers can run here."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def require_transformer_engine(layer_spec: str) -> None:
    """Refuses Transformer Engine's layers if they cannot run here."""
    if layer_spec == "transformer_engine" and not has_transformer_engine():
        raise ValueError(
            "layer_spec=transformer_engine needs a CUDA device and the package "
            "transformer-engine (pip install 'megatron-opdlm[te]'); or set layer_spec=local, "
            "which has no FP8"
        )


def stream_multiple(options: BuildOptions, tp_size: int) -> int:
    """Returns the number of which the length of every stream must be a multiple."""
    multiple = ALIGNMENT[options.fp8_recipe] if options.fp8 else 1
    return multiple * (tp_size if options.sequence_parallel else 1)


def training_stream_multiple(options: BuildOptions, tp_size: int) -> int:
    """Returns the number of which the length of a training stream must be a multiple.

    On CUDA the compiled kernel of FlexAttention must see only whole squares.
    """
    squares = FLEX_BLOCK if torch.cuda.is_available() else 1
    return math.lcm(stream_multiple(options, tp_size), squares)


def padded_vocab_size(vocab_size: int, *, divisor: int, tp_size: int) -> int:
    """Returns the number of embedding rows over all tensor-parallel ranks.

    For example, 151936 becomes 152576 with 8 ranks and divisor 128.
    """
    return round_up(vocab_size, divisor * tp_size)


def check_parallel_fit(hf: HFConfig, *, tp_size: int, pp_size: int, prefix: str = "") -> None:
    """Checks that a model can be divided into these parallel sizes.

    Args:
        hf: hyperparameters of the model.
        tp_size: tensor-parallel size.
        pp_size: pipeline-parallel size.
        prefix: prefix of the keys of these sizes, e.g. "teacher_".

    Raises:
        ValueError: it cannot be divided; the message names field, value, rule and fix.
    """
    for name, value in (
        ("num_key_value_heads", hf.num_query_groups),
        ("num_attention_heads", hf.num_attention_heads),
        ("intermediate_size", hf.ffn_hidden_size),
    ):
        if value % tp_size:
            divisors = [n for n in range(1, value + 1) if value % n == 0][:8]
            raise ValueError(
                f"{prefix}tensor_model_parallel_size={tp_size} must divide the model's "
                f"{name}={value}; use one of {divisors}"
            )
    if hf.num_layers % pp_size:
        raise ValueError(
            f"{prefix}pipeline_model_parallel_size={pp_size} must divide the model's "
            f"num_hidden_layers={hf.num_layers}; use one of "
            f"{[n for n in range(1, hf.num_layers + 1) if hf.num_layers % n == 0]}"
        )


def transformer_config(
    hf: HFConfig, options: BuildOptions, parallel: ParallelState
) -> TransformerConfig:
    """Translates a Hugging Face config into Megatron's."""
    family = FAMILIES[hf.family]
    bf16 = options.params_dtype is torch.bfloat16
    return TransformerConfig(
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_query_groups,
        kv_channels=hf.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        init_method_std=hf.initializer_range,
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        sequence_parallel=options.sequence_parallel,
        params_dtype=options.params_dtype,
        pipeline_dtype=options.params_dtype,
        bf16=bf16,
        # Microbatches are packed streams of different lengths.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # unused; the default one refuses variable lengths
        # The loss weights already contain the denominator; Megatron must not divide again.
        calculate_per_token_loss=True,
        apply_rope_fusion=options.apply_rope_fusion,
        bias_activation_fusion=options.bias_swiglu_fusion,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        fp8=options.fp8,
        fp8_recipe=options.fp8_recipe,
        recompute_granularity=options.recompute_granularity,
        recompute_method="uniform" if options.recompute_granularity == "full" else None,
        recompute_num_layers=1 if options.recompute_granularity == "full" else None,
    )


def _block_spec(
    config: TransformerConfig, layer_spec: str, pp_rank: int
) -> TransformerBlockSubmodules:
    """Returns the spec of this stage's layers, with our attention (and our norm if local)."""
    num_layers = get_num_layers_to_build(config, pp_rank=pp_rank)
    require_transformer_engine(layer_spec)
    if layer_spec == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        norm: Any = TENorm
    else:
        layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        norm = RMSNorm
        layer.submodules.input_layernorm = norm
        layer.submodules.pre_mlp_layernorm = norm
        if config.qk_layernorm:
            layer.submodules.self_attention.submodules.q_layernorm = norm
            layer.submodules.self_attention.submodules.k_layernorm = norm
    layer.submodules.self_attention.submodules.core_attention = TagAttention
    layers: list[ModuleSpec] = [layer] * num_layers
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _fuse_gradient_accumulation(model: BlockDiffusionModel) -> None:
    """Makes Transformer Engine's layers add weight gradients to `main_grad` themselves.

    Megatron's own flag would also apply to the LM head. The head would then need Apex, although it
    is never called as a layer here. Norms and embedding stay as they are.
    """
    fused = [module for module in model.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    assert fused, "checked with the configuration: the layers are Transformer Engine's"
    for module in fused:
        module.fuse_wgrad_accumulation = True


def build_model(
    hf: HFConfig, options: BuildOptions, parallel: ParallelState
) -> BlockDiffusionModel:
    """Builds this process's shard of the network. Its weights must still be loaded.

    Args:
        hf: hyperparameters of the model.
        options: build options.
        parallel: process groups.

    Returns:
        The model on the current device.

    Raises:
        ValueError: the model cannot be divided into these parallel sizes.
    """
    check_parallel_fit(hf, tp_size=parallel.tp_size, pp_size=parallel.pp_size)
    config = transformer_config(hf, options, parallel)
    model = BlockDiffusionModel(
        config=config,
        transformer_layer_spec=_block_spec(config, options.layer_spec, parallel.pp_rank),
        vocab_size=padded_vocab_size(
            hf.vocab_size,
            divisor=options.make_vocab_size_divisible_by,
            tp_size=parallel.tp_size,
        ),
        max_sequence_length=hf.max_position_embeddings,
        pre_process=parallel.is_first_stage,
        post_process=parallel.is_last_stage,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        pg_collection=parallel.pg_collection,
    )
    model.vocab_size_unpadded = hf.vocab_size
    model.tp_group = parallel.tp_group
    model = model.cuda()
    if options.gradient_accumulation_fusion:
        _fuse_gradient_accumulation(model)
    # Our frequencies replace Megatron's, whose scaling has three of Llama 3.1's four numbers fixed.
    model.inverse_frequency = inverse_frequencies(
        width=hf.kv_channels, theta=hf.rope_theta, scaling=hf.rope_scaling
    ).to(torch.cuda.current_device())
    return model
