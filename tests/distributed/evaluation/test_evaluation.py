"""Decoding and grading on process groups, and the transformers reference."""

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import shutil
import warnings

import pytest
import torch

from megatron_opdlm.diffusion.remasking import LowConfidenceDynamic
from megatron_opdlm.evaluation.cli import add_eval_parser
from tests.helpers import run_ranks
from tests.tiny import tiny_model, write_prompts

LIMIT = 12
OVERHEAD = 19
"""Tokens of the chat template around the text of one turn: 3 marks and 16 letters."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Prompts of several lengths, with answers that a random model rarely gives."""
    path = write_prompts(tmp_path_factory.mktemp("questions") / "q.jsonl", count=10)
    lines = [json.loads(line) | {"answer": "7"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def student_answers(rank, path, questions, tp_size, pp_size, max_rows):
    from megatron_opdlm.evaluation.runner import evaluate
    from megatron_opdlm.evaluation.task import load_task
    from megatron_opdlm.generate.decoder import Decoder
    from megatron_opdlm.rollout.request import DecodingOptions

    decoder = Decoder.open(
        path,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        max_rows=max_rows,
    )
    greedy = DecodingOptions()
    settings = {
        "static": (greedy, 0),
        "dynamic": (dataclasses.replace(greedy, rule=LowConfidenceDynamic()), 0),
        "sampled": (dataclasses.replace(greedy, temperature=1.0), 0),
        "another seed": (dataclasses.replace(greedy, temperature=1.0), 1),
    }
    task = load_task("t", questions)
    found = {}
    for name, (options, seed) in settings.items():
        result = evaluate(decoder, task, options, response_limit=LIMIT, seed=seed)
        ids = [answer.trajectory.response_ids.tolist() for answer in result.answers]
        found[name] = (
            ids,
            result.num_passes,
            result.to_json() | {"seconds": 0, "tokens_per_second": 0},
        )
    return found


@pytest.fixture(scope="module")
def one_process(model, questions):
    return run_ranks(student_answers, 1, str(model.checkpoint), questions, 1, 1, 256)[0]


@pytest.mark.parametrize(
    ("world_size", "tp_size", "pp_size", "max_rows"),
    [(1, 1, 1, 3), (2, 1, 1, 256), (2, 2, 1, 256), (2, 1, 2, 4)],
)
def test_answers_do_not_depend_on_the_layout(
    model, questions, one_process, world_size, tp_size, pp_size, max_rows
):
    ranks = run_ranks(
        student_answers, world_size, str(model.checkpoint), questions, tp_size, pp_size, max_rows
    )
    assert ranks == [one_process] * world_size


def test_the_seed_matters_when_sampling_and_only_then(one_process):
    assert one_process["sampled"][0] != one_process["another seed"][0]
    assert one_process["sampled"][0] != one_process["static"][0]


def test_a_hugging_face_directory_decodes_like_its_checkpoint(model, questions, one_process):
    found = run_ranks(student_answers, 1, str(model.hf), questions, 1, 1, 256)[0]
    assert found == one_process


def test_temporary_conversions_are_removed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def open_it(rank):
        from megatron_opdlm.generate.decoder import Decoder

        Decoder.open(str(model.hf))

    run_ranks(open_it, 2)
    assert list(tmp_path.glob("opdlm_*")) == []


def test_a_prompt_that_is_too_long_counts_as_wrong(model, tmp_path):
    path = tmp_path / "q.jsonl"
    prompts = [{"prompt": "x", "answer": 1, "id": "short"}]
    prompts += [{"prompt": "x" * 300, "answer": 1, "id": "long"}]
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))

    def answer(rank):
        from megatron_opdlm.evaluation.runner import evaluate
        from megatron_opdlm.evaluation.task import load_task
        from megatron_opdlm.generate.decoder import Decoder
        from megatron_opdlm.rollout.request import DecodingOptions

        decoder = Decoder.open(str(model.checkpoint))
        task = load_task("t", str(path))
        return evaluate(decoder, task, DecodingOptions(), response_limit=LIMIT).answers

    short, long = run_ranks(answer, 1)[0]
    assert short.trajectory is not None
    assert (long.question.id, long.correct, long.num_tokens) == ("long", False, 0)


def test_a_prompt_that_is_too_long_for_the_teacher_counts_as_wrong(model, tmp_path):
    """The model has 256 positions. A prompt of as many as fit is the control."""
    path = tmp_path / "q.jsonl"
    names = {"short": 1, "fits": 256 - LIMIT - OVERHEAD, "long": 257 - LIMIT - OVERHEAD}
    lines = [{"prompt": "x" * n, "answer": 1, "id": name} for name, n in names.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def answer(rank):
        from megatron_opdlm.distributed import process_groups as parallel
        from megatron_opdlm.evaluation.task import load_task
        from megatron_opdlm.evaluation.teacher import evaluate_teacher, load_reference

        teacher = load_reference(str(model.hf))
        parallel.initialize()
        result = evaluate_teacher(teacher, load_task("t", str(path)), response_limit=LIMIT)
        with pytest.raises(ValueError, match="max_new_tokens=256 .* leaves no room for a prompt"):
            evaluate_teacher(teacher, load_task("t", str(path)), response_limit=256)
        return result.too_long_ids, [answer.num_tokens for answer in result.answers]

    ((too_long, tokens),) = run_ranks(answer, 1)
    assert too_long == ["long"]
    assert tokens[0] > 0 and tokens[1] > 0 and tokens[2] == 0


def test_a_limit_without_room_is_refused_before_a_model_is_loaded(model, questions, monkeypatch):
    from megatron_opdlm.evaluation import decode

    def load(*args, **options):
        raise OSError("loaded")

    monkeypatch.setattr(decode, "open_decoder", load)
    monkeypatch.setattr(decode, "load_reference", load)
    argv = [
        "--model",
        str(model.checkpoint),
        "--teacher",
        str(model.hf),
        "--task",
        f"t={questions}",
    ]
    for limit, said in ((253, "no room for a prompt in the model's 256 positions"), (9, "loaded")):
        args = argparse_parser(add_eval_parser).parse_args(
            ["eval", *argv, "--block-size", "4", "--max-new-tokens", str(limit)]
        )
        with pytest.raises((ValueError, OSError), match=said):
            args.run(args)


def test_no_model_at_the_path(tmp_path):
    def open_it(rank):
        from megatron_opdlm.generate.decoder import Decoder

        with pytest.raises(ValueError, match="nor a checkpoint"):
            Decoder.open(str(tmp_path))
        return True

    assert run_ranks(open_it, 1) == [True]


def reference_answers(rank, hf_dir, questions, padding_side):
    """Batched answers of `evaluate_teacher`, and greedy ones by hand: one prompt, no cache."""
    from megatron_opdlm.distributed import process_groups as parallel
    from megatron_opdlm.evaluation.task import load_task
    from megatron_opdlm.evaluation.teacher import evaluate_teacher, load_reference

    warnings.simplefilter("ignore")
    teacher = load_reference(hf_dir)
    teacher.tokenizer.padding_side = padding_side
    parallel.initialize()
    task = load_task("t", questions)
    result = evaluate_teacher(teacher, task, response_limit=LIMIT, batch_size=4)
    by_hand = [greedy_by_hand(teacher, question) for question in task.questions]
    return [(answer.text, answer.num_tokens) for answer in result.answers], by_hand


def greedy_by_hand(teacher, question):
    response = greedy_ids(teacher, question)
    return teacher.tokenizer.decode(response, skip_special_tokens=True), len(response)


@torch.no_grad()
def greedy_ids(teacher, question, suffix=""):
    ids = teacher.tokenizer.apply_chat_template(
        question.messages, add_generation_prompt=True, return_dict=False
    )
    ids = ids + teacher.tokenizer.encode(suffix)
    response = []
    stops = teacher.model.generation_config.eos_token_id
    while len(response) < LIMIT and (not response or response[-1] not in stops):
        logits = teacher.model(torch.tensor([ids + response]), use_cache=False).logits
        response.append(int(logits[0, -1].argmax()))
    return response


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_reference_is_greedy_decoding(model, questions, world_size):
    for batched, by_hand in run_ranks(
        reference_answers, world_size, str(model.hf), questions, "left"
    ):
        assert batched == by_hand


def test_the_reference_stops_where_a_student_does(model, tmp_path):
    """Also where its files disagree: what the chat template ends a turn with is an end."""
    from megatron_opdlm.evaluation.teacher import load_reference
    from megatron_opdlm.files.errors import ConversionError

    hf = tmp_path / "hf"
    shutil.copytree(model.hf, hf)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((hf / name).read_text())
        (hf / name).write_text(json.dumps(values | {"eos_token_id": 3}))
    assert load_reference(str(hf)).model.generation_config.eos_token_id == [3, 256]
    with pytest.raises(ConversionError, match="is a checkpoint, not a Hugging Face directory"):
        load_reference(str(model.checkpoint))


def test_padding_on_the_right_would_show(model, questions):
    batched, by_hand = run_ranks(reference_answers, 1, str(model.hf), questions, "right")[0]
    assert batched != by_hand


STOP = 229
"""A byte that some responses of the random teacher come to, and others do not."""


def reference_figures(rank, hf_dir, questions, folder):
    """Figures of the reference with thoughts, and its responses by hand with and without them.

    Every third question has a reference that is not the response.
    """
    from megatron_opdlm.distributed import process_groups as parallel
    from megatron_opdlm.evaluation.graders.exact import EXACT
    from megatron_opdlm.evaluation.task import load_task
    from megatron_opdlm.evaluation.teacher import evaluate_teacher, load_reference

    warnings.simplefilter("ignore")
    teacher = load_reference(hf_dir)
    teacher.model.generation_config.eos_token_id = [STOP]
    parallel.initialize()
    asked = load_task("t", questions).questions
    by_hand, thoughtless = (
        [greedy_ids(teacher, question, suffix) for question in asked] for suffix in ("think", "")
    )
    lines = []
    for number, (question, ids) in enumerate(zip(asked, by_hand, strict=True)):
        text = teacher.tokenizer.decode(ids, skip_special_tokens=True)
        answer = f"not {text}" if number % 3 == 0 else text
        lines.append({"id": question.id, "messages": question.messages, "answer": answer})
    path = folder / f"{rank}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    teacher.tokenizer.chat_template += "{% if enable_thinking %}think{% endif %}"
    task = load_task("t", str(path), grader=EXACT)
    result = evaluate_teacher(
        teacher, task, response_limit=LIMIT, batch_size=4, enable_thinking=True
    )
    return result.to_json(), by_hand, thoughtless


@pytest.mark.parametrize("world_size", [1, 2])
def test_figures_of_the_reference_are_sums_by_hand(model, questions, tmp_path, world_size):
    for figures, by_hand, thoughtless in run_ranks(
        reference_figures, world_size, str(model.hf), questions, tmp_path
    ):
        tokens = [len(ids) for ids in by_hand]
        ended = [ids[-1] == STOP for ids in by_hand]
        assert by_hand != thoughtless and 0 < sum(ended) < 10 and 1 < max(tokens) > min(tokens)
        right = ["p1", "p2", "p4", "p5", "p7", "p8"]
        assert (figures["correct_ids"], figures["accuracy"]) == (right, 0.6)
        assert figures["num_questions"] == 10
        assert figures["standard_error"] == pytest.approx((0.6 * 0.4 / 10) ** 0.5)
        assert figures["eos_rate"] == sum(ended) / 10
        assert figures["tokens_per_forward"] == 1.0
        assert figures["response_tokens_mean"] == sum(tokens) / 10
        assert figures["tokens_per_second"] == pytest.approx(sum(tokens) / figures["seconds"])
        assert (figures["setting"], figures["options"], figures["seed"]) == ("teacher", None, 0)
        assert (figures["max_new_tokens"], figures["enable_thinking"]) == (LIMIT, True)


@pytest.mark.parametrize("show", [[], ["--show-steps"]])
def test_generate_writes_what_it_prints(model, questions, tmp_path, show):
    out = tmp_path / "out.jsonl"

    def generate(rank):
        from megatron_opdlm.generate.cli import add_generate_parser

        parser = argparse_parser(add_generate_parser)
        args = parser.parse_args(
            ["generate", "--model", str(model.checkpoint), "--prompts", questions]
            + ["--max-new-tokens", str(LIMIT), "--out", str(out), *show]
        )
        return printed_by(args)

    printed = run_ranks(generate, 1)[0]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt_id"] for record in records] == [f"p{i}" for i in range(10)]
    assert all(record["response"] in printed for record in records)
    tokens = sum(record["tokens"] for record in records)
    passes = sum(record["passes"] for record in records)
    assert f"{tokens} tokens, {passes} denoising passes, {tokens / passes:.2f} tokens" in printed
    assert ("step   1" in printed) is bool(show)


def argparse_parser(add):
    parser = argparse.ArgumentParser()
    add(parser.add_subparsers(required=True))
    return parser


def printed_by(args):
    """Runs a subcommand inside a rank, whose process group outlives it."""
    from megatron_opdlm.distributed import process_groups as parallel

    parallel.shutdown = lambda: None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert args.run(args) == 0
    return printed.getvalue()


def test_eval_writes_the_table_and_the_figures(model, questions, tmp_path):
    out = tmp_path / "figures.json"

    def evaluate(rank):
        warnings.simplefilter("ignore")
        args = argparse_parser(add_eval_parser).parse_args(
            ["eval", "--model", str(model.checkpoint), "--task", f"mine={questions}"]
            + ["--teacher", str(model.hf), "--num-questions", "6", "--temperature", "1"]
            + ["--seeds", "3", "4", "--confidence-threshold", "0.5", "0.9"]
            + ["--max-new-tokens", str(LIMIT), "--json", str(out), "--examples", "2"]
        )
        return printed_by(args)

    printed = run_ranks(evaluate, 2)[0]
    results = json.loads(out.read_text())["results"]
    assert [(result["setting"], result["seed"]) for result in results] == [
        ("teacher", 0), ("static", 3), ("static", 4), ("dynamic(0.5)", 3), ("dynamic(0.5)", 4),
        ("dynamic(0.9)", 3), ("dynamic(0.9)", 4),
    ]  # fmt: skip
    assert all(len(result["examples"]) == 2 for result in results)
    assert all(result["num_questions"] == 6 for result in results)
    example = results[1]["examples"][0]
    assert len(example["tokens"]) == len(example["passes_at"]) == len(example["commit_steps"])
    assert max(example["passes_at"]) == example["passes"] - 1
    assert "(std of seeds)" in printed


def caches_beside_the_reference(rank, model, questions):
    """Bytes of the student's caches whenever the reference is about to decode."""
    from megatron_opdlm import cli
    from megatron_opdlm.distributed import process_groups as parallel
    from megatron_opdlm.evaluation import decode
    from megatron_opdlm.rollout.cache import KVCache

    parallel.shutdown = lambda: None  # the group is the test's
    held, evaluate_teacher = [], decode.evaluate_teacher

    def watch(*args, **options):
        gc.collect()
        held.append(sum(x.num_bytes for x in gc.get_objects() if isinstance(x, KVCache)))
        return evaluate_teacher(*args, **options)

    decode.evaluate_teacher = watch
    tasks = [f"--task=one={questions}", f"--task=two={questions}"]
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(
            ["eval", "--model", str(model.checkpoint), "--teacher", str(model.hf), *tasks]
            + ["--max-new-tokens", "4", "--static", "--num-questions", "2"]
        )
    return status, held


def test_the_reference_has_the_room_of_the_students_cache(model, questions):
    ((status, held),) = run_ranks(caches_beside_the_reference, 1, model, questions)
    assert status == 0 and held == [0, 0]
