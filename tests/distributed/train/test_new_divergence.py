"""A divergence that only this file knows: a class and its entry in the table are all it takes."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from megatron_opdlm import cli
from megatron_opdlm.checks import require
from megatron_opdlm.config.run import load_config
from megatron_opdlm.distributed.vocab_shard import VocabShard
from megatron_opdlm.loss import fused
from megatron_opdlm.loss.divergence import DIVERGENCES, TOP_K_MODES, Divergence, Kind
from megatron_opdlm.reporting.logger import read_metrics
from tests import loss_oracle
from tests.helpers import run_ranks
from tests.tiny import tiny_model, write_prompts
from tests.training import run_command, tiny_config

LAYOUTS = {"1": (1, {}), "TP2": (2, {"tensor_model_parallel_size": 2})}


@dataclass(frozen=True, kw_only=True)
class Power(Kind):
    """Amari's divergence, the sum of (a p + (1 - a) q - p^a q^(1 - a)) / (a (1 - a))."""

    summary: ClassVar[str] = "a power divergence"
    power: float = 0.5
    """exponent a of the teacher's probability, in (0, 1)."""

    def __post_init__(self):
        rule = "must lie in (0, 1)"
        require(0 < self.power < 1, "power", self.power, rule, "use e.g. 0.5")

    def terms(self, log_p, log_q, q):
        a, p = self.power, log_p.exp()
        both = (a * log_p + (1 - a) * log_q).exp()
        return (a * p + (1 - a) * q - both) / (a * (1 - a)), (q - both) / a


class Unfinished(Kind):
    """A name without a computation."""

    summary = "nothing"


def oracle(kind, log_p, log_q):
    a = kind.power
    weighted = a * log_p.exp() + (1 - a) * log_q.exp()
    return ((weighted - log_p.exp() ** a * log_q.exp() ** (1 - a)) / (a * (1 - a))).sum(1)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "power", Power)
    monkeypatch.setitem(loss_oracle.ORACLES, "power", oracle)


@pytest.mark.parametrize("mode", ["full", *TOP_K_MODES])
def test_value_and_gradient_equal_autograd(mode):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(5, 19, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    options = {} if mode == "full" else {"top_k": 4, "top_k_mode": mode}
    got, shard = {}, VocabShard(0, 19, None, None)
    for power in (0.2, 0.7):
        divergence = Divergence(kind=Power(power=power), **options)
        leaf, gradient = student.clone().requires_grad_(), student.clone()
        expected = loss_oracle.dense_divergence(leaf, teacher, divergence)
        expected.sum().backward()
        values = fused.divergence_and_gradient(gradient, teacher.clone(), divergence, shard)
        torch.testing.assert_close((values, gradient), (expected.detach(), leaf.grad))
        got[power] = values
    assert not torch.allclose(got[0.2], got[0.7])  # control


def test_it_stands_among_those_that_all_tests_of_the_loss_try(monkeypatch):
    def tried():
        return [d for d in loss_oracle.every_divergence(4) if isinstance(d.kind, Power)]

    assert len(tried()) == 1 + len(TOP_K_MODES)
    monkeypatch.delitem(loss_oracle.ORACLES, "power")
    assert tried() == []  # control


@pytest.fixture(scope="module")
def steps_of(tmp_path_factory):
    """A run of `opdlm train`: loss and gradient norm of its optimizer steps."""
    folder = tmp_path_factory.mktemp("divergences")
    data = write_prompts(folder / "prompts.jsonl")
    student, teacher = (tiny_model(tmp_path_factory.getbasetemp(), seed=s) for s in (0, 5))
    make_config = functools.partial(tiny_config, student.checkpoint, data)

    @functools.cache
    def run(layout, **values):
        world_size, sizes = LAYOUTS[layout]
        save = folder / f"{layout} {values}"
        config = make_config(save, teacher=teacher.checkpoint, train_rollouts=1, **sizes, **values)
        path = folder / f"{layout} {values}.yaml"
        config.save_yaml(path)
        results = run_ranks(run_command, world_size, path)
        assert [status for status, _ in results] == [0] * world_size, results
        steps = [r for r in read_metrics(save / "metrics.jsonl") if "train/loss" in r]
        return torch.tensor([[s["train/loss"], s["train/grad_norm"]] for s in steps])

    return run


def test_it_trains_the_same_in_every_layout(steps_of):
    got, sharded = (steps_of(name, divergence="power") for name in LAYOUTS)
    assert len(got) == 3
    torch.testing.assert_close(got[:, 0], sharded[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[:, 1], sharded[:, 1], rtol=1e-4, atol=0)


def test_its_parameter_arrives(steps_of):
    """With a power near 1 it is KL(p || q): in the first step, where the weights are the same."""
    forward, default = (steps_of("1", divergence=name)[0] for name in ("forward_kl", "power"))
    near_1 = steps_of("1", divergence="power", power=0.999)[0]
    torch.testing.assert_close(near_1, forward, rtol=0.01, atol=0)
    assert not torch.allclose(default, forward, rtol=0.01)  # control


def test_it_stands_in_the_help(capsys, monkeypatch):
    def text():
        with pytest.raises(SystemExit):
            cli.main(["train", "--help"])
        return capsys.readouterr().out

    assert "power = a power divergence" in text()
    line = "  power: float, default 0.5\n      power: exponent a of the teacher's probability"
    assert line in text()
    monkeypatch.delitem(DIVERGENCES, "power")
    assert "power divergence" not in text() and "  power: " not in text()  # control


def test_its_settings_are_checked_as_all_are(tmp_path):
    def error_of(*overrides):
        needed = ["student=a", "data=b", "save=c", "train_rollouts=10"]
        with pytest.raises(ValueError) as caught:
            load_config(None, [*needed, *overrides])
        return str(caught.value)

    assert error_of("power=2") == "power=2.0 must lie in (0, 1); use e.g. 0.5"
    assert error_of("power=0.3").startswith(
        "power=0.3 applies only to divergence=power; leave it out"
    )
    assert "jsd_alpha=0.3 applies only to divergence=jsd" in error_of(
        "divergence=power", "jsd_alpha=0.3"
    )
    assert "did you mean power?" in error_of("divergence=powr")


def test_a_name_without_a_computation_is_loud(monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "unfinished", Unfinished)
    with pytest.raises(TypeError, match="Unfinished.* abstract method '?terms"):
        load_config(None, ["student=a", "data=b", "save=c", "train_rollouts=10"])
