"""Evaluation during training: what it leaves alone, what it says, and what it refuses."""

import dataclasses
import json
import logging
import warnings

import pytest

from megatron_opdlm.evaluation.graders import GRADERS
from megatron_opdlm.evaluation.graders.grader import Grader
from tests.helpers import run_ranks
from tests.tiny import tiny_model, write_prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Prompts with answers that a random model rarely gives."""
    path = write_prompts(tmp_path_factory.mktemp("questions") / "q.jsonl", count=10)
    lines = [json.loads(line) | {"answer": "7"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def train(rank, model, prompts, run_dir, overrides):
    from megatron_opdlm.config.run import load_config
    from megatron_opdlm.reporting.logger import read_metrics
    from megatron_opdlm.train.trainer import Trainer

    warnings.simplefilter("ignore")
    keys = [
        f"student={model.checkpoint}", f"data={prompts}", f"save={run_dir}", "train_rollouts=3",
        "prompts_per_rollout=4", "rows_per_optimizer_step=4", "max_prompt_tokens=64", "lr=1e-2",
        "max_response_tokens.start=8", "max_response_tokens.end=8", "lr_warmup_steps=0",
        "confidence_threshold=0.03",
    ]  # fmt: skip
    Trainer(load_config(None, keys + overrides).resolved(cuda=False)).train()
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in records]


def test_evaluation_does_not_change_the_training(model, questions, tmp_path):
    evaluating = [f"eval_data={questions}", "eval_interval=2", "eval_questions=6"]
    plain = run_ranks(train, 1, model, questions, tmp_path / "plain", [])[0]
    found = run_ranks(train, 1, model, questions, tmp_path / "eval", evaluating)[0]
    with_eval = [record for record in found if "eval/questions" in record]
    assert [record for record in found if "eval/questions" not in record] == plain
    assert [record["rollout_step"] for record in with_eval] == [0, 2, 3]
    assert with_eval[0]["eval/questions"] == 6
    assert {"eval/accuracy_static", "eval/accuracy_dynamic"} < with_eval[0].keys()
    # Control: the weights that are evaluated are the live ones.
    speeds = {record["eval/tokens_per_forward_dynamic"] for record in with_eval}
    assert len(speeds) > 1


def said_while_training(rank, model, questions, run_dir, overrides):
    """Lines of evaluations, and their records."""
    lines, logger = [], logging.getLogger("megatron_opdlm.evaluation.online")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    records = train(rank, model, questions, run_dir, overrides)
    return lines, [record for record in records if "eval/questions" in record]


def test_an_evaluation_in_training_is_one_line_on_one_rank(model, questions, tmp_path):
    evaluating = [f"eval_data={questions}", "eval_interval=2", "eval_questions=6"]
    ranks = run_ranks(said_while_training, 2, model, questions, tmp_path / "run", evaluating)
    (lines, records), (silent, _) = ranks
    assert silent == []
    assert lines == [
        f"evaluation, 6 questions: static {100 * record['eval/accuracy_static']:.1f} % correct, "
        f"{record['eval/tokens_per_forward_static']:.2f} tokens per forward; dynamic(0.03) "
        f"{100 * record['eval/accuracy_dynamic']:.1f} % correct, "
        f"{record['eval/tokens_per_forward_dynamic']:.2f} tokens per forward"
        for record in records
    ]
    assert len(records) == 3


def no_verdict(text, reference):
    raise ValueError("no verdict")


def out_of_luck():
    raise ValueError("grader=broken needs luck; have some")


BROKEN = Grader(
    name="broken", reads="anything", accepts="never", read=lambda entry: None, grade=no_verdict
)


@pytest.fixture
def broken_questions(tmp_path, monkeypatch):
    """Six questions of a grader that breaks; the last is too long for the model."""
    monkeypatch.setitem(GRADERS, "broken", BROKEN)
    path = tmp_path / "broken.jsonl"
    prompts = ["x"] * 5 + ["x" * 300]
    lines = [{"prompt": prompt, "grader": "broken"} for prompt in prompts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_what_is_not_graded_in_training_is_counted_apart(
    model, questions, broken_questions, tmp_path
):
    evaluating = [f"eval_data={broken_questions}", "eval_interval=3", "eval_questions=6"]
    ((lines, records),) = run_ranks(
        said_while_training, 1, model, questions, tmp_path / "run", evaluating
    )
    for name in ("static", "dynamic"):
        assert [record[f"eval/accuracy_{name}"] for record in records] == [0, 0]
        assert [record[f"eval/ungraded_{name}"] for record in records] == [5, 5]
        assert [record[f"eval/too_long_{name}"] for record in records] == [1, 1]
    assert lines[1:3] == [
        "evaluation: eval, static, seed 0: 5 of 6 responses could not be graded and count as "
        "wrong: 1, 2, 3, 4, 5",
        "evaluation: eval, static, seed 0: 1 of 6 prompts were too long to decode and count as "
        "wrong: 6",
    ]


def test_a_grader_that_cannot_run_shows_before_the_training(
    model, questions, broken_questions, tmp_path, monkeypatch
):
    monkeypatch.setitem(GRADERS, "broken", dataclasses.replace(BROKEN, require=out_of_luck))
    evaluating = [f"eval_data={broken_questions}", "eval_interval=3", "eval_questions=6"]

    def refuse(rank):
        with pytest.raises(ValueError, match="grader=broken needs luck"):
            train(rank, model, questions, tmp_path / "run", evaluating)
        return True

    assert run_ranks(refuse, 1) == [True]


def test_too_few_questions_show_before_the_training(model, questions, tmp_path):
    evaluating = [f"eval_data={questions}", "eval_interval=2", "eval_questions=11"]

    def refuse(rank):
        with pytest.raises(ValueError, match="eval_questions=11 must be between 1 and .* 10"):
            train(rank, model, questions, tmp_path / "run", evaluating)
        return True

    assert run_ranks(refuse, 1) == [True]
