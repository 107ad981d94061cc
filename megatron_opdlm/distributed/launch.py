"""Reads from torchrun's environment variables which process of a job this is.

This file needs only the standard library, because the command line uses it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_TOGETHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets and torch.distributed needs: either all of them or none."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The place of a process in its job. Without a launcher the job has one process."""

    rank: int = 0
    """Rank of this process, from 0."""
    world_size: int = 1
    """Number of processes of the job."""
    local_rank: int = 0
    """Index of this process on its machine, from 0."""
    has_launcher: bool = False
    """Whether a launcher has started this process."""


def read_launch() -> Launch:
    """Reads the environment variables.

    Raises:
        ValueError: the variables contradict each other, or only some of a launcher's variables are
            set (most likely a shell has kept them).
    """
    given = {name: os.environ[name] for name in _TOGETHER if name in os.environ}
    if not given.keys() & {"RANK", "WORLD_SIZE"}:  # a cluster may set an address for all jobs
        return Launch()
    missing = [name for name in _TOGETHER if name not in given]
    if missing:
        said = " and ".join(f"{name}={given[name]}" for name in _TOGETHER[:2] if name in given)
        raise ValueError(
            f"{said} {'is' if ' and ' not in said else 'are'} set in the environment without "
            f"{' and '.join(missing)}, so nobody knows which process of a job this is; "
            f"unset {' '.join(name for name in _TOGETHER[:2] if name in given)}, or start with "
            "torchrun"
        )
    numbers = {name: _number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    rank, world_size = numbers["RANK"], numbers["WORLD_SIZE"]
    port = given["MASTER_PORT"]
    if not (port.isdecimal() and len(port) <= 5 and int(port) < 2**16):
        raise ValueError(
            f"MASTER_PORT={port} must be a port, from 0 to 65535; unset it, or start with torchrun"
        )
    if not given["MASTER_ADDR"]:
        raise ValueError("MASTER_ADDR is empty; set it to the first node, or start with torchrun")
    if not rank < world_size:
        raise ValueError(
            f"RANK={rank} must be below WORLD_SIZE={world_size}; unset both, or start with torchrun"
        )
    return Launch(
        rank=rank, world_size=world_size, local_rank=numbers["LOCAL_RANK"], has_launcher=True
    )


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdecimal() or len(text) > 9:
        raise ValueError(f"{name}={text} must be a whole number; unset it, or start with torchrun")
    return int(text)
