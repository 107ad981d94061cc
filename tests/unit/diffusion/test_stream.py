"""The attention predicate against loops over queries and keys, and packing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.diffusion.stream import Document, pack, packed_size
from megatron_opdlm.diffusion.tags import (
    BLOCK,
    DOCUMENT,
    LAST,
    NOISY,
    NUM_TAGS,
    POSITION,
    make_tags,
    visible,
)
from megatron_opdlm.model.flex import make_block_mask
from tests.oracle import dense_mask


def make_document(length, noisy_blocks, block_size, rows=(), num_states=1, first_id=0):
    """`length` clean tokens, and some of their blocks again as noisy ones, in each state."""
    noisy = [p for p in range(length) if p // block_size in noisy_blocks]
    positions = torch.tensor(noisy, dtype=torch.int64)
    parts = [
        make_tags(0, torch.arange(length), noisy=0, block_size=block_size),
        *(
            make_tags(0, positions, noisy=state + 1, block_size=block_size)
            for state in range(num_states)
        ),
    ]
    ids = first_id + torch.arange(length + num_states * len(noisy))
    return Document(
        token_ids=ids, tags=torch.cat(parts), loss_rows=torch.tensor(rows, dtype=torch.int64)
    )


@st.composite
def streams(draw, alike=False):
    """Several documents, clean or doubled, of lengths off the block grid too, with padding.

    They share nothing, or are of two kinds that begin alike.
    """
    block_size = draw(st.integers(1, 8))
    documents = []
    for _ in range(draw(st.integers(0, 4))):
        length = draw(st.integers(1, 40))
        kind = draw(st.integers(0, 1)) if alike else len(documents)
        blocks = draw(st.sets(st.integers(0, (length - 1) // block_size)))
        num_states = draw(st.integers(1, 3))
        size = length + num_states * sum(p // block_size in blocks for p in range(length))
        rows = sorted(draw(st.sets(st.integers(0, size - 1), max_size=5)))
        documents.append(make_document(length, blocks, block_size, rows, num_states, 1000 * kind))
    return documents, block_size, draw(st.sampled_from([1, 2, 16]))


@settings(max_examples=60, deadline=None)
@given(streams(alike=True))
def test_visible_equals_brute_force(drawn):
    documents, block_size, multiple = drawn
    tags = pack(documents, multiple=multiple).tags
    assert torch.equal(visible(tags, tags), dense_mask(tags).view(len(tags), len(tags)))


def mask_of(block_mask, length):
    """FlexAttention's mask_mod at every pair."""
    index = torch.arange(length)
    zero = torch.zeros((), dtype=torch.int64)
    return block_mask.mask_mod(zero, zero, index[:, None], index[None, :])


@settings(max_examples=15, deadline=None)
@given(streams(alike=True))
def test_flex_attention_mask_equals_visible(drawn):
    documents, block_size, multiple = drawn
    tags = pack(documents, multiple=multiple).tags
    if len(tags):
        assert torch.equal(mask_of(make_block_mask(tags), len(tags)), visible(tags, tags))


def squares(counts, indices):
    """[n, n] bool from FlexAttention's lists."""
    listed = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        listed[row, indices[0, 0, row, :count].long()] = True
    return listed


def check_squares(tags):
    """Nothing visible is skipped, nothing invisible is computed unmasked.

    Returns how many squares are computed, and how many hold a visible pair.
    """
    block_mask = make_block_mask(tags)
    partial = squares(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = squares(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    n = -(-len(tags) // 128)
    seen = torch.zeros(n * 128, n * 128, dtype=torch.bool)
    seen[: len(tags), : len(tags)] = visible(tags, tags)
    by_square = seen.view(n, 128, n, 128).transpose(1, 2).flatten(2)
    assert not bool((by_square.any(2) & ~(partial | full)).any()), "a visible pair is skipped"
    assert not bool((full & ~by_square.all(2)).any()), "an invisible pair is computed"
    assert not bool((partial & full).any()), "a square is computed twice"
    return int((partial | full).sum()), int(by_square.any(2).sum()), int(full.sum())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 500), st.sets(st.integers(0, 130), max_size=130), st.integers(1, 3)
        ),
        max_size=5,
    ),
    st.integers(1, 8),
    st.sampled_from([1, 16, 128]),
    st.booleans(),
)
def test_flex_attention_squares(parts, block_size, multiple, alike):
    documents = [
        make_document(
            length,
            {b for b in blocks if b * block_size < length},
            block_size,
            num_states=num_states,
            first_id=0 if alike else 1000 * index,
        )
        for index, (length, blocks, num_states) in enumerate(parts)
    ]
    check_squares(pack(documents, multiple=multiple).tags)


def test_flex_attention_squares_of_a_block_as_wide_as_a_square():
    """A square of noisy queries does not see the square of clean keys of its own block."""
    check_squares(pack([make_document(256, {1}, 128)]).tags)


def test_flex_attention_skips_most_of_what_nobody_sees():
    documents = [make_document(512, set(range(64, 128)), 4, first_id=1000 * i) for i in range(6)]
    computed, needed, full = check_squares(pack(documents).tags)
    assert needed <= computed < 1.3 * needed and full > needed / 4


def test_block_size_one_is_causal():
    tags = pack([make_document(9, set(), 1)]).tags
    assert torch.equal(visible(tags, tags), torch.ones(9, 9).tril().bool())
    # control: block size 2 is not
    tags = pack([make_document(9, set(), 2)]).tags
    assert not torch.equal(visible(tags, tags), torch.ones(9, 9).tril().bool())


@pytest.mark.parametrize("part", ["document", "noisy", "block", "last"])
def test_control_every_tag_matters(part):
    """Brute force and predicate part as soon as a tag is lost."""
    one, other = make_document(24, {5}, 4), make_document(28, {5}, 4)
    other.token_ids[16:] += 100
    stream = pack([one, other])
    assert bool((stream.tags[:, LAST] > stream.tags[:, DOCUMENT]).any())
    broken = stream.tags.clone()
    broken[:, {"document": DOCUMENT, "noisy": NOISY, "block": BLOCK, "last": LAST}[part]] = 0
    assert not torch.equal(visible(broken, broken), dense_mask(stream.tags))


def test_visible_broadcasts():
    tags = pack([make_document(8, {1}, 4)]).tags
    whole = visible(tags, tags)
    batch = visible(tags.view(3, 4, NUM_TAGS), tags.expand(3, -1, -1))
    assert torch.equal(batch.flatten(0, 1), whole)


@settings(max_examples=60, deadline=None)
@given(streams())
def test_pack(drawn):
    documents, block_size, multiple = drawn
    stream = pack(documents, multiple=multiple)
    length = sum(map(len, documents))
    assert len(stream) % multiple == 0 and len(stream) > 0
    assert len(stream) - stream.num_padding == length
    assert stream.num_padding < multiple or length == 0
    assert bool((stream.tags[length:, DOCUMENT] == -1).all())
    offset, rows = 0, []
    for index, document in enumerate(documents):
        part = slice(offset, offset + len(document))
        assert torch.equal(stream.token_ids[part], document.token_ids)
        assert torch.equal(stream.tags[part, NOISY:LAST], document.tags[:, NOISY:LAST])
        assert bool((stream.tags[part][:, [DOCUMENT, LAST]] == index).all())
        assert bool((document.tags[:, DOCUMENT] == 0).all()), "packing changes no document"
        rows += [offset + row for row in document.loss_rows.tolist()]
        offset += len(document)
    assert stream.loss_rows.tolist() == rows
    moved = stream.to("cpu")
    assert torch.equal(moved.tags, stream.tags) and moved.num_padding == stream.num_padding


@settings(max_examples=60, deadline=None)
@given(streams(alike=True))
def test_pack_documents_that_begin_alike(drawn):
    """Loss rows are the documents' own tokens, wherever these are now."""
    documents, _, multiple = drawn
    stream = pack(documents, multiple=multiple)
    rows = [document.token_ids[document.loss_rows] for document in documents]
    assert (
        stream.token_ids[stream.loss_rows].tolist() == torch.cat([*rows, torch.empty(0)]).tolist()
    )
    positions = [document.tags[document.loss_rows, POSITION] for document in documents]
    packed = stream.tags[stream.loss_rows, POSITION]
    assert packed.tolist() == torch.cat([*positions, torch.empty(0)]).tolist()
    assert len(stream) % multiple == 0 and stream.num_padding <= multiple


def test_padding_sees_itself_and_is_seen_by_nobody():
    tags = pack([make_document(5, set(), 4)], multiple=8).tags
    seen = visible(tags, tags)
    assert not bool(seen[:5, 5:].any()) and not bool(seen[5:, :5].any())
    assert bool(seen[5:].any(1).all())  # a softmax over nothing would be NaN


def test_nothing_to_pack_gives_padding():
    stream = pack([], multiple=2)
    assert len(stream) == stream.num_padding == 2 and len(stream.loss_rows) == 0
    assert len(pack([])) == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.lists(st.sets(st.integers(0, 4)), max_size=3), st.booleans())
def test_packed_size(block_size, noisy_blocks, alike):
    """Counted one by one; blocks are whole, as rollouts leave them."""
    documents = [
        make_document(5 * block_size, noisy, block_size, first_id=0 if alike else 1000 * i)
        for i, noisy in enumerate(noisy_blocks)
    ]
    stream = pack(documents, multiple=3)
    tags = stream.tags[: len(stream) - stream.num_padding]
    size = packed_size(documents, multiple=3, block_size=block_size)
    assert size.num_tokens == len(stream)
    assert size.attention_pairs == int(dense_mask(tags).sum())


def test_size_of_a_causal_stream():
    documents = [make_document(length, set(), 1, first_id=100 * length) for length in (7, 1)]
    assert packed_size(documents, multiple=1, block_size=1).attention_pairs == 28 + 1


def test_tags_must_match_the_tokens():
    with pytest.raises(AssertionError, match="one row of tags"):
        Document(
            token_ids=torch.arange(3),
            tags=make_tags(0, torch.arange(2), noisy=False, block_size=1),
            loss_rows=torch.arange(1),
        )


def test_make_tags():
    tags = make_tags(3, torch.tensor([6, 7, 8]), noisy=True, block_size=4)
    assert tags[:, POSITION].tolist() == [6, 7, 8] and tags[:, BLOCK].tolist() == [1, 1, 2]
    assert tags[:, DOCUMENT].tolist() == [3, 3, 3] and tags[:, NOISY].tolist() == [1, 1, 1]
