"""opdlm_off, off_policy and sft: losses against dense ones, responses, layouts, resuming."""

import functools
import json
import os
import signal

import pytest
import torch
from transformers import AutoTokenizer

import megatron_opdlm.trainer as trainer_module
from megatron_opdlm.convert.hf import read_config
from megatron_opdlm.schedules import response_limit
from megatron_opdlm.state_selection import NoisyStates, select_states
from megatron_opdlm.trainer import Trainer
from tests.distributed.test_checkpoint import records
from tests.distributed.test_parallel_training import (
    LAYOUTS,
    NOT_MASK,
    Recorder,
    largest_relative_difference,
    whole,
)
from tests.helpers import run_ranks
from tests.oracle import hf_logits, load_hf
from tests.rollouts import MASK, same
from tests.tiny import tiny_model, write_prompts
from tests.training import tiny_config

END = 256  # <|im_end|>
METHODS = {
    "opdlm_off": {"method": "opdlm_off"},
    "off_policy": {"method": "off_policy"},
    "sft": {"method": "sft", "eos_loss": "exclude"},
    "sft from data": {"method": "sft", "sft_responses": "data", "loss_reduction": "token_mean"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp(), seed=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prompts with responses of many lengths, beyond the limit too."""
    path = write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")
    letters = [chr(c) for c in range(ord("a"), ord("z"))]
    texts = ["".join(letters[(i * j) % 7] for j in range(1 + 2 * i)) for i in range(16)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line | {"response": text} for line, text in zip(lines, texts, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def make_config(model, teacher, data):
    # Rows in the rollout's order, so that the first optimizer step is that of the first four.
    return functools.partial(
        tiny_config, model.checkpoint, data, teacher=teacher.checkpoint, group_by_length=False
    )


class Watched(Recorder):
    """Remembers states, and how many responses the teacher decoded."""

    def __init__(self, config):
        super().__init__(config)
        self.states, self.num_decoded = [], 0
        if config.distill.responses == "teacher":
            stream = self.source._engine.stream

            def counting(queue):
                self.num_decoded += len(queue.requests)
                return stream(queue)

            self.source._engine.stream = counting

    def select_states(self, trajectories):
        def remember(trajectory, **kwargs):
            self.states.append(select_states(trajectory, **kwargs))
            return self.states[-1]

        trainer_module.select_states = remember
        return super().select_states(trajectories)


def run(rank, make_config, save, values):
    trainer = Watched(make_config(save=save, **values))
    trainer.train()
    return {
        "losses": trainer.losses,
        "grad_norms": trainer.grad_norms,
        "rollouts": trainer.rollouts,
        "states": trainer.states,
        "gradient": trainer.first,
        "weights": trainer.pieces("data"),
        "work": trainer.work.to_json(),
        "num_decoded": trainer.num_decoded,
        "has_teacher": trainer.teacher is not None,
    }


@pytest.fixture(scope="module")
def runs(make_config, tmp_path_factory):
    """(layout, method) -> results of its ranks; each run once."""
    folder = tmp_path_factory.mktemp("methods")

    @functools.cache
    def run_once(layout, method):
        world_size, values = LAYOUTS[layout]
        save = folder / f"{layout} {method}"
        return run_ranks(run, world_size, make_config, save, values | METHODS[method])

    run_once.folder = folder
    return run_once


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        *((layout, method) for layout in ("TP2", "PP2") for method in METHODS),
        ("DP2", "off_policy"),
        ("DP2 distributed optimizer", "sft"),
        ("TP2 x PP2, rollouts on DP4", "off_policy"),
    ],
)
def test_layouts_agree_with_one_process(layout, method, runs, model):
    (expected,), results = runs("1", method), runs(layout, method)
    assert len(expected["losses"]) == 6
    for result in results:
        for got, want in zip(result["rollouts"], expected["rollouts"], strict=True):
            assert len(got) == len(want) == 12 and all(map(same, got, want))
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=0, atol=1e-5)
        torch.testing.assert_close(result["grad_norms"], expected["grad_norms"], rtol=1e-4, atol=0)
        for counter in ("response_tokens", "teacher_head_rows", "student_attention_pairs"):
            assert result["work"][counter] == expected["work"][counter]
    config = read_config(model.hf)
    name, worst = largest_relative_difference(
        whole(results, "weights", config), whole([expected], "weights", config)
    )
    assert worst < 5e-5, name


def dense_loss(method, student, teacher, trajectories, states):
    """Loss of one optimizer step in float64: a doubled sequence per row, dense masks."""
    is_distilled = method in ("opdlm_off", "off_policy")
    sums, counts = [], []
    for trajectory, state in zip(trajectories, states, strict=True):
        size, start = trajectory.block_size, trajectory.first_block * trajectory.block_size
        length, prompt = len(trajectory.token_ids), len(trajectory.prompt_ids)
        end = prompt + trajectory.num_response_tokens
        if method == "sft" and trajectory.ended:  # eos_loss: exclude
            end -= 1
        masked, time = state.masked[0].flatten(), state.time[0]
        noisy = range(start, length)
        shown = [MASK if masked[p - start] else int(trajectory.token_ids[p]) for p in noisy]
        tags = [[0, 0, p // size, p] for p in range(length)]
        tags += [[0, 1, p // size, p] for p in noisy]
        ids = torch.cat([trajectory.token_ids, torch.tensor(shown, dtype=torch.int64)])
        logits = hf_logits(student, ids, torch.tensor(tags))
        logits[:, MASK] = -torch.inf
        log_q = logits.log_softmax(-1)
        causal = torch.tensor([[0, 0, p, p] for p in range(length)])
        with torch.no_grad():
            log_p = hf_logits(teacher, trajectory.token_ids, causal)[:, NOT_MASK].log_softmax(-1)
        losses = []
        for p in noisy:
            if not masked[p - start] or p >= end:
                continue
            row = log_q[length + p - start]
            if is_distilled:
                losses.append((log_p[p - 1].exp() * (log_p[p - 1] - row[NOT_MASK])).sum())
            else:
                cross_entropy = -row[trajectory.token_ids[p]]
                losses.append(cross_entropy / time[p // size - trajectory.first_block].double())
        sums.append(sum(losses))
        counts.append(len(losses) if is_distilled else end - prompt)
    if method == "sft from data":  # token_mean
        return sum(sums) / sum(counts)
    means = [one / count for one, count in zip(sums, counts, strict=True) if count]
    return sum(means) / len(means)


@pytest.mark.parametrize("method", METHODS)
def test_loss_is_the_dense_one(method, runs, model, teacher):
    (result,) = runs("1", method)
    student, frozen = (load_hf(path.hf, torch.float64) for path in (model, teacher))
    step = result["rollouts"][0][:4], result["states"][:4]
    assert sum(int(state.masked.sum()) for state in step[1]) > 10
    loss = dense_loss(method, student, frozen, *step)
    assert result["losses"][0] == pytest.approx(loss.item(), rel=2e-6)
    loss.backward()
    expected = {name: p.grad for name, p in student.named_parameters()}
    got = whole([result], "gradient", read_config(model.hf))
    name, worst = largest_relative_difference({n: g.double() for n, g in got.items()}, expected)
    assert worst < 2e-4, name
    # control: other masks give another loss
    fewer = [NoisyStates(s.masked & (torch.arange(4) > 0), s.time) for s in step[1]]
    with torch.no_grad():
        other = dense_loss(method, student, frozen, step[0], fewer)
    assert abs(float(other) - result["losses"][0]) > 1e-3


def test_methods_differ_in_what_they_should(runs):
    (on,), (off,), (sft,), (given,) = (runs("1", method) for method in METHODS)
    assert not any(map(same, on["rollouts"][0], off["rollouts"][0]))
    assert on["work"]["rollout_tokens"] > 0 == on["num_decoded"]
    assert off["has_teacher"] and sft["has_teacher"] and not given["has_teacher"]
    for one, other in zip(off["rollouts"], sft["rollouts"], strict=True):
        assert all(map(same, one, other))  # the same teacher, the same keys
    assert off["losses"] != sft["losses"]
    assert all(bool(s.masked.any(-1).all()) for s in off["states"])
    assert not all(bool(s.masked.any(-1).all()) for s in sft["states"])  # no forced mask
    for result in (off, sft, given):
        assert result["work"]["rollout_tokens"] == 0
    assert given["work"]["teacher_tokens"] == 0
    assert 0 < sft["work"]["teacher_tokens"] < off["work"]["teacher_tokens"]
    assert sft["num_decoded"] == 24 and given["num_decoded"] == 0


def test_responses_of_the_data(runs, data, model):
    """Token for token, one end of sequence, cut at the curriculum's limit."""
    texts = {e["id"]: e["response"] for e in map(json.loads, data.read_text().splitlines())}
    tokenizer = AutoTokenizer.from_pretrained(model.hf)
    (result,) = runs("1", "sft from data")
    seen = set()
    for step, trajectories in enumerate(result["rollouts"]):
        limit = response_limit(step, start=9, end=14, ramp_steps=2, curve="cos")
        for trajectory in trajectories:
            text = texts[trajectory.prompt_id]
            expected = [*tokenizer.encode(text, add_special_tokens=False), END]
            assert trajectory.text_ids.tolist() == expected[:limit]
            assert trajectory.ended == (len(expected) <= limit)
            seen.add(trajectory.ended)
    assert seen == {True, False}


# --- the file of responses ---


def test_responses_are_decoded_once(runs, make_config, tmp_path):
    """A second run with the file decodes nothing, and is the same run to the last bit."""
    file = tmp_path / "shared.jsonl"
    values = METHODS["off_policy"] | {"teacher_responses": file}
    (first,) = run_ranks(run, 1, make_config, tmp_path / "first", values)
    text = file.read_bytes()
    assert len(text.splitlines()) == 1 + 24 == 1 + first["num_decoded"]
    assert not (tmp_path / "first" / "teacher_responses.jsonl").exists()
    for method in ("off_policy", "sft"):
        shared = METHODS[method] | {"teacher_responses": file}
        results = run_ranks(run, 2, make_config, tmp_path / method, shared)
        assert [result["num_decoded"] for result in results] == [0, 0]
        assert file.read_bytes() == text
    (again,) = run_ranks(run, 1, make_config, tmp_path / "again", values)
    assert again["losses"] == first["losses"] and again["work"] == first["work"]
    # Control: what is in the file is what is trained on.
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines[1:]:
        line["response_ids"] = line["response_ids"][::-1]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (other,) = run_ranks(run, 1, make_config, tmp_path / "other", values)
    assert other["losses"] != first["losses"]


def start(rank, make_config, save, values):
    try:
        Trainer(make_config(save=save, **values))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"temperature": 0.5}, "temperature was 1.0 and is now 0.5"),
        ({"seed": 9}, "seed was 1234 and is now 9"),
        ({"max_response_tokens__end": 15}, "response_limit was 14 and is now 15"),
        ({"teacher": None}, "teacher was "),
    ],
)
def test_a_file_of_other_settings_is_refused(change, text, runs, model, tmp_path, make_config):
    runs("1", "off_policy")
    file = runs.folder / "1 off_policy" / "teacher_responses.jsonl"
    values = METHODS["off_policy"] | {"teacher_responses": file}
    if "teacher" in change:
        change = {"teacher": model.checkpoint}  # the student's own weights
    messages = run_ranks(start, 2, make_config, tmp_path / "two", values | change)
    assert all(text in message and "\n" not in message for message in messages)


# --- killed and resumed ---


class Killed(Trainer):
    """Dies in the second rollout, its responses decoded and on disk, between two steps."""

    def log_step(self, rows, grad_norm, lr):
        super().log_step(rows, grad_norm, lr)
        if self.optimizer.num_steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def train(rank, make_config, save, values, cls=Trainer):
    cls(make_config(save=save, **values)).train()


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(method, make_config, tmp_path):
    values = METHODS[method] | {"train_rollouts": 3, "save_interval": 1, "lr_decay_steps": 9}
    run_ranks(train, 1, make_config, tmp_path / "whole", values)
    with pytest.raises(AssertionError, match="rank 0 died without a result"):
        run_ranks(train, 1, make_config, tmp_path / "killed", values, Killed)
    file = tmp_path / "killed" / "teacher_responses.jsonl"
    if method in ("off_policy", "sft"):
        assert len(file.read_text().splitlines()) == 1 + 24
        file.write_bytes(file.read_bytes()[:-9])  # and the last line was torn
    run_ranks(train, 1, make_config, tmp_path / "killed", values)
    expected = records(tmp_path / "whole")
    assert records(tmp_path / "killed") == expected
    # Two rollouts are an epoch with some prompts left: the third takes old ones and new ones.
    assert [r["perf/tokens_teacher"] for r in expected if "perf/tokens_teacher" in r]
    has_speed = any("rollout/tokens_per_forward" in record for record in expected)
    assert has_speed == (method == "opdlm_off")
    if method in ("off_policy", "sft"):
        one, other = (tmp_path / name / "teacher_responses.jsonl" for name in ("whole", "killed"))
        assert sorted(one.read_text().splitlines()) == sorted(other.read_text().splitlines())


# --- states without any loss ---


class FewMasks(Trainer):
    """Nothing is masked in the first optimizer step of every rollout."""

    def collect(self):
        count, choose = iter(range(12)), select_states

        def first_four_unmasked(trajectory, **kwargs):
            states = choose(trajectory, **kwargs)
            if next(count) < 4:
                absent = trajectory.token_ids[-states.masked[0].numel() :] == MASK
                states.masked[:] = absent.view_as(states.masked[0])
            return states

        trainer_module.select_states = first_four_unmasked
        return super().collect()


def test_steps_without_loss_are_left_out_and_counted(make_config, tmp_path):
    for world_size in (1, 2):
        save = tmp_path / str(world_size)
        run_ranks(train, world_size, make_config, save, METHODS["sft from data"], FewMasks)
        found = records(save)
        rollouts = [r for r in found if "rollout/batches_without_loss" in r]
        assert [r["rollout/batches_without_loss"] for r in rollouts] == [1, 1]
        assert all(r["rollout/states_without_loss"] >= 4 for r in rollouts)
        losses = [r["train/loss"] for r in found if "train/loss" in r]
        assert len(losses) == 4 and all(loss > 0 for loss in losses)


# --- bad data ---


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({}, ":3: response=null must be text"),
        ({"response": "  "}, ':3: response="  " must be text, and not empty'),
        ({"response": ["a"]}, ':3: response=["a"] must be text'),
        ({"response": "a<|MASK|>"}, ":3: response holds the mask token '<|MASK|>'"),
        ({"response": "a<|im_end|>"}, ":3: response holds the end-of-sequence token '<|im_end|>'"),
    ],
)
def test_bad_responses_name_file_and_line(entry, text, make_config, data, tmp_path):
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines[2] = {k: v for k, v in lines[2].items() if k != "response"} | entry
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(line) + "\n" for line in lines))
    of_bad = functools.partial(tiny_config, make_config.args[0], bad)
    messages = run_ranks(start, 2, of_bad, tmp_path / "run", METHODS["sft from data"])
    assert all(f"{bad}{text}" in message and "\n" not in message for message in messages)
