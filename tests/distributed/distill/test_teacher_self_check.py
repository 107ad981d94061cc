"""The check of the teacher at the start: its loss, its figures, and what it refuses."""

import functools
import logging
import math

import pytest
import torch

from megatron_opdlm.convert import weights as weights_module
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.distill.teacher import PROBE_PROMPTS
from megatron_opdlm.plan.ranks import rank_table
from megatron_opdlm.reporting.logger import read_metrics
from tests.distributed.train.test_parallel_training import Recorder
from tests.helpers import run_ranks
from tests.oracle import load_hf
from tests.rollouts import MASK
from tests.teachers import LAYOUTS, TEACHERS, UNTIED, teacher_sizes
from tests.tiny import VOCAB_SIZE, write_model


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
def test_the_loss_at_the_start_is_that_of_transformers(layout, teachers, tmp_path):
    world_size, values = LAYOUTS[layout]
    results = run_ranks(teacher_losses, world_size, teachers.config_of(UNTIED), tmp_path, values)
    hf, prompts = load_hf(teachers.models[UNTIED].hf, torch.float64), results[0][2]
    assert len(prompts) == PROBE_PROMPTS
    with torch.no_grad():
        with_mask = expected_loss(hf, prompts, without_mask=False)
        without_mask = expected_loss(hf, prompts, without_mask=True)
    for loss, figures, _, _ in results:
        assert loss == pytest.approx(with_mask, rel=1e-5)
        assert figures["train/teacher_nll"] == pytest.approx(without_mask, rel=1e-5)
    assert abs(with_mask / without_mask - 1) > 1e-4  # the mask token shows

    config = teachers.config_of(UNTIED)(save=tmp_path, **values)
    student, teacher = (
        ModelSource.open(m).config for m in (config.model.student, config.model.teacher)
    )
    plans = rank_table(config, student=student, teacher=teacher, world_size=world_size, cuda=False)
    assert [plan.teacher_parameters for plan in plans] == [count for *_, count in results]


def start(rank, make_config, save, values, is_trained=False):
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
    if is_trained:
        trainer.train()
    return trainer._first_figures, [(r.levelname, r.getMessage()) for r in records]


def warnings_of(log):
    return [message for level, message in log if level == "WARNING" and "UNIFORM" in message]


def test_figures_are_logged_once(teachers, tmp_path):
    make_config = teachers.config_of(UNTIED)
    results = run_ranks(start, 2, make_config, tmp_path, teacher_sizes(2, 1), True)
    (figures, log), (other_figures, other_log) = results
    assert figures == other_figures
    written = [r for r in read_metrics(tmp_path / "metrics.jsonl") if figures.keys() <= r.keys()]
    assert len(written) == 1 and written[0].items() >= figures.items()
    assert figures["train/teacher_uniform_nll"] == pytest.approx(math.log(VOCAB_SIZE + 1), abs=0.01)
    text = "\n".join(message for _, message in log)
    for name in ("student", "teacher"):
        assert f"{figures[f'train/{name}_parameters']:,} parameters" in text
        assert f"fingerprint {figures[f'train/{name}_fingerprint']:012x}" in text
    assert str(teachers.models[UNTIED].checkpoint) in text and "other weights" in text
    assert figures["train/teacher_nll"] > figures["train/teacher_uniform_nll"]  # random weights
    assert len(warnings_of(log)) == 1
    assert not any("fingerprint" in message for _, message in other_log)


def test_a_student_that_is_its_own_teacher(teachers, tmp_path):
    ((figures, log),) = run_ranks(start, 1, teachers.config_of("student"), tmp_path, {})
    assert figures["train/teacher_fingerprint"] == figures["train/student_fingerprint"]
    assert any("the same weights" in message for _, message in log)


def test_a_threshold_refuses_a_teacher(teachers, tmp_path):
    make_config = teachers.config_of(UNTIED)
    results = run_ranks(start, 2, make_config, tmp_path, {"max_teacher_nll": 0.5})
    for message in results:
        assert message.startswith(f"teacher={teachers.models[UNTIED].checkpoint} has a loss of ")
        assert "above max_teacher_nll=0.5" in message and "\n" not in message
    assert not (tmp_path / "metrics.jsonl").exists()
    (fine,) = run_ranks(start, 1, make_config, tmp_path, {"max_teacher_nll": 99})
    assert not warnings_of(fine[1])  # the threshold has said what to expect


def losses_of_tokens(rank, make_config, save, values):
    trainer = Recorder(make_config(save=save, **values))
    texts = [prompt.ids for prompt in trainer.schedule.prompts]
    given = [1 + place % len(ids) for place, ids in enumerate(texts)]
    return texts, given, trainer.teacher.token_losses(texts, given, MASK)


@pytest.mark.parametrize("layout", ["1", "PP2, teacher TP2", "DP4, teacher TP2 x PP2"])
def test_losses_of_tokens_are_those_of_transformers(layout, teachers, tmp_path):
    """Each text has its own losses, in order, whichever rank and pass computed them."""
    world_size, values = LAYOUTS[layout]
    make_config = teachers.config_of(UNTIED)
    results = run_ranks(losses_of_tokens, world_size, make_config, tmp_path, values)
    hf = load_hf(teachers.models[UNTIED].hf, torch.float64)
    for texts, given, losses in results:
        assert [len(ids) - first for ids, first in zip(texts, given, strict=True)] == [
            len(of_text) for of_text in losses
        ]
        assert len(set(given)) > 3 and len({len(ids) for ids in texts}) > 3
        for ids, first, of_text in zip(texts, given, losses, strict=True):
            with torch.no_grad():
                logits = hf(input_ids=ids[None]).logits[0]
            with_mask = cross_entropies(logits, ids)[first - 1 :]
            logits[:, MASK] = -torch.inf
            expected = cross_entropies(logits, ids)[first - 1 :]
            torch.testing.assert_close(of_text, expected, rtol=1e-5, atol=1e-5)
            assert float((of_text - with_mask).abs().max()) > 1e-4  # control


def cross_entropies(logits, ids):
    """[S - 1]: of every token but the first."""
    return -logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]


# --- weights that are broken, and some that are good ---


@pytest.fixture
def with_changed(tmp_path, teachers, monkeypatch):
    """Imports the teacher with a changed tensor: (name of the tensor, change in place) -> folder,
    save=, key= -> Config."""
    from safetensors.torch import load_file, save_file

    def make(tensor, change):
        source = write_model(tmp_path / "hf", **TEACHERS[UNTIED])
        weights = load_file(source / "model.safetensors")
        change(weights[tensor])
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        # The import refuses what is not finite; a checkpoint may come from elsewhere.
        monkeypatch.setattr(weights_module, "require_finite", lambda *args: None)
        path = tmp_path / "checkpoint"
        import_hf(source, path, progress=False)
        return path, functools.partial(teachers.config_of(UNTIED), teacher=path)

    return make


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_refused(value, with_changed, tmp_path):
    def one_entry(weight):
        weight[0, 0] = value

    path, make_config = with_changed("model.layers.3.mlp.up_proj.weight", one_entry)
    for world_size, values in ((1, {}), (2, teacher_sizes(1, 2))):
        results = run_ranks(start, world_size, make_config, tmp_path / "run", values)
        for message in results:
            assert message == (
                f"teacher={path} holds NaN or infinity in decoder.layers.mlp.linear_fc1.weight; "
                "use weights that are whole"
            )


def test_a_loss_that_is_not_finite_is_refused(with_changed, tmp_path):
    """Every weight is finite, and yet the logits are not."""
    path, make_config = with_changed("model.norm.weight", lambda weight: weight.fill_(3e38))
    (message,) = run_ranks(start, 1, make_config, tmp_path / "run", {})
    assert message.startswith(f"teacher={path} has a loss of ") and "broken" in message


def test_a_teacher_that_beats_a_uniform_guess_is_not_warned_about(with_changed, tmp_path):
    """By a little: all logits are 0, and the mask token is in no softmax."""
    _, make_config = with_changed("model.norm.weight", lambda weight: weight.zero_())
    ((figures, log),) = run_ranks(start, 1, make_config, tmp_path / "run", {})
    uniform = figures["train/teacher_uniform_nll"]
    num_tokens = round(math.exp(uniform))
    assert uniform == pytest.approx(math.log(num_tokens), rel=1e-9)
    assert figures["train/teacher_nll"] == pytest.approx(math.log(num_tokens - 1), rel=1e-6)
    assert not warnings_of(log) and any("uniform guess has" in message for _, message in log)
