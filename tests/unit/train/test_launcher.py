"""The launchers: valid bash and valid Python at once, and what they start where."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
EXAMPLES = REPOSITORY / "examples"
SIZES = ("0.6b", "1.7b", "4b", "8b")
LAUNCHER = EXAMPLES / "opdlm_qwen3_8b.sh"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose commands print their arguments: python, srun, nvidia-smi, scontrol."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)

    def command(name, body):
        path = binaries / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    command("python", 'echo "python $*"')
    command("srun", 'echo "srun $*"')
    command("nvidia-smi", "exit 1")
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("VIRTUAL_ENV", str(binaries.parent))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    return command


def bash(*arguments):
    done = subprocess.run(
        ["bash", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("size", SIZES)
def test_a_launcher_is_valid_bash_and_valid_python(size):
    path = EXAMPLES / f"opdlm_qwen3_{size}.sh"
    subprocess.run(["bash", "-n", path], check=True)
    compile(path.read_text(), path, "exec")
    assert os.access(path, os.X_OK)


def test_launchers_differ_in_the_models_name_alone():
    texts = {
        (EXAMPLES / f"opdlm_qwen3_{size}.sh").read_text().replace(f"qwen3_{size}", "qwen3_SIZE")
        for size in SIZES
    }
    assert len(texts) == 1


def test_slurm_lines_name_no_account_and_stand_before_any_command():
    """sbatch stops reading #SBATCH at the first line that is no comment."""
    lines = LAUNCHER.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    options = [line.split()[1] for line in lines[:first_command] if line.startswith("#SBATCH")]
    assert any(option.startswith("--nodes=") for option in options)
    assert not any("#SBATCH" in line for line in lines[first_command:])
    assert not any(option.startswith(("--account", "--partition")) for option in options)


def test_without_a_gpu_one_process_runs(machine):
    assert bash(LAUNCHER, "lr=1e-4") == f"python {LAUNCHER} lr=1e-4"


def test_on_gpus_torchrun_runs_one_process_each(machine):
    machine("nvidia-smi", "printf 'GPU 0: a\\nGPU 1: b\\n'")
    text = bash(LAUNCHER, "lr=1e-4")
    assert text == (
        f"python -m torch.distributed.run --standalone --nproc-per-node=2 {LAUNCHER} lr=1e-4"
    )


def test_a_dry_run_is_one_process_wherever_it_starts(machine, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    machine("nvidia-smi", "printf 'GPU 0: a\\n'")
    assert bash(LAUNCHER, "--dry-run", "a=b") == f"python {LAUNCHER} --gpus 8 --dry-run a=b"


def test_a_slurm_job_starts_one_torchrun_per_node(machine, monkeypatch, tmp_path):
    """sbatch runs a copy of the file in a spool folder; the job knows where the file is."""
    spooled = tmp_path / "spool" / "slurm_script"
    spooled.parent.mkdir()
    shutil.copy(LAUNCHER, spooled)
    machine(
        "scontrol",
        'if [ "$1" = show ] && [ "$2" = job ]; then\n'
        f"  printf 'JobId=%s JobName=a\\n   Command={LAUNCHER} lr=1e-4\\n   WorkDir=/x\\n' \"$3\"\n"
        "else printf 'node3\\nnode4\\n'; fi",
    )
    for name, value in (
        ("JOB_ID", "123456"),
        ("JOB_NUM_NODES", "2"),
        ("JOB_NODELIST", "node[3-4]"),
    ):
        monkeypatch.setenv(f"SLURM_{name}", value)
    text = bash(spooled, "lr=1e-4")
    assert text.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1")
    assert "-m torch.distributed.run --nnodes=2 --nproc-per-node=gpu" in text
    assert "--rdzv-backend=c10d --rdzv-endpoint=node3:23456" in text
    assert text.endswith(f"{LAUNCHER} lr=1e-4")


def test_torchrun_runs_the_same_file():
    """Two real processes reach the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + [str(LAUNCHER), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: opdlm train") == 2


# --- examples/stories.sh ---

PROGRAM = """#!/usr/bin/env bash
# opdlm or python: one line in the log, and the output that the options name; fails at the step FAIL
step=$(basename "$0") out=
for word; do
  case $previous in --out) out=$word ;; esac
  case $word in save=*) out=${word#save=}; esac
  previous=$word
done
echo "$step $*" >>"$LOG"
if [ "$(wc -l <"$LOG")" = "$FAIL" ]; then exit 1; fi
case "$*" in
  *score.py*) touch "$out/report.md" ;;
  *prompts.py*) touch "$out/train.jsonl" ;;
  generate*) touch "$out" ;;
  *) mkdir -p "${out:-$PWD}" ;;
esac
"""


@pytest.fixture
def stories(tmp_path, monkeypatch):
    """Runs a copy of stories.sh on programs that only note their arguments."""
    root, log = tmp_path / "checkout", tmp_path / "log"
    (root / "examples").mkdir(parents=True)
    shutil.copy(EXAMPLES / "stories.sh", root / "examples")
    programs = {"tools/setup_venv.sh": "#!/usr/bin/env bash\n"}
    programs |= dict.fromkeys((".venv/bin/opdlm", ".venv/bin/python"), PROGRAM)
    for name, text in programs.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    for name in ("model/config.json", "text"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("LOG", str(log))

    def run(*arguments, fail=0, out=tmp_path / "out"):
        """Status, error, and the steps that were begun; the step `fail` fails."""
        monkeypatch.setenv("FAIL", str(fail))
        log.write_text("")
        options = ("--model", tmp_path / "model", "--text", tmp_path / "text", "--out", out)
        command = ["bash", root / "examples/stories.sh", *options, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        run.said = done.stdout
        return done.returncode, done.stderr, log.read_text().splitlines()

    return run


def test_stories_go_on_where_they_were_stopped(stories, tmp_path):
    def count(word, steps):
        return sum(word in step for step in steps)

    status, _, steps = stories(out=tmp_path / "whole")
    assert status == 0 and len(steps) == 16 and "score.py" in steps[-1]
    assert "--dry-run student=" in steps[0]
    shown = [line[2:] for line in stories.said.splitlines() if line.startswith("$ ")]
    assert shown == steps[1:]  # each command is printed before it runs
    assert count("opdlm generate", steps) == 9
    for fail in range(1, 17):
        out, before = tmp_path / str(fail), steps[: fail - 1]
        assert stories("lr=1e-3", fail=fail, out=out)[0] == 1
        status, error, rest = stories("lr=1e-3", out=out)
        assert (status, error) == (0, "")
        for word in ("opdlm convert import", "opdlm generate", "opdlm convert export"):
            assert count(word, rest) == count(word, steps) - count(word, before)
        (train,) = (step for step in rest if "opdlm train" in step and "--dry-run" not in step)
        assert f"save={out}/run lr=1e-3" in train


def test_stories_refuse_a_folder_of_something_else(stories, tmp_path):
    assert stories("lr=1e-3", fail=6)[0] == 1
    for arguments in ((), ("lr=2e-3",)):
        status, error, steps = stories(*arguments)
        assert (status, steps) == (2, []) and "no unfinished run of this model, text and" in error
    assert stories("lr=1e-3")[0] == 0
    status, error, steps = stories("lr=1e-3")
    assert (status, steps) == (2, []) and "holds a finished run" in error
    (tmp_path / "foreign").mkdir()
    assert stories(out=tmp_path / "foreign", fail=2)[0] == 1  # empty: nobody's
    (tmp_path / "foreign/settings.txt").unlink()
    (tmp_path / "foreign/thesis.tex").touch()
    assert stories(out=tmp_path / "foreign")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out",), "--out needs a value"),
        (("--out", ""), "--out is empty; name a folder"),
        (("--model", ""), "--model '' must be a Hugging Face directory"),
        (("--text", "."), "--text '.' must be a file"),
        (("--model=x",), "unknown argument --model=x; --help shows all"),
        (("--lr=1e-3",), "unknown argument --lr=1e-3; --help shows all"),
        (("lr",), "unknown argument lr; --help shows all"),
        (("save=x",), "save=x is set by the script; leave it out"),
        (("student=x",), "student=x is set by the script; leave it out"),
        (("--out", __file__), "test_launcher.py is not a folder; choose another path"),
        (("--out", f"{__file__}/a/b"), "test_launcher.py is not a folder; choose another path"),
        (("--out", "x" * 300), "--out: File name too long; choose another path"),
    ],
)
def test_wrong_options_of_the_stories_are_one_line_before_any_work(
    stories, tmp_path, arguments, words
):
    status, error, steps = stories(*arguments)
    assert (status, steps) == (2, []) and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["-", "a b", "a\nb"])
def test_the_folder_of_the_stories_may_have_any_name(stories, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    status, error, _ = stories(out=name)
    assert (status, error) == (0, "") and (tmp_path / name / "report.md").exists()
    assert "holds a finished run" in stories(out=name)[1]


def test_keys_of_the_stories_are_looked_at_first(stories, tmp_path):
    """The dry run refuses them; nothing is made then."""
    status, error, steps = stories("block_size=8", "prediction=next_position", fail=1)
    assert (status, error, len(steps)) == (1, "", 1) and not (tmp_path / "out").exists()
    assert steps[0].endswith(f"student={tmp_path / 'model'} block_size=8 prediction=next_position")
    steps = stories("block_size=8", "prediction=next_position")[2]
    decoded = [step for step in steps if "opdlm generate" in step]
    assert [("--block-size 8 --prediction next_position" in step) for step in decoded] == [
        *[True] * 3, *[False] * 6,  # a trained student knows its own
    ]  # fmt: skip


def test_a_python_without_the_packages_is_told_how_to_get_them(machine, monkeypatch, tmp_path):
    shutil.copytree(EXAMPLES, tmp_path / "clone" / "examples")  # no .venv beside it
    monkeypatch.delenv("VIRTUAL_ENV")
    machine("python3", "exit 1")
    command = ["bash", tmp_path / "clone" / "examples" / LAUNCHER.name, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "run: bash tools/setup_venv.sh" in done.stderr
    machine("python3", 'echo "python3 $*"')  # control
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--dry-run" in done.stdout
