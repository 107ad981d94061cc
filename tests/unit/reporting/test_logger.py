"""Files of a run, phase times, loss by masked fraction."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_opdlm.reporting.logger import (
    MaskedFractionHistogram,
    MetricsLogger,
    PhaseTimer,
    read_metrics,
)


def write_run(folder, steps, start=0):
    with MetricsLogger(folder, True) as logger:
        logger.open_at(start)
        for step in steps:
            logger.log({"train/loss": step / 2}, rollout_step=step, optimizer_step=10 * step)


def test_records_are_one_json_object_per_line(tmp_path):
    write_run(tmp_path, [0, 1])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"rollout_step": 1, "optimizer_step": 10, "train/loss": 0.5}
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(line) for line in lines]


def test_a_record_is_on_disk_before_the_logger_closes(tmp_path):
    logger = MetricsLogger(tmp_path, True)
    logger.open_at(0)
    logger.log({"train/loss": 1.0}, rollout_step=0, optimizer_step=0)
    assert len(read_metrics(logger.path)) == 1
    logger.close()


def test_resuming_removes_what_the_killed_run_wrote_too_much(tmp_path):
    write_run(tmp_path, [0, 1, 2, 3])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"rollout_step": 4, "optim')  # killed while it wrote
    write_run(tmp_path, [2, 3, 4], start=2)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["rollout_step"] for r in records] == [0, 1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [0, 10, 20, 30, 40]


def test_starting_anew_empties_the_file(tmp_path):
    write_run(tmp_path, [0, 1])
    write_run(tmp_path, [0])
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_line_that_is_no_record_is_named(tmp_path):
    for bad in ("not json", "7", '{"loss": 1}'):
        (tmp_path / "metrics.jsonl").write_text(f"{bad}\n")
        with pytest.raises(ValueError, match=r"metrics.jsonl:1: is no metrics record"):
            MetricsLogger(tmp_path, True).open_at(1)


def test_a_disabled_logger_touches_nothing(tmp_path):
    with MetricsLogger(tmp_path / "run", False) as logger:
        logger.open_at(0)
        logger.log({"train/loss": 1.0}, rollout_step=0, optimizer_step=0)
    assert not (tmp_path / "run").exists()


def test_numbers_that_json_lacks_become_null_and_tensors_numbers(tmp_path):
    with MetricsLogger(tmp_path, True) as logger:
        logger.open_at(0)
        metrics = {"eval/a": float("nan"), "eval/b": torch.tensor(2), "eval/c": float("inf")}
        logger.log(metrics, rollout_step=0, optimizer_step=0)
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert (record["eval/a"], record["eval/b"], record["eval/c"]) == (None, 2, None)


def test_a_name_without_a_prefix_is_a_bug(tmp_path):
    with MetricsLogger(tmp_path, True) as logger:
        logger.open_at(0)
        with pytest.raises(AssertionError, match="metric loss must begin with"):
            logger.log({"loss": 1.0}, rollout_step=0, optimizer_step=0)


def test_logging_before_opening_is_a_bug(tmp_path):
    with pytest.raises(AssertionError, match=r"open_at\(\) comes first"):
        MetricsLogger(tmp_path, True).log({}, rollout_step=0, optimizer_step=0)


def test_wandb_that_is_not_installed_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    logger = MetricsLogger(tmp_path, True, wandb_project="p")
    with pytest.raises(ImportError, match=r"wandb_project=p needs wandb; pip install .*\[wandb\]"):
        logger.open_at(0)
    logger.close()


def test_phases_add_up_and_drain(monkeypatch):
    times = iter([0.0, 1.0, 10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    calls = []
    timer = PhaseTimer(lambda: calls.append(1))
    for name in ("rollout", "rollout", "student"):
        with timer.phase(name):
            pass
    assert timer.drain() == {"perf/seconds_rollout": 3.0, "perf/seconds_student": 0.5}
    assert timer.drain() == {}
    assert len(calls) == 6  # both ends of every phase wait for the device


def test_divergence_by_masked_fraction():
    histogram = MaskedFractionHistogram(4)
    histogram.add(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1, 1, 4]))
    histogram.add(torch.tensor([8.0], requires_grad=True), torch.tensor([4]))
    assert histogram.drain() == {"train/kl_masked_0.25": 2.0, "train/kl_masked_1": 6.5}
    assert histogram.drain() == {}


def test_the_histogram_of_ranks_is_the_sum_of_their_totals():
    kl, masked = torch.rand(20), torch.randint(1, 5, (20,))
    whole, left, right = (MaskedFractionHistogram(4) for _ in range(3))
    whole.add(kl, masked)
    left.add(kl[:7], masked[:7])
    right.add(kl[7:], masked[7:])
    left.totals += right.totals
    assert left.drain() == pytest.approx(whole.drain())


def test_no_rows_are_no_metrics():
    histogram = MaskedFractionHistogram(4)
    histogram.add(torch.empty(0), torch.empty(0, dtype=torch.int64))
    assert histogram.drain() == {}
