"""The block grid is anchored at position 0."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_opdlm.diffusion.blocks import block_start, num_decoded_tokens, round_up

sizes = st.integers(1, 64)


@given(st.integers(0, 10_000), sizes)
def test_block_start(position, size):
    start = block_start(position, size)
    assert start <= position < start + size and start % size == 0


@given(st.integers(0, 10_000), sizes)
def test_round_up(length, multiple):
    rounded = round_up(length, multiple)
    assert length <= rounded < length + multiple and rounded % multiple == 0


@given(st.integers(1, 500), st.integers(1, 500), sizes)
def test_num_decoded_tokens(prompt, limit, size):
    decoded = num_decoded_tokens(prompt, limit, size)
    assert limit <= decoded < limit + size
    assert (prompt + decoded) % size == 0
    # Counted one by one: whole blocks until the limit is reached.
    end = block_start(prompt, size)
    while end < prompt + limit:
        end += size
    assert decoded == end - prompt
