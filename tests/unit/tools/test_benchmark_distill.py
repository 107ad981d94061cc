"""The benchmarks of training: their gates can fail, and the peers' layouts mean what ours does."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[3] / "tools/benchmarks"


@pytest.fixture(scope="module")
def tools():
    sys.path.insert(0, str(FOLDER))
    try:
        import attention
        import kl
        import measuring
        import step
    finally:
        sys.path.remove(str(FOLDER))
    return SimpleNamespace(attention=attention, kl=kl, measuring=measuring, step=step)


def test_gate(tools):
    tools.measuring.must_agree("x", {"a": {"loss": 1.0}, "b": {"loss": 1.0 + 1e-6}})
    for wrong in (1.0001, float("nan"), -1.0):
        with pytest.raises(SystemExit, match="x: loss of b is"):
            tools.measuring.must_agree("x", {"a": {"loss": 1.0}, "b": {"loss": wrong}})


MEASURED = """
import torch, measuring
torch.ones(2**26)  # 256 MiB, freed
print(*measuring.peak_above(lambda: int(torch.ones(2**23).sum())))  # 32 MiB
"""


def test_peak_counts_what_the_work_takes_and_not_what_came_before():
    """In a fresh process, as the benchmarks do: freed memory of others would be used again."""
    command = [sys.executable, "-c", MEASURED]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True)
    result, peak = map(int, done.stdout.split())
    assert result == 2**23 and 30 * 2**20 < peak < 60 * 2**20


def test_arms_take_turns(tools):
    calls = []
    taken = tools.measuring.in_turn({n: lambda n=n: calls.append(n) for n in "ab"}, 2)
    assert calls == ["a", "b", "a", "b"] and [len(taken[n]) for n in "ab"] == [2, 2]


def test_losses_agree_and_a_wrong_one_does_not(tools, monkeypatch):
    monkeypatch.setattr(tools.kl, "VOCAB", 300)
    monkeypatch.setattr(tools.kl, "CHUNK", 8)
    x = tools.kl.Inputs(16, 12)
    numbers = {
        name: x.numbers(tools.kl.forward_backward(arm, x)) for name, arm in tools.kl.ARMS.items()
    }
    tools.measuring.must_agree("kl", numbers)
    x.teacher_hidden[3] *= 1.01
    numbers["other"] = x.numbers(tools.kl.forward_backward(tools.kl.naive, x))
    with pytest.raises(SystemExit, match="of other"):
        tools.measuring.must_agree("kl", numbers)


def test_dense_columns_see_what_the_stream_sees(tools):
    """A padded row without its padding and its last clean block, against the tags."""
    from megatron_opdlm.diffusion.tags import make_tags, visible

    row = next(row for row in tools.step.make_rows() if len(row.masked) == 100)
    num_prompt = len(row.trajectory.prompt_ids)
    columns = tools.step.Columns(row, num_prompt + 12, 100 + 8)
    real = columns.part >= 0
    end = num_prompt + 100
    clean = make_tags(0, torch.arange(end), noisy=0, block_size=4)
    noisy = make_tags(0, torch.arange(num_prompt, end), noisy=1, block_size=4)
    tags = torch.cat([clean, noisy])
    mask = columns.dense_mask(causal=False)[0, 0]
    assert torch.equal(mask[real][:, real], visible(tags, tags))
    assert not mask[real][:, ~real].any() and mask.diagonal().all()
    causal = columns.dense_mask(causal=True)[0, 0][real][:, real]
    assert torch.equal(causal[:end, :end], torch.ones(end, end).bool().tril())
    assert torch.equal(causal[end:, end:], causal[num_prompt:end, num_prompt:end])
    assert not causal[end:, num_prompt:end].any()


def test_ideal_work_by_counting(tools):
    """The formula against the documents and the predicate, pair by pair."""
    from megatron_opdlm.diffusion.example import make_example
    from megatron_opdlm.diffusion.tags import visible

    rows = [row for row in tools.step.make_rows() if len(row.masked) <= 160]
    states = [
        make_example(row.trajectory, row.states, mask_token_id=0, include_eos=True) for row in rows
    ]
    work = tools.step.ideal_work(rows)
    assert work.tokens == tuple(
        sum(len(getattr(s, side)) for s in states) for side in ("student", "teacher")
    )
    assert work.pairs == tuple(
        sum(int(visible(d.tags, d.tags).sum()) for d in (getattr(s, side) for s in states))
        for side in ("student", "teacher")
    )
    assert work.head_rows == (sum(s.num_rows for s in states),) * 2


def test_attention_gate(tools):
    tags = tools.attention.tags_of(20)
    inputs = tools.attention.make_inputs(len(tags))
    found = {
        arm: tools.attention.forward_backward(make(tags), inputs)
        for arm, make in tools.attention.ARMS.items()
    }
    tools.attention.check(len(tags), found)
    found["tiles"][2][5, 0, 0] += 1e-2
    with pytest.raises(SystemExit, match="the key gradient of tiles"):
        tools.attention.check(len(tags), found)


@pytest.mark.parametrize("name", ["step", "kl", "attention", "balance"])
def test_help(name):
    command = [sys.executable, "-W", "ignore", str(FOLDER / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--repeats" in done.stdout and "Nothing is judged" in done.stdout.replace("\n", " ")


def test_ranks_that_disagree_are_never_timed(tools, monkeypatch):
    timed = []

    def ranks(fn, size, name, repeats, timeout):
        if repeats:
            timed.append((name, size))
        loss = 1.0 if name == "fused" else 2.0
        one = {"loss": loss, "hidden_gradient": 1.0, "head_gradient": 1.0}
        return [one | {"peak_bytes": 1, "bytes_per_row": 0.0, "cpu_seconds": [0.0]}] * size

    monkeypatch.setattr(tools.kl, "run_ranks", ranks)
    with pytest.raises(SystemExit, match="gathered, 2 ranks: loss of"):
        tools.kl.parallel(3)
    assert timed == [("fused", 1), ("fused", 2), ("fused", 4)]
