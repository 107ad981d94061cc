"""What an optimizer step costs up to its gradients, next to the same step on transformers.

python tools/benchmarks/step.py                      # about 6 minutes on one core
python tools/benchmarks/step.py --repeats 5 --out step.json

8 responses of 100 to 1,024 tokens (their mean is 0.3 of the longest), prompts of about 200, blocks
of 4, one noisy state per block; student and teacher of 8 layers and 256 channels, whose LM head has
the share of the work that it has in Qwen3-8B; the same random weights in all arms, float32, one
process, one thread. An arm is the teacher's forward pass, the student's, the loss and the backward
pass. The arms run in turn, A B A B, after a gate: loss and gradient norm agree to 1e-5.

  ours        this trainer: packed stream, teacher on the clean tokens, heads and loss at masked
              positions, fused
  padded      what the released OPDLM code runs, on transformers' Qwen3ForCausalLM: every row is
              [prompt | response | noisy response], padded to the longest prompt and response of the
              batch; a dense mask per row; the teacher on a doubled sequence, too; logits of both at
              all positions; fp32 log_softmax of both; the mean over masked positions. Its full
              recomputation of activations is left out, and so is what it does to optimizer states
  unpadded    the same without padding
  teacher x0  unpadded, and the teacher on the clean tokens, causal, without a mask

Prompts are whole blocks here, because the released layout starts a block at the response's first
token, and this project at a multiple of the block size.

Work is counted: tokens through the body, rows through the LM head (both models), pairs of query and
key that attention computes, per layer. ideal / executed is in FLOPs, the backward pass as twice the
forward; ideal is what the mask, the masked positions and the lengths call for, by formula.

Nothing is judged.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from measuring import CONFIG, in_turn, medians, must_agree, parser, write
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_opdlm.config.learning import OptimizerConfig
from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.example import make_example
from megatron_opdlm.diffusion.noising import select_states
from megatron_opdlm.diffusion.state_selection import NoisyStates
from megatron_opdlm.diffusion.stream import pack
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distill.batching import make_microbatches, plan_packing
from megatron_opdlm.distill.step import forward_backward
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.loss.fused import TeacherTarget
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions, build_model
from megatron_opdlm.model.hf_config import parse_config
from megatron_opdlm.model.pipeline import forward_only
from megatron_opdlm.model.tiles import make_tiles
from megatron_opdlm.reporting.accounting import model_flops_per_token
from megatron_opdlm.train.optimizer import StudentOptimizer
from tests.training import assemble, parameter_pieces, to_hf

MASK, BLOCK = 0, 4
PROMPTS = (184, 240, 96, 312, 200, 160, 264, 148)
RESPONSES = (472, 100, 220, 1024, 120, 312, 160, 104)


@dataclass
class Work:
    """Of a step: tokens, rows and pairs of (student, teacher)."""

    tokens: tuple[int, int] = (0, 0)
    head_rows: tuple[int, int] = (0, 0)
    pairs: tuple[int, int] = (0, 0)

    def add(
        self, tokens: tuple[int, int], head_rows: tuple[int, int], pairs: tuple[int, int]
    ) -> None:
        for name, numbers in (("tokens", tokens), ("head_rows", head_rows), ("pairs", pairs)):
            before = getattr(self, name)
            setattr(self, name, (before[0] + numbers[0], before[1] + numbers[1]))

    def flops(self) -> int:
        """The student forward and backward, the teacher forward."""
        model = model_flops_per_token(parse_config(CONFIG, {}))
        student, teacher = (
            model.forward(
                tokens=self.tokens[i], head_rows=self.head_rows[i], attention_pairs=self.pairs[i]
            )
            for i in range(2)
        )
        return 3 * student + teacher


@dataclass(frozen=True)
class Row:
    """A response at a noisy state."""

    trajectory: Trajectory
    states: NoisyStates

    @property
    def masked(self) -> Tensor:
        """[R] bool."""
        return self.states.masked.flatten()


def make_rows() -> list[Row]:
    """The batch. A block of 4 takes 1 to 4 denoising steps."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, (num_prompt, num_response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.randint(2, 2752, (num_prompt + num_response,), generator=generator)
        steps = torch.rand(num_response // BLOCK, BLOCK, generator=generator)
        steps = (steps * torch.randint(1, BLOCK + 1, (len(steps), 1), generator=generator)).long()
        steps = torch.stack([block.unique(return_inverse=True)[1] for block in steps])
        trajectory = Trajectory(
            prompt_id=str(number), sample=0, prompt_ids=ids[:num_prompt],
            response_ids=ids[num_prompt:], commit_step=steps.flatten(),
            num_response_tokens=num_response, ended=False, block_size=BLOCK,
        )  # fmt: skip
        key = randomness.key(0, number)
        states = select_states(trajectory, state_selection="per_block", key=key, mask_token_id=MASK)
        rows.append(Row(trajectory, states))
    return rows


def ideal_work(rows: list[Row]) -> Work:
    """What the lengths and the masked positions call for. Nobody sees the last clean block."""
    work = Work()
    for row in rows:
        num_prompt, num_response = len(row.trajectory.prompt_ids), len(row.masked)
        blocks, first = (num_prompt + num_response) // BLOCK, num_prompt // BLOCK
        num_clean = BLOCK * (blocks - 1)
        teacher = num_prompt + int(row.masked.nonzero().max())  # up to the token before that
        seen = sum(range(1, blocks)) + sum(range(first + 1, blocks + 1))
        work.add(
            (num_clean + num_response, teacher),
            (int(row.masked.sum()), int(row.masked.sum())),
            (BLOCK * BLOCK * seen, teacher * (teacher + 1) // 2),
        )
    return work


class Ours:
    """The trainer's own step, and the weights of all arms."""

    def __init__(self, rows: list[Row]) -> None:
        """Makes both models."""
        self.rows, self.hf = rows, parse_config(CONFIG, {})
        self.parallel = process_groups.initialize()
        torch.manual_seed(0)
        options = BuildOptions(make_vocab_size_divisible_by=1)
        self.student = build_model(self.hf, options, self.parallel)
        self.teacher = build_model(self.hf, options, self.parallel).requires_grad_(False)
        self.optimizer = StudentOptimizer(
            self.student, OptimizerConfig(lr_warmup_steps=0), use_distributed_optimizer=False,
            overlap_grad_reduce=False, decay_steps=1,
        )  # fmt: skip
        self.work = Work()

    def weights(self, model: BlockDiffusionModel, attribute: str = "data") -> dict[str, Tensor]:
        """By Hugging Face name: weights, or with "main_grad" their gradients."""
        values = {name: getattr(p, attribute) for name, p in model.named_parameters()}
        return to_hf(assemble([parameter_pieces(model, values)]), self.hf)

    def step(self) -> dict[str, float]:
        states = [
            make_example(row.trajectory, row.states, mask_token_id=MASK, include_eos=True)
            for row in self.rows
        ]
        runs = plan_packing([len(s.student) for s in states], dp_size=1, token_budget=16384)
        microbatches = make_microbatches(
            states, runs, dp_rank=0, multiple=1, loss_reduction="sequence_mean"
        )
        causal = [pack([states[i].teacher for i in run]) for run in runs[0]]
        head, hidden = self.teacher.head_weight(), forward_only(self.teacher, causal, self.parallel)
        targets = [TeacherTarget(rows, head) for rows in hidden]
        self.optimizer.zero_grad()
        rows = forward_backward(
            self.optimizer.ddp, microbatches, targets, self.parallel,
            divergence=Divergence(), mask_token_id=MASK,
        )  # fmt: skip
        self.work = Work()
        for student, teacher in zip((m.student for m in microbatches), causal, strict=True):
            self.work.add(
                (len(student), len(teacher)),
                (len(student.loss_rows), len(teacher.loss_rows)),
                (tile_pairs(student.tags), tile_pairs(teacher.tags)),
            )
        return {"loss": rows.loss}

    def gradient_norm(self) -> float:
        return norm(p.main_grad for p in self.student.parameters())


def tile_pairs(tags: Tensor) -> int:
    """Pairs that attention computes, those it masks among them."""
    return sum(tile.num_pairs for tile in make_tiles(tags))


def norm(gradients: Any) -> float:
    return float(sum(g.double().square().sum() for g in gradients) ** 0.5)


class Columns:
    """[prompt | response | noisy response] of one row, padded to given lengths.

    `part` is 0, 1, 2 and -1 at padding; `position` counts within prompt and response.
    """

    def __init__(self, row: Row, prompt_length: int, response_length: int) -> None:
        """Lays the row out: prompts padded on the left, responses on the right."""
        ids, num_prompt = row.trajectory.token_ids, len(row.trajectory.prompt_ids)
        num_response = len(row.masked)
        left, right = prompt_length - num_prompt, response_length - num_response
        self.prompt_length, self.tail = prompt_length, prompt_length + response_length
        noisy = ids[num_prompt:].masked_fill(row.masked, MASK)
        before, after = torch.zeros(left).long(), torch.zeros(right).long()
        self.student = torch.cat([before, ids, after, noisy, after])
        self.teacher = torch.cat([before, ids, after, ids[num_prompt:], after])
        own = torch.arange(len(ids))
        self.position = torch.cat([before, own, after, own[num_prompt:], after])
        parts = [(-1, left), (0, num_prompt), (1, num_response), (-1, right), (2, num_response)]
        self.part = torch.cat([torch.full((n,), part) for part, n in [*parts, (-1, right)]])
        self.masked = torch.zeros(len(self.part), dtype=torch.bool)
        self.masked[self.tail : self.tail + num_response] = row.masked

    def dense_mask(self, *, causal: bool) -> Tensor:
        """[1, 1, N, N] bool: the student's mask, or the causal one of the doubled sequence."""
        block = self.position if causal else self.position // BLOCK
        q, k = block.unsqueeze(1), block.unsqueeze(0)
        noisy_q, noisy_k = (self.part == 2).unsqueeze(1), (self.part == 2).unsqueeze(0)
        if causal:
            shared = (self.part == 0).unsqueeze(0)
            seen = (k <= q) & (shared | (noisy_q == noisy_k))
        else:
            seen = (~noisy_k & (k < q)) | ((k == q) & (noisy_q == noisy_k))
        real = self.part >= 0
        seen &= real.unsqueeze(1) & real.unsqueeze(0)
        return (seen | torch.eye(len(real), dtype=torch.bool))[None, None]


class Peer:
    """The step on transformers, a row at a time."""

    def __init__(self, rows: list[Row], ours: Ours, *, pad: bool, clean_teacher: bool) -> None:
        """Takes over the weights."""
        self.rows, self.clean_teacher = rows, clean_teacher
        self.sizes = [
            (max(PROMPTS), max(RESPONSES)) if pad else (len(r.trajectory.prompt_ids), len(r.masked))
            for r in rows
        ]
        self.student, self.teacher = (
            load_transformers(ours.weights(model)) for model in (ours.student, ours.teacher)
        )
        self.teacher.requires_grad_(False)
        self.work = Work()

    def step(self) -> dict[str, float]:
        self.student.zero_grad()
        self.work, total = Work(), 0.0
        for row, size in zip(self.rows, self.sizes, strict=True):
            columns = Columns(row, *size)
            target = self.target(columns)
            logits = logits_of(self.student, columns.student, columns.position,
                               columns.dense_mask(causal=False))  # fmt: skip
            log_q = logits[:, 1:].float().log_softmax(-1)  # the mask token has id 0
            log_q = log_q[-len(target) :]
            kl = (target.exp() * (target - log_q)).sum(-1)
            chosen = columns.masked[-len(target) :]
            loss = (kl * chosen).sum() / chosen.sum() / len(self.rows)
            loss.backward()
            total += float(loss.detach())
        return {"loss": total}

    @torch.no_grad()
    def target(self, columns: Columns) -> Tensor:
        """Log probabilities [N, V - 1] of all columns, or [R, V - 1] of the noisy ones."""
        n, tail, first = len(columns.part), columns.tail, columns.prompt_length
        if self.clean_teacher:
            self.work.add((n, tail), (n, tail), (n * n, tail * (tail + 1) // 2))
            logits = logits_of(self.teacher, columns.teacher[:tail], columns.position[:tail], None)
            return logits[first - 1 : -1, 1:].float().log_softmax(-1)
        self.work.add((n, n), (n, n), (n * n, n * n))
        logits = logits_of(
            self.teacher, columns.teacher, columns.position, columns.dense_mask(causal=True)
        )
        shifted = logits.roll(1, 0)
        shifted[tail] = logits[first - 1]
        return shifted[:, 1:].float().log_softmax(-1)

    def gradient_norm(self) -> float:
        return norm(p.grad for p in self.student.parameters())


def load_transformers(weights: dict[str, Tensor]) -> Qwen3ForCausalLM:
    config = Qwen3Config(**CONFIG)
    config._attn_implementation = "sdpa"
    model = Qwen3ForCausalLM(config)
    model.load_state_dict(weights)
    return model.eval()


def logits_of(
    model: Qwen3ForCausalLM, ids: Tensor, positions: Tensor, mask: Tensor | None
) -> Tensor:
    """[N, V] at all positions."""
    return model(
        input_ids=ids[None], position_ids=positions[None], attention_mask=mask, use_cache=False
    ).logits[0]


def compare(repeats: int) -> dict[str, Any]:
    """The arms, in turn."""
    rows = make_rows()
    ours = Ours(rows)
    arms: dict[str, Any] = {
        "ours": ours,
        "padded": Peer(rows, ours, pad=True, clean_teacher=False),
        "unpadded": Peer(rows, ours, pad=False, clean_teacher=False),
        "teacher x0": Peer(rows, ours, pad=False, clean_teacher=True),
    }
    numbers = {
        name: arm.step() | {"gradient_norm": arm.gradient_norm()} for name, arm in arms.items()
    }
    must_agree("step", numbers)
    gradient = ours.weights(ours.student, "main_grad")
    for name, arm in list(arms.items())[1:]:
        apart = norm(p.grad - gradient[key] for key, p in arm.student.named_parameters())
        if not apart < 1e-4 * numbers["ours"]["gradient_norm"]:
            sys.exit(f"step: the gradient of {name} is {apart} away from ours")
    taken = in_turn({name: arm.step for name, arm in arms.items()}, repeats)
    seconds = medians(taken)
    ideal, executed = ideal_work(rows), ours.work
    print(f"loss {numbers['ours']['loss']:.6f}, gradient norm "
          f"{numbers['ours']['gradient_norm']:.6f}, in all arms\n"
          f"{'':12}{'CPU s':>8}{'x ours':>8}{'student':>9}{'teacher':>9}{'head rows':>11}"
          f"{'pairs':>13}{'FLOPs/ideal':>13}")  # fmt: skip
    works = {name: arm.work for name, arm in arms.items()} | {"ideal": ideal}
    for name, work in works.items():
        time = f"{seconds[name]:8.2f}{seconds[name] / seconds['ours']:8.2f}" if name in arms else ""
        print(f"{name:12}{time:16}{work.tokens[0]:9,}{work.tokens[1]:9,}{sum(work.head_rows):11,}"
              f"{sum(work.pairs):13,}{work.flops() / ideal.flops():13.2f}", flush=True)  # fmt: skip
    efficiency = ideal.flops() / executed.flops()
    print(f"ideal / executed of ours: {efficiency:.3f}")
    found: dict[str, Any] = {name: numbers[name] | {"cpu_seconds": taken[name]} for name in arms}
    found["work"] = {name: vars(work) for name, work in works.items()}
    return found | {"efficiency": efficiency}


def main() -> None:
    """Parse the command line."""
    args = parser(__doc__ or "", repeats=3).parse_args()
    torch.set_num_threads(1)
    write(args.out, {"config": CONFIG, "results": compare(args.repeats)})


if __name__ == "__main__":
    main()
