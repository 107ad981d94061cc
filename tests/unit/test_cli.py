"""The command line: help, overrides, errors, dry run."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opdlm import __version__, cli
from megatron_opdlm.config.run import Config, load_config
from megatron_opdlm.config.schema import collect_keys
from megatron_opdlm.train import start

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
CONFIG = str(CONFIGS / "qwen3_4b.yaml")


def run(capsys, *argv):
    status = cli.main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from megatron_opdlm.cli import build_parser; build_parser().format_help();"
        "print([m for m in ('torch', 'megatron', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_version_and_usage(capsys):
    for argv, status in (["--version"], 0), ([], 2), (["train"], 2), (["train", CONFIG, "--n"], 2):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == status
    assert __version__ in capsys.readouterr().out


def test_the_help_of_train_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {name}: " in text for name in collect_keys(Config))


def test_overrides_may_stand_anywhere(capsys):
    status, out, _ = run(capsys, "train", CONFIG, "lr=2e-5", "--dry-run", "seed=5", "--gpus", "2")
    assert status == 0
    assert "lr: 2.0e-05" in out
    assert "seed: 5" in out


def test_an_error_is_one_line_and_status_2(capsys):
    status, out, err = run(capsys, "train", CONFIG, "lrr=1", "--dry-run")
    assert (status, out) == (2, "")
    assert err == "error: unknown key lrr; did you mean lr?\n"


def test_a_script_ends_as_a_command_does(capsys):
    def fail(error):
        raise error

    cases = (
        (lambda: None, 0, ""), (lambda: 3, 3, ""),
        (lambda: fail(ValueError("x=1\n  is wrong; use 2")), 2, "error: x=1 is wrong; use 2\n"),
        (lambda: fail(FileNotFoundError(2, "No such file", "a b")), 2,
         "error: [Errno 2] No such file: 'a b'\n"),
    )  # fmt: skip
    for main, status, said in cases:
        with pytest.raises(SystemExit) as ended:
            cli.run_script(main)
        assert (ended.value.code, capsys.readouterr().err) == (status, said)
    with pytest.raises(RuntimeError):  # control: a defect shows where it is
        cli.run_script(lambda: fail(RuntimeError("a defect")))


@pytest.mark.parametrize("position", [0, 3])
def test_a_traceback_is_there_when_asked_for(position):
    argv = ["train", CONFIG, "lrr=1", "--dry-run"]
    argv.insert(position, "--traceback")
    with pytest.raises(ValueError, match="unknown key"):
        cli.main(argv)


def under_torchrun(monkeypatch, rank):
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("command", ["train", "plan"])
def test_half_of_a_launchers_variables_is_an_error_of_its_own(capsys, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")  # left over in a shell
    status, out, err = run(capsys, command, CONFIG, "--gpus", "8")
    assert (status, out) == (2, "")
    assert err.startswith("error: WORLD_SIZE=2 is set in the environment without RANK"), err
    assert "unset WORLD_SIZE" in err


def test_errors_under_torchrun_name_the_rank(capsys, monkeypatch):
    under_torchrun(monkeypatch, rank=1)
    assert run(capsys, "train", CONFIG, "lrr=1")[2].startswith("error (rank 1): unknown key")


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--gpus", "8"], "--gpus is for --dry-run"),
        (["--nproc", "0"], "--nproc=0 must be at least 1"),
        (["--dry-run", "--gpus", "0"], "--gpus=0 must be at least 1"),
        (["--dry-run", "--gpus", "-8"], "--gpus=-8 must be at least 1"),
        (["--dry-run", "--nproc", "0"], "--nproc=0 must be at least 1"),
        (["--dry-run", "--gpus", "3"], "number of GPUs 3 must be a multiple of .* 2 x 1"),
        (["--dry-run", "student=nowhere/Model-1B"], "nowhere/Model-1B holds neither"),
        (
            ["--dry-run", "tensor_model_parallel_size=3"],
            "must divide the model's num_key_value_heads",
        ),
        (
            ["--dry-run", "pipeline_model_parallel_size=5"],
            "must divide the model's num_hidden_layers",
        ),
    ],
)
def test_bad_arguments(capsys, arguments, rule):
    import re

    status, _, err = run(capsys, "train", CONFIG, *arguments)
    assert status == 2
    assert re.search(rule, err)


def test_nproc_starts_torchrun_with_the_same_arguments(monkeypatch):
    commands = []

    def execv(path, argv):
        commands.append(argv)
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execv)
    monkeypatch.setattr(start, "check", lambda config: config)  # its files are not here
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit):
        cli.main(["train", CONFIG, "--nproc", "4", "lr=2e-5"])
    assert commands[0][1:] == (
        "-m torch.distributed.run --standalone --nproc-per-node 4 -m megatron_opdlm train "
        f"{CONFIG} lr=2e-5"
    ).split(" ")


def test_nproc_under_torchrun_is_refused(capsys, monkeypatch):
    under_torchrun(monkeypatch, rank=0)
    assert "torchrun has started this process" in run(capsys, "train", CONFIG, "--nproc", "2")[2]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["lrr=1"], "unknown key lrr"),
        (["layer_spec=local", "data=nowhere.jsonl"], "prompt file nowhere.jsonl does not exist"),
        (["tensor_model_parallel_size=3"], "--nproc=2 must be a multiple"),
    ],
)
def test_a_bad_start_stops_before_any_process_starts(capsys, monkeypatch, arguments, rule):
    monkeypatch.setattr("os.execv", None)
    status, _, err = run(capsys, "train", CONFIG, "--nproc", "2", *arguments)
    assert (status, rule in err) == (2, True), err


def test_only_this_package_reports_progress():
    """Libraries log what they do, also when an interrupted process ends."""
    program = (
        "import logging; from megatron_opdlm import cli; cli._set_up_logging(cli.Launch());"
        "logging.getLogger('megatron_opdlm.train.trainer').info('ours');"
        "logging.getLogger('torch._subclasses.fake_tensor').info('theirs');"
        "logging.getLogger('torch').warning('a warning')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = [line.split(": ")[1] for line in done.stderr.splitlines()]
    assert said == ["ours", "a warning"], done.stderr


@pytest.mark.parametrize("name", ["x" * 300, "file/below"])
def test_a_path_that_the_system_refuses_is_one_line(capsys, tmp_path, monkeypatch, name):
    (tmp_path / "file").touch()
    status, _, err = run(capsys, "plan", str(tmp_path / name), "--gpus", "8")
    assert (status, len(err.splitlines())) == (2, 1) and err.startswith("error: ")


@pytest.mark.parametrize("content", [b"0\n", b"- a\n", b"\xff\xfe\n"])
def test_a_configuration_that_is_no_mapping_is_one_line(capsys, tmp_path, content):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    status, _, err = run(capsys, "plan", str(path), "--gpus", "8")
    assert (status, len(err.splitlines())) == (2, 1) and str(path) in err


def test_interruption_is_no_traceback(capsys, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "main", interrupt)
    status, _, err = run(capsys, "train", CONFIG)
    assert status == 130 and "goes on when started again" in err


def test_train_hands_the_configuration_to_the_trainer(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(start, "main", seen.append)
    assert run(capsys, "train", CONFIG, "seed=3")[0] == 0
    assert seen == [load_config(CONFIG, ["seed=3"])]


def test_a_dry_run_prints_a_configuration_that_loads(capsys, tmp_path):
    out = run(capsys, "train", CONFIG, "--dry-run", "--gpus", "4")[1]
    path = tmp_path / "resolved.yaml"
    path.write_text(out.split("\n\n")[0])
    assert load_config(path) == load_config(CONFIG).resolved(cuda=True)
    assert "4 ranks = tp 2 x dp 2 x pp 1" in out


def test_other_ranks_of_a_dry_run_are_silent(capsys, monkeypatch):
    under_torchrun(monkeypatch, rank=1)
    assert run(capsys, "train", CONFIG, "--dry-run") == (0, "", "")


def test_plan_prints_the_table_without_the_configuration(capsys):
    status, out, _ = run(capsys, "plan", CONFIG, "--gpus", "2")
    assert status == 0
    assert out.startswith("rank tp dp pp")
    assert "128 sequences at once on each if free memory holds them; key/value cache" in out


def test_plan_counts_in_the_number_format_of_the_machine(capsys):
    """quickstart.yaml leaves it open: bfloat16 in pages on GPUs, float32 on this machine's CPU."""
    quickstart = str(CONFIGS / "quickstart.yaml")
    gpus = run(capsys, "plan", quickstart, "--gpus", "1")[1]
    assert "bfloat16 on GPUs" in gpus and "x 256 tokens x 1024 bytes" in gpus
    cpus = run(capsys, "plan", quickstart, "--nproc", "1")[1]
    assert "float32 on CPUs" in cpus and "x 104 tokens x 2048 bytes" in cpus
    assert "if free memory" not in cpus
    assert cpus == run(capsys, "train", quickstart, "--dry-run")[1].split("\n\n", 1)[1]
    given = run(capsys, "plan", quickstart, "--gpus", "1", "params_dtype=float32")[1]
    assert "float32 on GPUs" in given and "x 256 tokens x 2048 bytes" in given


@pytest.mark.parametrize("option", ["--gpus", "--nproc"])
def test_plan_wants_at_least_one_rank(capsys, option):
    err = run(capsys, "plan", CONFIG, option, "0")[2]
    assert err == f"error: {option[2:]}=0 must be at least 1; use 1 or more\n"


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("kv_cache_gb=0.1", "kv_cache_gb=0.1 must hold at least one sequence: 6000 "),
        (
            "rollout_tensor_model_parallel_size=3",
            "rollout_tensor_model_parallel_size=3 must divide make_vocab_size_divisible_by x ",
        ),
    ],
)
def test_plan_refuses_what_a_run_would_refuse(capsys, override, rule):
    status, out, err = run(capsys, "plan", CONFIG, "--gpus", "6", override)
    assert (status, out) == (2, "") and err.startswith(f"error: {rule}") and err.count("\n") == 1
