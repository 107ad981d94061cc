"""A training run does not depend on how it is spread over ranks, and equals plain autograd."""

import functools

import pytest
import torch

from megatron_opdlm.diffusion.noising import select_states
from megatron_opdlm.distill.batching import make_microbatches, plan_packing
from megatron_opdlm.distill.step import forward_backward
from megatron_opdlm.loss import fused as fused_loss
from megatron_opdlm.model.hf_config import read_config
from megatron_opdlm.train.optimizer import NonFiniteError
from megatron_opdlm.train.trainer import Trainer
from tests.helpers import run_ranks
from tests.oracle import hf_logits, load_hf
from tests.rollouts import MASK, all_same
from tests.tiny import VOCAB_SIZE, tiny_model, write_prompts
from tests.training import assemble, parameter_pieces, tiny_config, to_hf

LAYOUTS = {
    "1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2 sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2, "micro_batch_tokens": 80}),
    "DP2": (2, {"use_distributed_optimizer": False}),
    "DP2 distributed optimizer": (2, {"overlap_grad_reduce": True}),
    "TP2 x PP2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "micro_batch_tokens": 80,
        },
    ),
    "TP2 x PP2, rollouts on DP4": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "micro_batch_tokens": 80,
            "rollout_tensor_model_parallel_size": 1,
        },
    ),
    "DP2 x PP2 recomputed": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "recompute_granularity": "full",
            "use_distributed_optimizer": False,
            "micro_batch_tokens": 80,
        },
    ),
}
MODELS = {
    "qwen3": {"tie_word_embeddings": True},
    "qwen3 untied": {"tie_word_embeddings": False},
    "qwen2": {"family": "qwen2"},  # biases of queries, keys and values; no QK-norm
    "llama": {"family": "llama", "tie_word_embeddings": False},
    "next position": {"tie_word_embeddings": True},
}
VALUES = {"next position": {"prediction": "next_position"}}
"""Keys of the runs of a model."""


class Recorder(Trainer):
    """Keeps what a run went through."""

    def __init__(self, config):
        super().__init__(config)
        self.losses, self.grad_norms, self.rollouts = [], [], []
        self.first, self.most_microbatches = None, 0

    def collect(self):
        self.rollouts.append(super().collect())
        return self.rollouts[-1]

    def run_student(self, microbatches, targets):
        rows = super().run_student(microbatches, targets)
        if self.first is None:
            self.first = self.pieces("main_grad")
        self.most_microbatches = max(self.most_microbatches, len(microbatches))
        return rows

    def log_step(self, rows, grad_norm, lr):
        super().log_step(rows, grad_norm, lr)
        self.losses.append(rows.loss)
        self.grad_norms.append(grad_norm)

    def save_if_due(self):
        """Nothing is saved here."""

    def pieces(self, attribute):
        model = self.student.model
        values = {name: getattr(p, attribute) for name, p in model.named_parameters()}
        return parameter_pieces(model, values)


def run(rank, make_config, layout):
    trainer = Recorder(make_config(save=layout["save"], **layout["values"]))
    trainer.train()
    return {
        "losses": trainer.losses,
        "grad_norms": trainer.grad_norms,
        "rollouts": trainer.rollouts,
        "gradient": trainer.first,
        "microbatches": trainer.most_microbatches,
        "weights": trainer.pieces("data"),
        "work": trainer.work.to_json(),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs a layout once: (layout name, model name) -> results of its ranks."""
    folder = tmp_path_factory.mktemp("parallel_training")
    data = write_prompts(folder / "prompts.jsonl")

    @functools.cache
    def run_layout(name, model_name="qwen3"):
        model = tiny_model(tmp_path_factory.getbasetemp(), **MODELS[model_name])
        make_config = functools.partial(tiny_config, model.checkpoint, data)
        world_size, values = LAYOUTS[name]
        values = values | VALUES.get(model_name, {})
        layout = {"save": folder / f"{name} {model_name}", "values": values}
        return run_ranks(run, world_size, make_config, layout)

    return run_layout


def largest_relative_difference(got, expected):
    """Over tensors: the largest difference, as a part of the tensor's largest entry."""
    assert got.keys() == expected.keys()
    for tensors in (got, expected):  # max() would pass NaN by
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert all(bool(tensor.any()) for tensor in expected.values()), "nothing to be relative to"
    worst = {
        name: float((got[name] - expected[name]).abs().max() / expected[name].abs().max())
        for name in expected
    }
    return max(worst.items(), key=lambda item: item[1])


def relative_difference(got, expected):
    """Of all tensors as one vector."""
    apart = sum(float((got[name] - expected[name]).double().square().sum()) for name in expected)
    length = sum(float(tensor.double().square().sum()) for tensor in expected.values())
    return (apart / length) ** 0.5


def whole(results, name, config):
    return to_hf(assemble([result[name] for result in results]), config)


CASES = [(name, "qwen3") for name in LAYOUTS if name != "1"]
CASES += [("TP2 x PP2", name) for name in MODELS if name != "qwen3"]


@pytest.mark.parametrize(("layout", "model_name"), CASES)
def test_layouts_agree_with_one_process(layout, model_name, runs, tmp_path_factory):
    model = tiny_model(tmp_path_factory.getbasetemp(), **MODELS[model_name])
    config = read_config(model.hf)
    (expected,), results = runs("1", model_name), runs(layout, model_name)
    assert len(expected["losses"]) == 6
    for result in results:
        for got, want in zip(result["rollouts"], expected["rollouts"], strict=True):
            assert len(got) == len(want) == 12 and all_same(got, want)
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=0, atol=2e-6)
        torch.testing.assert_close(result["grad_norms"], expected["grad_norms"], rtol=1e-4, atol=0)
        for counter in ("response_tokens", "teacher_head_rows", "student_head_rows"):
            assert result["work"][counter] == expected["work"][counter] > 0
    if "PP2" in layout:
        assert results[0]["microbatches"] > 1  # several in flight
    if layout != "DP2 distributed optimizer":  # there, a rank's gradient holds its own part only
        gradients = whole(results, "gradient", config), whole([expected], "gradient", config)
        name, worst = largest_relative_difference(*gradients)
        assert worst < 4e-6, name
        assert relative_difference(*gradients) < 1e-6
    weights = whole(results, "weights", config), whole([expected], "weights", config)
    name, worst = largest_relative_difference(*weights)
    assert worst < 2e-5, name


def test_control_training_moves_the_weights(runs, tmp_path_factory):
    """The comparisons above are not between untouched weights."""
    model = tiny_model(tmp_path_factory.getbasetemp(), **MODELS["qwen3"])
    before = load_hf(model.hf).state_dict()
    after = whole(runs("1"), "weights", read_config(model.hf))
    moved = {name: float((after[name] - before[name]).abs().max()) for name in after}
    assert all(value > 1e-4 for value in moved.values()), moved


# --- plain autograd ---


NOT_MASK = [v for v in range(VOCAB_SIZE) if v != MASK]  # columns of every softmax


def reference(hf, teacher, trajectories, masks, *, shift=0):
    """Loss and gradients of one optimizer step: a whole doubled sequence per row, dense masks."""
    rows = []
    for trajectory, masked in zip(trajectories, masks, strict=True):
        size, start = trajectory.block_size, trajectory.first_block * trajectory.block_size
        length, prompt_length = len(trajectory.token_ids), len(trajectory.prompt_ids)
        noisy = list(range(start, length))
        shown = [
            MASK if masked.flatten()[p - start] else int(trajectory.token_ids[p]) for p in noisy
        ]
        tags = [[0, 0, p // size, p, 0] for p in range(length)]
        tags += [[0, 1, p // size, p, 0] for p in noisy]
        ids = torch.cat([trajectory.token_ids, torch.tensor(shown)])
        student = hf_logits(hf, ids, torch.tensor(tags))[:, NOT_MASK].log_softmax(-1)

        causal = torch.tensor([[0, 0, p, p, 0] for p in range(length)])
        with torch.no_grad():
            target = hf_logits(teacher, trajectory.token_ids, causal)[:, NOT_MASK].log_softmax(-1)

        def row(p, size=size, length=length, start=start):
            """Row of the output that predicts a position: noisy, but clean before a block."""
            is_first = shift and p % size == 0
            return p - 1 if is_first else length + p - shift - start

        losses = [
            (target[p - 1].exp() * (target[p - 1] - student[row(p)])).sum()
            for p in noisy
            if shown[p - start] == MASK and p < prompt_length + trajectory.num_response_tokens
        ]
        if losses:
            rows.append(torch.stack(losses).mean())
    loss = torch.stack(rows).mean()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in hf.named_parameters()}


def states_of_first_step(rank, make_config, save):
    """Trajectories and masks of the first optimizer step."""
    trainer = Trainer(make_config(save=save))
    drawn = []

    def remember(trajectory, **kwargs):
        drawn.append(select_states(trajectory, **kwargs))
        return drawn[-1]

    import megatron_opdlm.train.trainer as module

    module.select_states = remember
    trajectories = trainer.collect()
    states = trainer.select_states(trajectories)
    rows = [next(i for i, s in enumerate(states) if s is state) for state in trainer.cut(states)[0]]
    return [trajectories[i] for i in rows], [drawn[i].masked[0] for i in rows]


@pytest.mark.parametrize("model_name", MODELS)
def test_gradient_equals_plain_autograd(model_name, runs, tmp_path_factory):
    model = tiny_model(tmp_path_factory.getbasetemp(), **MODELS[model_name])
    folder = tmp_path_factory.mktemp("autograd")
    data = write_prompts(folder / "prompts.jsonl")
    values = VALUES.get(model_name, {})
    make_config = functools.partial(tiny_config, model.checkpoint, data, **values)
    ((trajectories, masks),) = run_ranks(states_of_first_step, 1, make_config, folder / "run")
    assert sum(int(mask.sum()) for mask in masks) > 10
    hf, teacher = (load_hf(model.hf, torch.float64) for _ in range(2))
    shift = int(bool(values))
    loss, gradients = reference(hf, teacher, trajectories, masks, shift=shift)
    (result,) = runs("1", model_name)
    assert result["losses"][0] == pytest.approx(loss, rel=1e-5)
    got = whole([result], "gradient", read_config(model.hf))
    got = {name: tensor.double() for name, tensor in got.items()}
    name, worst = largest_relative_difference(got, gradients)
    assert worst < 2e-4, name
    # controls: the shifts of target and output are seen
    for parameter in hf.parameters():
        parameter.grad = None
    shifted = [torch.roll(mask.flatten(), 1).view_as(mask) for mask in masks]
    for masked, other in ((shifted, shift), (masks, 1 - shift)):
        other_loss, _ = reference(hf, teacher, trajectories, masked, shift=other)
        assert abs(other_loss - loss) > 1e-3


# --- the loss does not depend on the split ---


def losses_of_splits(rank, make_config, save, splits):
    """Loss and whole gradient of the same states, packed, padded and chunked in several ways."""
    trainer = Recorder(make_config(save=save, use_distributed_optimizer=False))
    states = trainer.select_states(trainer.collect())[:6]
    result = []
    for budget, order, multiple, chunk_cells in splits:
        fused_loss.CHUNK_CELLS["cpu"] = chunk_cells  # in a process of its own
        ordered = [states[i] for i in order]
        runs = plan_packing(
            [len(state.student) for state in ordered],
            dp_size=trainer.parallel.dp_size,
            token_budget=budget,
        )
        batches = make_microbatches(
            ordered,
            runs,
            dp_rank=trainer.parallel.dp_rank,
            multiple=multiple,
            loss_reduction="sequence_mean",
        )
        assert all(len(batch.student) % multiple == 0 for batch in batches)
        hidden = trainer.teacher.hidden_rows([state.teacher for state in ordered], runs)
        targets = trainer.teacher.targets(hidden)
        trainer.optimizer.zero_grad()
        rows = forward_backward(
            trainer.optimizer.ddp,
            batches,
            targets,
            trainer.parallel,
            divergence=trainer.divergence,
            mask_token_id=MASK,
        )
        gradient = assemble([trainer.pieces("main_grad")])
        result.append((rows.loss, sorted(rows.kl.tolist()), gradient, len(batches)))
    return result


ORDERS = ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 1, 3])
ALL_ROWS, FEW_ROWS = 2**24, 5 * 384  # cells of a chunk of logits
SPLITS = [
    (10_000, ORDERS[0], 1, ALL_ROWS),
    (10_000, ORDERS[1], 1, FEW_ROWS),
    (10_000, ORDERS[0], 128, ALL_ROWS),
    (60, ORDERS[0], 16, ALL_ROWS),
    (120, ORDERS[1], 1, FEW_ROWS),
]


def test_loss_is_invariant_to_the_split(tmp_path_factory):
    """Data-parallel ranks 1, 2 and 4; microbatches; packing order; alignment rows; chunks."""
    model = tiny_model(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("split")
    data = write_prompts(folder / "prompts.jsonl")
    make_config = functools.partial(tiny_config, model.checkpoint, data)
    loss = kl = gradient = None
    for world_size in (1, 2, 4):
        splits = SPLITS if world_size < 4 else SPLITS[3:]
        results = run_ranks(
            losses_of_splits, world_size, make_config, folder / str(world_size), splits
        )
        if world_size == 1:
            loss, kl, gradient, _ = results[0][0]
            assert [split[3] for split in results[0]][:3] == [1, 1, 1]
            assert min(split[3] for split in results[0][3:]) > 1
        for split in (split for result in results for split in result):
            assert split[0] == pytest.approx(loss, rel=1e-6)
            assert split[1] == pytest.approx(kl, rel=1e-4, abs=1e-6)
            name, worst = largest_relative_difference(split[2], gradient)
            assert worst < 1e-6, name


def few_states(rank, make_config, save):
    """Two rows on four data-parallel ranks: two of them have nothing but padding."""
    trainer = Recorder(make_config(save=save, overlap_grad_reduce=True))
    states = trainer.select_states(trainer.collect())
    states = [state for state in states if state.num_rows][:2]
    runs = trainer.plan(states)
    batches = trainer.make_batch(states, runs)
    rows = trainer.run_student(batches, trainer.run_teacher(states, runs))
    grad_norm, _ = trainer.update(rows)
    return len(batches[0].row_weight), rows.loss, grad_norm, trainer.pieces("data")


def test_ranks_without_rows(tmp_path_factory):
    model = tiny_model(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("few")
    data = write_prompts(folder / "prompts.jsonl")
    make_config = functools.partial(tiny_config, model.checkpoint, data)
    (expected,) = run_ranks(few_states, 1, make_config, folder / "1")
    results = run_ranks(few_states, 4, make_config, folder / "4")
    assert sum(not result[0] for result in results) == 2
    for _, loss, grad_norm, weights in results:
        assert loss == pytest.approx(expected[1], rel=1e-6)
        assert grad_norm == pytest.approx(expected[2], rel=1e-5)
        name, worst = largest_relative_difference(assemble([weights]), assemble([expected[3]]))
        assert worst < 2e-5, name


# --- nothing that is not finite reaches the weights ---


def poisoned(rank, make_config, layout, save):
    """NaN in the teacher's head on the last stage; returns the error and whether weights moved."""
    trainer = Recorder(make_config(save=save, **layout))
    if trainer.parallel.is_last_stage and trainer.parallel.tp_rank == 0:
        with torch.no_grad():
            trainer.teacher.head_weight()[3] = torch.nan
    before = [p.detach().clone() for p in trainer.student.model.parameters()]
    try:
        trainer.train()
    except NonFiniteError as error:
        unchanged = all(map(torch.equal, before, trainer.student.model.parameters()))
        return str(error), unchanged


@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2 distributed optimizer"])
def test_nan_stops_every_rank_before_the_update(layout, tmp_path_factory):
    model = tiny_model(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("nan")
    data = write_prompts(folder / "prompts.jsonl")
    make_config = functools.partial(tiny_config, model.checkpoint, data)
    world_size, values = LAYOUTS[layout]
    results = run_ranks(poisoned, world_size, make_config, values, folder / "run")
    assert all(result is not None for result in results), "every rank raises"
    assert all("loss=nan" in message and unchanged for message, unchanged in results)
