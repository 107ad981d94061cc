"""Replicas share one queue of requests."""

import pytest

from megatron_opdlm.distributed import process_groups
from megatron_opdlm.rollout.request_queue import SharedQueue
from tests.helpers import run_ranks
from tests.rollouts import make_request


def take_all(rank, layout, num_requests, most, most_tokens):
    """What this rank's replica takes, batch by batch, and when it knew that nothing was left."""
    parallel = process_groups.initialize(**layout)
    requests = [make_request(i, 1 + i % 5, 4) for i in range(num_requests)]
    queue = SharedQueue(requests, parallel)
    batches = []
    while not queue.is_empty:
        batches.append(queue.take(most, most_tokens))
    return parallel.dp_rank, batches, queue.fair_share


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (3, {}),
        (4, {"tensor_model_parallel_size": 2}),
        (4, {"pipeline_model_parallel_size": 2}),
    ],
)
def test_replicas_share_one_queue(world_size, layout):
    """Every request is taken once, by a replica whose ranks agree; nobody stops before the end."""
    for num_requests, most, most_tokens in ((23, 3, 100), (23, 100, 6), (0, 3, 6), (2, 1, 1)):
        results = run_ranks(take_all, world_size, layout, num_requests, most, most_tokens)
        replicas = {}
        for replica, batches, share in results:
            assert replicas.setdefault(replica, batches) == batches
            assert share == -(-num_requests // len({r for r, *_ in results}))
        batches = [batch for batches in replicas.values() for batch in batches]
        assert sorted(index for batch in batches for index in batch) == list(range(num_requests))
        for batch in batches:
            assert len(batch) <= most
            assert sum(1 + index % 5 for index in batch[:-1]) < most_tokens
