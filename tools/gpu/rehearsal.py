"""Process groups without a network or NCCL, for a device that computes nothing.

A rehearsal runs the survey where every CUDA call succeeds and does nothing: wrong arguments, types
and shapes show, and what kernels fail to compile; numbers and speed do not. NCCL needs a device
that answers, so a rehearsal has torch's own fake process group: one rank, whose collectives return
at once.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

MOST_THREADS = 1024


def install() -> None:
    """Makes every process group of this process a fake one. Idempotent."""
    if getattr(dist, "_is_rehearsal", False):
        return
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)

    from megatron_opdlm.model import fingerprint
    from megatron_opdlm.rollout import cache, decoding_memory, graphs

    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN asks the device too much
    # What the package reads from the device and acts upon would be 0 or false.
    for module in (cache, decoding_memory):
        module.smallest_in_replica = lambda value, parallel: int(value)
    fingerprint._sum = lambda data, offset: (0, True)
    graphs.CudaCapture = lambda: _repeat  # nothing can be captured there
    if find_spec("triton") is not None:
        _let_triton_launch()
    real_init, real_new_group = dist.init_process_group, dist.new_group

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        real_init("fake", store=dist.HashStore(), rank=0, world_size=1)

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return real_new_group(*args, **{**kwargs, "backend": "fake"})

    # The names of their arguments are torch's.
    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather_object(
        obj: Any, object_gather_list: list[Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        all_gather_object(object_gather_list or [], obj)

    def scatter_object_list(
        scatter_object_output_list: list[Any],
        scatter_object_input_list: list[Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        scatter_object_output_list[0] = scatter_object_input_list[0]

    def do_nothing(*args: Any, **kwargs: Any) -> None:
        """Of one rank, what it sends is what it has."""

    dist.init_process_group = init_process_group
    dist.new_group = new_group
    dist.all_gather_object = all_gather_object
    dist.gather_object = gather_object
    dist.scatter_object_list = scatter_object_list
    dist.broadcast_object_list = do_nothing
    dist._is_rehearsal = True


def _repeat(run: Callable[[], Any]) -> tuple[Any, Any]:
    """In place of a captured pass: one that is run again on the same buffers."""
    output = run()
    return SimpleNamespace(replay=lambda: output.copy_(run()), reset=lambda: None), output


def _let_triton_launch() -> None:
    """The device says that a kernel may have 0 threads, and Triton then refuses to launch it."""
    from triton.backends.nvidia.driver import CudaUtils

    prepare = CudaUtils.__init__

    def prepare_and_change(utils: Any) -> None:
        prepare(utils)
        load = utils.load_binary
        utils.load_binary = lambda *args: (*load(*args)[:-1], MOST_THREADS)

    CudaUtils.__init__ = prepare_and_change
