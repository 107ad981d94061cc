"""Which process of a job the environment says that this is."""

import pytest
import torch.distributed as dist

from megatron_opdlm.distributed import process_groups
from megatron_opdlm.distributed.launch import Launch, read_launch
from tests.helpers import run_ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def set_environment(monkeypatch, given):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "a"}, {"LOCAL_RANK": "3"}])
def test_without_a_launcher_it_is_one_process(monkeypatch, given):
    set_environment(monkeypatch, given)
    assert read_launch() == Launch(rank=0, world_size=1, local_rank=0, has_launcher=False)


def test_a_launchers_variables_are_read(monkeypatch):
    set_environment(monkeypatch, WHOLE | {"LOCAL_RANK": "1"})
    assert read_launch() == Launch(rank=1, world_size=4, local_rank=1, has_launcher=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set .* without RANK and .* unset WORLD_SIZE,"),
        ({"RANK": "0"}, "RANK=0 is set .* without WORLD_SIZE and .* unset RANK,"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 are .* without MASTER"),
        (WHOLE | {"RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        (WHOLE | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two must be a whole number"),
        (WHOLE | {"RANK": "-1"}, "RANK=-1 must be a whole number"),
        (WHOLE | {"LOCAL_RANK": ""}, "LOCAL_RANK= must be a whole number"),
        (WHOLE | {"WORLD_SIZE": "9" * 5001}, "WORLD_SIZE=9+ must be a whole number"),
        (WHOLE | {"MASTER_PORT": "abc"}, "MASTER_PORT=abc must be a port"),
        (WHOLE | {"MASTER_PORT": "999999"}, "MASTER_PORT=999999 must be a port"),
        (WHOLE | {"MASTER_ADDR": ""}, "MASTER_ADDR is empty"),
    ],
)  # fmt: skip
def test_variables_that_contradict_each_other_are_refused(monkeypatch, given, message):
    set_environment(monkeypatch, given)
    with pytest.raises(ValueError, match=message):
        read_launch()


def test_a_job_is_not_joined_as_one_process_by_mistake(monkeypatch):
    def join(rank):
        dist.destroy_process_group()
        monkeypatch.setenv("WORLD_SIZE", "2")
        try:
            process_groups.initialize()
        except ValueError as error:
            return str(error)

    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert "WORLD_SIZE=2 is set in the environment without RANK" in run_ranks(join, 1)[0]
