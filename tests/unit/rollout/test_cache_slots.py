"""How many sequences a cache has room for, the spare one of captured passes among them."""

import itertools

import pytest

from megatron_opdlm.rollout.cache_size import LEAST_BESIDE_SPARE, share_slots, slot_capacity


def test_examples_of_the_documentation():
    assert [share_slots(*a, None) for a in ((2, 2), (3, 2), (9, 99))] == [
        (2, False), (2, True), (8, True),
    ]  # fmt: skip
    assert [slot_capacity(n, on_cuda=True) for n in (1, 256, 257)] == [256, 256, 512]
    assert [slot_capacity(n, on_cuda=False) for n in (1, 257)] == [1, 257]


@pytest.mark.parametrize("has_spare", [None, True, False])
def test_all_slots_fit_and_none_is_wasted(has_spare):
    """Sequences and spare slot are never more than there is memory for; what is asked for, no more,
    is decoded at once, and everything that fits beside the spare slot.
    """
    for num_fit, most in itertools.product(range(1, 30), range(1, 30)):
        slots, spare = share_slots(num_fit, most, has_spare)
        assert slots + spare <= num_fit and slots <= most, "beyond the limit"
        assert slots == min(most, num_fit - spare)
        assert has_spare in (None, spare), "what was asked for"


def test_nobody_gives_up_one_of_a_few_sequences_for_a_spare_slot():
    for num_fit, most in itertools.product(range(1, 30), range(1, 30)):
        slots, spare = share_slots(num_fit, most, None)
        without, _ = share_slots(num_fit, most, False)
        costs_one = slots < without
        assert not costs_one or slots >= LEAST_BESIDE_SPARE
        assert spare or num_fit <= most, "there was room for it"
        assert spare or num_fit <= LEAST_BESIDE_SPARE, "it was one of many"


def test_control_a_spare_slot_takes_room():
    assert share_slots(5, 5, True) == (4, True)
    assert share_slots(1, 5, True) == (0, True), "which is refused"
