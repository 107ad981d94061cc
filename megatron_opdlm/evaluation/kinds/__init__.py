"""Kinds of tasks: graders and benchmarks; a new one is one file here, listed below."""

from megatron_opdlm.checks import require
from megatron_opdlm.evaluation.kinds.kind import TaskKind
from megatron_opdlm.evaluation.kinds.number import NUMBER
from megatron_opdlm.evaluation.kinds.text import TEXT

KINDS: dict[str, TaskKind] = {kind.name: kind for kind in (NUMBER, TEXT)}
DEFAULT_KIND = NUMBER


def find_kind(task: str, chosen: str | None = None) -> TaskKind:
    """Returns the kind of a task: the chosen one, else the one that the task is named after, else
    the default.

    Args:
        task: name of the task.
        chosen: name of a kind; None where the user chose none.

    Raises:
        ValueError: there is no kind of the chosen name.
    """
    if chosen is None:
        return KINDS.get(task, DEFAULT_KIND)
    rule = f"of task {task} must be one of {', '.join(KINDS)}"
    require(chosen in KINDS, "kind", chosen, rule, "choose one of them, or none")
    return KINDS[chosen]
