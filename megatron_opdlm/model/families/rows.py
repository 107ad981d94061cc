"""The rows that make up the name tables of the families."""

from megatron_opdlm.model.tensors import Entry, GatedConcat, InterleavedQKV, Plain, VocabRows

_ATTENTION, _MLP = "decoder.layers.{layer}.self_attention.", "decoder.layers.{layer}.mlp."
_HF_LAYER = "model.layers.{layer}."
_HF_ATTENTION, _HF_MLP = _HF_LAYER + "self_attn.", _HF_LAYER + "mlp."

EMBEDDING = Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VocabRows())
INPUT_NORM = Entry(
    _ATTENTION + "linear_qkv.layer_norm_weight",
    (_HF_LAYER + "input_layernorm.weight",),
    Plain("H"),
)
QKV = Entry(
    _ATTENTION + "linear_qkv.weight",
    tuple(_HF_ATTENTION + f"{part}_proj.weight" for part in "qkv"),
    InterleavedQKV(),
)
QKV_BIAS = Entry(
    _ATTENTION + "linear_qkv.bias",
    tuple(_HF_ATTENTION + f"{part}_proj.bias" for part in "qkv"),
    InterleavedQKV(trailing=""),
)
QUERY_NORM = Entry(
    _ATTENTION + "q_layernorm.weight", (_HF_ATTENTION + "q_norm.weight",), Plain("D")
)
KEY_NORM = Entry(_ATTENTION + "k_layernorm.weight", (_HF_ATTENTION + "k_norm.weight",), Plain("D"))
ATTENTION_OUTPUT = Entry(
    _ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), Plain("HQ")
)
MLP_NORM = Entry(
    _MLP + "linear_fc1.layer_norm_weight",
    (_HF_LAYER + "post_attention_layernorm.weight",),
    Plain("H"),
)
GATE_AND_UP = Entry(
    _MLP + "linear_fc1.weight",
    (_HF_MLP + "gate_proj.weight", _HF_MLP + "up_proj.weight"),
    GatedConcat(),
)
DOWN = Entry(_MLP + "linear_fc2.weight", (_HF_MLP + "down_proj.weight",), Plain("HF"))
FINAL_NORM = Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Plain("H"))
HEAD = Entry("output_layer.weight", ("lm_head.weight",), VocabRows(), untied_only=True)
