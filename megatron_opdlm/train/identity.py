"""What a run is computed from: its prompts as tokens, and the weights it begins with.

A path says little: its file may change, and one file may have several paths. So a run folder keeps
digests of the content, and a resumed run must have the same digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_opdlm.files.folders import read_json_object, replacing, write_json

_NAMED = 4
"""An error names at most so many prompts of each kind (changed, new, gone)."""
_DIGEST_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Digests of everything that a run reads and that its configuration only points to."""

    prompts: Mapping[str, str]
    """Digest of the token ids, by prompt id. The order is the file's: rollouts depend on it."""
    student: str
    """Fingerprint of the student's weights before training."""
    teacher: str | None
    """Fingerprint of the teacher's weights; None if the run has no teacher."""

    @classmethod
    def read(cls, path: Path) -> RunIdentity:
        """Reads the file that `write` wrote.

        Raises:
            ValueError: the file is damaged.
        """
        values = read_json_object(path)
        prompts = values.get("prompts")
        if not (
            set(values) == {"prompts", "student", "teacher"}
            and isinstance(prompts, dict)
            and all(isinstance(digest, str) for digest in prompts.values())
            and isinstance(values["student"], str)
            and isinstance(values["teacher"], str | None)
        ):
            raise ValueError(
                f"{path} is damaged: it does not hold what a run writes there; choose another "
                "folder for save, or bring the file back from a copy"
            )
        return cls(**values)

    def write(self, path: Path) -> None:
        """Writes a JSON file, completely or not at all."""
        values = {"prompts": self.prompts, "student": self.student, "teacher": self.teacher}
        with replacing(path) as partial:
            write_json(partial, values)

    def digest(self) -> str:
        """Returns a short digest of the prompts, by which ranks compare theirs."""
        text = json.dumps(list(self.prompts.items()))
        return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()

    def require_same(
        self, before: RunIdentity, save: Path, paths: Mapping[str, str | None]
    ) -> None:
        """Refuses to go on with a run that was computed from something else.

        Args:
            before: identity of the run so far.
            save: folder of the run.
            paths: paths of `data`, `student` and `teacher` in the current configuration.

        Raises:
            ValueError: the identities differ; the message names the difference.
        """
        for role in ("student", "teacher"):
            old, new = getattr(before, role), getattr(self, role)
            if old != new:
                raise ValueError(
                    f"save={save} holds a run whose {role} had other weights (fingerprint {old}) "
                    f"than {role}={paths[role]} has now ({new}); give the weights that it began "
                    "with, or choose another folder"
                )
        if difference := _difference(before.prompts, self.prompts):
            raise ValueError(
                f"save={save} holds a run on other prompts than data={paths['data']} gives now: "
                f"{difference}; give the file, the tokenizer and the chat template that it began "
                "with (a template that writes the date changes every day), or choose another folder"
            )


def digest_tokens(parts: Sequence[Tensor]) -> str:
    """Returns a short digest of token ids.

    Args:
        parts: tensors [L] int64: a prompt, and its response where the data give one.
    """
    whole = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part.numpy().astype("<i8").tobytes())
    return whole.hexdigest()


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Describes the changed, new and gone prompts by their first ids; empty if nothing changed."""
    kinds = {
        "changed": [name for name in now if before.get(name, now[name]) != now[name]],
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
    }
    found = [f"{len(names)} {kind} ({_names(names)})" for kind, names in kinds.items() if names]
    if not found and list(before) != list(now):
        return "they are the same in another order"
    return ", ".join(found)


def _names(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NAMED else ""
    return ", ".join(json.dumps(name, ensure_ascii=False) for name in names[:_NAMED]) + more
