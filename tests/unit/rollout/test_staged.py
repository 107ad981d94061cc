"""Tensors that travel together are what they were."""

import pytest
import torch

from megatron_opdlm.rollout.staged import Staged

TENSORS = {
    "odd bytes": torch.tensor([True, False, True]),
    "words": torch.arange(6, dtype=torch.int32).view(2, 3),
    "nothing": torch.empty(0, 4, dtype=torch.int64),
    "keys": torch.tensor([2**63 - 1, -(2**63), 5]),
    "last": torch.tensor([7], dtype=torch.int32),
}


def same(staged, tensors):
    return all(
        staged[name].dtype == tensor.dtype and torch.equal(staged[name], tensor)
        for name, tensor in tensors.items()
    )


def test_values_shapes_and_types():
    staged = Staged(TENSORS, "cpu")
    assert same(staged, TENSORS)
    first = dict(list(TENSORS.items())[:3])
    assert same(staged.only(first), first)
    with pytest.raises(KeyError):
        staged.only(first)["keys"]
    with pytest.raises(AssertionError):
        staged.only(["words"])  # not the first


def test_a_clone_is_filled_anew():
    staged, other = Staged(TENSORS, "cpu"), {name: t.clone() for name, t in TENSORS.items()}
    other["words"] += 100
    clone, view = staged.clone(), staged["words"]
    kept = clone["words"]
    clone.copy_from(Staged(other, "cpu"))
    assert same(clone, other) and torch.equal(kept, other["words"])  # its views follow
    assert torch.equal(view, TENSORS["words"])  # the first stays
    with pytest.raises(AssertionError, match="its own shapes"):
        clone.copy_from(Staged(TENSORS | {"last": torch.tensor([7, 8])}, "cpu"))
