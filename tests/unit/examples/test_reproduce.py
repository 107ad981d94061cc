"""The commands of the paper's tables and figures: what they need, what they run, what it costs."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opdlm.cli import build_parser
from megatron_opdlm.evaluation.benchmarks import BENCHMARKS
from megatron_opdlm.evaluation.benchmarks.load import load_benchmark
from megatron_opdlm.evaluation.graders import GRADERS

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "reproduce"
NAMES = [f"table_{n}" for n in range(1, 15)] + [f"figure_{n}" for n in range(1, 7)]
MODULES = ("run", "estimate", "training_speed")


@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in MODULES:
        sys.modules.pop(name, None)
    yield importlib.import_module("run")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def places(reproduce, tmp_path):
    return reproduce.Places(
        tmp_path / "checkpoints", tmp_path / "models", tmp_path / "benchmarks", tmp_path / "out"
    )


def test_every_table_and_figure_has_a_command_and_a_line_in_the_docs(reproduce):
    assert list(reproduce.Catalogue().experiments) == NAMES
    page = (ROOT / "docs" / "reproduce.md").read_text()
    assert re.findall(r"^\| .* `bash examples/reproduce.sh (\w+)` \|", page, re.MULTILINE) == NAMES


@pytest.mark.parametrize(
    "words, extra",
    [
        (["--list"], []),
        (["table_1", "--dry-run"], []),
        (["table_1", "--tiny"], ["--extra", "eval"]),
        (["table_1"], ["--extra", "eval"]),
    ],
)
def test_the_script_sets_up_what_graders_need(tmp_path, words, extra):
    """IFEval needs the extra `eval` and NLTK's file; a machine without the file runs the rest."""
    script = tmp_path / "examples" / "reproduce.sh"
    interpreter, setup = tmp_path / ".venv/bin/python", tmp_path / "tools/setup_venv.sh"
    for path in (script, interpreter, setup):
        path.parent.mkdir(parents=True, exist_ok=True)
    script.write_bytes((ROOT / "examples" / "reproduce.sh").read_bytes())
    setup.write_text('#!/usr/bin/env bash\necho setup "$@"\n')
    interpreter.write_text('#!/usr/bin/env bash\necho python "$@"\n[ $1 != tools/get_punkt.py ]\n')
    for path in (interpreter, setup):
        path.chmod(0o755)
    done = subprocess.run(["bash", script, *words], capture_output=True, text=True, timeout=60)
    for_ifeval = ["python tools/get_punkt.py"] if extra else []
    runs = f"python examples/reproduce/run.py {' '.join(words)}"
    assert done.returncode == 0
    assert done.stdout.splitlines() == [" ".join(["setup", *extra]), *for_ifeval, runs]


def test_everything_that_is_named_exists(reproduce):
    catalogue = reproduce.Catalogue()
    for name, experiment in catalogue.experiments.items():
        kinds = {"sweeps", "commands", "runs"} & experiment.keys()
        assert len(kinds) == 1, name
        for sweep in experiment.get("sweeps", ()):
            assert set(sweep["checkpoints"]) <= set(catalogue.checkpoints), name
            assert set(sweep.get("teachers", ())) <= set(catalogue.teachers), name
            assert set(sweep["tasks"]) <= set(BENCHMARKS), name
            assert all(catalogue.stand_in(task) in catalogue.tiny for task in sweep["tasks"]), name
    configs = {path.stem for path in (ROOT / "examples" / "configs").glob("*.yaml")}
    assert {entry["config"] for entry in catalogue.checkpoints.values()} <= configs
    asked = {
        t for e in catalogue.experiments.values() for s in e.get("sweeps", ()) for t in s["tasks"]
    }
    assert asked | {"mbpp_all"} == set(BENCHMARKS)  # the paper reports all but this one


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_says_what_is_missing_and_what_it_costs(reproduce, places, capsys, name):
    argv = [name, "--dry-run", "--checkpoints", str(places.checkpoints)]
    assert reproduce.main(argv) == 0
    text = capsys.readouterr().out
    experiment = reproduce.Catalogue().experiments[name]
    assert text.startswith(f"{name}: {experiment['title']}")
    for sweep in experiment.get("sweeps", ()):
        for label in sweep["checkpoints"]:
            assert f"{places.checkpoints / label}: opdlm train examples/configs/" in text
            assert re.search(rf"^  {re.escape(label)}: at most [\d,]+M response tokens", text, re.M)
        assert all(f"  {task}: " in text for task in sweep["tasks"])
        assert "GPU-hours at the bound of an H100" in text
    assert not places.out.exists()


def test_tokens_by_hand(reproduce, places):
    """Table 11: two models, two rules; AIME with 32 seeds."""
    text = reproduce.describe(reproduce.Catalogue(), "table_11", places)
    assert (
        "gsm8k: 4 cells of 1,319 questions and at most 16,000 tokens each, 84,416,000 tok" in text
    )
    assert "aime_24: 128 cells of 30 questions and at most 16,000 tokens each, 61,440,000 t" in text
    most = 4 * 16000 * (1319 + 500 + 2 * 32 * 30) + 4 * 4000 * (164 + 378)
    assert f"at most {most:,} response tokens" in text


def test_training_by_hand(reproduce, places):
    """The curriculum: 100 tokens at first, 4,000 after ten rollouts, of 128 responses."""
    from tools.gpu.roofline import Shape

    estimate = importlib.import_module("estimate")
    limits = [100 + min(1, step / 10) * 3900 for step in range(483)]
    tokens, size = sum(limits) * 128, Shape.of("4B").num_parameters
    text = estimate.training("examples/configs/qwen3_4b.yaml", ["save=x"], "4B")
    assert text.startswith(
        f"at most {tokens / 1e6:,.0f}M response tokens, {8 * size * tokens:.1e} "
    )
    larger = estimate.training(
        "examples/configs/qwen3_0.6b.yaml", ["save=x", "teacher=models/Qwen3-4B"], "0.6B"
    )
    flops = (2 * size + 6 * Shape.of("0.6B").num_parameters) * tokens
    assert f" {flops:.1e} FLOPs" in larger
    for keys in (["method=sft"], ["teacher=models/Qwen3-32B"]):
        text = estimate.training("examples/configs/qwen3_4b.yaml", [*keys, "save=x"], "4B")
        assert text.endswith("response tokens")


def test_what_is_there_is_not_missing(reproduce, places):
    catalogue = reproduce.Catalogue()
    experiment = catalogue.experiments["figure_3"]
    before = list(reproduce.missing_files(catalogue, experiment, places))
    assert len(before) == 4
    places.benchmarks.mkdir()
    (places.benchmarks / "math_500.jsonl").touch()
    (places.checkpoints / "OPDLM-4B").mkdir(parents=True)
    (places.checkpoints / "OPDLM-4B" / "config.json").touch()
    after = list(reproduce.missing_files(catalogue, experiment, places))
    assert [line.partition(":")[0] for line in after] == [
        str(places.checkpoints / f"OPDLM-4B@{size}") for size in (8, 16)
    ]
    assert reproduce.benchmark_path(places, "math_500").suffix == ".jsonl"


def test_a_run_without_its_files_is_refused(reproduce, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "run", None)
    assert reproduce.main(["table_2", "--checkpoints", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "table_2 needs files that are not there" in error and "opdlm train examples" in error


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["table1"], "NAME=table1 is no table or figure of the paper; did you mean table_1?"),
        (["x"], "NAME=x is no table or figure of the paper; name one of table_1, table_2, "),
        ([], "NAME=null is no table or figure of the paper; name one of table_1, "),
    ],
)
def test_another_name_is_refused_with_the_nearest(reproduce, argv, says):
    with pytest.raises(ValueError) as refused:
        reproduce.main(argv)
    assert str(refused.value).startswith(says)


def test_a_dry_run_is_not_tiny(reproduce, capsys):
    """It would tell of another run than the one that --tiny starts."""
    with pytest.raises(SystemExit):
        reproduce.main(["table_1", "--dry-run", "--tiny"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_figure_over_training_needs_the_folders_of_the_runs(reproduce, places):
    catalogue = reproduce.Catalogue()
    experiment = catalogue.experiments["figure_6"]
    for label in experiment["runs"]:
        (places.checkpoints / label).mkdir(parents=True)
        (places.checkpoints / label / "config.json").touch()  # an export has no metrics
    assert len(list(reproduce.missing_files(catalogue, experiment, places))) == 3
    for label in experiment["runs"]:
        (places.checkpoints / label / "metrics.jsonl").touch()
    assert list(reproduce.missing_files(catalogue, experiment, places)) == []


def test_a_training_that_fails_is_one_line(reproduce, places, monkeypatch):
    monkeypatch.setattr(reproduce.sys, "executable", "false")
    with pytest.raises(ValueError, match="the training of OPDLM-4B has ended with status 1"):
        reproduce.run(reproduce.Catalogue(), "figure_6", places, tiny=True)


def test_sampled_benchmarks_are_sampled_everywhere(reproduce):
    """AIME and GPQA-Diamond ask for several seeds, which greedy decoding does not have."""
    several = {name for name, benchmark in BENCHMARKS.items() if benchmark.seeds > 1}
    assert several == {"aime_24", "aime_25", "gpqa_diamond"}
    for name, experiment in reproduce.Catalogue().experiments.items():
        for sweep in experiment.get("sweeps", ()):
            is_sampled = "--seeds-temperature" in sweep["options"]
            assert is_sampled == bool(several & set(sweep["tasks"])), name


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_sweep_is_a_command_on_shipped_files(reproduce, places, name):
    catalogue = reproduce.Catalogue()
    for sweep in catalogue.experiments[name].get("sweeps", ()):
        command = reproduce.sweep_command(catalogue, sweep, places, places.out / "r", tiny=True)
        args = build_parser().parse_args(command)
        paths = [
            text.partition("=")[2] for text in (*args.model, *(args.teacher or ()), *args.task)
        ]
        assert all((ROOT / path).exists() for path in paths)


def test_block_sizes_are_an_option_in_a_tiny_sweep(reproduce, places):
    catalogue = reproduce.Catalogue()
    (sweep,) = catalogue.experiments["figure_4"]["sweeps"]
    args = build_parser().parse_args(
        reproduce.sweep_command(catalogue, sweep, places, places.out / "r", tiny=True)
    )
    assert args.block_size == [4, 8, 16] and len(args.model) == 1
    assert (args.temperature, args.seeds) == ([1.0], [0, 1])


@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "ifeval", "humaneval"])
def test_the_few_questions_have_the_published_schema(name):
    if BENCHMARKS[name].grader not in GRADERS:
        pytest.skip(f"there is no grader {BENCHMARKS[name].grader}")
    task = load_benchmark(BENCHMARKS[name], FOLDER / "tiny" / f"{name}.jsonl")
    assert len(task.questions) >= 2


def test_speeds_of_runs_are_lines_of_one_figure(reproduce, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, speed in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        record = {"rollout_step": 0, "optimizer_step": 1, "rollout/tokens_per_forward": speed}
        lines = [record | {"rollout_step": step} for step in range(3)]
        text = "".join(f"{line}\n".replace("'", '"') for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    draw = importlib.import_module("training_speed").draw_speeds
    draw(tmp_path / "out", {"a": tmp_path / "a", "b": tmp_path / "b"})
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "tokens_per_forward.svg", "tokens_per_forward.png",
    }  # fmt: skip
