"""What the training of a model cost, from the metrics of its run folder."""

import json
from types import SimpleNamespace

from megatron_opdlm.evaluation.sweep.training import TrainingCost, read_cost


def source(folder, *, is_checkpoint=True, rollout_step=2):
    state = {} if rollout_step is None else {"rollout_step": rollout_step}
    return SimpleNamespace(is_checkpoint=is_checkpoint, state=state, folder=folder)


def run_folder(tmp_path):
    """Three rollouts; each adds 100 tokens, and optimizer steps have records of their own."""
    folder = tmp_path / "run" / "checkpoints" / "iter_0000002"
    folder.mkdir(parents=True)
    records = []
    for step in range(3):
        tokens = 100 * (step + 1)
        records.append({"rollout_step": step, "optimizer_step": step, "train/loss": 1.0})
        records.append({"rollout_step": step, "optimizer_step": step, "perf/tokens_paper": tokens,
                        "perf/flops_paper": 8 * tokens})  # fmt: skip
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    return folder


def test_the_cost_is_that_up_to_the_checkpoint(tmp_path):
    folder = run_folder(tmp_path)
    assert read_cost(source(folder)) == TrainingCost(tokens=200, flops=1600)
    assert read_cost(source(folder, rollout_step=3)) == TrainingCost(tokens=300, flops=2400)


def test_the_cost_of_other_models_is_not_known(tmp_path):
    folder = run_folder(tmp_path)
    assert read_cost(source(folder, is_checkpoint=False)) == TrainingCost()
    assert read_cost(source(folder, rollout_step=None)) == TrainingCost()
    assert read_cost(source(tmp_path / "a" / "b" / "c")) == TrainingCost()
    cost = TrainingCost(tokens=7)
    assert TrainingCost.from_json(cost.to_json()) == cost
