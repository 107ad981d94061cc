"""Block-diffusion decoding on the live training weights.

Sequences wait in a queue and occupy slots of the KV cache; a finished one is replaced at once.
Every pass runs one denoising step of every active sequence: the tokens of a sequence in a pass are
its clean tokens that the cache does not hold yet (the prompt at first, later the block just
finished) followed by its current block. So prefill, commit and denoising are the same pass, and a
block costs exactly its denoising steps.

All ranks of a model-parallel group run this file in step on the same requests and hold the same
host state; only logits are sharded.

Shape letters: n active rows, S stream tokens of a pass, T masked positions of a pass, K block size,
V vocab."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm.attention import AttentionPlan
from megatron_opdlm.blocks import block_start, num_decoded_tokens
from megatron_opdlm.denoise import choose_commits
from megatron_opdlm.model import BlockDiffusionModel
from megatron_opdlm.parallel import ParallelState
from megatron_opdlm.pipeline import forward_only
from megatron_opdlm.rollout.cache import DecodeView, KVCache
from megatron_opdlm.rollout.request import DecodingOptions, Request
from megatron_opdlm.rollout.sampler import sample_tokens
from megatron_opdlm.stream import BLOCK, DOCUMENT, NOISY, PADDING_DOCUMENT, POSITION
from megatron_opdlm.trajectory import Trajectory

PREFILL_TOKENS = 16384
"""Most prompt tokens that new sequences bring into one pass; bounds the memory of a pass."""


@dataclass
class Row:
    """A request that occupies a slot of the cache."""

    index: int
    slot: int
    token_ids: Tensor
    commit_step: Tensor
    masked: Tensor
    block: int
    cached: int = 0
    step: int = 0


@dataclass
class RolloutCounts:
    """Work of a rollout on this data-parallel rank.

    Passes of the model, stream tokens and LM head rows.
    """

    passes: int = 0
    tokens: int = 0
    head_rows: int = 0


Observer = Callable[[int, Tensor, Tensor], None]
"""Called after a step of a row: (index of the request, [L] ids so far, [L] bool still masked)."""


class RolloutEngine:
    """Decodes responses block by block on a model that may be in training."""

    def __init__(
        self,
        model: BlockDiffusionModel,
        parallel: ParallelState,
        options: DecodingOptions,
        *,
        mask_token_id: int,
        eos_token_ids: Sequence[int],
        max_rows: int = 128,
        stream_multiple: int = 1,
    ) -> None:
        """Binds the engine to a model; nothing is allocated before `generate`.

        Args:
            model: this rank's pipeline stage, not wrapped.
            parallel: process groups.
            options: how blocks are denoised.
            mask_token_id: id of masked positions; never sampled.
            eos_token_ids: ids that end a response.
            max_rows: sequences decoded at once on this data-parallel rank.
            stream_multiple: the length of a pass is padded to a multiple of this.
        """
        self.model = model
        self.parallel = parallel
        self.options = options
        self.mask_token_id = mask_token_id
        self.eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.int64)
        self.max_rows = max_rows
        self.stream_multiple = stream_multiple
        self.counts = RolloutCounts()

    def generate(
        self,
        requests: Sequence[Request],
        *,
        on_finish: Callable[[Trajectory], None] | None = None,
        observer: Observer | None = None,
    ) -> list[Trajectory]:
        """Decodes all requests.

        Args:
            requests: the same list on every rank of the model-parallel group.
            on_finish: called with every finished trajectory, in the order in which they finish.
            observer: called after every step of every row.

        Returns:
            Trajectories in the order of the requests.

        Raises:
            ValueError: a request that does not fit the model, before any work.
            FloatingPointError: NaN logits, on all ranks, naming the prompts.
        """
        capacity = max((self._check(request) for request in requests), default=0)
        num_slots = min(self.max_rows, len(requests))
        cache = KVCache(num_slots=num_slots, capacity=capacity)
        waiting, free_slots = deque(range(len(requests))), list(range(num_slots))
        rows: list[Row] = []
        finished: list[Trajectory | None] = [None] * len(requests)
        self.counts = RolloutCounts()
        while rows or waiting:
            rows = sorted(rows + self._admit(requests, waiting, free_slots), key=lambda r: r.slot)
            self._denoise(rows, requests, cache)
            still_active = []
            for row in rows:
                if observer is not None:
                    self._show(row, observer)
                trajectory = self._advance(row, requests[row.index])
                if trajectory is None:
                    still_active.append(row)
                    continue
                free_slots.append(row.slot)
                finished[row.index] = trajectory
                if on_finish is not None:
                    on_finish(trajectory)
            rows = still_active
        return [trajectory for trajectory in finished if trajectory is not None]

    def _check(self, request: Request) -> int:
        """Returns the tokens that a request may fill, or says why it cannot be decoded."""
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
        total = prompt_length + num_decoded_tokens(prompt_length, limit, self.options.block_size)
        if total > self.model.max_sequence_length:
            raise ValueError(
                f"prompt {request.prompt_id!r}: {prompt_length} prompt + {limit} response tokens "
                f"fill {total} positions, but the model has {self.model.max_sequence_length}; "
                "shorten the prompt or the response limit"
            )
        return total

    def _admit(
        self, requests: Sequence[Request], waiting: deque[int], free_slots: list[int]
    ) -> list[Row]:
        """Gives free slots to waiting requests, as many as their prompts fit into one pass."""
        admitted: list[Row] = []
        num_tokens = 0
        while waiting and free_slots:
            num_tokens += len(requests[waiting[0]].prompt_ids)
            if admitted and num_tokens > PREFILL_TOKENS:
                break
            admitted.append(self._start(requests, waiting.popleft(), free_slots.pop(0)))
        return admitted

    def _start(self, requests: Sequence[Request], index: int, slot: int) -> Row:
        request, block_size = requests[index], self.options.block_size
        prompt_length = len(request.prompt_ids)
        num_decoded = num_decoded_tokens(prompt_length, request.response_limit, block_size)
        token_ids = torch.full(
            (prompt_length + num_decoded,), self.mask_token_id, dtype=torch.int64
        )
        token_ids[:prompt_length] = request.prompt_ids
        block = block_start(prompt_length, block_size)
        return Row(
            index=index,
            slot=slot,
            token_ids=token_ids,
            commit_step=torch.full_like(token_ids, -1),
            masked=torch.arange(block, block + block_size) >= prompt_length,
            block=block,
        )

    def _denoise(self, rows: list[Row], requests: Sequence[Request], cache: KVCache) -> None:
        """Runs one denoising step of every row.

        Forward, sample, commit. Updates the rows in place.
        """
        block_size = self.options.block_size
        token_ids, tags, view = self._lay_out(rows, cache)
        masked = torch.stack([row.masked for row in rows])
        row_of, column_of = masked.nonzero(as_tuple=True)
        ends = torch.tensor([row.block + block_size - row.cached for row in rows]).cumsum(0)
        head_rows = ends[row_of] - block_size + column_of
        block_of_row = torch.tensor([row.block for row in rows])
        steps = torch.tensor([row.step for row in rows])
        keys = torch.tensor([requests[row.index].key for row in rows])[row_of]
        # A row's positions and steps differ in these low bits, so every draw has its own key.
        keys = keys ^ (((block_of_row[row_of] + column_of) << 8) | steps[row_of])
        tokens, confidence = self._forward_and_sample(
            token_ids, tags, view, head_rows, keys, rows, requests
        )

        confidence_nK = torch.zeros(masked.shape).masked_scatter_(masked, confidence)
        tokens_nK = torch.zeros(masked.shape, dtype=torch.int64).masked_scatter_(masked, tokens)
        commit = choose_commits(
            confidence_nK,
            masked,
            steps,
            remasking=self.options.remasking,
            denoising_steps=self.options.denoising_steps,
            confidence_threshold=self.options.confidence_threshold,
        )
        for row, row_commit, row_tokens in zip(rows, commit, tokens_nK, strict=True):
            place = slice(row.block, row.block + block_size)
            row.token_ids[place][row_commit] = row_tokens[row_commit]
            row.commit_step[place][row_commit] = row.step
            row.masked = row.masked & ~row_commit
            row.cached, row.step = row.block, row.step + 1

    def _lay_out(self, rows: list[Row], cache: KVCache) -> tuple[Tensor, Tensor, DecodeView]:
        """Packs the new tokens of all rows.

        [S] ids, [S, 4] tags, and the pass as the cache sees it.
        """
        block_size = self.options.block_size
        parts = [row.token_ids[row.cached : row.block + block_size] for row in rows]
        lengths = torch.tensor([len(part) for part in parts])
        num_tokens = int(lengths.sum())
        row_of = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        starts = torch.tensor([row.cached for row in rows]) - (lengths.cumsum(0) - lengths)
        positions = torch.arange(num_tokens) + starts[row_of]
        first_noisy = torch.tensor([row.block for row in rows])
        num_padding = -num_tokens % self.stream_multiple
        tags = torch.zeros(num_tokens + num_padding, 4, dtype=torch.int64)
        tags[num_tokens:, DOCUMENT] = PADDING_DOCUMENT
        tags[:num_tokens, DOCUMENT] = row_of
        tags[:num_tokens, NOISY] = positions >= first_noisy[row_of]
        tags[:num_tokens, BLOCK] = positions // block_size
        tags[:num_tokens, POSITION] = positions
        slots = torch.tensor([row.slot for row in rows])
        view = DecodeView(cache, tags, slots, first_noisy, block_size=block_size)
        return torch.cat([*parts, parts[0].new_zeros(num_padding)]), tags, view

    def _forward_and_sample(
        self,
        token_ids: Tensor,
        tags: Tensor,
        view: DecodeView,
        head_rows: Tensor,
        keys: Tensor,
        rows: list[Row],
        requests: Sequence[Request],
    ) -> tuple[Tensor, Tensor]:
        """Returns sampled token [T] int64 and confidence [T] float32 of the masked positions, on
        the host of every rank.
        """
        device = torch.cuda.current_device()
        self.counts.passes += 1
        self.counts.tokens += len(token_ids)
        self.counts.head_rows += len(head_rows)
        tags = tags.to(device)
        plan = AttentionPlan(tags=tags, cache=view)
        hidden = forward_only(self.model, [(token_ids.to(device), tags, plan)], self.parallel)
        result = torch.full((2, len(head_rows)), torch.nan, dtype=torch.float64, device=device)
        if self.parallel.is_last_stage:
            with torch.no_grad():
                logits = self.model.logits(self.model.select_rows(hidden[0], head_rows.to(device)))
                try:
                    tokens, confidence = self._sample(logits, keys.to(device))
                    result[0], result[1] = tokens.double(), confidence.double()
                except FloatingPointError:
                    pass  # NaN travels to the other stages, and all raise below.
        if self.parallel.pp_size > 1:
            last = dist.get_global_rank(self.parallel.pp_group, self.parallel.pp_size - 1)
            dist.broadcast(result, last, group=self.parallel.pp_group)
        result = result.cpu()
        if bool(result.isnan().any()):
            prompts = sorted({requests[row.index].prompt_id for row in rows})
            raise FloatingPointError(
                f"NaN logits in a rollout pass over prompts {', '.join(prompts[:8])}"
                f"{' ...' if len(prompts) > 8 else ''}: the student's weights are not finite"
            )
        return result[0].long(), result[1].float()

    def _sample(self, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Samples from this rank's shard of the logits [T, V_local]; last stage only."""
        return sample_tokens(
            logits,
            keys=keys,
            temperature=self.options.temperature,
            top_k=self.options.top_k,
            top_p=self.options.top_p,
            mask_token_id=self.mask_token_id,
            vocab_size=self.model.vocab_size_unpadded,
            tp_group=self.parallel.tp_group,
        )

    def _advance(self, row: Row, request: Request) -> Trajectory | None:
        """Moves a row on when its block is finished.

        Returns its trajectory when its response is.
        """
        if bool(row.masked.any()):
            return None
        prompt_length, end = len(request.prompt_ids), row.block + self.options.block_size
        first = max(row.block, prompt_length)
        limit = prompt_length + request.response_limit
        is_eos = torch.isin(row.token_ids[first : min(end, limit)], self.eos_token_ids)
        if bool(is_eos.any()):
            num_response_tokens, ended = first + int(is_eos.nonzero()[0]) + 1 - prompt_length, True
        elif end >= limit:
            num_response_tokens, ended = request.response_limit, False
        else:
            row.block, row.step = end, 0
            row.masked = torch.ones_like(row.masked)
            return None
        return Trajectory(
            prompt_id=request.prompt_id,
            sample=request.sample,
            prompt_ids=request.prompt_ids,
            response_ids=row.token_ids[prompt_length:end].clone(),
            commit_step=row.commit_step[prompt_length:end].clone(),
            num_response_tokens=num_response_tokens,
            ended=ended,
            block_size=self.options.block_size,
        )

    def _show(self, row: Row, observer: Observer) -> None:
        end = row.block + self.options.block_size
        still_masked = torch.zeros(end, dtype=torch.bool)
        still_masked[row.block :] = row.masked
        observer(row.index, row.token_ids[:end].clone(), still_masked)


def tokens_per_forward(trajectories: Iterable[Trajectory]) -> float:
    """Returns response tokens per denoising pass over all trajectories.

    Commits cost no pass of their own.
    """
    tokens = passes = 0
    for trajectory in trajectories:
        tokens += trajectory.num_response_tokens
        passes += trajectory.num_passes
    return tokens / max(passes, 1)
