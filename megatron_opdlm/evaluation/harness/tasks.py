"""Loads tasks of lm-eval, and refuses those that a block-diffusion model cannot do."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_opdlm.checks import require
from megatron_opdlm.evaluation.harness.generation import NO_LIKELIHOOD

_YAML = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class HarnessTasks:
    """Tasks that can be decoded."""

    manager: Any
    """lm-eval's TaskManager."""
    specs: list[Any]
    """What `lm_eval.simple_evaluate` takes as its tasks."""


def require_lm_eval() -> None:
    """Raises an ImportError with a fix if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            "--harness needs lm_eval, which is not installed; install it with: "
            "pip install 'megatron-opdlm[eval]'"
        )


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Runs lm-eval without what would make a result depend on the day, or takes long for nothing.

    Metrics of some tasks download NLTK's data when they are imported, langdetect draws samples, and
    lm-eval runs pip, compilers and git to describe the machine.
    """
    from lm_eval import evaluator

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(evaluator, "add_env_info", lambda storage: None))
        stack.enter_context(_replaced(evaluator, "get_git_commit_hash", lambda: None))
        if importlib.util.find_spec("nltk") is not None:
            import nltk

            stack.enter_context(_replaced(nltk, "download", _refuse_download))
        if importlib.util.find_spec("langdetect") is not None:
            from langdetect import DetectorFactory

            stack.enter_context(_replaced(DetectorFactory, "seed", 0))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def load_tasks(names: Sequence[str], include: Sequence[str]) -> HarnessTasks:
    """Loads tasks with their data.

    Args:
        names: names of tasks, groups and tags, or YAML files.
        include: folders with YAML files of further tasks.

    Raises:
        FileNotFoundError: a file or folder does not exist, or the data of a task is not there.
        ValueError: a name is unknown; a YAML file is no task; a task compares likelihoods, runs the
            code of responses, or has images or sound.
        ConnectionError: the data of a task is on the hub, which cannot be reached.
    """
    from lm_eval.tasks import TaskManager

    for folder in include:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--harness-include={folder} is not a folder")
    # An index of all of lm-eval's tasks takes a quarter of a minute, and few evaluations need it.
    manager = TaskManager(include_path=list(include) or None, include_defaults=False)
    specs = [_spec(name, manager) for name in names]
    if None in specs:
        manager = TaskManager(include_path=list(include) or None)
        for name in names:
            _require_known(name, manager)
        specs = list(names)
    loaded = _load(manager, specs)
    for name, task in loaded["tasks"].items():
        _require_possible(name, task)
    # Loaded tasks need not be loaded again; groups do, because lm-eval takes them whole by name.
    if not loaded.get("groups"):
        specs = list(loaded["tasks"].values())
    return HarnessTasks(manager=manager, specs=specs)


def _load(manager: Any, specs: list[Any]) -> Any:
    """Loads tasks. Whatever lm-eval raises at a YAML file of the user's is an error of one line."""
    named = ",".join(specs)
    try:
        return manager.load(specs)
    except ConnectionError as error:
        raise ConnectionError(
            f"--harness={named}: {error}; run it where the hub can be reached, or give a "
            "YAML file that names data on this machine, as docs/evaluation.md shows"
        ) from error
    except (KeyError, TypeError, AttributeError, AssertionError, yaml.YAMLError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"--harness={named}: lm-eval cannot load it ({what}); correct its YAML file"
        ) from error


def _spec(name: str, manager: Any) -> Any:
    """Returns what a manager without lm-eval's own tasks can load; None if it cannot load it.

    lm-eval's own task is loaded from its file, if just one file has a task of this name.
    """
    if name in manager.all_tasks:
        return name
    if _is_file_name(name):
        if not Path(name).is_file():
            raise FileNotFoundError(f"--harness: there is no file {name}")
        return name
    import lm_eval.tasks

    pattern = re.compile(rf"^(task|group):[ ]*[\"']?{re.escape(name)}[\"']?[ ]*$", re.MULTILINE)
    found = []
    for path in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"):
        found += [(m[1], path) for m in pattern.finditer(path.read_text(errors="replace"))]
    return str(found[0][1]) if [kind for kind, _ in found] == ["task"] else None


def _is_file_name(name: str) -> bool:
    return Path(name).suffix in _YAML


def _require_known(name: str, manager: Any) -> None:
    if name in manager.all_tasks or Path(name).is_file():
        return
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    fix = f"did you mean {' or '.join(near)}?" if near else "see lm_eval ls tasks"
    require(False, "--harness", name, "is not a task of lm-eval or of --harness-include", fix)


def _require_possible(name: str, task: Any) -> None:
    kind = task.OUTPUT_TYPE
    require(kind == "generate_until", "--harness", name, f"needs {kind}", NO_LIKELIHOOD)
    runs_code = getattr(task, "UNSAFE_CODE", False)
    fix = "use --task, which runs code in a sandbox, e.g. --task humaneval=FILE"
    require(not runs_code, "--harness", name, "runs the code of responses unprotected", fix)
    has_media = getattr(task, "MULTIMODAL", False)
    require(not has_media, "--harness", name, "has images or sound", "choose a task of text")


def _refuse_download(*names: Any, **options: Any) -> NoReturn:
    what = " ".join(map(str, names))
    raise FileNotFoundError(
        f"a task of lm-eval needs NLTK's data {what}, which is not on this machine; get it with: "
        f"python -m nltk.downloader {what}, or set NLTK_DATA=DIR to the folder that has it"
    )
