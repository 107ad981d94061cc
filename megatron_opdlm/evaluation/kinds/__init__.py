"""Kinds of tasks: graders and benchmarks. A new kind is one file here and its name below."""

from megatron_opdlm.checks import require
from megatron_opdlm.evaluation.kinds.kind import TaskKind
from megatron_opdlm.evaluation.kinds.number import NUMBER
from megatron_opdlm.evaluation.kinds.text import TEXT

KINDS: dict[str, TaskKind] = {kind.name: kind for kind in (NUMBER, TEXT)}
DEFAULT_KIND = NUMBER


def find_kind(task: str, chosen: str | None = None) -> TaskKind:
    """Returns the kind of a task.

    It is the chosen kind, or the kind whose name is the name of the task, or the default kind.

    Args:
        task: name of the task.
        chosen: name of a kind; None if the user chose none.

    Raises:
        ValueError: there is no kind of the chosen name.
    """
    if chosen is None:
        return KINDS.get(task, DEFAULT_KIND)
    rule = f"of task {task} must be one of {', '.join(KINDS)}"
    require(chosen in KINDS, "kind", chosen, rule, "choose one of them, or none")
    return KINDS[chosen]
