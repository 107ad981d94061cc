"""Counts the parameters of a rank, from hyperparameters and parallel layout alone."""

from __future__ import annotations

import math

from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.gpt import padded_vocab_size
from megatron_opdlm.model.hf_config import HFConfig
from megatron_opdlm.model.tensors import Plain, VocabRows


def count_parameters(
    hf: HFConfig, *, divisor: int, tp_size: int, pp_size: int, pp_rank: int, with_head: bool = True
) -> int:
    """Returns the number of parameters of one rank.

    Every tensor-parallel rank holds the norms completely; everything else is sharded.

    Args:
        hf: hyperparameters of the model.
        divisor: make_vocab_size_divisible_by.
        tp_size: tensor-parallel size.
        pp_size: pipeline-parallel size.
        pp_rank: pipeline stage.
        with_head: whether the LM head counts; False if the head is applied elsewhere.
    """
    is_first, is_last = pp_rank == 0, pp_rank == pp_size - 1
    total = 0
    for entry in FAMILIES[hf.family].entries_for(hf):
        shape = entry.transform.megatron_shape(hf)
        is_vocab = isinstance(entry.transform, VocabRows)
        if is_vocab:
            rows = padded_vocab_size(hf.vocab_size, divisor=divisor, tp_size=tp_size)
            shape = (rows, *shape[1:])
        whole = isinstance(entry.transform, Plain) and len(shape) == 1
        share = math.prod(shape) // (1 if whole else tp_size)
        if entry.per_layer:
            total += share * (hf.num_layers // pp_size)
        elif entry.is_embedding:
            # With tied weights the last stage has a second copy of the embedding, as its head.
            total += share * (is_first or (is_last and with_head and hf.tie_word_embeddings))
        elif with_head or not is_vocab:
            total += share * is_last
    return total


def vocab_rows(
    hf: HFConfig, *, divisor: int, tp_size: int, pp_size: int, tp_rank: int, pp_rank: int
) -> range | None:
    """Returns the rows of the padded vocabulary on a rank; None on a stage without any."""
    if pp_rank not in (0, pp_size - 1):
        return None
    share = padded_vocab_size(hf.vocab_size, divisor=divisor, tp_size=tp_size) // tp_size
    return range(tp_rank * share, (tp_rank + 1) * share)
