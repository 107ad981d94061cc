"""Block-diffusion decoding on the live training weights, and autoregressive decoding.

Requests wait in a queue. A decoded sequence has a slot of the KV cache; when it is finished, the
next request gets the slot at once. Every pass runs one denoising step of its rows (its sequences).
With pipeline parallelism the active rows are spread over as many passes as there are stages, and
all these passes are in the pipeline at the same time.

All ranks of a data-parallel replica run this file in step, on the same requests and with the same
host state. Only hidden states, logits and the cache are sharded.

Shape letters: n rows of a pass, T masked positions of a pass, K block size, V vocab."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm.diffusion.blocks import num_decoded_tokens
from megatron_opdlm.diffusion.prediction import PREDICTIONS
from megatron_opdlm.diffusion.remasking import choose_commits
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.model.pipeline import DecodePipeline
from megatron_opdlm.rollout.decodable import Decodable
from megatron_opdlm.rollout.decode_pass import DecodePass, lay_out
from megatron_opdlm.rollout.decoding_memory import Lent, Need
from megatron_opdlm.rollout.graph_support import choose_graphs
from megatron_opdlm.rollout.kernel_choice import decoding_kernel, log_choice
from megatron_opdlm.rollout.request import DecodingOptions, Request
from megatron_opdlm.rollout.request_queue import LocalQueue, RequestQueue
from megatron_opdlm.rollout.sampler import Draws, most_logits, sample_tokens
from megatron_opdlm.rollout.scheduler import Scheduler
from megatron_opdlm.rollout.sequences import Sequences


@dataclass
class RolloutCounts:
    """Work of a rollout on this data-parallel replica."""

    passes: int = 0
    """Forward passes of the model."""
    ticks: int = 0
    """Ticks of the pipeline: the passes, and the ticks at which no pass entered the pipeline."""
    tokens: int = 0
    """Tokens in the streams of all passes."""
    head_rows: int = 0
    """Rows that the LM head was applied to."""
    attention_pairs: int = 0
    """(query, key) pairs of all passes that the predicate allows, per layer."""


Observer = Callable[[int, Tensor, Tensor], None]
"""A function called after each denoising step of a sequence, with three arguments: index of the
request, [L] int64 token ids so far, [L] bool positions that are still masked."""


class RolloutEngine:
    """Decodes responses block by block on a model that may be in training."""

    def __init__(
        self,
        decodable: Decodable,
        options: DecodingOptions,
        *,
        max_rows: int = 128,
        kv_cache_gb: float | None = None,
        cuda_graphs: bool | None = None,
        policy: type[Scheduler] = Scheduler,
    ) -> None:
        """Binds the engine to a model. Allocates nothing before decoding.

        Args:
            decodable: the model, and what an engine must know of it.
            options: decoding options.
            max_rows: most sequences that this replica decodes at once.
            kv_cache_gb: most memory for keys and values on this rank, see `KVCache.for_model`.
            cuda_graphs: whether to capture passes; None captures them if possible.
            policy: scheduler, which chooses the sequences of each tick. No policy changes a
                response.

        Raises:
            ValueError: a causal model has blocks of several tokens, or CUDA graphs are impossible
                here.
        """
        if decodable.is_causal and options.block_size != 1:
            raise ValueError(
                f"block_size={options.block_size} must be 1 where the model is causal: it predicts "
                "one token after the other"
            )
        self.causal = decodable.is_causal
        self.shift = 0 if self.causal else PREDICTIONS[options.prediction].shift
        self.model = decodable.model
        self.parallel = decodable.parallel
        self.options = options
        self.mask_token_id = decodable.mask_token_id
        self.eos_token_ids = torch.tensor(list(decodable.eos_token_ids), dtype=torch.int64)
        self.max_rows = max_rows
        self.kv_cache_gb = kv_cache_gb
        self.stream_multiple = decodable.stream_multiple
        config, device = self.model.config, torch.cuda.current_device()
        dtype, head_size = config.params_dtype, config.kv_channels
        self._has_kernel = decoding_kernel(device, dtype, head_size) is not None
        log_choice(device, dtype, head_size)
        rules = {"sequence_parallel": config.sequence_parallel, "fp8": config.fp8}
        self.cuda_graphs = choose_graphs(cuda_graphs, dtype, head_size, **rules)
        self.memory = decodable.memory
        self.policy = policy
        self.counts = RolloutCounts()

    def generate(
        self, requests: Sequence[Request], *, observer: Observer | None = None
    ) -> list[Trajectory]:
        """Decodes all requests on this replica.

        Args:
            requests: the same list on every rank of the replica.
            observer: called after every denoising step of every sequence.

        Returns:
            Trajectories in the order of the requests. It raises the errors of `stream`.
        """
        finished = dict(self.stream(LocalQueue(requests), observer=observer))
        return [finished[index] for index in range(len(requests))]

    def stream(
        self, queue: RequestQueue, *, observer: Observer | None = None
    ) -> Iterator[tuple[int, Trajectory]]:
        """Decodes the requests of a queue, and yields each response when it is finished.

        Args:
            queue: requests; the list is the same on every rank of the replica.
            observer: called after every denoising step of every sequence.

        Yields:
            Index of the request and its trajectory.

        Raises:
            ValueError: a request fits neither the model nor the cache. This is raised when the
                first response is asked for, before any work.
            RuntimeError: another rollout of this model is not finished.
            FloatingPointError: NaN logits. All ranks of the replica raise it; the message names
                prompts and steps.
        """
        self.memory.require_free()
        self.counts = RolloutCounts()
        capacity = max((self.required_tokens(request) for request in queue.requests), default=0)
        if not queue.requests:
            return
        need = Need(
            capacity=capacity,
            most_slots=min(self.max_rows, queue.fair_share),
            limit_gb=self.kv_cache_gb,
            block_size=self.options.block_size,
            with_graphs=self.cuda_graphs,
        )
        was_training, is_usable = self.model.training, False
        lent = self.memory.take(self.model, self.parallel, need)
        try:
            sequences = Sequences(
                num_slots=lent.cache.num_slots,
                capacity=capacity,
                block_size=self.options.block_size,
                mask_token_id=self.mask_token_id,
                causal=self.causal,
            )
            self.model.eval()
            num_slots = min(lent.cache.num_slots, need.most_slots)
            yield from self._decode(queue, sequences, lent, num_slots, observer)
            is_usable = True
        finally:
            self.memory.give_back(is_usable=is_usable)
            self.model.train(was_training)

    def required_tokens(self, request: Request) -> int:
        """Returns the number of tokens that a request may fill.

        Raises:
            ValueError: the request cannot be decoded; the message says why.
        """
        prompt_length, limit = len(request.prompt_ids), request.response_limit
        if prompt_length == 0:
            raise ValueError(
                f"prompt {request.prompt_id!r} is empty; a prompt needs at least one token"
            )
        if limit < 1:
            raise ValueError(
                f"prompt {request.prompt_id!r}: response_limit={limit} must be at least 1"
            )
        if bool((request.prompt_ids == self.mask_token_id).any()):
            raise ValueError(
                f"prompt {request.prompt_id!r} holds the mask token (id {self.mask_token_id}); "
                "remove it from the data"
            )
        vocab_size = self.model.vocab_size_unpadded
        if not 0 <= int(request.prompt_ids.min()) <= int(request.prompt_ids.max()) < vocab_size:
            raise ValueError(
                f"prompt {request.prompt_id!r} holds ids from {int(request.prompt_ids.min())} to "
                f"{int(request.prompt_ids.max())}, which must lie in [0, {vocab_size}); tokenise "
                "it with the student's tokenizer"
            )
        total = prompt_length + num_decoded_tokens(prompt_length, limit, self.options.block_size)
        if total > self.model.max_sequence_length:
            raise ValueError(
                f"prompt {request.prompt_id!r}: {prompt_length} prompt + {limit} response tokens "
                f"fill {total} positions, but the model has {self.model.max_sequence_length}; "
                "shorten the prompt or the response limit"
            )
        return total

    def _decode(
        self,
        queue: RequestQueue,
        sequences: Sequences,
        lent: Lent,
        num_slots: int,
        observer: Observer | None,
    ) -> Iterator[tuple[int, Trajectory]]:
        """Runs the loop: schedule, push, commit, retire. One turn is one tick of the pipeline."""
        graphs = lent.graphs
        pipeline: DecodePipeline[DecodePass] = DecodePipeline(
            self.model, self.parallel, None if graphs is None else graphs.run
        )
        scheduler = self.policy(
            queue,
            sequences,
            num_slots=num_slots,
            num_stages=self.parallel.pp_size,
            prompts_apart=graphs is not None,
        )
        while (entering := scheduler.schedule()) is not None:
            leaving = self._push(pipeline, sequences, entering, lent)
            if leaving is None:
                continue
            decoded, hidden = leaving
            self.commit(sequences, decoded, hidden)
            if observer is not None:
                _show(sequences, decoded.slots, observer)
            yield from self._retire(scheduler, sequences, decoded.slots, lent)

    def _push(
        self,
        pipeline: DecodePipeline[DecodePass],
        sequences: Sequences,
        slots: list[int],
        lent: Lent,
    ) -> tuple[DecodePass, Tensor | None] | None:
        """Starts a pass of some slots, if there are any.

        Returns:
            The pass that has now left the last stage, and there also the model's output for it;
            None if no pass has.
        """
        self.counts.ticks += 1
        if not slots:
            return pipeline.push(None)
        entering = lay_out(
            sequences,
            torch.tensor(slots),
            lent.cache,
            multiple=self.stream_multiple,
            shift=self.shift,
            for_graph=lent.graphs is not None,
        )
        self.counts.passes += 1
        self.counts.tokens += len(entering.token_ids)
        self.counts.head_rows += len(entering.head_rows)
        self.counts.attention_pairs += entering.attention_pairs
        return pipeline.push(entering)

    def _retire(
        self, scheduler: Scheduler, sequences: Sequences, slots: Tensor, lent: Lent
    ) -> Iterator[tuple[int, Trajectory]]:
        """Moves the sequences of a pass to their next block, and yields the finished ones."""
        finished = sequences.advance(slots, self.eos_token_ids)
        scheduler.retire(slots.tolist(), [slot for slot, _ in finished])
        for slot, trajectory in finished:
            yield sequences.index[slot], trajectory
        if not self._has_kernel:
            scheduler.close_gaps(lent.cache)

    def commit(self, sequences: Sequences, decoded: DecodePass, hidden: Tensor | None) -> None:
        """Samples the masked positions of a pass and commits some of them.

        Args:
            sequences: state of all slots; changed in place.
            decoded: the pass.
            hidden: output of the model on the last pipeline stage; None on other stages.

        Raises:
            FloatingPointError: NaN logits. All ranks of the replica raise it.
        """
        masked = decoded.masked
        drawn = self._draw_everywhere(sequences, decoded, hidden)
        bad = masked.nonzero()[drawn[1].isnan(), 0].unique()
        if len(bad):
            raise FloatingPointError(
                "NaN logits in a rollout pass, prompts "
                f"{sequences.describe(decoded.slots[bad].tolist())}: the model's weights are "
                "not finite"
            )
        tokens, confidence, entropy = (
            torch.zeros(masked.shape, dtype=torch.float64).masked_scatter_(masked, values)
            for values in drawn
        )
        options = self.options
        chosen = choose_commits(
            confidence.float(),
            masked,
            decoded.steps,
            rule=options.rule,
            denoising_steps=options.denoising_steps,
            entropy_BK=entropy,
        )
        sequences.commit(decoded.slots, chosen, tokens.long())

    @torch.no_grad()
    def _draw_everywhere(
        self, sequences: Sequences, decoded: DecodePass, hidden: Tensor | None
    ) -> Tensor:
        """Returns [3, T] float64 tokens, confidence and entropy, on the host of every rank.

        Only here does the host wait for the device.
        """
        shape, device = (3, len(decoded.head_rows)), torch.cuda.current_device()
        drawn = torch.zeros(shape, dtype=torch.float64, device=device)
        if self.parallel.is_last_stage:
            assert hidden is not None
            self._draw(self._head_inputs(sequences, decoded, hidden), decoded.noise_keys, drawn)
        if self.parallel.pp_size > 1:
            last = dist.get_global_rank(self.parallel.pp_group, self.parallel.pp_size - 1)
            dist.broadcast(drawn, last, group=self.parallel.pp_group)
        return drawn.cpu()

    def _head_inputs(self, sequences: Sequences, decoded: DecodePass, hidden: Tensor) -> Tensor:
        """Returns the outputs [T, D] that predict the masked positions. Last stage only."""
        if (rows := decoded.boundary) is None:
            return self.model.select_rows(hidden, decoded.head_rows)
        selected = self.model.select_rows(hidden, torch.cat([rows.kept_rows, decoded.head_rows]))
        kept, outputs = selected.split([len(rows.kept_rows), len(decoded.head_rows)])
        return sequences.boundary.apply(rows, kept, outputs)

    def _draw(self, hidden: Tensor, keys: Tensor, drawn: Tensor) -> None:
        """Samples from hidden states [T, D] into `drawn` [3, T], in parts. Last stage only."""
        num_columns = self.model.vocab_size // self.parallel.tp_size
        size = max(1, most_logits(self.options.sampling, hidden.device.type) // num_columns)
        for start in range(0, len(keys), size):
            part = slice(start, start + size)
            draws = self._sample(self.model.logits(hidden[part]), keys[part])
            drawn[0, part], drawn[1, part] = draws.tokens, draws.confidence
            if draws.entropy is not None:
                drawn[2, part] = draws.entropy

    def _sample(self, logits: Tensor, keys: Tensor) -> Draws:
        """Samples from this rank's shard of logits [T, V_local]. Last stage only."""
        return sample_tokens(
            logits,
            self.options.sampling,
            keys=keys,
            mask_token_id=self.mask_token_id,
            vocab_size=self.model.vocab_size_unpadded,
            tp_group=self.parallel.tp_group,
            with_entropy=self.options.rule.needs_entropy,
        )


def _show(sequences: Sequences, slots: Tensor, observer: Observer) -> None:
    """Calls an observer with the state of each sequence after a pass."""
    for slot in slots.tolist():
        observer(sequences.index[slot], *sequences.still_masked(slot))


def tokens_per_forward(trajectories: Sequence[Trajectory]) -> float:
    """Returns response tokens per denoising pass over all trajectories.

    Commits need no extra pass.
    """
    tokens = sum(trajectory.num_response_tokens for trajectory in trajectories)
    return tokens / max(sum(trajectory.num_passes for trajectory in trajectories), 1)
