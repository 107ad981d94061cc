"""Loads tasks of lm-eval, and refuses those that a block-diffusion model cannot do."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

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
    names: list[str]
    """Names of all tasks, those of groups included."""


def require_lm_eval() -> None:
    """Raises an ImportError with a fix if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            "--harness needs lm_eval, which is not installed; install it with: "
            "pip install 'megatron-opdlm[eval]'"
        )


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Runs lm-eval without what would make a result depend on the day.

    Metrics of some tasks download NLTK's data when they are imported, and langdetect draws samples.
    """
    with contextlib.ExitStack() as stack:
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
        ValueError: a name is unknown; a task compares likelihoods, runs the code of responses, or
            has images or sound.
    """
    from lm_eval.tasks import TaskManager

    for folder in include:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--harness-include={folder} is not a folder")
    # lm-eval reads all its YAML files for an index, some seconds, unless only files are asked for.
    files_only = all(map(_is_file_name, names)) and not include
    manager = TaskManager(include_path=list(include) or None, include_defaults=not files_only)
    for name in names:
        _require_known(name, manager)
    loaded = manager.load(list(names))
    for name, task in loaded["tasks"].items():
        _require_possible(name, task)
    # Loaded tasks need not be loaded again; groups do, because lm-eval takes them whole by name.
    specs = list(names) if loaded.get("groups") else list(loaded["tasks"].values())
    return HarnessTasks(manager=manager, specs=specs, names=list(loaded["tasks"]))


def _is_file_name(name: str) -> bool:
    return Path(name).suffix in _YAML


def _require_known(name: str, manager: Any) -> None:
    if name in manager.all_tasks:
        return
    if _is_file_name(name):
        if not Path(name).is_file():
            raise FileNotFoundError(f"--harness: there is no file {name}")
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
