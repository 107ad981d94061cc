"""The work that a run logs, known from the plan alone, is what the models are given."""

import pytest

from tests.distributed.train.test_parallel_training import Recorder
from tests.helpers import run_ranks
from tests.teachers import LAYOUTS, UNTIED

CASES = (
    "1",
    "TP2 x PP2 sequence parallel, teacher PP2",
    "DP4, teacher TP2 x PP2",
)


def tokens(rank, make_config, save, values):
    """Student and teacher: tokens given to this rank's model, counted, and counted of one rank."""
    trainer = Recorder(make_config(save=save, use_distributed_optimizer=False, **values))
    given = {}

    def watch(name, model, parallel):
        forward, given[name] = model.forward, 0
        counts = parallel.tp_rank == 0 and parallel.is_first_stage  # once for every replica

        def watched(token_ids, *args, **kwargs):
            given[name] += len(token_ids) * counts
            return forward(token_ids, *args, **kwargs)

        model.forward = watched

    batches = trainer.cut(trainer.select_states(trainer.collect()))
    watch("student", trainer.student.model, trainer.parallel)
    watch("teacher", trainer.teacher.model, trainer.teacher.parallel)
    counted, of_one_rank = [], []
    for whole, into in ((True, counted), (False, of_one_rank)):
        before = trainer.work.student_tokens, trainer.work.teacher_tokens
        for batch in batches:
            runs = trainer.plan(batch)
            if whole:
                targets = trainer.run_teacher(batch, runs)
                trainer.run_student(trainer.make_batch(batch, runs), targets)
            trainer.count(batch, runs if whole else [runs[0][:1]])
        into += [trainer.work.student_tokens - before[0], trainer.work.teacher_tokens - before[1]]
    return given, counted, of_one_rank


@pytest.mark.parametrize("layout", CASES)
def test_counted_tokens_are_those_that_ran(layout, teachers):
    world_size, values = LAYOUTS[layout]
    values = values | {"micro_batch_tokens": 80}
    save = teachers.folder / f"counted {layout}"
    results = run_ranks(tokens, world_size, teachers.config_of(UNTIED), save, values)
    executed = [sum(given[name] for given, _, _ in results) for name in ("student", "teacher")]
    assert min(executed) > 0
    for _, counted, of_one_rank in results:
        assert counted == executed
        assert 0 < of_one_rank[0] < executed[0]  # control: the first microbatch alone
