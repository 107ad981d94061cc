"""opdlm_off, off_policy and sft: losses against dense ones, the same under every layout."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from megatron_opdlm.config import methods as records
from megatron_opdlm.config.schedules import response_limit
from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.noising import select_states
from megatron_opdlm.diffusion.state_selection import NoisyStates
from megatron_opdlm.model.hf_config import read_config
from tests.distributed.train.test_parallel_training import (
    NOT_MASK,
    largest_relative_difference,
    whole,
)
from tests.methods import METHODS
from tests.oracle import hf_logits, load_hf
from tests.rollouts import MASK, all_same

END = 256  # <|im_end|>


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        *((layout, method) for layout in ("TP2", "PP2") for method in METHODS),
        ("DP2", "off_policy"),
        ("DP2 distributed optimizer", "sft"),
        ("TP2 x PP2, rollouts on DP4", "off_policy"),
    ],
)
def test_layouts_agree_with_one_process(layout, method, methods):
    (expected,), results = methods.run("1", method), methods.run(layout, method)
    assert len(expected["losses"]) == 6
    for result in results:
        for got, want in zip(result["rollouts"], expected["rollouts"], strict=True):
            assert len(got) == len(want) == 12 and all_same(got, want)
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=0, atol=1e-5)
        torch.testing.assert_close(result["grad_norms"], expected["grad_norms"], rtol=1e-4, atol=0)
        for counter in ("response_tokens", "teacher_head_rows", "student_head_rows"):
            assert result["work"][counter] == expected["work"][counter]
    config = read_config(methods.model.hf)
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
        tags = [[0, 0, p // size, p, 0] for p in range(length)]
        tags += [[0, 1, p // size, p, 0] for p in noisy]
        ids = torch.cat([trajectory.token_ids, torch.tensor(shown, dtype=torch.int64)])
        logits = hf_logits(student, ids, torch.tensor(tags))
        logits[:, MASK] = -torch.inf
        log_q = logits.log_softmax(-1)
        causal = torch.tensor([[0, 0, p, p, 0] for p in range(length)])
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


def response_places(trajectory):
    """[N, K] bool: the places of the grid that are decoded, or would be."""
    return trajectory.commit_grid >= 0


@pytest.mark.parametrize("method", METHODS)
def test_loss_is_the_dense_one(method, methods):
    (result,) = methods.run("1", method)
    student, frozen = (load_hf(path.hf, torch.float64) for path in (methods.model, methods.teacher))
    step = result["rollouts"][0][:4], result["states"][:4]
    assert sum(int(state.masked.sum()) for state in step[1]) > 10
    loss = dense_loss(method, student, frozen, *step)
    assert result["losses"][0] == pytest.approx(loss.item(), rel=2e-6)
    loss.backward()
    expected = {name: p.grad for name, p in student.named_parameters()}
    got = whole([result], "gradient", read_config(methods.model.hf))
    name, worst = largest_relative_difference({n: g.double() for n, g in got.items()}, expected)
    assert worst < 2e-4, name
    # Control: with more masks the student sees less, and has to predict more. Every position is
    # masked now, so whatever was drawn, there are others than before.
    more = [NoisyStates(response_places(t)[None], s.time) for t, s in zip(*step, strict=True)]
    assert any(bool((m.masked > s.masked).any()) for m, s in zip(more, step[1], strict=True))
    with torch.no_grad():
        other = dense_loss(method, student, frozen, step[0], more)
    assert float(other) != pytest.approx(result["losses"][0], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_weighted_sum_of_the_divergences(method, methods):
    """What is logged of the rows is without their weights, which depend on the reduction."""
    (result,) = methods.run("1", method)
    assert len(result["rows"]) == len(result["losses"]) == 6
    for (weight, kl), loss in zip(result["rows"], result["losses"], strict=True):
        assert len(weight) == len(kl) > 1
        assert loss == pytest.approx(float((weight.double() * kl.double()).sum()), rel=1e-5)
        assert loss != pytest.approx(float(kl.sum()), rel=0.1)  # control


def test_every_method_is_trained_somewhere():
    """`opdlm` is what all other tests train with."""
    trained = {values["method"] for values in METHODS.values()} | {"opdlm"}
    assert trained == set(records.METHODS)


def test_methods_differ_in_what_they_should(methods):
    (on,), (off,), (sft,), (given,) = (methods.run("1", method) for method in METHODS)
    # Two models, two rules, noise of its own: one short response may be the same by chance, but not
    # all twelve; and a response that nobody denoised has one step.
    assert not all_same(on["rollouts"][0], off["rollouts"][0])
    assert max(int(t.num_steps.max()) for t in on["rollouts"][0]) > 1
    for result in (off, sft, given):
        assert all(bool((t.num_steps == 1).all()) for r in result["rollouts"] for t in r)
    assert on["work"]["rollout_tokens"] > 0 == on["num_decoded"]
    assert off["has_teacher"] and sft["has_teacher"] and not given["has_teacher"]
    for one, other in zip(off["rollouts"], sft["rollouts"], strict=True):
        assert all_same(one, other)  # the same teacher, the same keys
    assert off["losses"] != sft["losses"]
    for result in (off, sft, given):
        assert result["work"]["rollout_tokens"] == 0
    assert given["work"]["teacher_tokens"] == 0
    assert 0 < sft["work"]["teacher_tokens"] < off["work"]["teacher_tokens"]
    assert sft["num_decoded"] == 24 and given["num_decoded"] == 0


def drawn_states(result, at_least_one):
    """The masks of a run, drawn here once more: from seed, rollout, prompt and sample alone."""
    return [
        select_states(
            trajectory,
            state_selection="random",
            key=randomness.key(1234, "state", step, trajectory.prompt_id, trajectory.sample),
            at_least_one=at_least_one,
            mask_token_id=MASK,
        ).masked
        for step, trajectories in enumerate(result["rollouts"])
        for trajectory in trajectories
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_is_forced_in_every_block_but_for_the_nelbo(method, methods):
    """Masks that are forced and masks that are not are both drawn here; a run has one kind."""
    (result,) = methods.run("1", method)
    forced, free = (drawn_states(result, at_least_one) for at_least_one in (True, False))
    assert all(bool(masked.any(-1).all()) for masked in forced)
    expected, others = (free, forced) if method.startswith("sft") else (forced, free)
    got = [state.masked for state in result["states"]]
    assert len(got) == len(expected) == 24 and all(map(torch.equal, got, expected))
    assert not all(map(torch.equal, expected, others)), "the draws leave some block without a mask"


def test_responses_of_the_data(methods):
    """Token for token, one end of sequence, cut at the curriculum's limit."""
    texts = {e["id"]: e["response"] for e in map(json.loads, methods.data.read_text().splitlines())}
    tokenizer = AutoTokenizer.from_pretrained(methods.model.hf)
    (result,) = methods.run("1", "sft from data")
    seen, prompts = set(), set()
    for step, trajectories in enumerate(result["rollouts"]):
        limit = response_limit(step, start=9, end=14, ramp_steps=2, curve="cos")
        for trajectory in trajectories:
            text = texts[trajectory.prompt_id]
            expected = [*tokenizer.encode(text, add_special_tokens=False), END]
            assert trajectory.text_ids.tolist() == expected[:limit]
            assert trajectory.ended == (len(expected) <= limit)
            seen.add(trajectory.ended)
            prompts.add(trajectory.prompt_id)
    # The one epoch holds 12 of the 16 prompts, and at most 6 are within the limit of 10 tokens or
    # less: so at least 6 responses are cut, whatever the order.
    assert len(prompts) == 12 and False in seen
    assert sum(len(tokenizer.encode(text)) + 1 <= limit for text in texts.values()) <= 6
