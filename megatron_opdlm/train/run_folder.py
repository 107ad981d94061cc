"""The folder of a run: config.yaml, identity.json, metrics.jsonl, tensorboard/, checkpoints/,
rollouts/, and teacher_responses.jsonl if the teacher wrote responses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_opdlm.config.run import Config, load_config
from megatron_opdlm.config.schema import collect_keys
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.files.folder_lock import LOCK_FILE, FolderLock
from megatron_opdlm.files.folders import replacing
from megatron_opdlm.files.path_kind import CHECKPOINTS
from megatron_opdlm.train.identity import RunIdentity

CONFIG_FILE = "config.yaml"
IDENTITY_FILE = "identity.json"
ROLLOUTS = "rollouts"
TEACHER_RESPONSES = "teacher_responses.jsonl"
IMPORTED = "imported"


class RunFolder:
    """The paths of a run, and the check that the folder belongs to this run."""

    def __init__(self, root: str | Path) -> None:
        """Remembers the folder; writes nothing."""
        self.root = Path(root)
        self.checkpoints = self.root / CHECKPOINTS
        self._lock: FolderLock | None = None

    def imported(self, config: Config) -> Path:
        """Returns the folder of imported checkpoints.

        By default it stands beside the run folder, so that the runs of a series share it.
        """
        return Path(config.model.import_cache or self.root.absolute().parent / IMPORTED)

    def teacher_responses(self, config: Config) -> Path:
        """Returns the file of the teacher's responses: in this folder, or one that runs share."""
        return Path(config.train.teacher_responses or self.root / TEACHER_RESPONSES)

    def check(self, config: Config) -> None:
        """Checks that the folder is free or belongs to this run. Writes nothing. Main process only.

        Raises:
            ValueError: the folder holds another run, or something else.
        """
        if self.imported(config).resolve() == self.root.resolve():
            raise ValueError(
                f"save={self.root} is the folder for imports; choose another folder, or another "
                "import_cache"
            )
        previous = self.root / CONFIG_FILE
        if previous.is_file():
            if config.train.resume == "never":
                raise ValueError(
                    f"save={self.root} already holds a run and resume=never; "
                    "choose another folder, or set resume=auto to go on with it"
                )
            self._require_same_run(load_config(previous), config)
            return
        found = sorted(path.name for path in self.root.iterdir()) if self.root.exists() else []
        # A start that was refused leaves imported checkpoints; one that was killed, what `claim`
        # makes before the configuration.
        begun = {IMPORTED, LOCK_FILE, ROLLOUTS, IDENTITY_FILE}
        begun |= {f"{name}.partial" for name in (CONFIG_FILE, IDENTITY_FILE)}
        if set(found) - begun:
            raise ValueError(
                f"save={self.root} is not empty and holds no {CONFIG_FILE} "
                f"(found {', '.join(found[:4])}); choose another folder"
            )

    def lock(self) -> None:
        """Keeps other jobs out of the folder until this process ends. Main process only.

        What is made here is removed again unless `claim` is called, see `FolderLock`.

        Raises:
            ValueError: another job is running there, or the file system has no locks.
        """
        self._lock = FolderLock(self.root, "save")

    def check_identity(self, identity: RunIdentity, config: Config) -> None:
        """Refuses to go on with a run that was computed from something else. Main process only.

        Args:
            identity: digests of the prompts and weights that this process has loaded.
            config: resolved configuration, with the paths that they were loaded from.

        Raises:
            ValueError: the run was computed from something else; the message names the difference.
        """
        path = self.root / IDENTITY_FILE
        if not (self.root / CONFIG_FILE).is_file():
            return  # a new run
        if not path.is_file():
            raise ValueError(
                f"save={self.root} holds a run without {IDENTITY_FILE}, so nobody can say what it "
                "was computed from; choose another folder"
            )
        paths = {
            "data": config.train.data,
            "student": config.model.student,
            "teacher": config.model.teacher,
        }
        identity.require_same(RunIdentity.read(path), self.root, paths)

    def claim(self, config: Config, identity: RunIdentity) -> None:
        """Claims the folder for this run: writes its resolved configuration and its identity.

        Main process only.
        """
        if self._lock is not None:
            self._lock.keep()
        (self.root / ROLLOUTS).mkdir(parents=True, exist_ok=True)
        identity.write(self.root / IDENTITY_FILE)
        with replacing(self.root / CONFIG_FILE) as partial:
            config.save_yaml(partial)

    def _require_same_run(self, before: Config, now: Config) -> None:
        old, new = before.to_flat_dict(), now.to_flat_dict()
        may_change = {name for name, key in collect_keys(Config).items() if key.may_change}
        different = [k for k in new if k not in may_change and old.get(k) != new[k]]
        if "lr_decay_steps" in different and old["train_rollouts"] != new["train_rollouts"]:
            raise ValueError(
                f"save={self.root}: train_rollouts changed from {old['train_rollouts']} to "
                f"{new['train_rollouts']}, which moves the learning-rate schedule; "
                f"set lr_decay_steps={old['lr_decay_steps']} to keep it"
            )
        if different:
            key = different[0]
            raise ValueError(
                f"save={self.root} already holds another run: {key} was {old.get(key)} and is now "
                f"{new[key]}{f' ({len(different)} keys differ)' if len(different) > 1 else ''}; "
                "choose another folder, or start with the old value"
            )

    def write_samples(
        self, rollout_step: int, trajectories: Sequence[Trajectory], tokenizer: Any
    ) -> None:
        """Writes sample responses for people, as JSON lines with text, ids and commit steps."""
        path = self.root / ROLLOUTS / f"rollout_{rollout_step:06d}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for trajectory in trajectories:
                record = {
                    "prompt_id": trajectory.prompt_id,
                    "sample": trajectory.sample,
                    "prompt": tokenizer.decode(trajectory.prompt_ids.tolist()),
                    "response": tokenizer.decode(trajectory.text_ids.tolist()),
                    "ended": trajectory.ended,
                    "block_size": trajectory.block_size,
                    "num_prompt_tokens": len(trajectory.prompt_ids),
                    "num_response_tokens": trajectory.num_response_tokens,
                    "response_ids": trajectory.response_ids.tolist(),
                    "commit_step": trajectory.commit_step.tolist(),
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
