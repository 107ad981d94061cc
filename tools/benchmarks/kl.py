"""What the loss costs at a vocabulary of 151,936: both LM heads, KL(teacher || student), gradients.

python tools/benchmarks/kl.py                        # about 8 minutes on one core, 20 GB of memory
python tools/benchmarks/kl.py --sections time --repeats 5 --out kl.json

Random hidden states of student and teacher and random heads, float32. Every arm returns the mean
over rows and leaves its gradients in the student's hidden states and head.

  naive       log_softmax of all logits of both, p (log p - log q), autograd
  kl_div      the same through torch.nn.functional.kl_div
  recomputed  kl_div of 128 rows at a time, whose logits are made again in the backward pass
  fused       megatron_opdlm.loss.fused

  memory    peak above the set-up, at 1,024 and 4,096 rows of 256 channels; every number from a
            process of its own (VmHWM; the peak of the set-up is forgotten before the work starts).
            An arm that needs more memory than is free is skipped, and said to be
  time      CPU time at 1,024 rows of 256 and of 512 channels, arms in turn
  parallel  256 channels, 512 rows, on 1, 2 and 4 ranks that share the vocabulary (gloo): peak, CPU
            time and collective bytes of a rank; `fused` against `gathered`, which all-gathers the
            logits of both models and calls kl_div. Bytes are those of the tensors that a rank puts
            into a collective, or gets out of an all-gather. The sum of the hidden states' gradient
            over the ranks, 4 bytes a channel, belongs to both and is left out of the bytes

Before an arm is timed or anything is reported, loss and both gradient norms of all arms must agree
to 1e-5. Nothing is judged.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measuring import (
    free_bytes,
    in_fresh_process,
    in_turn,
    medians,
    must_agree,
    parser,
    peak_above,
    write,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.loss.fused import TeacherTarget, fused_divergence
from tests.helpers import run_ranks

VOCAB = 151_936
CHUNK = 128
WIDTHS, ROWS, PARALLEL_ROWS, RANKS = (256, 512), (1024, 4096), 512, (1, 2, 4)
BYTES_PER_LOGIT = 32
"""Memory that must be free before an arm that makes all logits may start: measured, and a bit."""


class Inputs:
    """Hidden states of both models, and this rank's part of both heads."""

    def __init__(self, num_rows: int, width: int, rank: int = 0, num_ranks: int = 1) -> None:
        """Draws them; the parts of all ranks are those of one rank alone."""
        generator = torch.Generator().manual_seed(0)

        def draw(rows: int, std: float) -> Tensor:
            return std * torch.randn(rows, width, generator=generator)

        self.student_hidden, self.teacher_hidden = draw(num_rows, 1.0), draw(num_rows, 1.0)
        mine = slice(rank * VOCAB // num_ranks, (rank + 1) * VOCAB // num_ranks)
        self.student_head = draw(VOCAB, width**-0.5)[mine].clone().requires_grad_()
        self.teacher_head = draw(VOCAB, width**-0.5)[mine].clone()
        self.student_hidden.requires_grad_()

    def numbers(self, loss: Tensor, num_ranks: int = 1) -> dict[str, float]:
        """Loss and gradient norms of the whole, and drops the gradients. Collective if sharded."""
        hidden, head = self.student_hidden.grad, self.student_head.grad
        assert hidden is not None and head is not None
        square = head.double().square().sum()
        if num_ranks > 1:
            dist.all_reduce(square)
        self.student_hidden.grad = self.student_head.grad = None
        return {
            "loss": float(loss.detach()),
            "hidden_gradient": float(hidden.double().norm()),
            "head_gradient": float(square.sqrt()),
        }


def naive(x: Inputs) -> Tensor:
    log_q = (x.student_hidden @ x.student_head.t()).log_softmax(-1)
    with torch.no_grad():
        log_p = (x.teacher_hidden @ x.teacher_head.t()).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def kl_of(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Sum over rows."""
    log_q = student_logits.float().log_softmax(-1)
    with torch.no_grad():
        log_p = teacher_logits.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def kl_div(x: Inputs) -> Tensor:
    with torch.no_grad():
        teacher_logits = x.teacher_hidden @ x.teacher_head.t()
    return kl_of(x.student_hidden @ x.student_head.t(), teacher_logits) / len(x.student_hidden)


def recomputed(x: Inputs) -> Tensor:
    def part(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        return kl_of(student @ head.t(), teacher @ x.teacher_head.t())

    pairs = zip(x.student_hidden.split(CHUNK), x.teacher_hidden.split(CHUNK), strict=True)
    sums = [checkpoint(part, *pair, x.student_head, use_reentrant=False) for pair in pairs]
    return torch.stack(sums).sum() / len(x.student_hidden)


def fused(x: Inputs) -> Tensor:
    num_rows = len(x.student_hidden)
    group = dist.group.WORLD if dist.is_initialized() else None
    loss, _ = fused_divergence(
        x.student_hidden,
        x.student_head,
        TeacherTarget(x.teacher_hidden, x.teacher_head),
        torch.full((num_rows,), 1 / num_rows),
        Divergence(),
        vocab_size=VOCAB,
        mask_token_id=None,
        tp_group=group,
    )
    return loss


class AllColumns(torch.autograd.Function):
    """[T, V_local] of all ranks -> [T, V]. All compute the same loss from it, so the gradient of a
    rank's columns is theirs."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor) -> Tensor:
        num_rows, size = len(columns), dist.get_world_size()
        gathered = columns.new_empty(size * num_rows, columns.shape[1])
        dist.all_gather_into_tensor(gathered, columns.contiguous())
        return gathered.view(size, num_rows, -1).transpose(0, 1).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.chunk(dist.get_world_size(), 1)[dist.get_rank()]


def gathered(x: Inputs) -> Tensor:
    with torch.no_grad():
        teacher_logits = AllColumns.apply(x.teacher_hidden @ x.teacher_head.t())
    student_logits = AllColumns.apply(x.student_hidden @ x.student_head.t())
    return kl_of(student_logits, teacher_logits) / len(x.student_hidden)


ARMS: dict[str, Callable[[Inputs], Tensor]] = {
    "naive": naive,
    "kl_div": kl_div,
    "recomputed": recomputed,
    "fused": fused,
}


def forward_backward(arm: Callable[[Inputs], Tensor], x: Inputs) -> Tensor:
    loss = arm(x)
    loss.backward()
    return loss


def run_arm(arm: str, num_rows: int, width: int) -> None:
    """In a process of its own: prints peak memory and numbers as JSON."""
    torch.set_num_threads(1)
    forward_backward(ARMS[arm], Inputs(8, 16))  # what libraries allocate once
    x = Inputs(num_rows, width)
    loss, peak = peak_above(lambda: forward_backward(ARMS[arm], x))
    print(json.dumps({"peak_bytes": peak} | x.numbers(loss)))


def memory(repeats: int) -> dict[str, Any]:
    """Section `memory`."""
    found: dict[str, Any] = {}
    print(f"\nmemory above the set-up, MiB; {WIDTHS[0]} channels")
    for num_rows in ROWS:
        runs = {}
        for arm in ARMS:
            makes_all = arm in ("naive", "kl_div")
            if makes_all and free_bytes() < BYTES_PER_LOGIT * num_rows * VOCAB:
                print(f"  {num_rows:5} rows  {arm:10} skipped: it needs more memory than is free")
            else:
                runs[arm] = in_fresh_process(__file__, arm, num_rows, WIDTHS[0])
        must_agree(f"memory, {num_rows} rows", runs_without_memory(runs))
        ours = runs["fused"]["peak_bytes"]
        for arm, run in runs.items():
            peak = run["peak_bytes"]
            print(f"  {num_rows:5} rows  {arm:10} {peak / 2**20:9.0f} {peak / ours:7.1f} x",
                  flush=True)  # fmt: skip
        found[str(num_rows)] = runs
    few, many = (found[str(num_rows)]["fused"]["peak_bytes"] for num_rows in ROWS)
    print(f"  fused, {ROWS[1]} rows over {ROWS[0]}: {many / few:.3f}")
    return found


def runs_without_memory(runs: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        arm: {key: value for key, value in run.items() if key != "peak_bytes"}
        for arm, run in runs.items()
    }


def time_of(repeats: int) -> dict[str, Any]:
    """Section `time`."""
    found: dict[str, Any] = {}
    for width in WIDTHS:
        x = Inputs(ROWS[0], width)
        numbers = {arm: x.numbers(forward_backward(ARMS[arm], x)) for arm in ARMS}
        must_agree(f"time, {width} channels", numbers)

        def measured(arm: str, x: Inputs = x) -> Callable[[], object]:
            return lambda: x.numbers(forward_backward(ARMS[arm], x))

        taken = in_turn({arm: measured(arm) for arm in ARMS}, repeats)
        found[str(width)] = {arm: numbers[arm] | {"cpu_seconds": taken[arm]} for arm in ARMS}
        peer = medians(taken)["kl_div"]
        print(f"\ntime, {ROWS[0]} rows, {width} channels; loss {numbers['fused']['loss']:.6f}")
        for arm, seconds in medians(taken).items():
            print(f"  {arm:10} {seconds:7.2f} CPU s {seconds / peer:6.2f} x kl_div", flush=True)
    return found


class CountedBytes:
    """Bytes of this rank's collectives, between entering and leaving."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.total = 0

    def __enter__(self) -> "CountedBytes":
        self.plain = dist.all_reduce, dist.all_gather_into_tensor

        def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
            self.total += tensor.nbytes
            return self.plain[0](tensor, *args, **options)

        def all_gather_into_tensor(out: Tensor, *args: Any, **options: Any) -> Any:
            self.total += out.nbytes
            return self.plain[1](out, *args, **options)

        dist.all_reduce, dist.all_gather_into_tensor = all_reduce, all_gather_into_tensor
        return self

    def __exit__(self, *unused: object) -> None:
        dist.all_reduce, dist.all_gather_into_tensor = self.plain


def on_rank(rank: int, name: str, repeats: int) -> dict[str, Any]:
    """Peak, CPU seconds, bytes and numbers of one rank; without repeats nothing is timed."""
    torch.set_num_threads(1)
    arm, num_ranks = {"fused": fused, "gathered": gathered}[name], dist.get_world_size()

    def work() -> Tensor:
        loss = forward_backward(arm, x)
        if num_ranks > 1:
            dist.all_reduce(x.student_hidden.grad)  # each rank has the part of its columns
        return loss

    x = Inputs(8, 16, rank, num_ranks)
    work()
    x = Inputs(PARALLEL_ROWS, WIDTHS[0], rank, num_ranks)
    dist.barrier()
    with CountedBytes() as counted:
        loss, peak = peak_above(work)
    total = counted.total - (x.student_hidden.nbytes if num_ranks > 1 else 0)
    numbers = x.numbers(loss, num_ranks)
    taken = in_turn({name: lambda: x.numbers(work(), num_ranks)}, repeats)
    return numbers | {
        "peak_bytes": peak,
        "bytes_per_row": total / PARALLEL_ROWS,
        "cpu_seconds": taken[name],
    }


def parallel(repeats: int) -> dict[str, Any]:
    """Section `parallel`."""
    found: dict[str, Any] = {}
    for name in ("fused", "gathered"):
        for size in RANKS:
            if name == "gathered" and size == 1:
                continue
            untimed = run_ranks(on_rank, size, name, 0, timeout=600.0)
            must_agree(f"parallel, {name}, {size} ranks", {
                i: {key: rank[key] for key in ("loss", "hidden_gradient", "head_gradient")}
                for i, rank in enumerate([*(found.get("fused, 1 ranks", [])), *untimed])
            })  # fmt: skip
            ranks = run_ranks(on_rank, size, name, repeats, timeout=600.0)
            found[f"{name}, {size} ranks"] = ranks
    single = found["fused, 1 ranks"][0]["peak_bytes"]
    print(f"\nparallel, {PARALLEL_ROWS} rows, the largest of the ranks")
    for name, ranks in found.items():
        peak = max(rank["peak_bytes"] for rank in ranks)
        seconds = max(median(rank["cpu_seconds"]) for rank in ranks)
        print(f"  {name:18} {peak / 2**20:8.0f} MiB {peak / single:6.2f} x {seconds:7.2f} CPU s "
              f"{ranks[0]['bytes_per_row']:11,.0f} bytes a row; loss {ranks[0]['loss']:.7f}",
              flush=True)  # fmt: skip
    return found


SECTIONS = {"parallel": parallel, "memory": memory, "time": time_of}  # forks before it computes


def main() -> None:
    """Parse the command line."""
    options = parser(__doc__ or "", repeats=3)
    options.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all"
    )
    options.add_argument("--run-arm", nargs=3, help="used by the benchmark itself")
    args = options.parse_args()
    if args.run_arm is not None:
        return run_arm(args.run_arm[0], int(args.run_arm[1]), int(args.run_arm[2]))
    torch.set_num_threads(1)
    results = {name: SECTIONS[name](args.repeats) for name in SECTIONS if name in args.sections}
    write(args.out, {"vocabulary": VOCAB, "results": results})
    return None


if __name__ == "__main__":
    main()
