"""lm-eval's tasks, decoded by a tiny student: figures, texts, counts and refusals."""

import argparse
import contextlib
import importlib
import io
import json
import warnings
from pathlib import Path

import pytest

from megatron_opdlm.evaluation.graders.gsm8k import grade_gsm8k
from megatron_opdlm.evaluation.graders.ifeval import grade_ifeval
from megatron_opdlm.evaluation.graders.instructions import read_instructions
from megatron_opdlm.evaluation.harness.generation import cut
from megatron_opdlm.responses.entries import read_entries
from tests.harness_tasks import (
    QUESTIONS,
    needs_lm_eval,
    needs_lm_eval_and_checkers,
    refuse_network,
    write_gsm8k,
    write_ifeval,
    write_lines,
)
from tests.helpers import run_ranks
from tests.tiny import tiny_model

LIMIT = 12
pytestmark = needs_lm_eval


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp(), eos_token_id=[256])


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Imports what every forked rank would import again."""
    for name in ("lm_eval.evaluator", "lm_eval.tasks", "datasets", "evaluate"):
        importlib.import_module(name)


def parse(*argv):
    """The arguments of `opdlm eval` with those of the harness."""
    from megatron_opdlm.evaluation.harness.arguments import add_harness_arguments
    from megatron_opdlm.evaluation.settings import add_setting_arguments
    from megatron_opdlm.evaluation.task_arguments import add_task_arguments
    from megatron_opdlm.generate.arguments import add_model_arguments

    parser = argparse.ArgumentParser()
    add_task_arguments(parser)
    add_model_arguments(parser, required=False)
    add_setting_arguments(parser)
    add_harness_arguments(parser)
    for name in ("--responses", "--regrade", "--teacher", "--json", "--out"):
        parser.add_argument(name)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--examples", type=int, default=0)
    return parser.parse_args(list(argv))


def harness(rank, *argv):
    """Exit status or error, and what was printed."""
    from megatron_opdlm.distributed import process_groups
    from megatron_opdlm.evaluation.harness.run import run_harness

    warnings.simplefilter("ignore")
    process_groups.shutdown = lambda: None  # the group is the test's
    with pytest.MonkeyPatch.context() as patch:
        refuse_network(patch)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                status = run_harness(parse(*argv))
            except (ValueError, OSError) as error:
                status = str(error)
    return status, out.getvalue()


def evaluate(model, out, *argv, world_size=1):
    options = ["--model", str(model.checkpoint), "--out", str(out)]
    options += ["--gen-kwargs", f"max_gen_toks={LIMIT}"] if "--gen-kwargs" not in argv else []
    return run_ranks(harness, world_size, *argv, *options)


def samples_of(out):
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return {(line["setting"], line["task"], line["doc_id"]): line for line in lines}


def responses_of(out, setting, task):
    """Responses by question, which lm-eval has in a list per request and sample."""
    found = samples_of(out)
    return [found[setting, task, n]["responses"][0][0] for n in range(len(QUESTIONS))]


def own_texts(rank, path, questions, rule):
    """Responses of the task's own path to the same conversations."""
    from megatron_opdlm.diffusion.remasking import make_rule
    from megatron_opdlm.evaluation.runner import evaluate
    from megatron_opdlm.evaluation.task import load_task
    from megatron_opdlm.generate.decoder import Decoder
    from megatron_opdlm.rollout.request import DecodingOptions

    warnings.simplefilter("ignore")
    task = load_task("own", questions)
    options = DecodingOptions(rule=make_rule(rule))
    result = evaluate(Decoder.open(path), task, options, response_limit=LIMIT)
    return [(a.text, a.num_tokens, a.num_passes, a.ended) for a in result.answers]


@pytest.fixture(scope="module")
def own(model, tmp_path_factory):
    """The task's own responses, by setting and by what is asked."""
    folder = tmp_path_factory.mktemp("own")
    found = {}
    for name, form in {"gsm8k": "Question: {}\nAnswer:", "ifeval": "{}"}.items():
        entries = [{"prompt": form.format(q), "answer": n} for n, q in enumerate(QUESTIONS)]
        path = str(write_lines(folder / f"{name}.jsonl", entries))
        for setting, rule in {"static": "low_confidence_static",
                              "dynamic(0.9)": "low_confidence_dynamic"}.items():  # fmt: skip
            (found[setting, name],) = run_ranks(own_texts, 1, str(model.checkpoint), path, rule)
    return found


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Folders of one evaluation on one rank and on two, and what was printed."""
    tasks = tmp_path_factory.mktemp("tasks")
    names = f"{write_gsm8k(tasks)},{write_ifeval(tasks)}"
    found = {}
    for size in (1, 2):
        out = tasks / f"ranks_{size}"
        ranks = evaluate(model, out, "--harness", names, world_size=size)
        found[size] = (out, ranks, tasks)
    return found


@needs_lm_eval_and_checkers
def test_responses_are_those_of_our_own_tasks(folders, own):
    """Same conversations, same template, same decoding; GSM8K's stop strings do not occur."""
    out, ranks, _ = folders[1]
    assert [status for status, _ in ranks] == [0]
    for setting in ("static", "dynamic(0.9)"):
        for name in ("gsm8k", "ifeval"):
            texts = [text for text, *_ in own[setting, name]]
            assert responses_of(out, setting, f"tiny_{name}") == texts
            assert len(set(texts)) > 1


@needs_lm_eval_and_checkers
def test_figures_are_those_of_our_own_graders(folders, own):
    out, _, tasks = folders[1]
    results = {
        each["setting"]: each for each in json.loads((out / "results.json").read_text())["results"]
    }
    entries = read_entries(tasks / "tiny_ifeval.jsonl")
    for setting in ("static", "dynamic(0.9)"):
        figures = results[setting]["lm_eval"]["results"]
        graded = [
            grade_gsm8k(text, str(n)).verdicts for n, (text, *_) in enumerate(own[setting, "gsm8k"])
        ]
        for name in graded[0]:
            assert figures["tiny_gsm8k"][name] == sum(g[name][0] for g in graded) / len(graded)
        graded = [
            grade_ifeval(text, read_instructions(entry)).verdicts
            for entry, (text, *_) in zip(entries, own[setting, "ifeval"], strict=True)
        ]
        for name in graded[0]:
            verdicts = [verdict for grade in graded for verdict in grade[name]]
            assert figures["tiny_ifeval"][f"{name},none"] == sum(verdicts) / len(verdicts)


@needs_lm_eval_and_checkers
def test_everything_decoded_is_counted(folders, own):
    out, *_ = folders[1]
    for result in json.loads((out / "results.json").read_text())["results"]:
        for name in ("gsm8k", "ifeval"):
            mine = own[result["setting"], name]
            counts = result["counts"][f"tiny_{name}"]
            tokens, passes = (sum(each[place] for each in mine) for place in (1, 2))
            assert (counts["tokens"], counts["passes"]) == (tokens, passes)
            assert counts["ended"] == sum(each[3] for each in mine)
            assert (counts["responses"], counts["too_long"], counts["tokens_cut"]) == (4, 0, 0)
            assert counts["tokens_per_forward"] == pytest.approx(tokens / passes)


@needs_lm_eval_and_checkers
def test_two_ranks_give_the_files_of_one(folders):
    (one, *_), (two, ranks, _) = folders[1], folders[2]
    assert [status for status, _ in ranks] == [0, 0]
    assert "tiny_gsm8k" in ranks[0][1] and ranks[1][1] == ""
    assert samples_of(one) == samples_of(two)
    values = [json.loads((out / "results.json").read_text()) for out in (one, two)]
    for value in values:
        for result in value["results"]:
            del result["seconds"]
    assert values[0] == values[1]
    assert (one / "table.md").read_text() == (two / "table.md").read_text()


def test_a_stop_string_cuts_and_what_stands_after_it_is_counted(model, own, tmp_path):
    task = write_gsm8k(tmp_path)
    whole = [text for text, *_ in own["static", "gsm8k"]]
    stop = "\x11"
    assert 0 < whole[0].index(stop) < len(whole[0]) - 1  # in the middle of the first response
    out = tmp_path / "out"
    gen_kwargs = f"max_gen_toks={LIMIT},until={stop}"
    ((status, printed),) = evaluate(model, out, "--harness", str(task), "--static",
                                    "--gen-kwargs", gen_kwargs)  # fmt: skip
    assert status == 0
    kept = [cut(text, [stop]) for text in whole]
    assert responses_of(out, "static", "tiny_gsm8k") == kept
    (result,) = json.loads((out / "results.json").read_text())["results"]
    counts = result["counts"]["tiny_gsm8k"]
    stopped = sum(stop in text for text in whole)
    assert counts["stopped"] == stopped > 0
    assert counts["tokens"] == sum(tokens for _, tokens, *_ in own["static", "gsm8k"])
    assert counts["tokens_cut"] >= stopped
    assert (
        f"{counts['tokens_cut']} of {counts['tokens']} decoded tokens stand after a stop" in printed
    )


def test_prompts_that_are_too_long_have_empty_responses_and_are_counted(model, tmp_path):
    task, out = write_gsm8k(tmp_path), tmp_path / "out"
    ((status, printed),) = evaluate(model, out, "--harness", str(task), "--static",
                                    "--system-instruction", "long " * 60)  # fmt: skip
    assert status == 0
    assert responses_of(out, "static", "tiny_gsm8k") == [""] * 4
    assert "4 of 4 prompts were too long to decode; their responses are empty" in printed


def test_sampling_is_the_tasks_and_has_a_seed(model, tmp_path):
    task = write_gsm8k(tmp_path)
    found = {}
    for name, seed in {"a": "5", "again": "5", "b": "6"}.items():
        out = tmp_path / name
        argv = ["--harness", str(task), "--static", "--seeds", seed]
        sampled = f"max_gen_toks={LIMIT},do_sample=true,temperature=1.5"
        assert evaluate(model, out, *argv, "--gen-kwargs", sampled)[0][0] == 0
        found[name] = responses_of(out, "static", "tiny_gsm8k")
    assert found["a"] == found["again"] != found["b"]


def test_without_the_template_prompts_are_plain_text(model, tmp_path):
    task = write_gsm8k(tmp_path)
    plain, rendered = tmp_path / "plain", tmp_path / "rendered"
    assert (
        evaluate(model, plain, "--harness", str(task), "--static", "--no-chat-template")[0][0] == 0
    )
    assert evaluate(model, rendered, "--harness", str(task), "--static")[0][0] == 0
    hashes = [
        {line["prompt_hash"] for line in samples_of(out).values()} for out in (plain, rendered)
    ]
    assert not hashes[0] & hashes[1]
    responses = [responses_of(out, "static", "tiny_gsm8k") for out in (plain, rendered)]
    assert responses[0] != responses[1]


# --- what is refused


def refusal(model, tmp_path, *argv):
    ((status, printed),) = evaluate(model, tmp_path / "out", *argv)
    assert printed == "" and not (tmp_path / "out").exists()
    return status


def test_likelihoods_are_refused_with_the_reason(model, tmp_path):
    task = write_gsm8k(
        tmp_path, output_type="loglikelihood", filter_list=None, metric_list=[{"metric": "acc"}]
    )
    assert refusal(model, tmp_path, "--harness", str(task)) == (
        "--harness=tiny_gsm8k needs loglikelihood; a block-diffusion model has no likelihood token "
        "by token, and a likelihood block by block is not implemented; choose a task that generates"
    )


def test_beams_are_refused_with_the_fix(model, tmp_path):
    task = write_gsm8k(tmp_path)
    said = refusal(model, tmp_path, "--harness", str(task), "--gen-kwargs", "num_beams=4")
    assert said.startswith("num_beams=4 of task tiny_gsm8k must be 1: block decoding has no num_b")


def test_code_of_responses_is_not_run(model, tmp_path):
    task = write_gsm8k(tmp_path, unsafe_code=True)
    said = refusal(model, tmp_path, "--harness", str(task))
    assert said.startswith(
        "--harness=tiny_gsm8k runs the code of responses unprotected; use --task"
    )


def test_a_missing_file_is_refused(model, tmp_path):
    missing = tmp_path / "no.yaml"
    assert refusal(model, tmp_path, "--harness", str(missing)) == (
        f"--harness: there is no file {missing}"
    )
    said = refusal(model, tmp_path, "--harness", "gsm8k", "--harness-include", str(missing))
    assert said == f"--harness-include={missing} is not a folder"


def test_a_limit_beyond_the_models_positions_is_refused(model, tmp_path):
    task = write_gsm8k(tmp_path)
    said = refusal(model, tmp_path, "--harness", str(task), "--gen-kwargs", "max_gen_toks=4000")
    assert said.startswith("max_gen_toks=4000 with block_size=4 leaves no room for a prompt in the")


# --- as a model of lm-eval


def through_lm_eval(rank, model_args, task):
    import lm_eval
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    from megatron_opdlm.evaluation.harness.model import StudentLM

    warnings.simplefilter("ignore")
    assert get_model("opdlm") is StudentLM
    figures = lm_eval.simple_evaluate(
        "opdlm", model_args, tasks=[task], task_manager=TaskManager(include_defaults=False),
        batch_size=1, gen_kwargs=f"max_gen_toks={LIMIT}", apply_chat_template=True,
    )  # fmt: skip
    samples = figures["samples"]["tiny_gsm8k"]
    return {sample["doc_id"]: sample["resps"][0][0] for sample in samples}


def test_lm_eval_finds_the_model_by_its_name(model, own, tmp_path):
    task = str(write_gsm8k(tmp_path))
    (found,) = run_ranks(through_lm_eval, 1, f"model={model.checkpoint},dynamic=True", task)
    assert [found[n] for n in range(4)] == [text for text, *_ in own["dynamic(0.9)", "gsm8k"]]


def test_likelihoods_are_refused_by_the_model_too():
    from megatron_opdlm.evaluation.harness.model import StudentLM

    for name in ("loglikelihood", "loglikelihood_rolling"):
        with pytest.raises(NotImplementedError, match=f"{name}: a block-diffusion model has no"):
            getattr(StudentLM, name)(None, [])


def test_the_files_are_written_where_the_user_says(folders):
    out, ranks, _ = folders[1]
    assert sorted(path.name for path in Path(out).iterdir()) == [
        "results.json", "samples.jsonl", "table.md",
    ]  # fmt: skip
    assert f"responses and figures: {out}" in ranks[0][1]
