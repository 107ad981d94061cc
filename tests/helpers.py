"""Run a function on several gloo ranks of this machine, for tests of parallel code."""

import gc
import multiprocessing
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call ``fn(rank, *args)`` on ``world_size`` forked ranks that share a gloo process group.

    The ranks are forked, so ``fn`` may be a closure and modules imported by the parent are free.
    The world size is ``torch.distributed.get_world_size()`` inside ``fn``.

    Args:
        fn: function to run; its result must be picklable (tensors travel by value).
        world_size: number of ranks.
        *args: passed to every rank unchanged.
        timeout: seconds for all ranks together; every rank is killed after that.

    Returns:
        The result of each rank, in rank order.

    Raises:
        AssertionError: a rank raised (the text is the traceback of the first to report), died, or
            the timeout passed.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        rendezvous = Path(folder, "rendezvous").as_uri()
        processes, readers = [], []
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(writer, rendezvous, rank, world_size, timeout, fn, args),
                    daemon=False,  # a rank may start processes of its own: checkpoint writers
                )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads
                    process.start()
                # The parent's copy must go, otherwise a dead rank never reads as end of file.
                writer.close()
                processes.append(process)
                readers.append(reader)
            results = _collect(readers, time.monotonic() + timeout, timeout)
            for process in processes:
                process.join(10)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()
            for reader in readers:
                reader.close()


def _rank_main(
    writer: Connection,
    rendezvous: str,
    rank: int,
    world_size: int,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Body of one rank: join the group, run, report ``(ok, result or traceback text)``."""
    gc.freeze()  # a collection would write to, and so copy, every page that the parent has shared
    try:
        dist.init_process_group(
            "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        # Pickled here, not by the pipe: the pipe's pickler would pass tensors as shared memory that
        # dies with this process.
        message = pickle.dumps((True, fn(rank, *args)))
    except BaseException:  # reported to the parent, which raises
        writer.send_bytes(pickle.dumps((False, traceback.format_exc())))
        return
    writer.send_bytes(message)
    dist.barrier()  # no rank leaves while another is still in a collective
    dist.destroy_process_group()


def _collect(readers: list[Connection], deadline: float, timeout: float) -> list[Any]:
    """Results in rank order, or an AssertionError as soon as one rank fails."""
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        pending = [reader for rank, reader in enumerate(readers) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(readers)) if rank not in results]
            raise AssertionError(f"ranks {missing} gave no result within {timeout} seconds")
        for reader in ready:
            rank = readers.index(reader)
            try:
                ok, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a result") from None
            if not ok:
                raise AssertionError(f"rank {rank} of {len(readers)} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]
