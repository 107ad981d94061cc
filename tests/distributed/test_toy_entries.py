"""A remasking rule and a state selection that only this file knows, through every command.

Nothing else had to be touched for them but the two tables: this is what adding one takes. A source
of responses is in three: its name, the function that makes it, and a method that uses it.
"""

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from megatron_opdlm import cli
from megatron_opdlm.config.methods import METHODS, WRITERS, Method
from megatron_opdlm.config.run import load_config
from megatron_opdlm.convert.exporter import export
from megatron_opdlm.diffusion.noising import select_states
from megatron_opdlm.diffusion.remasking import RULES, Candidates, RemaskingRule
from megatron_opdlm.diffusion.state_selection import (
    STATE_SELECTIONS,
    Draw,
    NoisyStates,
    StateSelection,
    before_step,
)
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.reporting.logger import read_metrics
from megatron_opdlm.responses.given import DataResponses
from megatron_opdlm.responses.prompts import Prompt
from megatron_opdlm.responses.source import RolloutSchedule
from megatron_opdlm.responses.sources import RESPONSE_SOURCES, SourceParts
from tests.helpers import run_ranks
from tests.tiny import TinyModel, tiny_model, write_prompts

BLOCK = 4


@dataclass(frozen=True, kw_only=True)
class Toy(RemaskingRule):
    """From right to left."""

    summary: ClassVar[str] = "the n rightmost, and 100 % of what is more probable than toy_bound"
    label: ClassVar[str] = "toy"

    toy_bound: float = 1.0
    """Probability above which a token is kept, in [0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.toy_bound <= 1:
            raise ValueError(f"toy_bound={self.toy_bound} must lie in [0, 1]; use e.g. 0.5")

    def score(self, candidates: Candidates) -> Tensor:
        return candidates.confidence_BK.new_ones(candidates.confidence_BK.shape).cumsum(1)

    def beyond_quota(self, ordered: Candidates) -> Tensor:
        return ordered.confidence_BK > self.toy_bound


@dataclass(frozen=True, kw_only=True)
class Forgetful(RemaskingRule):
    """Says nothing about the order."""

    summary: ClassVar[str] = "nothing"
    label: ClassVar[str] = "forgetful"


@dataclass(frozen=True, kw_only=True)
class Leaning(Toy):
    """Leans on this module."""

    def beyond_quota(self, ordered: Candidates) -> Tensor:
        return torch.ones_like(ordered.confidence_BK, dtype=torch.bool)


def last_steps(trajectory: Trajectory, draw: Draw) -> NoisyStates:
    """Every block before its last step."""
    steps = (draw.uniform(1) * 0).long() + trajectory.num_steps - 1
    return before_step(trajectory, steps)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "toy", Toy)
    toy = StateSelection(summary="every block before its last step", choose=last_steps)
    monkeypatch.setitem(STATE_SELECTIONS, "toy", toy)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.getbasetemp(), num_hidden_layers=2, std=0.35)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_prompts(tmp_path_factory.mktemp("toy") / "q.jsonl", count=8)
    lines = [json.loads(line) | {"answer": "7"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(rank: int, *argv: str) -> tuple[str, list[tuple[Trajectory, NoisyStates]]]:
    """What `opdlm ARGV` prints in a rank, and the states that it has chosen."""
    import megatron_opdlm.train.trainer as trainer_module
    from megatron_opdlm.distributed import process_groups

    warnings.simplefilter("ignore")
    process_groups.shutdown = lambda: None  # the group is the test's
    chosen: list[tuple[Trajectory, NoisyStates]] = []

    def remember(trajectory: Trajectory, **options: Any) -> NoisyStates:
        chosen.append((trajectory, select_states(trajectory, **options)))
        return chosen[-1][1]

    trainer_module.select_states = remember
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["--traceback", *argv]) == 0
    return printed.getvalue(), chosen


def commits_from_the_right(grid: list[list[int]]) -> bool:
    """Whether the tokens of every block came one by one from right to left; -1 is prompt."""
    rows = [[step for step in row if step >= 0] for row in grid]
    return all(row == list(range(len(row)))[::-1] for row in rows)


def write_config(folder: Path, model: TinyModel, questions: Path, **more: Any) -> Path:
    keys: dict[str, Any] = {
        "student": str(model.checkpoint), "data": str(questions), "save": str(folder / "run"),
        "train_rollouts": 2, "prompts_per_rollout": 4, "rows_per_optimizer_step": 4,
        "max_prompt_tokens": 64, "max_response_tokens": {"start": 8, "end": 8},
        "lr_warmup_steps": 0, "remasking": "toy",
    }  # fmt: skip
    path = folder / "toy.yaml"
    path.write_text(json.dumps(keys | more))  # JSON is YAML
    return path


@pytest.mark.usefixtures("toys")
def test_it_trains(model: TinyModel, questions: Path, tmp_path: Path) -> None:
    free = write_config(tmp_path, model, questions, toy_bound=0.0, save=str(tmp_path / "free"))
    ((_, chosen),) = run_ranks(command, 1, "train", str(free))
    assert all(t.num_steps.max() == 1 for t, _ in chosen)  # its parameter: all at once
    path = write_config(tmp_path, model, questions, state_selection="toy")
    ((_, chosen),) = run_ranks(command, 1, "train", str(path))
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert len([record for record in records if "train/loss" in record]) == 2
    assert len(chosen) == 8
    for trajectory, states in chosen:
        assert commits_from_the_right(trajectory.commit_grid.tolist())
        last = trajectory.commit_grid == trajectory.num_steps[:, None] - 1
        assert torch.equal(states.masked, last[None])
    # control: another rule and selection
    path = write_config(
        tmp_path, model, questions, remasking="sequential", save=str(tmp_path / "other")
    )
    ((_, chosen),) = run_ranks(command, 1, "train", str(path))
    assert not any(commits_from_the_right(t.commit_grid.tolist()) for t, _ in chosen)
    assert not all(
        torch.equal(states.masked[0], t.commit_grid == t.num_steps[:, None] - 1)
        for t, states in chosen
    )


@pytest.mark.usefixtures("toys")
def test_helps_list_it(capsys: pytest.CaptureFixture[str]) -> None:
    for name, texts in {
        "train": ["toy = the n rightmost", "toy_bound: float, default 1.0 toy: Probability",
                  "toy = every block before its last step"],
        "generate": ["toy = the n rightmost", "--toy-bound X toy: Probability above which"],
        "eval": ["--toy toy: the n rightmost, and 100 % of what", "--toy-bound X [X ...] toy:"],
    }.items():  # fmt: skip
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert [text for text in texts if text not in printed] == []


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("bound", ["0.15", "1.0"])
def test_it_generates_and_an_export_repeats_it(
    model: TinyModel, questions: Path, tmp_path: Path, bound: str
) -> None:
    out, folder = tmp_path / "out.jsonl", tmp_path / f"toy_export_{bound[0]}"
    run_ranks(
        command, 1, "generate", "--model", str(model.checkpoint), "--prompts", str(questions),
        "--block-size", str(BLOCK), "--max-new-tokens", "12", "--remasking", "toy",
        "--toy-bound", bound, "--out", str(out),
    )  # fmt: skip
    responses = [json.loads(line) for line in out.read_text().splitlines()]
    grids = [[[-1] * (r["num_prompt_tokens"] % BLOCK) + r["commit_step"]] for r in responses]
    blocks = [[row[i : i + BLOCK] for i in range(0, len(row), BLOCK)] for (row,) in grids]
    assert all(map(commits_from_the_right, blocks)) == (bound == "1.0")
    export(model.checkpoint, folder, block_size=BLOCK, progress=False)
    found = run_ranks(generate_by_export, 1, folder, questions, {"toy_bound": float(bound)})[0]
    assert found == [r["response_ids"][: r["tokens"]] for r in responses]
    if bound != "1.0":  # control: its parameter matters
        others = run_ranks(generate_by_export, 1, folder, questions, {})[0]
        assert found != others


def generate_by_export(
    rank: int, folder: Path, questions: Path, parameters: dict[str, Any]
) -> list[list[int]]:
    """Responses of the exported model to the same prompts, by its own code alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    rules = sys.modules[type(exported).generate.__module__].make_rule.__module__
    assert rules.startswith("transformers_modules.")
    ends = set(exported.generation_config.eos_token_id)
    responses = []
    for line in questions.read_text().splitlines():
        turn = [{"role": "user", "content": json.loads(line)["prompt"]}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        output = exported.generate(prompt, max_new_tokens=12, remasking="toy", **parameters)
        ids = output[0, prompt.shape[1] :].tolist()
        end = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        responses.append(ids[:end])
    return responses


@pytest.mark.usefixtures("toys")
def test_it_is_evaluated_under_its_label(model: TinyModel, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    ((printed, _),) = run_ranks(
        command, 1, "eval", "--model", str(model.checkpoint), "--task", f"mine={questions}",
        "--toy", "--toy-bound", "0.15", "1", "--static", "--max-new-tokens", "8",
        "--json", str(out),
    )  # fmt: skip
    results = json.loads(out.read_text())["results"]
    assert [r["setting"] for r in results] == ["static", "toy(0.15)", "toy(1)"]
    assert [r["options"]["toy_bound"] for r in results] == [1.0, 0.15, 1.0]
    assert [r["options"]["remasking"] for r in results] == ["low_confidence_static", "toy", "toy"]
    assert "toy(0.15)" in printed
    with pytest.raises(
        ValueError, match="toy_bound=0.5 applies only to --toy, not to the decoding"
    ):
        cli.main(["--traceback", "eval", "--model", "m", "--task", "t=f", "--toy-bound", "0.5"])


def echo(parts: SourceParts, schedule: RolloutSchedule, prompts: Sequence[Prompt]) -> DataResponses:
    """Every response is the first five tokens of its prompt, and the end."""
    end = torch.tensor([parts.student.description.config.eos_token_ids[0]])
    return DataResponses(schedule, [torch.cat([p.ids[:5], end]) for p in schedule.prompts])


def test_a_source_writes_what_is_trained_on(
    model: TinyModel, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = {"remasking": "sequential", "method": "echoes"}
    path = write_config(tmp_path, model, questions, **toy)
    with pytest.raises(ValueError, match="method=echoes must be one of"):  # control
        load_config(path)
    monkeypatch.setitem(WRITERS, "echo", "the prompt, once more")
    monkeypatch.setitem(RESPONSE_SOURCES, "echo", echo)
    method = Method(summary="echoes", writers=("echo",), states="random", target="tokens")
    monkeypatch.setitem(METHODS, "echoes", method)
    ((_, chosen),) = run_ranks(command, 1, "train", str(path))
    assert len([r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "train/loss" in r]) == 2
    assert len(chosen) == 8
    for trajectory, _ in chosen:
        assert torch.equal(trajectory.response_ids[:5], trajectory.prompt_ids[:5])
        assert trajectory.num_response_tokens == 6


# --- controls ---


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("label", ["static", ""])
def test_a_label_belongs_to_one_rule(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables would average the two as if they were seeds."""
    monkeypatch.setattr(Toy, "label", label)
    with pytest.raises(ValueError, match="label of .* must be a name of its own"):
        cli.build_parser()


def test_a_rule_without_implementation_is_no_rule(
    model: TinyModel, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, model, questions, remasking="sequential")
    assert load_config(path).rollout.remasking == "sequential"
    monkeypatch.setitem(RULES, "forgetful", Forgetful)
    with pytest.raises(TypeError, match="Forgetful.*score"):
        load_config(path)
    with pytest.raises(TypeError, match="choose"):
        StateSelection(summary="nothing")  # type: ignore[call-arg]


def test_a_name_that_is_not_there(model: TinyModel, questions: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, model, questions)
    with pytest.raises(ValueError, match=r"remasking=toy must be one of \{low_confidence_static,"):
        load_config(path)
    with pytest.raises(ValueError, match="state_selection=toy must be one of {per_block,"):
        load_config(path, ["remasking=sequential", "state_selection=toy"])
    path = write_config(tmp_path, model, questions, remasking="sequential", toy_bound=0.5)
    with pytest.raises(ValueError, match="unknown key toy_bound"):
        load_config(path)


@pytest.mark.usefixtures("toys")
def test_its_parameter_is_checked(model: TinyModel, questions: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, model, questions, toy_bound=1.5)
    with pytest.raises(ValueError, match=r"toy_bound=1.5 must lie in \[0, 1\]; use e.g. 0.5"):
        load_config(path)


def test_an_export_refuses_a_rule_that_would_not_run_there(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, "leaning", Leaning)
    with pytest.raises(ConversionError, match="rule leaning: its class uses Toy, torch, which"):
        export(model.checkpoint, tmp_path / "out", block_size=BLOCK, progress=False)
    assert not (tmp_path / "out/config.json").exists()
