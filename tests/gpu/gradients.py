"""Logits and gradients of one optimizer step at the tiny size, and what they should be.

The oracle is transformers' model in float64 on the CPU, under an explicit mask, with the weights
rounded as the model under test holds them. It shares no layer, no rotation, no activation and no
gradient buffer with it.

Shape letters: S stream tokens, T rows of all streams, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.checkpoint.weights import load_model
from megatron_opdlm.config.learning import OptimizerConfig
from megatron_opdlm.diffusion.stream import Document, PackedStream, pack
from megatron_opdlm.diffusion.tags import make_tags
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions
from megatron_opdlm.model.hf_config import HFConfig
from megatron_opdlm.train.optimizer import StudentOptimizer
from tests.oracle import hf_logits, load_hf
from tests.tiny import VOCAB_SIZE
from tests.training import assemble, parameter_pieces, to_hf

MULTIPLE = 128
"""Stream lengths that every layer takes: whole squares of FlexAttention, FP8's blocks."""
SWIGLU, ROPE = "bias_swiglu_fusion", "apply_rope_fusion"
ACCUMULATION = "gradient_accumulation_fusion"
FUSIONS = (SWIGLU, ROPE, ACCUMULATION)
"""Settings of a model that replace several kernels by one."""


@dataclass(frozen=True)
class Outcome:
    """What an optimizer step computes before it updates anything.

    Attributes:
        logits: [T, V] float64 on the CPU.
        gradients: float64 on the CPU, by Hugging Face name, summed over two microbatches.
    """

    logits: Tensor
    gradients: dict[str, Tensor]

    def logit_error(self, other: Outcome) -> float:
        """Norm of the difference, as a fraction of the other's norm."""
        return relative(self.logits, other.logits)

    def gradient_errors(self, other: Outcome) -> dict[str, float]:
        """The same for every gradient, by name."""
        assert self.gradients.keys() == other.gradients.keys()
        return {name: relative(self.gradients[name], g) for name, g in other.gradients.items()}

    def gradient_error(self, other: Outcome) -> float:
        """The same for the gradient as a whole."""
        mine, others = (
            torch.cat([of.gradients[name].flatten() for name in sorted(of.gradients)])
            for of in (self, other)
        )
        return relative(mine, others)

    def worst(self, other: Outcome) -> float:
        """The largest error of logits and single gradients; infinite where one is not finite."""
        errors = torch.tensor([self.logit_error(other), *self.gradient_errors(other).values()])
        return float(errors.nan_to_num(nan=torch.inf).max())


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


def make_streams(multiple: int = MULTIPLE) -> list[PackedStream]:
    """Two microbatches of doubled documents: no loss row comes twice, some clean tokens have none.

    Positions start anew in every document, so their order in the stream says nothing of them.
    """
    generator = torch.Generator().manual_seed(0)
    streams = []
    for sizes in (((60, 24), (100, 40)), ((150, 60),)):
        documents = []
        for clean, noisy in sizes:
            positions = torch.arange(clean)
            parts = [(positions, 0), (positions[clean - noisy :], 1)]
            tags = torch.cat([make_tags(0, p, noisy=state, block_size=4) for p, state in parts])
            ids = torch.randint(0, VOCAB_SIZE, (len(tags),), generator=generator)
            rows = torch.arange(clean, len(tags))
            documents.append(Document(token_ids=ids, tags=tags, loss_rows=rows))
        streams.append(pack(documents, multiple=multiple))
    return streams


def loss_of(logits: Tensor, stream: PackedStream) -> Tensor:
    """Cross-entropy [T, V] -> [] of tokens that are drawn anew for every stream length."""
    generator = torch.Generator().manual_seed(len(stream))
    targets = torch.randint(0, VOCAB_SIZE, (len(logits),), generator=generator)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), targets.to(logits.device), reduction="sum") / 100


def expected(hf: Path, dtype: torch.dtype) -> Outcome:
    """The oracle, for weights that are rounded to `dtype`."""
    model = load_hf(hf, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    logits = []
    for stream in make_streams():
        of_stream = hf_logits(model, stream.token_ids, stream.tags)[stream.loss_rows]
        loss_of(of_stream, stream).backward()
        logits.append(of_stream.detach())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Outcome(torch.cat(logits), gradients)


def load(
    imported: Path, options: BuildOptions, parallel: ParallelState
) -> tuple[BlockDiffusionModel, HFConfig]:
    """A model to learn on, with its hyperparameters."""
    model, description = load_model(imported, options, parallel)
    return model, description.config


def run(
    model: BlockDiffusionModel,
    config: HFConfig,
    *,
    steps: int = 1,
    streams: list[PackedStream] | None = None,
) -> Outcome:
    """Forward and backward of two microbatches into Megatron's gradient buffers; no update.

    Args:
        model: freshly loaded; it is wrapped here, once.
        config: its hyperparameters.
        steps: so often, from cleared gradients each time; the last one counts.
        streams: other microbatches than `make_streams` gives.
    """
    optimizer = StudentOptimizer(
        model, OptimizerConfig(lr_warmup_steps=1), use_distributed_optimizer=True,
        overlap_grad_reduce=False, decay_steps=1,
    )  # fmt: skip
    on_device = [s.to(torch.cuda.current_device()) for s in streams or make_streams()]
    for _ in range(steps):
        optimizer.zero_grad()
        model.set_is_first_microbatch()
        logits = [_forward_backward(optimizer.ddp, stream) for stream in on_device]
    grads = {name: p.main_grad for name, p in model.named_parameters()}
    pieces = {
        place: (shape, data.float().cpu())
        for place, (shape, data) in parameter_pieces(model, grads).items()
    }
    by_name = to_hf(assemble([pieces]), config)
    return Outcome(torch.cat(logits), {name: g.double() for name, g in by_name.items()})


def _forward_backward(ddp: Any, stream: PackedStream) -> Tensor:
    """[T, V] logits of one microbatch, whose gradients are added to what the buffers hold."""
    model = ddp.module
    hidden = ddp(stream.token_ids, stream.tags, AttentionPlan(tags=stream.tags))
    logits = model.logits(model.select_rows(hidden, stream.loss_rows))[:, :VOCAB_SIZE]
    loss_of(logits, stream).backward()
    return logits.detach().double().cpu()
