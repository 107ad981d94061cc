"""The fingerprint of weights: of the weights alone, not of the layout or of the padding."""

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.checkpoint.layout import resolve_iteration
from megatron_opdlm.checkpoint.weights import freeze, load_model
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.model.fingerprint import fingerprint
from megatron_opdlm.model.gpt import BuildOptions
from tests.helpers import run_ranks
from tests.oracle import load_hf
from tests.tiny import VOCAB_SIZE

LAYOUTS = {2: [(2, 1), (1, 2), (1, 1)], 4: [(2, 2)]}
"""World size -> tensor and pipeline parallel sizes."""


def fingerprint_of(parallel, checkpoint, change=None):
    model, description = load_model(resolve_iteration(checkpoint), BuildOptions(), parallel)
    if change is not None:
        with torch.no_grad():
            change(model)
    return fingerprint(freeze(model), description.config)


def one_weight(model):
    weight = model.decoder.layers[0].mlp.linear_fc2.weight.data
    weight[3, 5] = torch.nextafter(weight[3, 5], weight.new_tensor(9.0))


def two_swapped(model):
    weight = model.decoder.layers[0].mlp.linear_fc2.weight.data
    weight[3, 5], weight[6, 5] = weight[6, 5].clone(), weight[3, 5].clone()


def padding(model):
    model.embedding.word_embeddings.weight.data[VOCAB_SIZE + 1 :] = 5.0


def changed(rank, checkpoints, changes):
    """(model, change) -> fingerprint."""
    parallel = process_groups.initialize()
    return {
        (name, change): fingerprint_of(parallel, checkpoint, change)
        for name, checkpoint in checkpoints.items()
        for change in changes
    }


def in_layouts(rank, checkpoints, layouts):
    """(model, layout) -> fingerprint."""
    first, found = process_groups.initialize(), {}
    for tp_size, pp_size in layouts:
        parallel = first
        if (tp_size, pp_size) != (1, 1):
            parallel = process_groups.second_layout(
                first,
                tensor_model_parallel_size=tp_size,
                pipeline_model_parallel_size=pp_size,
                prefix="teacher_",
            )
        for name, checkpoint in checkpoints.items():
            found[name, (tp_size, pp_size)] = fingerprint_of(parallel, checkpoint)
    return found


@pytest.fixture(scope="module")
def checkpoints(teachers):
    return {name: model.checkpoint for name, model in teachers.models.items()}


@pytest.fixture(scope="module")
def of_one_process(checkpoints):
    """(model, change) -> fingerprint."""
    changes = (None, padding, one_weight, two_swapped)
    return run_ranks(changed, 1, checkpoints, changes)[0]


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_the_fingerprint_is_the_same_in_every_layout(world_size, checkpoints, of_one_process):
    for found in run_ranks(in_layouts, world_size, checkpoints, LAYOUTS[world_size]):
        assert len(found) == len(checkpoints) * len(LAYOUTS[world_size])
        for (name, layout), value in found.items():
            assert value == of_one_process[name, None], layout


def test_the_fingerprint_is_that_of_the_weights(teachers, of_one_process):
    for name, model in teachers.models.items():
        found = of_one_process[name, None]
        assert found.num_parameters == sum(p.numel() for p in load_hf(model.hf).parameters())
        assert not found.not_finite
        assert of_one_process[name, padding] == found
        for change in (one_weight, two_swapped):
            assert of_one_process[name, change].digest != found.digest
    assert len({of_one_process[name, None].digest for name in teachers.models}) == 3


def replica_that_differs(model):
    if dist.get_rank() == 1:
        one_weight(model)


def test_ranks_that_disagree_are_found(checkpoints):
    student = {"student": checkpoints["student"]}
    with pytest.raises(AssertionError, match="ranks hold different values of decoder.layers.mlp"):
        run_ranks(changed, 2, student, [replica_that_differs])
