"""The teacher's weights in host memory: there in its phase only, and nothing is lost."""

import dataclasses

import pytest
import torch

from megatron_opdlm.checkpoint.layout import resolve_iteration
from megatron_opdlm.checkpoint.weights import freeze, load_model
from megatron_opdlm.distill.host_weights import HostWeights
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.model.gpt import BuildOptions
from tests.distributed.train.test_parallel_training import Recorder
from tests.helpers import run_ranks
from tests.teachers import LAYOUTS, UNTIED
from tests.tiny import VOCAB_SIZE


def with_offload(rank, make_config, layout):
    def offloaded(**values):
        config = make_config(**values)
        model = dataclasses.replace(config.model, teacher_offload=True)
        return dataclasses.replace(config, model=model)

    trainer = Recorder(offloaded(save=layout["save"], **layout["values"]))
    teacher, sizes_seen = trainer.teacher, []
    forward = type(teacher.model).forward

    def watched(model, *args, **kwargs):
        if model is teacher.model:
            sizes_seen.append(sum(p.numel() for p in model.parameters()))
        return forward(model, *args, **kwargs)

    type(teacher.model).forward = watched
    resting = {name for name, p in teacher.model.named_parameters() if p.numel()}
    trainer.train()
    still = {name for name, p in teacher.model.named_parameters() if p.numel()}
    return trainer.losses, resting, still, sizes_seen, teacher.host.num_bytes


@pytest.mark.parametrize(
    ("layout", "stays"),
    [("1", {"output_layer.weight"}), ("PP2, teacher TP2", set())],
)
def test_offloaded_weights_are_there_in_the_teachers_phase_only(layout, stays, teachers):
    """On a CPU, whose memory stands in for both; losses are those of a teacher that stays."""
    world_size, values = LAYOUTS[layout]
    work = {"save": teachers.folder / f"offload {layout}", "values": values}
    results = run_ranks(with_offload, world_size, teachers.config_of(UNTIED), work)
    (expected,) = teachers.run("1", UNTIED)
    for losses, resting, still, sizes_seen, num_bytes in results:
        torch.testing.assert_close(losses, expected["losses"], rtol=2e-6, atol=2e-6)
        assert resting == still == stays
        head = (VOCAB_SIZE + 83) * 48 if stays else 0  # 384 rows
        assert len(sizes_seen) >= 3
        assert set(sizes_seen) == {num_bytes // 4 + head}


def lent(rank, checkpoint):
    """Weights before, inside twice and outside, and whether they are copies."""
    parallel = process_groups.initialize()
    model, _ = load_model(resolve_iteration(checkpoint), BuildOptions(), parallel)
    freeze(model)
    before = [p.data.clone() for p in model.parameters()]
    host = HostWeights(model, keep=None, device="cpu")
    assert host.num_bytes == sum(part.nbytes for part in before)
    for _ in range(2):
        assert all(p.numel() == 0 for p in model.parameters())
        with pytest.raises(KeyError, match="a pass that fails"), host.on_device():
            assert all(map(torch.equal, model.parameters(), before))
            for parameter in model.parameters():
                parameter.data.zero_()  # on the device alone
            raise KeyError("a pass that fails gives the memory back, too")
    return True


def test_weights_are_lent_and_taken_back(teachers):
    assert run_ranks(lent, 1, teachers.models["student"].checkpoint) == [True]
