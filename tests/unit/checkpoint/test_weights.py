"""What is read must be all of the model, and a teacher is frozen."""

import pytest
import torch

from megatron_opdlm.checkpoint.weights import freeze, take_weights


def make_model():
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(), torch.nn.Linear(3, 1))


def test_a_frozen_model_has_no_gradients_and_no_dropout():
    model = make_model()
    assert all(p.requires_grad for p in model.parameters()) and model.training  # control
    assert freeze(model) is model
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_all_weights_are_taken():
    model, other = make_model(), make_model()
    take_weights(model, other.state_dict() | {"0._extra_state": None})
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("missing", ["0.weight", "2.bias"])
def test_a_tensor_that_only_one_of_both_has_is_named(missing):
    """A model that keeps what it was made with would be random, and nobody would notice."""
    state = make_model().state_dict()
    with pytest.raises(ValueError, match=f"the checkpoint and the model differ in {missing}"):
        take_weights(make_model(), {name: v for name, v in state.items() if name != missing})
    with pytest.raises(ValueError, match="differ in 9.weight"):
        take_weights(make_model(), state | {"9.weight": torch.ones(1)})
