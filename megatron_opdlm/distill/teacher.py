"""The frozen teacher: it may have any size, and a parallel layout of its own.

The teacher's layers run in the teacher's layout. The hidden states of the loss rows then go to the
student's last stage. There each rank holds the columns of the teacher's LM head for the same ids as
its columns of the student's head. So teacher and student may have different layouts, and no logits
are sent.

Shape letters: T loss rows, D the teacher's hidden size, V_local ids (head columns) of a student's
rank.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm.checkpoint.layout import ModelDescription
from megatron_opdlm.diffusion.example import teacher_row
from megatron_opdlm.diffusion.stream import Document, pack
from megatron_opdlm.diffusion.tags import make_tags
from megatron_opdlm.distill.batching import Packing, plan_packing
from megatron_opdlm.distill.host_weights import HostWeights
from megatron_opdlm.distill.row_exchange import RowExchange
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.loss.fused import Target, TeacherTarget, TokenTarget, fused_divergence
from megatron_opdlm.model.fingerprint import Fingerprint
from megatron_opdlm.model.gpt import BlockDiffusionModel
from megatron_opdlm.model.pipeline import forward_only

logger = logging.getLogger(__name__)

PROBE_PROMPTS = 16


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A loaded, frozen teacher."""

    path: str
    """Path that the teacher was loaded from, for messages."""
    model: BlockDiffusionModel
    """This rank's pipeline stage in the teacher's layout."""
    vocab_size: int
    """Number of ids that teacher and student both have; other ids are in no softmax."""
    description: ModelDescription
    """Description of the model, from its checkpoint."""
    fingerprint: Fingerprint
    """Fingerprint of the teacher's weights."""
    parallel: ParallelState
    """Process groups of the teacher's layout; the student's object if the layouts are equal."""
    student_parallel: ParallelState
    """Process groups of the student's layout."""
    head: Tensor | None
    """[V_local, D], the teacher's LM head for the ids whose student head this rank holds; None on
    ranks without the student's head."""
    stream_multiple: int
    """Training streams are padded to a multiple of this number of tokens."""
    pass_multiple: int
    """Decoding passes are padded to a multiple of this number of tokens."""
    token_budget: int
    """Most tokens of one training pass."""
    host: HostWeights | None = None
    """Host memory that holds the weights while the teacher does not run; None keeps them on the
    device."""

    @property
    def is_second_layout(self) -> bool:
        """Whether the teacher's parallel layout differs from the student's."""
        return self.parallel is not self.student_parallel

    def head_weight(self) -> Tensor:
        """Returns this rank's LM head [V_local, D]. Only the student's last stage has one."""
        assert self.head is not None, "only the student's last stage has a head"
        return self.head

    def shares(self, documents: Sequence[Document], packing: Packing) -> Packing:
        """Returns the documents that every replica of the teacher reads, by pass.

        Args:
            documents: all documents of an optimizer step.
            packing: from `plan_packing`: indices of the documents that every replica of the student
                trains on.
        """
        if not self.is_second_layout:
            return packing
        lengths = [len(document) for document in documents]
        return plan_packing(lengths, dp_size=self.parallel.dp_size, token_budget=self.token_budget)

    @torch.no_grad()
    def hidden_rows(self, documents: Sequence[Document], packing: Packing) -> list[Tensor]:
        """Runs the teacher with causal attention over the documents of an optimizer step.

        Call on all ranks. Collectives: those of the layers, and one all-to-all if the teacher has a
        second layout.

        Args:
            documents: all documents of the step, the same on every rank.
            packing: from `plan_packing`: indices of the documents that every replica of the student
                trains on, in order.

        Returns:
            On the student's last stage, the hidden states [T, D] of every microbatch of this rank;
            their logits are the targets. On other stages an empty list. Hidden states are V / D
            times smaller than logits.
        """
        shares = self.shares(documents, packing)
        rows = self._forward(documents, shares[self.parallel.dp_rank])
        if not self.is_second_layout:
            return rows
        exchange = RowExchange(
            teacher=self.parallel.grid,
            student=self.student_parallel.grid,
            shares=shares,
            packing=packing,
            num_rows=[len(document.loss_rows) for document in documents],
        )
        config = self.model.config
        empty = torch.empty(
            0, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        return exchange.run(rows, empty)

    def targets(self, hidden: Sequence[Tensor]) -> list[Target]:
        """Makes the target of every microbatch from its hidden states [T, D] (`hidden_rows`)."""
        return [TeacherTarget(rows, self.head_weight()) for rows in hidden]

    def on_device(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which the weights are on the device."""
        return contextlib.nullcontext() if self.host is None else self.host.on_device()

    def _forward(
        self, documents: Sequence[Document], packing: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        device = torch.cuda.current_device()
        multiple = self.stream_multiple
        streams = [
            pack([documents[i] for i in places], multiple=multiple).to(device) for places in packing
        ]
        with self.on_device():
            return forward_only(self.model, streams, self.parallel)

    @torch.no_grad()
    def token_losses(
        self, texts: Sequence[Tensor], num_given: Sequence[int], mask_token_id: int | None
    ) -> list[Tensor]:
        """Computes the teacher's cross-entropy of tokens, with the code that makes its targets.

        Call on all ranks.

        Args:
            texts: token ids [S] int64 of each text, the same on every rank.
            num_given: for each text, how many of its first tokens are given, at least 1. These have
                no loss, such as a prompt.
            mask_token_id: id of the mask token, which is in no softmax, as in training.

        Returns:
            [S - num_given] float64 of each text on the host, in nats; the same on every rank.
            Collectives: those of `hidden_rows` and the LM head, and one all-reduce.
        """
        assert all(given > 0 for given in num_given), "the first token of a text has no loss"
        student, device = self.student_parallel, torch.cuda.current_device()
        scored = [text[given:] for text, given in zip(texts, num_given, strict=True)]
        documents = [
            Document(
                token_ids=text,
                tags=make_tags(0, torch.arange(len(text)), noisy=0, block_size=1),
                loss_rows=teacher_row(torch.arange(given, len(text))),
            )
            for text, given in zip(texts, num_given, strict=True)
        ]
        packing = plan_packing(
            [len(text) for text in texts], dp_size=student.dp_size, token_budget=self.token_budget
        )
        counts = [len(ids) for ids in scored]
        places_of = torch.arange(sum(counts)).split(counts)
        total = torch.zeros(sum(counts), dtype=torch.float64, device=device)
        none = torch.empty(0, dtype=torch.int64)
        hidden = self.hidden_rows(documents, packing)
        for rows, indices in zip(hidden, packing[student.dp_rank], strict=False):
            _, losses = fused_divergence(
                rows,
                self.head_weight(),
                TokenTarget(torch.cat([none, *(scored[i] for i in indices)]).to(device)),
                torch.ones(len(rows), device=device),
                Divergence(),
                vocab_size=self.vocab_size,
                mask_token_id=mask_token_id,
                tp_group=student.tp_group,
            )
            if student.tp_rank == 0:
                places = torch.cat([none, *(places_of[i] for i in indices)])
                total[places.to(device)] = losses.double()
        dist.all_reduce(total)
        return list(total.cpu().split(counts))

    def mean_loss(self, texts: Sequence[Tensor], mask_token_id: int | None) -> float:
        """Computes the teacher's mean cross-entropy of texts; see `token_losses`.

        Call on all ranks.

        Args:
            texts: token ids [S] int64 of each text, the same on every rank. The mean is over all
                tokens but the first of each text.
            mask_token_id: id of the mask token, which is in no softmax, as in training.

        Returns:
            Nats per token, the same on every rank.
        """
        texts = [text for text in texts if len(text) > 1]
        assert texts, "a text has two tokens at least"
        losses = self.token_losses(texts, [1] * len(texts), mask_token_id)
        return float(torch.cat(losses).mean())

    def self_check(
        self,
        student: Fingerprint,
        prompts: Sequence[Tensor],
        *,
        mask_token_id: int,
        max_nll: float | None,
    ) -> dict[str, float]:
        """Logs both fingerprints, and how well the teacher predicts the first prompts.

        Call on all ranks; rank 0 logs.

        Args:
            student: fingerprint of the student's weights.
            prompts: token ids [S] int64 of each prompt with its template; the first few are read.
            mask_token_id: id of the mask token, which is in no softmax.
            max_nll: highest loss that is accepted, in nats per token; None only warns of a teacher
                that is no better than a uniform guess.

        Returns:
            The figures, as metrics.

        Raises:
            ValueError: the loss is not finite, or above `max_nll`.
        """
        probe = prompts[:PROBE_PROMPTS]
        loss = self.mean_loss(probe, mask_token_id)
        uniform = math.log(self.vocab_size)
        on_them = f"nats per token on the first {len(probe)} prompts"
        of_them = f"teacher={self.path} has a loss of {loss:.4g} {on_them}"
        if not math.isfinite(loss):
            raise ValueError(f"{of_them}; its weights or their number format are broken")
        if max_nll is not None and loss > max_nll:
            raise ValueError(
                f"{of_them}, above max_teacher_nll={max_nll}; check that it is the right model, "
                "or raise max_teacher_nll"
            )
        if self.student_parallel.is_main:
            self._log_check(student, loss, uniform, of_them)
            if max_nll is None and loss >= uniform:
                logger.warning(
                    "THE TEACHER IS WORSE THAN A UNIFORM GUESS: %s, log V = %.4g; check that it is "
                    "the right model and that its tokenizer and chat template are its own; if so, "
                    "say with max_teacher_nll what is to be expected",
                    of_them, uniform,
                )  # fmt: skip
        return {
            "train/teacher_nll": loss,
            "train/teacher_uniform_nll": uniform,
            "train/teacher_parameters": self.fingerprint.num_parameters,
            "train/teacher_fingerprint": self.fingerprint.digest,
            "train/student_parameters": student.num_parameters,
            "train/student_fingerprint": student.digest,
        }

    def _log_check(self, student: Fingerprint, loss: float, uniform: float, of_them: str) -> None:
        is_same = student.digest == self.fingerprint.digest
        logger.info(
            "student: %s parameters, fingerprint %s; teacher %s: %s parameters, fingerprint %s, "
            "%s weights",
            f"{student.num_parameters:,}", student, self.path,
            f"{self.fingerprint.num_parameters:,}", self.fingerprint,
            "the same" if is_same else "other",
        )  # fmt: skip
        logger.info("%s (perplexity %.4g); a uniform guess has %.4g", of_them, _exp(loss), uniform)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
