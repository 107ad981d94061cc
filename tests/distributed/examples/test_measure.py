"""What examples/smollm2/measure.py measures, against transformers in float64."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm import cli
from megatron_opdlm.diffusion.prediction import PREDICTIONS, SAME_POSITION
from tests import smollm2
from tests.helpers import run_ranks
from tests.oracle import block_tags, hf_logits, load_hf
from tests.rollouts import MASK
from tests.tiny import tiny_model, write_prompts

LIMIT, THRESHOLD = 13, 0.015
measure, pair_module = smollm2.module("measure"), smollm2.module("pair")
likelihood, states = smollm2.module("likelihood"), smollm2.module("states")
decoding = smollm2.module("decoding")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two Llamas with one tokenizer, and files of prompts and questions."""
    folder = tmp_path_factory.getbasetemp()
    heldout = write_prompts(tmp_path_factory.mktemp("measure") / "heldout.jsonl", count=9)
    questions = heldout.with_name("questions.jsonl")
    lines = [
        {"id": f"q{i}", "prompt": "y" * (1 + i), "answer": ["odd", "1"], "kind": f"kind {i % 2}"}
        for i in range(6)
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SimpleNamespace(
        teacher=tiny_model(folder, family="llama", seed=13, num_hidden_layers=2),
        student=tiny_model(folder, family="llama", seed=3, num_hidden_layers=2),
        heldout=str(heldout),
        questions=str(questions),
    )


def is_right(response, answers):
    """A grader by the length of a text; a random model says nothing that means anything."""
    return bool(len(response) % 2) == ("odd" in answers)


def work_of(models, **changes):
    values = {
        "prompts": measure.load_prompts(models.heldout),
        "questions": measure.read_questions(models.questions),
        "is_right": is_right,
        "parts": measure.PARTS,
        "thresholds": [THRESHOLD],
        "temperatures": [0.0, 1.0],
        "limit": LIMIT,
        "seed": 5,
    }
    return measure.Work(**(values | changes))


def measured(rank, models, block_size, prediction):
    """Everything that is measured, and what it was measured on."""
    pair = pair_module.open_pair(
        str(models.teacher.checkpoint), str(models.student.checkpoint), max_rows=64,
        block_size=block_size, prediction=prediction,
    )  # fmt: skip
    work = work_of(models)
    found = measure.measure(pair, work)
    prompts = pair.decoders["student"].tokenize(
        work.prompts, pair.options["student"], response_limit=LIMIT
    )
    decodings = [
        decoding.decode(pair, setting, prompts.kept, limit=LIMIT, seed=5)
        for setting in measure.settings(pair, work)
    ]
    rollout = next(d for d in decodings if d.setting.name == "static" and not d.setting.is_greedy)
    masked = states.divergences(pair, rollout.trajectories)
    return found, decodings, rollout.trajectories, masked


@pytest.fixture(
    scope="module", params=[(4, SAME_POSITION), (3, SAME_POSITION), (4, "next_position")], ids=str
)
def result(request, models):
    return *run_ranks(measured, 1, models, *request.param)[0], request.param[1]


@pytest.fixture(scope="module")
def hf(models):
    """transformers' teacher and student in float64."""
    return {
        "teacher": load_hf(models.teacher.hf, torch.float64),
        "student": load_hf(models.student.hf, torch.float64),
    }


def log_softmax(logits, *, with_mask=False):
    """[S, V], without the mask token unless told otherwise."""
    if not with_mask:
        logits = logits.clone()
        logits[:, MASK] = -torch.inf
    return logits.log_softmax(-1)


@torch.no_grad()
def nats_of(hf, prompt, response, **options):
    """Minus log probability of a response, by one forward pass."""
    ids = torch.tensor(prompt + response)
    rows = log_softmax(hf["teacher"](ids[None]).logits[0], **options)
    places = range(len(prompt), len(ids))
    return -sum(float(rows[place - 1, ids[place]]) for place in places)


def test_likelihood_is_that_of_transformers(result, hf):
    found, decodings, *_ = result
    assert len(found["results"]) == len(decodings) == 6
    controls = []
    for record, decoded in zip(found["results"], decodings, strict=True):
        pairs = [
            (t.prompt_ids.tolist(), t.response_ids.tolist(), t.num_response_tokens)
            for t in decoded.trajectories
        ]
        assert record["num_tokens"] == sum(count for *_, count in pairs)
        totals = [nats_of(hf, prompt, ids[:count]) for prompt, ids, count in pairs]
        counts = [count for *_, count in pairs]
        assert record["nll"] == pytest.approx(sum(totals) / sum(counts), rel=1e-5)
        with_mask = sum(nats_of(hf, p, ids[:n], with_mask=True) for p, ids, n in pairs)
        without_end = sum(nats_of(hf, p, ids[: n - 1]) for p, ids, n in pairs)
        to_the_block_end = sum(nats_of(hf, p, ids) for p, ids, n in pairs)
        more = sum(len(ids) for _, ids, _ in pairs)
        controls.append(
            [
                abs(with_mask / sum(counts) - record["nll"]),
                abs(without_end / (sum(counts) - len(counts)) - record["nll"]),
                0 if decoded.setting.writer == "teacher" else
                abs(to_the_block_end / more - record["nll"]),
            ]
        )  # fmt: skip
    assert all(largest > 1e-3 for largest in map(max, zip(*controls, strict=True)))


def test_some_responses_end_and_some_do_not(result):
    """Otherwise the tests here would say nothing of the tokens after an end."""
    found, decodings, *_ = result
    for record, decoded in zip(found["results"], decodings, strict=True):
        ended = [t.ended for t in decoded.trajectories]
        assert record["eos_rate"] == sum(ended) / len(ended)
    assert 0 < found["results"][1]["eos_rate"] < 1
    assert any(
        len(t.response_ids) > t.num_response_tokens for d in decodings for t in d.trajectories
    )


def test_the_teacher_decodes_what_it_finds_likeliest(result, hf):
    """Its engine is ours; transformers' argmax after every token is the oracle."""
    decoded = result[1][0]
    assert (decoded.setting.writer, decoded.setting.is_greedy) == ("teacher", True)
    for trajectory in decoded.trajectories:
        ids = trajectory.prompt_ids.tolist() + trajectory.text_ids.tolist()
        with torch.no_grad():
            rows = log_softmax(hf["teacher"](torch.tensor([ids])).logits[0])
        first = len(trajectory.prompt_ids)
        assert rows[first - 1 : -1].argmax(-1).tolist() == ids[first:]


@torch.no_grad()
def dense_divergences(
    hf, trajectories, prediction, *, place_of=lambda position, size: position % size, row=-1
):
    """(place, number masked) -> all KL values, from full forward passes of every state."""
    values, shift = {}, PREDICTIONS[prediction].shift
    for t in trajectories:
        size, first = t.block_size, len(t.prompt_ids)
        ids, end = t.token_ids, first + t.num_response_tokens
        causal = log_softmax(hf["teacher"](ids[None]).logits[0])
        steps = [-1] * first + t.commit_step.tolist()
        for start in range(first // size * size, len(ids), size):
            block = range(start, start + size)
            for step in range(max(steps[p] for p in block) + 1):
                masked = [p for p in block if steps[p] >= step]
                shown = ids[: start + size].clone()
                shown[masked] = MASK
                tags = block_tags(start, start + size, size)
                ours = log_softmax(hf_logits(hf["student"], shown, tags))
                for p in masked:
                    if p >= end:
                        continue
                    target = causal[p + row]
                    terms = target.exp() * (target - ours[p - shift])
                    terms[MASK] = 0
                    key = place_of(p, size), len(masked)
                    values.setdefault(key, []).append(float(terms.sum()))
    return values


def grouped(values, axis, numbers):
    """Mean and number by one of the two parts of the key."""
    groups = [[v for key, some in values.items() if key[axis] == n for v in some] for n in numbers]
    return [(sum(group) / len(group), len(group)) for group in groups]


def test_divergences_are_the_dense_ones(result, hf):
    found, _, trajectories, masked, prediction = result
    size, said = trajectories[0].block_size, found["states"]
    values = dense_divergences(hf, trajectories, prediction)
    everything = [value for some in values.values() for value in some]
    assert said["num_positions"] == len(everything) == len(masked.kl)
    assert said["kl"] == pytest.approx(sum(everything) / len(everything), rel=1e-5)
    assert sorted(masked.kl.tolist()) == pytest.approx(sorted(everything), rel=1e-4, abs=1e-6)
    for name, axis, numbers in (
        ("by_position", 0, range(size)), ("by_masked", 1, range(1, size + 1)),
    ):  # fmt: skip
        expected = grouped(values, axis, numbers)
        assert [entry["num_positions"] for entry in said[name]] == [n for _, n in expected]
        assert [entry["kl"] for entry in said[name]] == pytest.approx(
            [mean for mean, _ in expected], rel=1e-5
        )


def test_control_other_places_and_an_unshifted_teacher_have_other_divergences(result, hf):
    found, _, trajectories, _, prediction = result
    size, said = trajectories[0].block_size, found["states"]
    means = [entry["kl"] for entry in said["by_position"]]
    other = {SAME_POSITION: "next_position"}.get(prediction, SAME_POSITION)
    turned = dense_divergences(
        hf, trajectories, prediction, place_of=lambda p, size: (p - 1) % size
    )
    shifted = dense_divergences(hf, trajectories, other)
    unshifted = dense_divergences(hf, trajectories, prediction, row=0)
    for values in (turned, unshifted, shifted):
        means_of = [mean for mean, _ in grouped(values, 0, range(size))]
        assert max(abs(a - b) for a, b in zip(means, means_of, strict=True)) > 1e-3


def test_only_questions_that_the_teacher_gets_right_are_asked(result, models):
    found = result[0]
    greedy = [record for record in found["results"] if record["temperature"] == 0]
    sampled = [record for record in found["results"] if record["temperature"] == 1]
    right = found["teacher_right"]
    assert found["num_questions"] == 6 and 0 < right < 6
    assert not any("agreement" in record for record in sampled)
    for record in greedy:
        assert record["agreement"]["asked"] == right
    assert greedy[0]["agreement"]["share"] == 1.0  # the teacher agrees with itself
    assert any(record["agreement"]["share"] < 1 for record in greedy[1:])  # control


def test_what_is_measured(result):
    found = result[0]
    assert [(r["writer"], r["setting"], r["temperature"]) for r in found["results"]] == [
        ("teacher", "autoregressive", 0), ("teacher", "autoregressive", 1),
        ("student", "static", 0), ("student", "static", 1),
        ("student", "dynamic(0.015)", 0), ("student", "dynamic(0.015)", 1),
    ]  # fmt: skip
    teacher, _, static, _, dynamic, _ = found["results"]
    assert teacher["first_token"] == teacher["first_four"] == teacher["tokens_per_forward"] == 1
    assert static["tokens_per_forward"] <= 1 < dynamic["tokens_per_forward"]
    for record in found["results"]:
        assert record["tokens_per_second"] == record["num_tokens"] / record["seconds"]
        assert record["cpu_seconds"] > 0 and len(record["responses"]) == len(found["prompts"]) == 9
        assert math.isfinite(record["nll_error"])
    assert static["page"][0]["correct"] is None and static["page"][0]["setting"] == "static"
    assert teacher["page"] == []
    json.dumps(found, allow_nan=False)


def some_parts(rank, models, parts):
    pair = pair_module.open_pair(
        str(models.teacher.checkpoint), str(models.student.checkpoint), max_rows=4
    )
    return measure.measure(pair, work_of(models, parts=parts))


def test_parts_can_be_chosen(models, result):
    found = run_ranks(some_parts, 1, models, ["states"])[0]
    assert found["results"] == [] and found["teacher_right"] == result[0]["teacher_right"]
    assert found["states"]["num_positions"] > 0
    found = run_ranks(some_parts, 1, models, ["static"])[0]
    assert [r["setting"] for r in found["results"]] == ["static"] * 2 and "states" not in found


def command(rank, arguments):
    """The script's exit status and what it says on stderr."""
    import contextlib
    import io

    said = io.StringIO()
    sys.argv = ["measure.py", *map(str, arguments)]
    sys.modules["questions"] = SimpleNamespace(is_right=is_right)
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        cli.run_script(measure.main)
    return ended.value.code, said.getvalue()


def arguments_of(models, out, **changes):
    values = {
        "teacher": models.teacher.hf,
        "student": models.student.checkpoint,
        "heldout": models.heldout,
        "questions": models.questions,
        "out": out,
        "num-prompts": 3,
        "max-new-tokens": 6,
        "thresholds": "0.5",
        "which": "teacher,static",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def test_the_command_writes_one_file(models, tmp_path):
    out = tmp_path / "out.json"
    (status, _) = run_ranks(command, 1, arguments_of(models, out))[0]
    assert status == 0 and [path.name for path in tmp_path.iterdir()] == ["out.json"]
    found = json.loads(out.read_text())
    assert (found["response_tokens"], found["block_size"], found["max_new_tokens"]) == (0, 4, 6)
    assert [r["setting"] for r in found["results"]] == ["autoregressive"] * 2 + ["static"] * 2
    assert len(found["prompts"]) == 3 and found["seconds"]["total"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"which": "static,dynamics"}, "which=dynamics must be some of teacher,static"),
        ({"num_prompts": 0}, "num_prompts=0 must be at least 1"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"thresholds": "1.5"}, "confidence_threshold=1.5 must lie in"),
        ({"heldout": "nowhere.jsonl"}, "--heldout=nowhere.jsonl does not exist; check the path"),
        ({"student": "nowhere"}, "nowhere"),
        ({"student": ""}, "--student='' must be a path; name a folder"),
        ({"teacher": ""}, "--teacher='' must be a path; name a folder"),
        ({"thresholds": "nan"}, "confidence_threshold=nan must lie in"),
    ],
)
def test_wrong_arguments_are_one_line(models, tmp_path, changes, message):
    status, said = run_ranks(command, 1, arguments_of(models, tmp_path / "out.json", **changes))[0]
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert message in said and list(tmp_path.iterdir()) == []


def test_a_trained_student_keeps_what_it_was_trained_with():
    options = pair_module.student_options
    source = SimpleNamespace(block_size=8, prediction="next_position", path="run")
    for found in (options(source, None, None), options(source, 8, "next_position")):
        assert (found.block_size, found.denoising_steps) == (8, 8)
        assert found.prediction == "next_position"
    with pytest.raises(ValueError, match="block_size=4 is not that of run.* with 8; leave"):
        options(source, 4, None)
    with pytest.raises(ValueError, match="prediction=same_position is not .* use prediction=next"):
        options(source, None, SAME_POSITION)
    fresh = SimpleNamespace(block_size=None, prediction=None, path="import")
    for size, prediction in ((None, None), (16, "next_position")):
        found = options(fresh, size, prediction)
        assert (found.block_size, found.prediction) == (size or 4, prediction or SAME_POSITION)
