"""Evaluation during training against responses that are decoded one by one."""

import json
import warnings

import pytest

from tests.helpers import run_ranks
from tests.responses import by_hand, open_student
from tests.tiny import CHAT_TEMPLATE, TinyModel, write_model, write_prompts

START, END = 4, 16
"""Limits of the curriculum."""
ASKED = 16
"""Questions of one evaluation; the file has more."""
SETTING = {"block_size": 8, "denoising_steps": 4}
THRESHOLD = {"confidence_threshold": 0.015}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A student whose template knows thoughts."""
    from transformers import AutoTokenizer

    from megatron_opdlm.convert.importer import import_hf

    root = tmp_path_factory.mktemp("thinking")
    found = TinyModel(hf=write_model(root / "hf"), checkpoint=root / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(found.hf)
    tokenizer.chat_template = CHAT_TEMPLATE + "{% if enable_thinking %}think{% endif %}"
    tokenizer.save_pretrained(found.hf)
    import_hf(found.hf, found.checkpoint, progress=False)
    return found


def question(number):
    return f"{number} + {number}?"


def oracle(rank, model):
    """Rows of figures by rule: at the end of the curriculum, and of a few questions otherwise."""
    decoder = open_student(model)
    return {
        "end": answer_all(decoder, ASKED, limit=END, suffix="think"),
        "start": answer_all(decoder, 3, limit=START, suffix="think"),
        "thoughtless": answer_all(decoder, 3, limit=END),
    }


def answer_all(decoder, count, **choice):
    from megatron_opdlm.diffusion.remasking import make_rule
    from megatron_opdlm.evaluation.graders.number import final_number
    from megatron_opdlm.rollout.request import DecodingOptions

    found = {}
    for name, parameters in (("static", {}), ("dynamic", THRESHOLD)):
        rule = make_rule(f"low_confidence_{name}", **parameters)
        options = DecodingOptions(rule=rule, **SETTING)
        rows = [by_hand(decoder, f"q{n}", question(n), options, **choice) for n in range(count)]
        found[name] = [row | {"number": final_number(row["text"])} for row in rows]
    return found


def train(rank, model, prompts, questions, run_dir):
    from megatron_opdlm.config.run import load_config
    from megatron_opdlm.reporting.logger import read_metrics
    from megatron_opdlm.train.trainer import Trainer

    warnings.simplefilter("ignore")
    keys = [
        f"student={model.checkpoint}", f"data={prompts}", f"save={run_dir}", "train_rollouts=1",
        "prompts_per_rollout=4", "rows_per_optimizer_step=4", "max_prompt_tokens=64",
        f"max_response_tokens.start={START}", f"max_response_tokens.end={END}",
        f"eval_data={questions}", "eval_interval=1", f"eval_questions={ASKED}",
        "enable_thinking=true", "temperature=1.0", "seed=3",
        *(f"{key}={value}" for key, value in (SETTING | THRESHOLD).items()),
    ]  # fmt: skip
    Trainer(load_config(None, keys).resolved(cuda=False)).train()
    return read_metrics(run_dir / "metrics.jsonl")


@pytest.fixture(scope="module")
def figures(model):
    return run_ranks(oracle, 1, model)[0]


@pytest.fixture(scope="module")
def references(figures):
    """The student's own number where it gives one, static or dynamic; none is right elsewhere."""
    numbers = [row["number"] for row in figures["end"]["static"]]
    return ["7777777" if number is None else str(number) for number in numbers]


@pytest.fixture(scope="module")
def before(model, references, tmp_path_factory):
    """The record of the weights before the first rollout."""
    folder = tmp_path_factory.mktemp("online")
    path = folder / "questions.jsonl"
    lines = [
        {"id": f"q{number}", "prompt": question(number), "answer": answer}
        for number, answer in enumerate([*references, "1", "1", "1"])
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = write_prompts(folder / "prompts.jsonl")
    records = run_ranks(train, 1, model, prompts, path, folder / "run")[0]
    return next(record for record in records if "eval/questions" in record)


@pytest.mark.parametrize("name", ["static", "dynamic"])
def test_the_first_evaluation_is_that_of_the_student_itself(before, figures, references, name):
    """At the end of the curriculum, greedy, with the run's blocks, steps, threshold, thoughts."""
    rows = figures["end"][name]
    right = sum(
        row["number"] is not None and str(row["number"]) == reference
        for row, reference in zip(rows, references, strict=True)
    )
    assert (before["rollout_step"], before["eval/questions"]) == (0, ASKED)
    assert before[f"eval/accuracy_{name}"] == right / ASKED
    speed = sum(row["tokens"] for row in rows) / sum(row["passes"] for row in rows)
    assert before[f"eval/tokens_per_forward_{name}"] == pytest.approx(speed)


def test_control_limits_rules_and_thoughts_show_in_the_figures(figures, before):
    for name in ("static", "dynamic"):
        texts = {of: [row["text"] for row in figures[of][name][:3]] for of in figures}
        assert texts["start"] != texts["end"] != texts["thoughtless"]
    assert 0 < before["eval/accuracy_dynamic"] < before["eval/accuracy_static"] < 1
