"""How far a rollout is: counted over all replicas, told to each replica's main rank."""

import contextlib
import io
import json

import pytest

from megatron_opdlm.rollout import request_queue
from megatron_opdlm.rollout.collector import collect
from megatron_opdlm.rollout.request import DecodingOptions
from tests.helpers import run_ranks
from tests.rollouts import load, make_engine, make_request
from tests.tiny import tiny_model, write_prompts

TOTAL = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


def progress(rank, checkpoint, layout, num_requests):
    """What this rank is told. No replica goes on before each has finished a response."""
    model, parallel, _ = load(checkpoint, **layout)
    engine = make_engine(model, parallel, DecodingOptions(), max_rows=2)
    told = []

    def tell(done):
        told.append(done)
        if num_requests:
            parallel.store.set(f"begun/{parallel.dp_rank}", "1")
            parallel.store.wait([f"begun/{replica}" for replica in range(parallel.dp_size)])

    collect(engine, [make_request(i, 5, 4 + i) for i in range(num_requests)], parallel,
            on_progress=tell)  # fmt: skip
    return told


def test_progress_is_that_of_the_whole_job(model):
    first, second = run_ranks(progress, 2, model.checkpoint, {}, TOTAL)
    assert first[-1] == second[-1] == TOTAL
    own = first[:-1], second[:-1]
    for numbers in own:
        assert numbers == sorted(numbers)
        assert 0 < len(numbers) < TOTAL, "a replica alone decodes fewer"
    assert sorted(own[0] + own[1]) == list(range(1, TOTAL + 1))


def test_control_a_replica_that_counts_alone(model, monkeypatch):
    class Alone(request_queue.SharedQueue):
        finished = 0

        def count_finished(self):
            self.finished += 1
            return self.finished

    monkeypatch.setattr("megatron_opdlm.rollout.collector.SharedQueue", Alone)
    parts = run_ranks(progress, 2, model.checkpoint, {}, TOTAL)
    assert all(max(part[:-1]) < TOTAL for part in parts)
    assert sum(max(part[:-1]) for part in parts) == TOTAL


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_only_the_main_rank_of_a_replica_is_told(axis, model):
    layout = {f"{axis}_model_parallel_size": 2}
    main, other = run_ranks(progress, 2, model.checkpoint, layout, TOTAL)
    assert main == [*range(1, TOTAL + 1), TOTAL]
    assert other == []


def test_nothing_to_do(model):
    assert run_ranks(progress, 2, model.checkpoint, {}, 0) == [[0], [0]]


def test_the_bar_of_an_evaluation_ends_at_all_questions(model, tmp_path):
    path = write_prompts(tmp_path / "q.jsonl", count=TOTAL)
    lines = [json.loads(line) | {"answer": "7"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def drawn(rank):
        from megatron_opdlm.evaluation.runner import evaluate
        from megatron_opdlm.evaluation.task import load_task
        from megatron_opdlm.generate.decoder import Decoder

        decoder = Decoder.open(str(model.checkpoint))
        task = load_task("t", str(path))
        with contextlib.redirect_stderr(io.StringIO()) as text:
            evaluate(decoder, task, DecodingOptions(), response_limit=4, progress=True)
        return text.getvalue().split("\r")[-1]

    last, silent = run_ranks(drawn, 2)
    assert f"{TOTAL}/{TOTAL}" in last
    assert silent == ""
