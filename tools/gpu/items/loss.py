"""Both LM heads and KL(teacher || student) at Qwen3's vocabulary, with gradients.

Shape letters: T rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.loss.fused import TeacherTarget, fused_divergence
from tools.gpu.cases import LOSS_ROWS, LOSS_WIDTHS, VOCAB
from tools.gpu.device import begin, distance, generator
from tools.gpu.implementations import losses
from tools.gpu.models import MASK_TOKEN
from tools.gpu.record import Check, Context
from tools.gpu.roofline import loss_flops
from tools.gpu.timing import device_ms, peak_bytes

CHECKED_ROWS, CHECKED_TOKENS, PART = 64, 64, 256
VALUE_LIMIT, GRADIENT_LIMIT = 1e-4, 2e-2
"""Of a row's divergence, in float32; of the gradients, which are made of bfloat16 factors."""


@dataclass
class Inputs:
    """Hidden states and heads of both models, bfloat16."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor

    @classmethod
    def draw(cls, width: int) -> Inputs:
        """Logits of standard deviation 2."""
        of_device = generator()

        def normal(rows: int, std: float) -> Tensor:
            drawn = torch.empty(rows, width, device="cuda").normal_(std=std, generator=of_device)
            return drawn.bfloat16()

        parts = [normal(rows, std) for _ in range(2)
                 for rows, std in ((LOSS_ROWS, 1.0), (VOCAB, 2 * width**-0.5))]  # fmt: skip
        return cls(parts[0].requires_grad_(), parts[1].requires_grad_(), parts[2], parts[3])

    def forward_backward(self) -> Tensor:
        """[T] divergences; gradients of their mean go to the student's parts."""
        self.student.grad = self.student_head.grad = None
        weight = torch.full((LOSS_ROWS,), 1 / LOSS_ROWS, device="cuda")
        loss, values = fused_divergence(
            self.student, self.student_head, TeacherTarget(self.teacher, self.teacher_head),
            weight, Divergence(), vocab_size=VOCAB, mask_token_id=MASK_TOKEN,
        )  # fmt: skip
        loss.backward()
        return values


@dataclass
class Exact:
    """A slice of what comes out, in float64.

    Attributes:
        values: [T] divergences.
        hidden: gradient of the first rows.
        head: gradient of the first tokens' rows of the head.
    """

    values: Tensor
    hidden: Tensor
    head: Tensor


def run(context: Context) -> None:
    """Errors, time, rates and peak memory of every implementation."""
    begin(context)
    for width in LOSS_WIDTHS:
        inputs = Inputs.draw(width)
        expected = _exact(inputs)
        for implementation in losses():
            title = f"{implementation.name}, {LOSS_ROWS:,} rows, D = {width:,}"
            if implementation.obstacle is not None:
                context.skipped(title, implementation.obstacle)
                continue
            with implementation.only():
                checks = _checks(inputs, expected)
                peak = peak_bytes(inputs.forward_backward)
                ms = device_ms(inputs.forward_backward, context.repeats(5))
            moved = implementation.logit_bytes * LOSS_ROWS * VOCAB
            context.timed(
                title, ms, checks,
                flops=loss_flops(LOSS_ROWS, width, VOCAB),
                logit_gb_per_s=moved / ms / 1e6, peak_gb=peak / 1e9,
            )  # fmt: skip
        del inputs, expected
        torch.cuda.empty_cache()


def _checks(inputs: Inputs, expected: Exact) -> list[Check]:
    values = inputs.forward_backward()
    assert inputs.student.grad is not None and inputs.student_head.grad is not None
    hidden = inputs.student.grad[:CHECKED_ROWS]
    head = inputs.student_head.grad[:CHECKED_TOKENS]
    return [
        _check("values", values, expected.values, VALUE_LIMIT),
        _check("gradient of hidden states", hidden, expected.hidden, GRADIENT_LIMIT),
        _check("gradient of the head", head, expected.head, GRADIENT_LIMIT),
    ]


def _check(what: str, found: Tensor, expected: Tensor, limit: float) -> Check:
    """The control has each row in the place of the next."""
    return Check(
        what, distance(found, expected), limit, control=distance(found.roll(1, 0), expected)
    )


@torch.no_grad()
def _exact(inputs: Inputs) -> Exact:
    """By the formula: p (log p - log q) summed over tokens; the student's gradient is q - p."""
    values, hidden = [], torch.zeros(0)
    width = inputs.student.shape[1]
    head_gradient = torch.zeros(CHECKED_TOKENS, width, dtype=torch.float64, device="cuda")
    heads = [x.double() for x in (inputs.student_head, inputs.teacher_head)]
    for start in range(0, LOSS_ROWS, PART):
        rows = slice(start, start + PART)
        log_q = _log_softmax(inputs.student[rows].double() @ heads[0].t())
        log_p = _log_softmax(inputs.teacher[rows].double() @ heads[1].t())
        p = log_p.exp()
        values.append((p * (log_p - log_q).nan_to_num(0.0)).sum(1))
        slope = (log_q.exp() - p) / LOSS_ROWS
        head_gradient += slope[:, :CHECKED_TOKENS].t() @ inputs.student[rows].double()
        if start == 0:
            hidden = slope[:CHECKED_ROWS] @ heads[0]
    return Exact(torch.cat(values), hidden, head_gradient)


def _log_softmax(logits: Tensor) -> Tensor:
    """The mask token is in no softmax."""
    logits[:, MASK_TOKEN] = -torch.inf
    return logits.log_softmax(1)
