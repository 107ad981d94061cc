"""Models of one tokenizer whose embeddings are padded to different sizes: rows that only one of the
two has change nothing."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.plan.ranks import rank_table
from megatron_opdlm.responses.teacher import response_settings
from tests.distributed.train.test_parallel_training import Recorder, whole
from tests.helpers import run_ranks
from tests.oracle import load_hf
from tests.rollouts import MASK
from tests.tiny import VOCAB_SIZE, TinyModel, write_model, write_prompts
from tests.training import tiny_config

MORE, FEWER = 600, MASK + 1
"""Rows of a larger and of a smaller embedding; the tokenizer has MASK + 1 ids."""
VOCABULARIES = ("model.embed_tokens.weight", "lm_head.weight")
TEACHER = {"seed": 13, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def cut(model, folder, rows):
    """The same model without its last rows."""
    hf, path = folder / "hf", model.hf / "model.safetensors"
    shutil.copytree(model.hf, hf)
    config = json.loads((hf / "config.json").read_text())
    assert rows < config["vocab_size"]
    (hf / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    weights = load_file(path)
    kept = {n: w[:rows].clone() if n in VOCABULARIES else w for n, w in weights.items()}
    save_file(kept, hf / "model.safetensors", metadata={"format": "pt"})
    return imported(folder)


def imported(folder):
    import_hf(folder / "hf", folder / "checkpoint", progress=False)
    return TinyModel(hf=folder / "hf", checkpoint=folder / "checkpoint")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Students and teachers by name and number of rows; those with fewer are the others, cut."""
    root = tmp_path_factory.mktemp("vocabularies")
    found = {}
    for name, tied in (("tied", True), ("untied", False)):
        hf = write_model(root / name / "hf", vocab_size=MORE, tie_word_embeddings=tied, **TEACHER)
        weights = load_file(hf / "model.safetensors")
        for vocabulary in set(VOCABULARIES) & weights.keys():
            weights[vocabulary][VOCAB_SIZE:] *= 6  # they would win if anybody looked at them
        save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
        found[name, MORE] = imported(root / name)
        for rows in (VOCAB_SIZE, FEWER):
            found[name, rows] = cut(found[name, MORE], root / f"{name} {rows}", rows)
    write_model(root / "student" / "hf", num_hidden_layers=2)
    found["student", VOCAB_SIZE] = imported(root / "student")
    found["student", FEWER] = cut(found["student", VOCAB_SIZE], root / "fewer", FEWER)
    return found


@pytest.fixture(scope="module")
def train(models, tmp_path_factory):
    """(student's rows, teacher, its rows, world size, keys) -> what the ranks went through."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_prompts(folder / "prompts.jsonl")

    @functools.cache
    def train(rows, teacher, teacher_rows, world_size, keys=()):
        make = functools.partial(
            tiny_config,
            models["student", rows].checkpoint,
            data,
            teacher=models[teacher, teacher_rows].checkpoint,
            train_rollouts=1,
        )
        name = f"{rows} {teacher} {teacher_rows} {world_size} {len(list(folder.iterdir()))}"
        return run_ranks(run, world_size, make, folder / name, dict(keys))

    return train


def run(rank, make_config, save, keys):
    config = make_config(save=save, **keys)
    trainer = Recorder(config)
    teacher = trainer.teacher
    count = sum(p.numel() for p in teacher.model.parameters())
    if teacher.head is not None and all(
        teacher.head.data_ptr() != p.data_ptr() for p in teacher.model.parameters()
    ):
        count += teacher.head.numel()
    figures = trainer._first_figures
    trainer.train()
    return {
        "config": config,
        "losses": trainer.losses,
        "nll": figures["train/teacher_nll"],
        "uniform": figures["train/teacher_uniform_nll"],
        "rollouts": [
            (t.prompt_ids.tolist(), t.response_ids.tolist())
            for rollout in trainer.rollouts
            for t in rollout
        ],
        "gradient": trainer.first,
        "teacher_parameters": count,
        "settings": response_settings(config, teacher, trainer.student),
    }


LAYOUTS = {
    "TP1": (1, ()),
    "TP2": (2, (("tensor_model_parallel_size", 2),)),
    "TP2, padded as the teacher": (
        2,
        (("tensor_model_parallel_size", 2), ("make_vocab_size_divisible_by", 400)),
    ),
    "TP2, teacher TP1": (
        2,
        (("tensor_model_parallel_size", 2), ("teacher_tensor_model_parallel_size", 1)),
    ),
    "PP2": (2, (("pipeline_model_parallel_size", 2), ("micro_batch_tokens", 80))),
    "TP1, the teacher writes": (1, (("method", "off_policy"),)),
    "TP2, the teacher writes": (
        2, (("method", "off_policy"), ("tensor_model_parallel_size", 2)),
    ),
    "TP2, rollouts on TP1": (
        2, (("tensor_model_parallel_size", 2), ("rollout_tensor_model_parallel_size", 1)),
    ),
}  # fmt: skip


def require_equal(got, expected, config):
    assert len(expected) == len(got)
    for one, other in zip(got, expected, strict=True):
        assert one["rollouts"] == other["rollouts"] and len(one["rollouts"]) == 12
        torch.testing.assert_close(one["losses"], other["losses"], rtol=1e-6, atol=1e-7)
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-6)
        assert one["uniform"] == other["uniform"]
    gradients = [whole(results, "gradient", config) for results in (got, expected)]
    for name, gradient in gradients[1].items():
        rows = gradients[0][name][: len(gradient)]
        torch.testing.assert_close(rows, gradient, rtol=1e-4, atol=1e-6, msg=name)


CASES = [(layout, "untied") for layout in LAYOUTS]
CASES += [("TP1", "tied"), ("TP2", "tied"), ("PP2", "tied")]


@pytest.mark.parametrize(("layout", "teacher"), CASES)
def test_rows_that_the_teacher_has_alone_change_nothing(layout, teacher, train, models):
    world_size, keys = LAYOUTS[layout]
    got = train(VOCAB_SIZE, teacher, MORE, world_size, keys)
    expected = train(VOCAB_SIZE, teacher, VOCAB_SIZE, world_size, keys)
    require_equal(got, expected, ModelSource.open(models["student", VOCAB_SIZE].checkpoint).config)
    # a file of the teacher's responses is one of these ids; without padding it is as it ever was
    assert got[0]["settings"]["vocab_size"] == VOCAB_SIZE
    assert "vocab_size" not in expected[0]["settings"]
    student, big = (
        ModelSource.open(models[key].checkpoint).config
        for key in (("student", VOCAB_SIZE), (teacher, MORE))
    )
    plans = rank_table(
        got[0]["config"], student=student, teacher=big, world_size=world_size, cuda=False
    )
    planned = [plan.teacher_parameters for plan in plans]
    assert planned == [result["teacher_parameters"] for result in got]


def test_control_the_teachers_own_rows_would_show(train, models):
    """Its softmax over all of its rows is another one: they are likelier than the others."""
    model = load_hf(models["untied", MORE].hf, torch.float64)
    ids = torch.tensor(train(VOCAB_SIZE, "untied", MORE, 1)[0]["rollouts"][0][0])
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    assert float(logits.softmax(-1)[:, VOCAB_SIZE:].sum(-1).mean()) > 0.3


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2, rollouts on TP1"])
def test_rows_that_the_student_has_alone_change_nothing(layout, train, models):
    """A student with the teacher's rows alone goes through the same."""
    world_size, keys = LAYOUTS[layout]
    got = train(VOCAB_SIZE, "untied", FEWER, world_size, keys)
    expected = train(FEWER, "untied", FEWER, world_size, keys)
    config = ModelSource.open(models["student", FEWER].checkpoint).config
    wide = ModelSource.open(models["student", VOCAB_SIZE].checkpoint).config
    for one, other in zip(got, expected, strict=True):
        assert one["rollouts"] == other["rollouts"]
        torch.testing.assert_close(one["losses"], other["losses"], rtol=1e-6, atol=1e-7)
    gradient = whole(got, "gradient", wide)["model.embed_tokens.weight"]
    expected = whole(expected, "gradient", config)["model.embed_tokens.weight"]
    torch.testing.assert_close(gradient[:FEWER], expected, rtol=1e-4, atol=1e-6)
    assert expected.any() and not gradient[FEWER:].any()
