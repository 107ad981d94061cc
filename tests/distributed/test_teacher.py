"""A teacher of any size and layout gives the losses and gradients of one process."""

import contextlib
import dataclasses
import functools
import logging
import math

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm import parallel as process_groups
from megatron_opdlm.batching import plan_runs
from megatron_opdlm.checkpoint import freeze, load_model
from megatron_opdlm.convert import weights as weights_module
from megatron_opdlm.convert.hf import read_config
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.layout import resolve_iteration
from megatron_opdlm.fingerprint import fingerprint
from megatron_opdlm.host_weights import HostWeights
from megatron_opdlm.metrics import read_metrics
from megatron_opdlm.model import BuildOptions
from megatron_opdlm.parallel import RankGrid
from megatron_opdlm.plan import find_model_config, rank_table
from megatron_opdlm.row_exchange import RowExchange
from megatron_opdlm.teacher import PROBE_PROMPTS
from tests.distributed.test_parallel_training import (
    Recorder,
    largest_relative_difference,
    run,
    whole,
)
from tests.helpers import run_ranks
from tests.oracle import load_hf
from tests.rollouts import MASK
from tests.tiny import VOCAB_SIZE, tiny_model, write_model, write_prompts
from tests.training import tiny_config

TEACHERS = {
    "deeper, untied": {
        "seed": 7,
        "hidden_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "smaller, tied": {"seed": 8, "hidden_size": 24, "num_hidden_layers": 2},
}
UNTIED, TIED = TEACHERS


def sizes(tp_size, pp_size):
    return {"tensor_model_parallel_size": tp_size, "pipeline_model_parallel_size": pp_size}


def teacher_sizes(tp_size, pp_size):
    return {f"teacher_{name}": size for name, size in sizes(tp_size, pp_size).items()}


FEW_TOKENS = {"micro_batch_tokens": 80}
LAYOUTS = {
    "1": (1, {}),
    "TP2, teacher TP1": (2, sizes(2, 1) | teacher_sizes(1, 1)),
    "PP2, teacher TP2": (2, sizes(1, 2) | teacher_sizes(2, 1) | FEW_TOKENS),
    "DP4, teacher TP2 x PP2": (4, teacher_sizes(2, 2) | FEW_TOKENS),
    "TP2 x PP2 sequence parallel, teacher PP2": (
        4,
        sizes(2, 2) | teacher_sizes(1, 2) | FEW_TOKENS | {"sequence_parallel": True},
    ),
    "TP2, the same for the teacher": (2, sizes(2, 1)),
    "TP2, the vocabulary padded further": (
        2,
        sizes(1, 1) | teacher_sizes(2, 1) | {"make_vocab_size_divisible_by": 200},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("teacher")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By name: the student and the teachers."""
    base = tmp_path_factory.getbasetemp()
    return {"student": tiny_model(base)} | {
        name: tiny_model(base, **values) for name, values in TEACHERS.items()
    }


@pytest.fixture(scope="module")
def config_of(folder, models):
    """teacher name -> save=, key= -> Config."""
    data = write_prompts(folder / "prompts.jsonl")

    def of(teacher):
        return functools.partial(
            tiny_config,
            models["student"].checkpoint,
            data,
            teacher=models[teacher].checkpoint,
            train_rollouts=1,
        )

    return of


@pytest.fixture(scope="module")
def runs(folder, config_of):
    """Runs a layout once: (layout, teacher) -> results of its ranks."""

    @functools.cache
    def run_layout(name, teacher):
        world_size, values = LAYOUTS[name]
        layout = {"save": folder / f"{name} {teacher}", "values": values}
        return run_ranks(run, world_size, config_of(teacher), layout)

    return run_layout


CASES = [(name, UNTIED) for name in LAYOUTS if name != "1"]
CASES += [("DP4, teacher TP2 x PP2", TIED), ("PP2, teacher TP2", TIED)]


@pytest.mark.parametrize(("layout", "teacher"), CASES)
def test_layouts_of_the_teacher_agree_with_one_process(layout, teacher, runs, models):
    config = read_config(models["student"].hf)
    (expected,), results = runs("1", teacher), runs(layout, teacher)
    assert len(expected["losses"]) == 3 and min(expected["losses"]) > 0.01
    for result in results:
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(result["grad_norms"], expected["grad_norms"], rtol=1e-4, atol=0)
    if "DP" not in layout and layout != "TP2, the vocabulary padded further":
        gradients = whole(results, "gradient", config), whole([expected], "gradient", config)
        name, worst = largest_relative_difference(*gradients)
        assert worst < 2e-5, name
    weights = whole(results, "weights", config), whole([expected], "weights", config)
    name, worst = largest_relative_difference(*weights)
    assert worst < 2e-5, name


def test_control_teachers_differ(runs):
    first, second = (runs("1", name)[0]["losses"] for name in TEACHERS)
    assert abs(first[0] - second[0]) > 1e-2


def gradients_with(rank, make_config, save, values, change):
    """Loss and gradient of one step, with the teacher's rows changed on the way."""
    config = make_config(save=save, use_distributed_optimizer=False, **values)
    trainer = Recorder(config)
    states = trainer.select_states(trainer.collect())[:8]
    hidden_rows, teacher = type(trainer.teacher).hidden_rows, trainer.teacher
    type(teacher).hidden_rows = lambda self, *args: change(hidden_rows(self, *args))
    batches = trainer.make_batch(states)
    rows = trainer.run_student(batches, trainer.run_teacher(states, batches))
    return rows.loss, trainer.pieces("main_grad")


def same(rows):
    return rows


def shifted(rows):
    """Every row goes to its neighbour, and the first ones to the next document."""
    return [row.roll(1, 0) for row in rows]


DP4 = teacher_sizes(2, 2) | FEW_TOKENS


def test_whole_gradients_of_data_parallel_students(folder, config_of, models):
    config, make_config = read_config(models["student"].hf), config_of(UNTIED)
    (expected,) = run_ranks(gradients_with, 1, make_config, folder / "whole 1", {}, same)
    results = run_ranks(gradients_with, 4, make_config, folder / "whole 4", DP4, same)
    assert all(r[0] == pytest.approx(expected[0], rel=1e-6) for r in results)
    gradients = [whole([{"g": g}], "g", config) for _, g in (expected, results[0])]
    name, worst = largest_relative_difference(gradients[1], gradients[0])
    assert worst < 2e-5, name

    wrong = run_ranks(gradients_with, 4, make_config, folder / "wrong 4", DP4, shifted)
    assert abs(wrong[0][0] - expected[0]) > 1e-4
    gradient = whole([{"g": wrong[0][1]}], "g", config)
    assert largest_relative_difference(gradient, gradients[0])[1] > 1e-2


# --- who sends what to whom ---


def exchanged(rank, teacher, student, lengths):
    """Rows (document, number) of every microbatch, after the exchange."""
    world = dist.get_world_size()
    teacher, student = (
        RankGrid(tp_size=tp, pp_size=pp, world_size=world) for tp, pp in (teacher, student)
    )
    shares = plan_runs(lengths, dp_size=teacher.dp_size, token_budget=9)
    runs = plan_runs([2 * n for n in lengths], dp_size=student.dp_size, token_budget=16)
    exchange = RowExchange(
        teacher=teacher, student=student, shares=shares, runs=runs, num_rows=lengths
    )
    _, dp_rank, pp_rank = teacher.place(rank)
    rows = []
    if pp_rank == teacher.pp_size - 1:
        rows = [rows_of(run, lengths) for run in shares[dp_rank]]
    sent = sum(len(exchange.documents(rank, target)) for target in range(world))
    return exchange.run(rows, torch.empty(0, 2)), runs, sent


def rows_of(run, lengths):
    return torch.tensor([[float(i), float(n)] for i in run for n in range(lengths[i])]).view(-1, 2)


LENGTHS = [3, 5, 0, 2, 7, 1, 4]


@pytest.mark.parametrize("lengths", [LENGTHS, [2]], ids=["seven", "one"])
@pytest.mark.parametrize("student", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("teacher", [(1, 1), (2, 2), (1, 4)])
def test_rows_reach_the_ranks_that_need_them(teacher, student, lengths):
    results = run_ranks(exchanged, 4, teacher, student, lengths)
    grid = RankGrid(tp_size=student[0], pp_size=student[1], world_size=4)
    wanted = 0
    for rank, (rows, runs, _) in enumerate(results):
        _, dp_rank, pp_rank = grid.place(rank)
        if pp_rank != grid.pp_size - 1:
            assert rows == []
            continue
        assert len(rows) == len(runs[dp_rank])
        for got, run_ in zip(rows, runs[dp_rank], strict=True):
            assert torch.equal(got, rows_of(run_, lengths))
            wanted += len(run_)
    assert sum(sent for _, _, sent in results) == wanted, "each once to each rank, and no more"


# --- fingerprints ---


def fingerprint_of(rank, checkpoint, tp_size, pp_size, change=None):
    parallel = process_groups.initialize()
    if (tp_size, pp_size) != (1, 1):
        parallel = process_groups.second_layout(
            parallel,
            tensor_model_parallel_size=tp_size,
            pipeline_model_parallel_size=pp_size,
            prefix="teacher_",
        )
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


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_fingerprint_is_the_same_in_every_layout(teacher, models):
    checkpoint = models[teacher].checkpoint
    (expected,) = run_ranks(fingerprint_of, 1, checkpoint, 1, 1)
    hf = load_hf(models[teacher].hf)
    assert expected.num_parameters == sum(p.numel() for p in hf.parameters())
    assert not expected.not_finite
    for world_size, tp_size, pp_size in ((2, 2, 1), (2, 1, 2), (4, 2, 2), (2, 1, 1)):
        found = run_ranks(fingerprint_of, world_size, checkpoint, tp_size, pp_size)
        assert found == [expected] * world_size
    (same_one,) = run_ranks(fingerprint_of, 1, checkpoint, 1, 1, padding)
    assert same_one == expected
    for change in (one_weight, two_swapped):
        (other,) = run_ranks(fingerprint_of, 1, checkpoint, 1, 1, change)
        assert other.digest != expected.digest
    others = {run_ranks(fingerprint_of, 1, models[n].checkpoint, 1, 1)[0].digest for n in models}
    assert len(others) == len(models)


def replica_that_differs(model):
    if dist.get_rank() == 1:
        one_weight(model)


def test_ranks_that_disagree_are_found(models):
    with pytest.raises(AssertionError, match="ranks hold different values of decoder.layers.mlp"):
        run_ranks(fingerprint_of, 2, models["student"].checkpoint, 1, 1, replica_that_differs)


# --- the check at the start ---


def teacher_losses(rank, make_config, save, values):
    trainer = Recorder(make_config(save=save, **values))
    prompts = [prompt.ids for prompt in trainer.schedule.prompts][:PROBE_PROMPTS]
    teacher, figures = trainer.teacher, trainer._first_figures
    count = sum(p.numel() for p in teacher.model.parameters())
    if teacher.is_second_layout and teacher.head is not None:
        count += teacher.head.numel()
    return teacher.mean_loss(prompts, None), figures, prompts, count


def expected_loss(hf, prompts, *, without_mask):
    """transformers' own loss, weighted by the tokens of each prompt."""
    total, count = 0.0, 0
    for ids in prompts:
        logits = hf(input_ids=ids[None]).logits[0, :-1].double()
        if without_mask:
            logits[:, MASK] = -torch.inf
            loss = torch.nn.functional.cross_entropy(logits, ids[1:])
        else:
            loss = hf(input_ids=ids[None], labels=ids[None]).loss
        total, count = total + float(loss) * (len(ids) - 1), count + len(ids) - 1
    return total / count


@pytest.mark.parametrize("layout", ["1", "PP2, teacher TP2", "DP4, teacher TP2 x PP2"])
def test_the_loss_at_the_start_is_that_of_transformers(layout, folder, config_of, models):
    world_size, values = LAYOUTS[layout]
    save = folder / f"loss {layout}"
    results = run_ranks(teacher_losses, world_size, config_of(UNTIED), save, values)
    hf, prompts = load_hf(models[UNTIED].hf, torch.float64), results[0][2]
    assert len(prompts) == PROBE_PROMPTS
    with torch.no_grad():
        with_mask = expected_loss(hf, prompts, without_mask=False)
        without_mask = expected_loss(hf, prompts, without_mask=True)
    for loss, figures, _, _ in results:
        assert loss == pytest.approx(with_mask, rel=1e-5)
        assert figures["train/teacher_nll"] == pytest.approx(without_mask, rel=1e-5)
    assert abs(with_mask / without_mask - 1) > 1e-4  # the mask token shows

    config = config_of(UNTIED)(save=save, **values)
    student, teacher = (find_model_config(m) for m in (config.model.student, config.model.teacher))
    plans = rank_table(config, student=student, teacher=teacher, world_size=world_size, cuda=False)
    assert [plan.teacher_parameters for plan in plans] == [count for *_, count in results]


def start(rank, make_config, save, values):
    """Figures and log of a start, or its error."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("megatron_opdlm").addHandler(handler)
    logging.getLogger("megatron_opdlm").setLevel(logging.INFO)
    try:
        trainer = Recorder(make_config(save=save, **values))
    except ValueError as error:
        return str(error)
    trainer.train()
    return trainer._first_figures, [(r.levelname, r.getMessage()) for r in records]


def test_figures_are_logged_once(folder, config_of, models):
    results = run_ranks(start, 2, config_of(UNTIED), folder / "logged", teacher_sizes(2, 1))
    (figures, log), (other_figures, other_log) = results
    assert figures == other_figures
    written = [
        r for r in read_metrics(folder / "logged" / "metrics.jsonl") if figures.keys() <= r.keys()
    ]
    assert len(written) == 1 and written[0].items() >= figures.items()
    assert figures["train/teacher_uniform_nll"] == pytest.approx(math.log(VOCAB_SIZE + 1), abs=0.01)
    text = "\n".join(message for _, message in log)
    for name in ("student", "teacher"):
        assert f"{figures[f'train/{name}_parameters']:,} parameters" in text
        assert f"fingerprint {figures[f'train/{name}_fingerprint']:012x}" in text
    assert str(models[UNTIED].checkpoint) in text and "other weights" in text
    worse = figures["train/teacher_nll"] >= figures["train/teacher_uniform_nll"]
    warned = [message for level, message in log if level == "WARNING" and "UNIFORM" in message]
    assert len(warned) == worse
    assert not any("fingerprint" in message for _, message in other_log)


def test_a_student_that_is_its_own_teacher(folder, config_of):
    ((figures, log),) = run_ranks(start, 1, config_of("student"), folder / "itself", {})
    assert figures["train/teacher_fingerprint"] == figures["train/student_fingerprint"]
    assert any("the same weights" in message for _, message in log)


def test_a_threshold_refuses_a_teacher(folder, config_of, models):
    save = folder / "threshold"
    results = run_ranks(start, 2, config_of(UNTIED), save, {"max_teacher_nll": 0.5})
    for message in results:
        assert message.startswith(f"teacher={models[UNTIED].checkpoint} has a loss of ")
        assert "above max_teacher_nll=0.5" in message and "\n" not in message
    assert not (save / "metrics.jsonl").exists()
    (fine,) = run_ranks(start, 1, config_of(UNTIED), save, {"max_teacher_nll": 99})
    assert isinstance(fine, tuple)


def damaged(folder, name, tensor, value, monkeypatch):
    """A checkpoint with one bad value."""
    from safetensors.torch import load_file, save_file

    source = write_model(folder / name, **TEACHERS[UNTIED])
    weights = load_file(source / "model.safetensors")
    weights[tensor].view(-1)[:: 1 if value < math.inf else 10**6] = value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    # The import refuses what is not finite; a checkpoint may come from elsewhere.
    monkeypatch.setattr(weights_module, "require_finite", lambda *args: None)
    import_hf(source, folder / f"{name} checkpoint", progress=False)
    return folder / f"{name} checkpoint"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_refused(value, folder, config_of, monkeypatch):
    tensor = "model.layers.3.mlp.up_proj.weight"
    path = damaged(folder, f"broken {value}", tensor, value, monkeypatch)
    for world_size, values in ((1, {}), (2, teacher_sizes(1, 2))):
        make_config = functools.partial(config_of(UNTIED), teacher=path)
        results = run_ranks(start, world_size, make_config, folder / "broken run", values)
        for message in results:
            assert message == (
                f"teacher={path} holds NaN or infinity in decoder.layers.mlp.linear_fc1.weight; "
                "use weights that are whole"
            )


def test_a_loss_that_is_not_finite_is_refused(folder, config_of, monkeypatch):
    """Every weight is finite, and yet the logits are not."""
    path = damaged(folder, "overflow", "model.norm.weight", 3e38, monkeypatch)
    make_config = functools.partial(config_of(UNTIED), teacher=path)
    (message,) = run_ranks(start, 1, make_config, folder / "overflow run", {})
    assert message.startswith(f"teacher={path} has a loss of ") and "broken" in message


# --- weights in host memory ---


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
def test_offloaded_weights_are_there_in_the_teachers_phase_only(
    layout, stays, folder, config_of, runs
):
    """On a CPU, whose memory stands in for both; losses are those of a teacher that stays."""
    world_size, values = LAYOUTS[layout]
    work = {"save": folder / f"offload {layout}", "values": values}
    results = run_ranks(with_offload, world_size, config_of(UNTIED), work)
    (expected,) = runs("1", UNTIED)
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
        with contextlib.suppress(KeyError), host.on_device():
            assert all(map(torch.equal, model.parameters(), before))
            for parameter in model.parameters():
                parameter.data.zero_()  # on the device alone
            raise KeyError("a pass that fails gives the memory back, too")
    return True


def test_weights_are_lent_and_taken_back(models):
    assert run_ranks(lent, 1, models["student"].checkpoint) == [True]
