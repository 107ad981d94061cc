"""Which slots enter the next pass."""

import pytest
import torch

from megatron_opdlm.rollout import scheduler as scheduler_module
from megatron_opdlm.rollout.request_queue import LocalQueue, new_tokens
from megatron_opdlm.rollout.scheduler import LEAST_SHARE_ADMITTED, Scheduler
from megatron_opdlm.rollout.sequences import Sequences
from tests.rollouts import MASK, alike_requests, make_request

BLOCK = 4


def make(lengths, *, num_slots, num_stages=1, prompts_apart=False):
    """A scheduler over requests with prompts of these lengths, one block of response each."""
    requests = [make_request(i, length, BLOCK) for i, length in enumerate(lengths)]
    sequences = Sequences(
        num_slots=num_slots, capacity=64, block_size=BLOCK, mask_token_id=MASK
    )  # fmt: skip
    scheduler = Scheduler(
        LocalQueue(requests), sequences,
        num_slots=num_slots, num_stages=num_stages, prompts_apart=prompts_apart,
    )  # fmt: skip
    return scheduler, sequences


def run_step(sequences, slots):
    """A pass without a commit: all that it read is in the cache."""
    sequences.cached[slots] = sequences.block[slots]


def test_all_sequences_enter_together():
    scheduler, sequences = make([9] * 5, num_slots=3)
    assert scheduler.schedule() == [0, 1, 2]
    run_step(sequences, [0, 1, 2])
    scheduler.retire([0, 1, 2], [1])
    assert scheduler.schedule() == [0, 2, 1]  # a request takes the free slot at once
    assert sequences.index[1] == 3
    scheduler.retire([0, 2, 1], [0, 1, 2])
    assert scheduler.schedule() == [0]
    scheduler.retire([0], [0])
    assert scheduler.schedule() is None


def test_prompts_that_begin_alike_enter_together(monkeypatch):
    """Six prompts of 24 + 21 tokens, of which two each are equal: 45, 0, 21, 0, 21, 0 new ones."""
    requests = alike_requests()
    each = [new_tokens(requests[max(0, i - 1) : i + 1]) for i in range(len(requests))]
    assert each == [45, 0, 21, 0, 21, 0]
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 46)
    sequences = Sequences(num_slots=6, capacity=64, block_size=BLOCK, mask_token_id=MASK)
    scheduler = Scheduler(
        LocalQueue(requests), sequences, num_slots=6, num_stages=1, prompts_apart=False
    )
    assert scheduler.schedule() == [0, 1, 2]  # 66 tokens; alone they would be 90 after two


def test_a_short_beginning_is_read_twice():
    requests = [make_request(1, 30, BLOCK), make_request(2, 30, BLOCK)]
    for request, common in zip([requests[0]] * 2, (15, 16), strict=True):
        requests[1].prompt_ids[:common] = request.prompt_ids[:common]
        requests[1].prompt_ids[common] = (request.prompt_ids[common] + 1) % 256
        assert new_tokens(requests) == (30 if common == 15 else 14)


@pytest.mark.parametrize("num_slots", [4, 16])
def test_every_stage_has_a_share(num_slots):
    scheduler, _ = make([9] * num_slots, num_slots=num_slots, num_stages=4)
    entered = [scheduler.schedule() for _ in range(4)]
    assert sorted(sum(entered, [])) == list(range(num_slots))
    assert {len(slots) for slots in entered} == {num_slots // 4}
    assert scheduler.schedule() == []  # all are in the pipeline


@pytest.mark.parametrize("apart", [False, True])
def test_prompts_have_passes_of_their_own(apart):
    """Where passes are captured; elsewhere they share them, which reads the weights less often."""
    slots = LEAST_SHARE_ADMITTED
    scheduler, sequences = make([9 + i for i in range(3 * slots)], num_slots=slots,
                                prompts_apart=apart)  # fmt: skip
    mixed, finished, seen = 0, 0, set()
    while (entering := scheduler.schedule()) is not None:
        reads = sequences.has_prompt(torch.tensor(entering))
        mixed += bool(reads.any()) and not bool(reads.all())
        run_step(sequences, entering)
        seen |= {sequences.index[slot] for slot in entering}
        done = entering[: 1 + finished % 2] if not bool(reads.any()) or not apart else []
        finished += len(done)
        scheduler.retire(entering, done)
    assert finished == 3 * slots and seen == set(range(3 * slots))
    assert (mixed == 0) is apart


def test_requests_wait_until_some_slots_are_free():
    slots = 4 * LEAST_SHARE_ADMITTED
    scheduler, sequences = make([9] * (2 * slots), num_slots=slots, prompts_apart=True)
    entering = scheduler.schedule()
    run_step(sequences, entering)
    for number in range(1, 5):
        scheduler.retire(entering, [entering[-1]])
        entering = scheduler.schedule()
        has_prompt = bool(sequences.has_prompt(torch.tensor(entering)).any())
        assert has_prompt is (number == 4), number  # four of 32 slots
    assert len(entering) == 4


def test_the_last_sequences_do_not_wait():
    """Nothing else is active, so a single free slot is enough."""
    scheduler, sequences = make([9] * 17, num_slots=16, prompts_apart=True)
    entering = scheduler.schedule()
    run_step(sequences, entering)
    scheduler.retire(entering, entering)
    assert scheduler.schedule() == [0]


def test_short_prompts_are_whole_blocks():
    """Of at most one block before the current one: they join the others."""
    scheduler, sequences = make([1, 7, 8], num_slots=3, prompts_apart=True)
    entering = scheduler.schedule()
    assert entering == [2]
    assert sequences.has_prompt(torch.tensor([0, 1, 2])).tolist() == [False, False, True]
    run_step(sequences, entering)
    scheduler.retire(entering, [])
    assert scheduler.schedule() == [0, 1, 2]


def test_long_prompts_do_not_leave_slots_empty(monkeypatch):
    """One prompt fills a pass; once begun, admission goes on until every slot is taken."""
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 9)
    slots = 4 * LEAST_SHARE_ADMITTED
    scheduler, sequences = make([9] * (2 * slots), num_slots=slots, prompts_apart=True)
    entered = []
    while len(entered) < slots:
        entering = scheduler.schedule()
        assert len(entering) == 1
        entered += entering
        run_step(sequences, entering)
        scheduler.retire(entering, [])
    while sequences.has_prompt(torch.tensor(entering := scheduler.schedule())).any():
        run_step(sequences, entering)
        scheduler.retire(entering, [])
    scheduler.retire(entering, entering[:4])
    admitted = [scheduler.schedule() for _ in range(4)]
    assert [len(slots) for slots in admitted] == [1, 1, 1, 1]
