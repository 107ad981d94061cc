"""The items of the survey, in their order: what matters most and takes least comes first.

Each names the function to call and its limits in seconds; modules are imported where they run. On
an H100 half of the items took 100 s, and the rest is an estimate: about eight minutes in all.
"""

from __future__ import annotations

from tools.gpu.child import Item

_PLACE = "tools.gpu.items."


def _item(
    name: str, function: str, what: str, *, limit: float, needs: float, asked: bool = False
) -> Item:
    return Item(name=name, run=_PLACE + function, what=what, limit=limit, needs=needs, asked=asked)


QUICKSTART = "quickstart"
ITEMS = (
    _item("machine", "machine:run", "copies, a bf16 product, host copies, kernel starts",
          limit=40, needs=5),
    _item("decoding-attention", "decoding_attention:run",
          "attention against the cache: every kernel, packed and not", limit=60, needs=5),
    _item("sampler", "sampler:run", "a draw from 512 x 151,936 logits", limit=40, needs=8),
    _item("loss", "loss:run", "both heads and the divergence, with gradients", limit=60, needs=8),
    _item("stream-attention", "stream_attention:run",
          "FlexAttention of a doubled stream against a dense mask", limit=90, needs=25),
    _item("profile", "profile:run", "the 30 costliest kernels of a pass and of a step",
          limit=60, needs=20),
    _item("decoding-0.6B", "decoding:small", "passes of 128 rows, graphs on and off, with fusions",
          limit=120, needs=45),
    _item("training-te", "training:transformer_engine",
          "a step of 16,384 tokens, Transformer Engine, bf16", limit=60, needs=20),
    _item("training-fused", "training:fused", "the same, with fused RoPE, SwiGLU and gradients",
          limit=60, needs=15),
    _item("training-tensorwise", "training:tensorwise", "the same, FP8 tensorwise",
          limit=60, needs=18),
    _item("training-blockwise", "training:blockwise", "the same, FP8 blockwise",
          limit=60, needs=15),
    _item("training-delayed", "training:delayed", "the same, FP8 delayed", limit=60, needs=18),
    _item("decoding-8B", "decoding:large", "passes of 32, 64 and 128 rows", limit=60, needs=25),
    _item("training-8B", "training:large", "a step of 8,192 tokens through 8 of 36 layers",
          limit=60, needs=20),
    _item("training-8B-tensorwise", "training:large_fp8", "the same, FP8 tensorwise",
          limit=60, needs=20),
    _item("offload", "offload:run", "a teacher's weights to host memory and back",
          limit=60, needs=25),
    _item("training-local", "training:local", "a step of 16,384 tokens, local layers, bf16",
          limit=60, needs=18),
    _item("tests", "tests:run", "pytest tests/gpu", limit=240, needs=60),
    _item("te-smoke", "te_smoke:run", "the given smoke test of Transformer Engine",
          limit=100, needs=35),
    _item(QUICKSTART, "quickstart:run", "the quickstart's training, on the GPU",
          limit=300, needs=60, asked=True),
)  # fmt: skip
