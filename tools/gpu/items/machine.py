"""What the device does on plain work: the yardstick of all other figures."""

from __future__ import annotations

import torch

from tools.gpu.cases import COPY_BYTES, PRODUCT_SIZE
from tools.gpu.device import begin, distance
from tools.gpu.record import Check, Context, exact
from tools.gpu.timing import device_ms, wall_ms

HOST_BYTES = 2**28
LAUNCHES = 1000


def run(context: Context) -> None:
    """Copies, a matrix product, host copies, and what the start of a kernel costs the host."""
    begin(context)
    properties = torch.cuda.get_device_properties(0)
    context.tell(
        device_gib=round(properties.total_memory / 2**30, 1),
        processors=properties.multi_processor_count,
        cuda=torch.version.cuda,
    )
    _copy(context)
    _product(context)
    _host_copies(context)
    _launches(context)


def _copy(context: Context) -> None:
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    ms = device_ms(lambda: target.copy_(source), context.repeats(20))
    check = exact("different bytes", int((source != target).sum()))
    context.timed("copy on the device", ms, [check], num_bytes=2 * COPY_BYTES)


def _product(context: Context) -> None:
    size = PRODUCT_SIZE
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = left @ right
    ms = device_ms(lambda: torch.mm(left, right, out=product), context.repeats(20), warmup=5)
    rows = product[:64, :64]
    expected = left[:64].double() @ right[:, :64].double()
    other = left[:64].double() @ right[:, 1:65].double()
    check = Check(
        "distance from float64", distance(rows, expected), 1e-2, control=distance(rows, other)
    )
    context.timed("bf16 product, random data", ms, [check], flops=2 * size**3)


def _host_copies(context: Context) -> None:
    host = torch.arange(HOST_BYTES // 8).view(torch.uint8).pin_memory()
    device = torch.empty_like(host, device="cuda")
    back = torch.empty_like(host).pin_memory()
    there = wall_ms(lambda: device.copy_(host, non_blocking=True), context.repeats(5))
    home = wall_ms(lambda: back.copy_(device, non_blocking=True), context.repeats(5))
    check = exact("different bytes", int((back != host).sum()))
    for case, ms in (("pinned host to device", there), ("device to pinned host", home)):
        context.line(case, {"ms": ms, "gb_per_s": HOST_BYTES / ms / 1e6}, [check])


def _launches(context: Context) -> None:
    """The host's side: microseconds per kernel that does next to nothing, queued and replayed."""
    number = torch.zeros(1, device="cuda")

    def launch() -> None:
        for _ in range(LAUNCHES):
            number.add_(1)

    launch()
    number.zero_()
    queued = wall_ms(launch, context.repeats(5), warmup=0)
    check = exact("kernels that did not run", context.repeats(5) * LAUNCHES - int(number))
    context.line("start of a kernel by torch", {"us": queued}, [check])  # 1,000 of them: ms are us
