"""Process groups without a network or NCCL, for a device that computes nothing.

A rehearsal runs the survey where every CUDA call succeeds and does nothing: wrong arguments, types
and shapes show, and what kernels fail to compile; numbers and speed do not. NCCL needs a device
that answers, so a rehearsal has torch's own fake process group: one rank, whose collectives return
at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Makes every process group of this process a fake one. Idempotent."""
    if getattr(dist, "_is_rehearsal", False):
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_opdlm.rollout import cache, decoding_memory

    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN asks the device too much
    for module in (cache, decoding_memory):  # it is a number that comes from the device
        module.smallest_in_replica = lambda value, parallel: int(value)
    real_init, real_new_group = dist.init_process_group, dist.new_group

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        real_init("fake", store=FakeStore(), rank=0, world_size=1)

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return real_new_group(*args, **{**kwargs, "backend": "fake"})

    def all_gather_object(out: list[Any], value: Any, group: Any = None) -> None:
        out[:] = [value] * len(out)

    def do_nothing(*args: Any, **kwargs: Any) -> None:
        """Of one rank, what it sends is what it has."""

    dist.init_process_group = init_process_group
    dist.new_group = new_group
    dist.all_gather_object = all_gather_object
    dist.broadcast_object_list = do_nothing
    dist._is_rehearsal = True
