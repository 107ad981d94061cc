"""The key=value of the training that a user may give: mistakes are found before anything begins."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from commands import BY_SCRIPT, LEAVE_OUT
from commands import REFUSED as OF_EVERY_SCRIPT

from megatron_opdlm.checks import require
from megatron_opdlm.config.run import Config

ONE_PROCESS = "is for several processes, and this example trains with one"
REFUSED = OF_EVERY_SCRIPT | {
    "train_rollouts": (BY_SCRIPT, "use --rollouts N"),
    "seed": (BY_SCRIPT, "use --seed N"),
    "data": (BY_SCRIPT, "leave it out, or use `opdlm train` for other prompts"),
    "lr_decay_steps": (BY_SCRIPT, "leave it out: it follows from the rollouts"),
    "resume": (BY_SCRIPT, "leave it out: a run goes on when it is started again"),
    **dict.fromkeys(
        (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
            *("teacher_tensor_model_parallel_size", "teacher_pipeline_model_parallel_size"),
            *("rollout_tensor_model_parallel_size", "sequence_parallel"),
        ),
        (ONE_PROCESS, LEAVE_OUT),
    ),
}
"""Keys that the user may not give: the rule, and the fix."""


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
