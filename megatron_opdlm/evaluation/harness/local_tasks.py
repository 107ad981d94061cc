"""Writes the YAML file of a task of lm-eval whose data are local files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_local_task(
    path: Path, builtin: str, *, data_files: Mapping[str, str | Path], **changes: Any
) -> Path:
    """Writes a task that is lm-eval's own, apart from its data.

    The file includes lm-eval's, so prompts, filters and metrics are those of the installed version.

    Args:
        path: file to write, NAME.yaml. The task has this name.
        builtin: lm-eval's file below its folder of tasks, such as "gsm8k/gsm8k.yaml".
        data_files: a JSONL file for every split that the task names.
        changes: other keys of the task, such as num_fewshot.

    Returns:
        The path.
    """
    import lm_eval

    assert lm_eval.__file__ is not None, "lm_eval is a package"
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / builtin),
        "task": path.stem,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(Path(file).resolve()) for split, file in data_files.items()},
            "cache_dir": str(path.parent.resolve() / "datasets"),
        },
    }
    path.write_text(json.dumps(task | changes, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    return path
