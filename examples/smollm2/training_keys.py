"""The key=value of the training that a user may give: mistakes are found before anything begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from megatron_opdlm.checks import require
from megatron_opdlm.config.run import Config

BY_SCRIPT = "is set by the script"
OF_IMPORT = "belongs to the import, which the script does as it must be"
ONE_PROCESS = "is for several processes, and this example trains with one"
REFUSED = {
    "train_rollouts": (BY_SCRIPT, "use --rollouts N"),
    "seed": (BY_SCRIPT, "use --seed N"),
    "save": (BY_SCRIPT, "use --out DIR"),
    "student": (BY_SCRIPT, "leave it out"),
    "data": (BY_SCRIPT, "leave it out, or use `opdlm train` for other prompts"),
    "lr_decay_steps": (BY_SCRIPT, "leave it out: it follows from the rollouts"),
    "resume": (BY_SCRIPT, "leave it out: a run goes on when it is started again"),
    "teacher": (
        "is the imported model, and measures compare with it",
        "leave it out",
    ),
    "import_cache": (OF_IMPORT, "leave it out"),
    "mask_token": (OF_IMPORT, "leave it out"),
    "mask_init": (OF_IMPORT, "leave it out"),
    "make_vocab_size_divisible_by": (OF_IMPORT, "leave it out"),
    "tensor_model_parallel_size": (ONE_PROCESS, "leave it out"),
    "pipeline_model_parallel_size": (ONE_PROCESS, "leave it out"),
    "rollout_tensor_model_parallel_size": (ONE_PROCESS, "leave it out"),
    "teacher_tensor_model_parallel_size": (ONE_PROCESS, "leave it out"),
    "teacher_pipeline_model_parallel_size": (ONE_PROCESS, "leave it out"),
    "sequence_parallel": (ONE_PROCESS, "leave it out"),
}
"""Keys that the user may not give: the rule, and what to do instead."""


def require_allowed(keys: Sequence[str]) -> None:
    """Refuses keys that the script sets, or with which a later step would fail or measure another.

    Raises:
        ValueError: the message names key, value, rule and fix.
    """
    for text in keys:
        key, _, value = text.partition("=")
        if key in REFUSED:
            require(False, key, value, *REFUSED[key])


def require_usable(config: Config) -> None:
    """Refuses values that are right in themselves and of which something is missing here.

    Raises:
        ValueError: the message names key, value, rule and fix.
    """
    import torch

    config.resolved(cuda=torch.cuda.is_available())
    train = config.train
    rule = "needs responses in the data, and the prompts of this example have none"
    is_given = config.distill.data_writes
    require(not is_given, "sft_responses", "data", rule, "use sft_responses=teacher")
    if train.eval_data is not None:
        is_file = Path(train.eval_data).is_file()
        require(is_file, "eval_data", train.eval_data, "does not exist", "check the path")
    if train.wandb_project is not None:
        is_there = importlib.util.find_spec("wandb") is not None
        fix = "pip install 'megatron-opdlm[wandb]', or leave it out"
        require(is_there, "wandb_project", train.wandb_project, "needs wandb", fix)
