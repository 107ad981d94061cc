"""What a rollout asks the engine for: whose noise is whose, and how long responses may be.

An engine that only writes down what it is asked for stands in for student and teacher.
"""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm.config.sections import ResponseLengthConfig, RolloutConfig
from megatron_opdlm.diffusion.trajectory import given_response
from megatron_opdlm.responses import student as student_module
from megatron_opdlm.responses import teacher as teacher_module
from megatron_opdlm.responses.file import ResponseFile
from megatron_opdlm.responses.given import DataResponses
from megatron_opdlm.responses.prompts import PromptTokens
from megatron_opdlm.responses.source import RolloutSchedule
from megatron_opdlm.responses.student import StudentResponses
from megatron_opdlm.responses.teacher import TeacherResponses
from megatron_opdlm.rollout.engine import RolloutCounts

MASK, START, END, RAMP, SAMPLES = 99, 3, 12, 4, 2
PROMPTS = [PromptTokens(index=i, id=f"p{i}", ids=torch.arange(1, 3 + i)) for i in range(3)]
SEEDS, STEPS = (1, 2), range(4)


def schedule(seed=1, prompts_per_rollout=3):
    lengths = ResponseLengthConfig(start=START, end=END, ramp_steps=RAMP, curve="linear")
    config = RolloutConfig(
        prompts_per_rollout=prompts_per_rollout,
        samples_per_prompt=SAMPLES,
        max_response_tokens=lengths,
    )
    return RolloutSchedule(prompts=PROMPTS, config=config, seed=seed, mask_token_id=MASK)


def answer(request):
    """A response as long as it may be, of tokens that say which request it answers."""
    ids = torch.full((request.response_limit,), 10 + len(request.prompt_ids) + request.sample)
    return given_response(
        request.prompt_id, request.sample, request.prompt_ids, ids,
        ended=False, block_size=1, mask_token_id=MASK,
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """Every request, in order."""
    requests = []

    def decode(engine, wanted, parallel, name):
        requests.extend(wanted)
        counts = RolloutCounts(passes=1, ticks=1, tokens=1, head_rows=1)
        return [answer(request) for request in wanted], counts

    for module in (student_module, teacher_module):
        monkeypatch.setattr(module, "decode", decode)
    return requests


def of_student(seed=1):
    layout = SimpleNamespace(refresh=lambda version: None, parallel=None)
    return StudentResponses(schedule(seed), None, layout, lambda: 0)


def of_teacher(path, seed=1):
    parallel = SimpleNamespace(is_main=True)
    teacher = SimpleNamespace(parallel=parallel, on_device=contextlib.nullcontext)
    file = ResponseFile(path, {"seed": seed}, vocab_size=100)
    return TeacherResponses(schedule(seed), None, teacher, file)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(teacher_module, "from_main", lambda work, *, is_main: work())


def test_every_response_of_a_student_has_noise_of_its_own(asked):
    """Another seed, rollout, prompt or sample is another key; the same ones are the same key."""
    for seed, step in itertools.product(SEEDS, STEPS):
        of_student(seed).collect(step)
    assert len(asked) == len(SEEDS) * len(STEPS) * len(PROMPTS) * SAMPLES
    assert len({request.key for request in asked}) == len(asked)
    again, asked[:] = list(asked), []
    of_student(SEEDS[1]).collect(STEPS[-1])
    assert [r.key for r in asked] == [r.key for r in again[-len(asked) :]]


def test_every_response_of_a_teacher_has_noise_of_its_own(asked, tmp_path):
    """There is one for a prompt and sample, whatever the rollout."""
    for seed in SEEDS:
        of_teacher(tmp_path / f"{seed}.jsonl", seed).collect(0)
    assert len(asked) == len(SEEDS) * len(PROMPTS) * SAMPLES
    assert len({request.key for request in asked}) == len(asked)
    keys = {(r.prompt_id, r.sample): r.key for r in asked[: len(asked) // 2]}
    asked.clear()
    of_teacher(tmp_path / "later.jsonl", SEEDS[0]).collect(STEPS[-1])
    assert {(r.prompt_id, r.sample): r.key for r in asked} == keys


def test_student_and_teacher_do_not_share_their_noise(asked, tmp_path):
    of_student().collect(0)
    of_teacher(tmp_path / "file.jsonl").collect(0)
    assert len({request.key for request in asked}) == len(asked) == 2 * len(PROMPTS) * SAMPLES


def test_a_student_writes_as_much_as_the_curriculum_has_it(asked):
    source = of_student()
    for step in (0, 1, RAMP, RAMP + 5):
        asked.clear()
        collected = source.collect(step)
        limit = schedule().response_limit(step)
        assert {r.response_limit for r in asked} == {limit}
        assert [t.num_response_tokens for t in collected.trajectories] == [limit] * len(asked)
    assert schedule().response_limit(0) == START < schedule().response_limit(RAMP) == END


def test_a_teacher_writes_to_the_end_of_the_curriculum_and_is_shown_as_far_as_it_goes(
    asked, tmp_path
):
    """Its response is decoded once, so it is as long as the last rollout wants it."""
    source = of_teacher(tmp_path / "file.jsonl")
    for step, limit in ((0, START), (1, schedule().response_limit(1)), (RAMP, END)):
        collected = source.collect(step)
        assert [t.num_response_tokens for t in collected.trajectories] == [limit] * 6
        assert {r.response_limit for r in asked} == {END}
    assert len(asked) == len(PROMPTS) * SAMPLES, "nothing is decoded twice"


def test_the_teachers_work_is_counted_in_the_first_epoch_alone(asked, tmp_path):
    """Also where the file has all responses already, so that runs which share it compare."""
    path = tmp_path / "file.jsonl"
    source = of_teacher(path)
    tokens = [source.collect(step).work.teacher_tokens for step in range(3)]
    whole = SAMPLES * sum(len(prompt.ids) + END - 1 for prompt in PROMPTS)
    assert tokens == [whole, 0, 0]
    asked.clear()
    assert of_teacher(path).collect(0).work.teacher_tokens == whole
    assert asked == [], "the file has them"


@pytest.mark.parametrize("write", ["student", "teacher"])
def test_a_trajectory_is_that_of_its_own_prompt_and_sample(write, asked, tmp_path):
    source = of_student() if write == "student" else of_teacher(tmp_path / "file.jsonl")
    collected = source.collect(0)
    rows = schedule().rows(0)
    assert [(t.prompt_id, t.sample) for t in collected.trajectories] == [
        (prompt.id, sample) for prompt, sample in rows
    ]
    for trajectory, (prompt, sample) in zip(collected.trajectories, rows, strict=True):
        assert torch.equal(trajectory.prompt_ids, prompt.ids)
        assert set(trajectory.text_ids.tolist()) == {10 + len(prompt.ids) + sample}


def test_a_rollout_holds_its_prompts_with_all_their_samples():
    wanted = schedule(prompts_per_rollout=2)
    rows = wanted.rows(0)
    assert [sample for _, sample in rows] == [0, 1, 0, 1]
    assert rows[0][0] is rows[1][0] and rows[2][0] is rows[3][0] and rows[0][0] is not rows[2][0]
    assert wanted.first_uses(0) == [True] * 4
    orders = {tuple(p.id for p, _ in schedule(seed).rows(0)) for seed in range(20)}
    assert len(orders) == 6, "the order is the seed's"


def test_responses_of_the_data_belong_to_their_prompts_and_are_cut_where_a_rollout_ends():
    texts = [torch.tensor([20 + i] * (START + i)) for i in range(len(PROMPTS))]
    source = DataResponses(schedule(), texts)
    for step, limit in ((0, START), (RAMP, END)):
        for trajectory in source.collect(step).trajectories:
            text = texts[int(trajectory.prompt_id[1:])]
            assert torch.equal(trajectory.text_ids, text[:limit])
            assert trajectory.ended == (len(text) <= limit)
