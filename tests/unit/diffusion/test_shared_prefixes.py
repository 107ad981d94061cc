"""Shared beginnings of documents against each document by itself."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.diffusion import shared_prefixes
from megatron_opdlm.diffusion.shared_prefixes import share_prefixes
from megatron_opdlm.diffusion.tags import DOCUMENT, LAST, NOISY, make_tags
from tests.oracle import dense_mask


def make_document(number, clean_ids, noisy_blocks, block_size):
    """Token ids and tags: clean tokens, then some of their blocks again as noisy ones."""
    length = len(clean_ids)
    positions = torch.tensor([p for p in range(length) if p // block_size in noisy_blocks]).long()
    tags = [
        make_tags(number, torch.arange(length), noisy=0, block_size=block_size),
        make_tags(number, positions, noisy=1, block_size=block_size),
    ]
    token_ids = torch.cat([torch.tensor(clean_ids).long(), torch.full_like(positions, 9)])
    return token_ids, torch.cat(tags)


def joined(documents):
    """Token ids and tags of all documents."""
    ids, tags = zip(*documents, strict=True)
    return torch.cat(ids), torch.cat(tags)


@st.composite
def some_documents(draw):
    """Documents over two tokens: many begin alike, some are equal, some are the start of others."""
    block_size = draw(st.integers(1, 4))
    documents = []
    for number in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
        noisy = draw(st.sets(st.integers(0, 3)))
        documents.append(make_document(number, ids, noisy, block_size))
    return documents


def check(documents, stream, from_document=0):
    """Every token has its own tags but those of the document, and sees what it saw."""
    token_ids, tags = joined(documents)
    assert torch.equal(token_ids[stream.kept][stream.place], token_ids)
    assert torch.equal(stream.tags[stream.place][:, NOISY:LAST], tags[:, NOISY:LAST])
    seen, start = dense_mask(stream.tags), 0
    for _, of_document in documents:
        places = stream.place[start : start + len(of_document)]
        assert len(places.unique()) == len(places), "tokens of one document are different ones"
        expected = dense_mask(of_document)
        assert torch.equal(seen[places][:, places], expected)
        assert torch.equal(seen[places].sum(1), expected.sum(1)), "no token of another document"
        start += len(of_document)


def fewest_tokens(documents):
    """Tokens of a stream that shares everything: a clean token is what comes before it, through its
    block."""
    distinct, noisy = set(), 0
    for ids, tags in documents:
        clean = int((tags[:, NOISY] == 0).sum())
        noisy += len(tags) - clean
        blocks = tags[:clean, 2].tolist()
        for place in range(clean):
            end = len([block for block in blocks if block <= blocks[place]])
            distinct.add((place, tuple(ids[:end].tolist())))
    return len(distinct) + noisy


@settings(max_examples=200, deadline=None)
@given(some_documents())
def test_everything_that_can_be_shared_is(documents):
    with mock.patch.object(shared_prefixes, "LEAST_SHARED", 1):
        stream = share_prefixes(*joined(documents))
    check(documents, stream)
    assert len(stream) == fewest_tokens(documents)
    assert stream.is_shared == (len(stream) < len(joined(documents)[0]))


@settings(max_examples=100, deadline=None)
@given(some_documents(), st.integers(2, 6))
def test_short_beginnings_are_repeated(documents, least):
    with mock.patch.object(shared_prefixes, "LEAST_SHARED", least):
        stream = share_prefixes(*joined(documents))
    check(documents, stream)
    assert fewest_tokens(documents) <= len(stream) <= len(joined(documents)[0])


def chat(number, system, rest):
    return make_document(number, [*range(100, 100 + system), *rest], set(), 1)


@pytest.mark.parametrize(("system", "saved"), [(15, 0), (16, 32), (17, 34)])
def test_only_long_beginnings_are_shared(system, saved):
    documents = [chat(i, system, [i, i, 7]) for i in range(3)]
    stream = share_prefixes(*joined(documents))
    assert len(stream) == 3 * (system + 3) - saved
    check(documents, stream)


def test_samples_of_a_prompt_share_it_and_all_prompts_the_system_message():
    """Two prompts of 20 + 16 tokens with two samples each; a third prompt alone."""
    prompts = [[1] * 16, [2] * 16, [3] * 16]
    documents = [
        chat(i, 20, [*prompts[which], 50 + i, 60 + i]) for i, which in enumerate([0, 1, 0, 1, 2])
    ]
    stream = share_prefixes(*joined(documents))
    assert len(stream) == 20 + 16 + 2 + 2 + 16 + 2 + 2 + 18
    check(documents, stream)
    of_first = stream.place[: 20 + 18]
    assert stream.tags[of_first][[0, 20, 36], DOCUMENT].tolist() == [0, 1, 2]
    assert stream.tags[of_first][[0, 20, 36], LAST].tolist() == [7, 3, 2]


def test_documents_that_share_nothing_stay_as_they_are():
    documents = [make_document(i, [9 - i] * 30, {1}, 4) for i in range(4)]
    token_ids, tags = joined(documents)
    stream = share_prefixes(token_ids, tags)
    assert not stream.is_shared and torch.equal(stream.tags, tags)
    assert torch.equal(stream.kept, torch.arange(len(tags)))


def test_documents_at_the_start_can_be_left_alone():
    documents = [chat(i, 20, [i]) for i in range(4)]
    token_ids, tags = joined(documents)
    stream = share_prefixes(token_ids, tags, from_document=2)
    assert len(stream) == 42 + 20 + 1 + 1
    assert torch.equal(stream.tags[:42], tags[:42])
    check(documents, stream)
    nothing = share_prefixes(token_ids, tags, from_document=4)
    assert torch.equal(nothing.tags, tags) and not nothing.is_shared


def test_no_documents():
    no_tags = make_tags(0, torch.arange(0), noisy=0, block_size=4)
    stream = share_prefixes(torch.empty(0, dtype=torch.int64), no_tags)
    assert len(stream) == 0 and stream.tags.shape == no_tags.shape and not stream.is_shared


def test_control_other_positions_or_blocks_are_not_shared():
    one, other = chat(0, 20, [1]), chat(1, 20, [1])
    for tag in (2, 3):
        moved = other[1].clone()
        moved[:, tag] += 1
        assert not share_prefixes(*joined([one, (other[0], moved)])).is_shared
    assert share_prefixes(*joined([one, other])).is_shared


def test_many_levels():
    """Each document is the start of the next one."""
    documents = [chat(i, 16 * (i + 1), []) for i in range(300)]
    stream = share_prefixes(*joined(documents))
    assert len(stream) == 16 * 300
    assert stream.tags[:, LAST].eq(stream.tags[-1, LAST]).sum() >= 16


def test_control_a_lost_part_is_noticed():
    documents = [chat(i, 20, [i]) for i in range(3)]
    stream = share_prefixes(*joined(documents))
    stream.tags[:20, LAST] -= 1
    with pytest.raises(AssertionError):
        check(documents, stream)
