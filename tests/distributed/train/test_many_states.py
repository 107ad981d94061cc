"""Several noisy states of a response in one stream: loss and gradient are those of the states one
by one, each a dense doubled sequence of its own in float64."""

import dataclasses
import functools

import pytest
import torch

from megatron_opdlm.diffusion import shared_prefixes
from megatron_opdlm.diffusion.tags import DOCUMENT, LAST, NOISY
from megatron_opdlm.loss.reduction import LOSS_REDUCTIONS
from megatron_opdlm.model.hf_config import read_config
from tests.distributed.train.test_parallel_training import (
    LAYOUTS,
    NOT_MASK,
    largest_relative_difference,
    whole,
)
from tests.helpers import run_ranks
from tests.methods import Watched
from tests.oracle import hf_logits, load_hf
from tests.rollouts import MASK, all_same

TWO = {"states_per_response": 2}
CASES = {
    "per_block": {"state_selection": "per_block"} | TWO,
    "trajectory": {"state_selection": "trajectory"} | TWO,
    "random": {"method": "opdlm_off"} | TWO,
    "all": {"state_selection": "all", "confidence_threshold": 0.9},
    "sft": {"method": "sft"} | TWO,
}
LAYOUT_CASES = [("1", case) for case in CASES]
LAYOUT_CASES += [("TP2 sequence parallel", "per_block"), ("PP2", "random"), ("DP2", "all")]


# --- the trainer's way ---


def cut_to_one_token(trajectory):
    """The response ends with its first token, which carries no loss with `eos_loss: exclude`."""
    size = trajectory.block_size - len(trajectory.prompt_ids) % trajectory.block_size
    return dataclasses.replace(
        trajectory,
        response_ids=trajectory.response_ids[:size],
        commit_step=trajectory.commit_step[:size],
        num_response_tokens=1,
        ended=True,
    )


def step(rank, make_config, save, values):
    """Loss and gradient of one optimizer step, for every loss reduction."""
    shared_prefixes.LEAST_SHARED = 4  # the prompts are short; this is a process of its own
    values = values | {"micro_batch_tokens": 160, "use_distributed_optimizer": False}
    trainer = Watched(make_config(save=save, eos_loss="exclude", **values))
    trajectories = trainer.collect()[:8]
    trajectories[2] = cut_to_one_token(trajectories[2])
    states = trainer.select_states(trajectories)
    result = {"trajectories": trajectories, "states": trainer.states, "streams": []}
    for reduction in LOSS_REDUCTIONS:
        distill = dataclasses.replace(trainer.config.distill, loss_reduction=reduction)
        trainer.config = dataclasses.replace(trainer.config, distill=distill)
        runs = trainer.plan(states)
        microbatches = trainer.make_batch(states, runs)
        rows = trainer.run_student(microbatches, trainer.run_teacher(states, runs))
        result[reduction] = rows.loss, trainer.pieces("main_grad")
    result["streams"] = [batch.student.tags for batch in microbatches]
    return result


@pytest.fixture(scope="module")
def steps(methods):
    """(layout, case) -> results of the ranks, each made once."""

    @functools.cache
    def run_once(layout, case):
        world_size, values = LAYOUTS[layout]
        save = methods.folder / f"states {layout} {case}"
        return run_ranks(step, world_size, methods.make_config, save, values | CASES[case])

    return run_once


# --- brute force ---


def end_of_loss(trajectory):
    """The position after the last one that can carry loss."""
    return len(trajectory.prompt_ids) + trajectory.num_response_tokens - trajectory.ended


def losses_of(student, log_p, trajectory, masks, times):
    """Losses of the masked positions of noisy states [N, K] that stand side by side behind one
    clean part: one state is a doubled sequence; several see each other, which is wrong."""
    size, start = trajectory.block_size, trajectory.first_block * trajectory.block_size
    ids, length = trajectory.token_ids.tolist(), len(trajectory.token_ids)
    tokens, tags = list(ids), [[0, 0, p // size, p, 0] for p in range(length)]
    for mask in masks:
        shown = zip(ids[start:], mask.flatten().tolist(), strict=True)
        tokens += [MASK if is_masked else token for token, is_masked in shown]
        tags += [[0, 1, p // size, p, 0] for p in range(start, length)]
    logits = hf_logits(student, torch.tensor(tokens), torch.tensor(tags))
    valid = logits.new_zeros(logits.shape[1]).index_fill(0, torch.tensor(MASK), -torch.inf)
    log_q = (logits + valid).log_softmax(-1)
    losses = []
    for number, mask in enumerate(masks):
        for block, place in mask.nonzero().tolist():
            position = start + block * size + place
            if position >= end_of_loss(trajectory):
                continue
            row = log_q[length + number * (length - start) + position - start]
            if times is None:
                target = log_p[position - 1]
                losses.append((target.exp() * (target - row[NOT_MASK])).sum())
            else:
                losses.append(-row[ids[position]] / times[number][block].double())
    return losses


class Oracle:
    """Per response: the losses of its rows, state by state; reduced as `row_weights` says."""

    def __init__(self, methods, result, case):
        self.student, teacher = (
            load_hf(model.hf, torch.float64) for model in (methods.model, methods.teacher)
        )
        self.is_supervised = case == "sft"
        self.responses = []
        for trajectory, states in zip(result["trajectories"], result["states"], strict=True):
            causal = torch.tensor([[0, 0, p, p, 0] for p in range(len(trajectory.token_ids))])
            with torch.no_grad():
                logits = hf_logits(teacher, trajectory.token_ids, causal)
            log_p = logits[:, NOT_MASK].log_softmax(-1)
            self.responses.append((log_p, trajectory, states))

    @functools.cached_property
    def apart(self):
        """Every state in a sequence of its own: [response][state][row]."""
        return [[self._losses(*of, [m]) for m in range(len(of[2].masked))] for of in self.responses]

    @functools.cached_property
    def together(self):
        """The control: all states of a response in one sequence, where they see each other."""
        return [
            [self._losses(*of, range(len(of[2].masked))), *[[]] * (len(of[2].masked) - 1)]
            for of in self.responses
        ]

    def _losses(self, log_p, trajectory, states, chosen):
        times = [states.time[m] for m in chosen] if self.is_supervised else None
        masks = [states.masked[m] for m in chosen]
        return losses_of(self.student, log_p, trajectory, masks, times)

    def loss(self, responses, reduction):
        sums, counts = [], []
        for (_, trajectory, _), states in zip(self.responses, responses, strict=True):
            total, num_states = sum(sum(rows) for rows in states), len(states)
            count = sum(len(rows) for rows in states)
            if self.is_supervised:  # the NELBO: a mean over states, per token of the response
                total, num_states = total / num_states, 1
                count = end_of_loss(trajectory) - len(trajectory.prompt_ids)
            sums.append(total / num_states if reduction == "token_sum" else total)
            counts.append(count)
        if reduction == "token_sum":
            return sum(sums) / len(sums)
        if reduction == "token_mean":
            return sum(sums) / sum(counts)
        means = [total / count for total, count in zip(sums, counts, strict=True) if count]
        return sum(means) / len(means)

    def value_and_gradient(self, responses, reduction):
        loss, names = self.loss(responses, reduction), dict(self.student.named_parameters())
        gradients = torch.autograd.grad(loss, list(names.values()), retain_graph=True)
        return loss.item(), dict(zip(names, gradients, strict=True))


@pytest.fixture(scope="module")
def oracle_of(methods, steps):
    return functools.cache(lambda case: Oracle(methods, steps("1", case)[0], case))


# --- the comparison ---


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
@pytest.mark.parametrize(("layout", "case"), LAYOUT_CASES)
def test_a_step_is_that_of_single_states(layout, case, reduction, steps, oracle_of, methods):
    oracle, config, results = oracle_of(case), read_config(methods.model.hf), steps(layout, case)
    loss, gradient = oracle.value_and_gradient(oracle.apart, reduction)
    parts = results[:1] if layout == "DP2" else results  # replicas hold the same sum
    pieces = [{"gradient": result[reduction][1]} for result in parts]
    got = {name: g.double() for name, g in whole(pieces, "gradient", config).items()}
    for result in results:
        (expected,) = steps("1", case)
        assert all_same(result["trajectories"], expected["trajectories"])
        assert result[reduction][0] == pytest.approx(loss, rel=1e-5)
    name, worst = largest_relative_difference(got, gradient)
    assert worst < 1e-4, name


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_one_that_can_tell(case, steps, oracle_of):
    """Streams of several responses with several states, some of which share their prompt; one
    response has no loss."""
    (result,), oracle = steps("1", case), oracle_of(case)
    assert len(result["streams"]) > 1
    documents = [tags[tags[:, NOISY] > 0][:, 0].unique() for tags in result["streams"]]
    assert max(map(len, documents)) > 1
    assert any(bool((tags[:, LAST] > tags[:, DOCUMENT]).any()) for tags in result["streams"])
    num_states = max(int(tags[:, NOISY].max()) for tags in result["streams"])
    assert num_states == 2 if case != "all" else num_states > 2
    counts = [[len(rows) for rows in states] for states in oracle.apart]
    assert not sum(counts[2]) and sum(map(sum, counts)) > 30
    assert len({sum(count) for count in counts}) > 2, "reductions differ"
    if case == "all":
        for trajectory, states in zip(result["trajectories"], result["states"], strict=True):
            grid = trajectory.commit_grid
            every = [grid >= number for number in range(int(grid.max()) + 1)]
            assert torch.equal(states.masked, torch.stack(every))


@pytest.mark.parametrize("case", CASES)
def test_controls_differ(case, steps, oracle_of):
    """A wrong reduction, a state that is left out, and states that see each other."""
    (result,), oracle = steps("1", case), oracle_of(case)
    dropped = [states[:-1] or states for states in oracle.apart]  # `all` has one at least
    for reduction in LOSS_REDUCTIONS:
        loss, gradient = oracle.value_and_gradient(oracle.apart, reduction)
        assert result[reduction][0] == pytest.approx(loss, rel=1e-5)
        others = [(oracle.apart, other) for other in LOSS_REDUCTIONS if other != reduction]
        others += [(dropped, reduction), (oracle.together, reduction)]
        for responses, other in others:
            wrong, wrong_gradient = oracle.value_and_gradient(responses, other)
            assert abs(wrong / loss - 1) > 5e-5, other
            assert largest_relative_difference(wrong_gradient, gradient)[1] > 1e-2, other
