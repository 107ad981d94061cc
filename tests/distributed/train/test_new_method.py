"""Methods that only this file knows: a record that recombines what there is is all it takes."""

import dataclasses
import functools

import pytest
import torch

from megatron_opdlm import cli
from megatron_opdlm.config.methods import METHODS, STATES, TARGETS, WRITERS, Method
from megatron_opdlm.config.run import load_config
from megatron_opdlm.diffusion.state_selection import STATE_SELECTIONS
from megatron_opdlm.reporting.logger import read_metrics
from megatron_opdlm.responses.sources import RESPONSE_SOURCES
from megatron_opdlm.train import start
from megatron_opdlm.train.targets import TARGET_SOURCES
from tests.distributed.train.test_methods import dense_loss
from tests.helpers import run_ranks
from tests.methods import run
from tests.oracle import load_hf
from tests.training import run_command

LAYOUTS = {"1": (1, {}), "TP2": (2, {"tensor_model_parallel_size": 2})}
NEEDED = ["student=a", "data=b", "save=c", "train_rollouts=10"]
TOYS = {
    "self_training": Method(
        summary="the student's responses under random masks, learnt as they are",
        writers=("student",),
        states="random",
        target="tokens",
    ),
    "own_path": Method(
        summary="the student's responses at their own states, learnt as they are",
        writers=("student",),
        states="trajectory",
        target="tokens",
    ),
    "given": Method(
        summary="the data's responses under random masks, by the teacher's distribution",
        writers=("data",),
        states="random",
        target="teacher",
    ),
}
VALUES = {
    "self_training": {"teacher": None},
    "own_path": {"teacher": None, "loss_reduction": "token_mean"},
    "given": {},
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, method in TOYS.items():
        monkeypatch.setitem(METHODS, name, method)


@pytest.fixture(scope="module")
def steps_of(methods):
    """Records of the optimizer steps of one `opdlm train`, by method and layout."""

    @functools.cache
    def steps(method, layout):
        world_size, sizes = LAYOUTS[layout]
        save = methods.folder / f"new {layout} {method}"
        values = VALUES[method] | sizes | {"method": method, "train_rollouts": 1}
        path = save.with_suffix(".yaml")
        methods.make_config(save=save, **values).save_yaml(path)
        results = run_ranks(run_command, world_size, path)
        assert [status for status, _ in results] == [0] * world_size, results
        return [r for r in read_metrics(save / "metrics.jsonl") if "train/loss" in r]

    return steps


@pytest.mark.parametrize("method", ["self_training", "given"])
def test_it_trains_the_same_in_every_layout(method, steps_of):
    one, two = (
        torch.tensor([[r["train/loss"], r["train/grad_norm"]] for r in steps_of(method, layout)])
        for layout in LAYOUTS
    )
    assert len(one) == 3
    torch.testing.assert_close(one[:, 0], two[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(one[:, 1], two[:, 1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("method", "same_loss_as", "other"),
    [("self_training", "self_training", "opdlm_off"), ("given", "opdlm_off", "self_training")],
)
def test_its_parts_are_those_that_the_record_names(method, same_loss_as, other, methods, steps_of):
    """The loss of the first optimizer step against a dense one in float64."""
    values = VALUES[method] | {"method": method, "train_rollouts": 1}
    save = methods.folder / f"watched {method}"
    (result,) = run_ranks(run, 1, methods.make_config, save, values)
    assert result["has_teacher"] == (method == "given")
    assert (result["work"]["teacher_head_rows"] > 0) == (method == "given")
    assert (result["work"]["rollout_tokens"] > 0) == (method == "self_training")
    assert all(bool(s.masked.any(-1).all()) for s in result["states"]) == (method == "given")
    student, frozen = (load_hf(path.hf, torch.float64) for path in (methods.model, methods.teacher))
    step = result["rollouts"][0][:4], result["states"][:4]
    with torch.no_grad():
        loss, wrong = (dense_loss(name, student, frozen, *step) for name in (same_loss_as, other))
    assert steps_of(method, "1")[0]["train/loss"] == result["losses"][0]
    assert result["losses"][0] == pytest.approx(loss.item(), rel=2e-6)
    assert abs(float(wrong) - result["losses"][0]) > 1e-3  # control


def test_tokens_at_states_of_a_trajectory_are_plain_cross_entropy(methods, steps_of):
    for step in steps_of("own_path", "1"):
        assert step["train/loss"] == pytest.approx(step["train/kl"], rel=1e-6)
    weighted = steps_of("self_training", "1")  # control: 1/t at random masks
    assert all(abs(step["train/loss"] - step["train/kl"]) > 1e-3 for step in weighted)


def test_it_stands_in_the_help(capsys, monkeypatch):
    def text():
        with pytest.raises(SystemExit):
            cli.main(["train", "--help"])
        return capsys.readouterr().out

    assert "self_training = the student's responses under random masks, learnt" in text()
    monkeypatch.delitem(METHODS, "self_training")
    assert "self_training" not in text()  # control


def error_of(*overrides):
    with pytest.raises(ValueError) as caught:
        load_config(None, [*NEEDED, *overrides])
    return str(caught.value)


def test_its_settings_are_checked_as_all_are():
    assert load_config(None, [*NEEDED, "method=own_path"]).distill.state_selection == "per_block"
    paper = load_config(None, [*NEEDED, "method=own_path", "preset=paper"]).distill
    assert paper.state_selection == "trajectory" and not paper.is_nelbo
    assert "divergence=jsd does not apply to method=own_path" in error_of(
        "method=own_path", "divergence=jsd"
    )
    for key in ("teacher=a", "teacher_fp8=hybrid"):
        assert "applies only to the teacher, and method=own_path has none" in error_of(
            "method=own_path", key
        )
    wrong = error_of("method=own_path", "state_selection=random")
    assert wrong.startswith(
        "state_selection=random applies only to the methods opdlm_off, off_policy, sft,"
    )
    assert "teacher_responses=a applies only to" in error_of(
        "method=self_training", "teacher_responses=a"
    )
    assert "sft_responses=data applies only to method=sft" in error_of(
        "method=given", "sft_responses=data"
    )


def test_a_choice_of_writers_is_one_of_the_methods_own(monkeypatch):
    choice = dataclasses.replace(TOYS["self_training"], writers=("student", "data"))
    monkeypatch.setitem(METHODS, "choice", choice)
    wrong = error_of("method=choice")  # the default, the teacher, is none of its writers
    assert "sft_responses=teacher must be student or data with method=choice" in wrong
    given = load_config(None, [*NEEDED, "method=choice", "sft_responses=data"]).distill
    assert given.responses == "data"


def test_a_part_that_nobody_has_written_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(WRITERS, "oracle", "an oracle's")
    monkeypatch.setitem(METHODS, "toy", dataclasses.replace(TOYS["given"], writers=("oracle",)))
    config = load_config(None, [*NEEDED[:2], f"save={tmp_path}/s", NEEDED[3], "method=toy"])
    with pytest.raises(ValueError, match="writers=oracle of method=toy has no implementation"):
        start.check(config)


def test_a_kind_of_states_without_a_selection_is_refused(monkeypatch):
    monkeypatch.setitem(STATES, "oracle", "an oracle's")
    with pytest.raises(ValueError, match="states=oracle must have a state selection of its kind"):
        dataclasses.replace(TOYS["self_training"], states="oracle")


@pytest.mark.parametrize(
    ("part", "rule"),
    [
        ({"writers": ("parrot",)}, "writers=parrot must be among student, teacher, data"),
        ({"writers": ()}, r"writers=\(\) must not be empty"),
        ({"writers": ("student", "student")}, "writers=student, student must be named once each"),
        ({"states": "sorted"}, "states=sorted must be among trajectory, random"),
        ({"target": "applause"}, "target=applause must be among teacher, tokens"),
        (
            {"states": "trajectory", "writers": ("teacher",)},
            "states=trajectory needs a denoising trajectory, which only the student's responses",
        ),
    ],
)
def test_a_record_of_what_is_not_there_is_loud(part, rule):
    with pytest.raises(ValueError, match=rule):
        dataclasses.replace(TOYS["self_training"], **part)


def test_every_name_that_a_record_may_hold_has_its_part():
    assert set(RESPONSE_SOURCES) == set(WRITERS)
    assert set(TARGET_SOURCES) == set(TARGETS)
    kinds = {selection.reads_trajectory for selection in STATE_SELECTIONS.values()}
    assert kinds == {True, False} and set(STATES) == {"trajectory", "random"}
