"""What teacher and student must have in common: the same text for every id.

The rows of an embedding need not be equally many. Models of one family pad theirs to different
sizes: Qwen2.5 has 151,936 rows up to 3B and 152,064 from 7B on, and one tokenizer of 151,665 ids.
Rows that only one of the two has stand for no text, so they belong to no softmax of a run.
"""

from __future__ import annotations

from megatron_opdlm.convert.model_source import ModelSource

_FIX = "use two models of one family, both imported with a mask token"


def check_same_language(student: ModelSource, teacher: ModelSource, teacher_path: str) -> int:
    """Refuses a teacher whose ids do not mean what the student's mean.

    Args:
        student: the student.
        teacher: the teacher.
        teacher_path: where it comes from, for messages.

    Returns:
        The number of ids that both models have, from 0 on.

    Raises:
        ValueError: another tokenizer, or a token of it that one of the models lacks.
    """
    _require_same_tokenizer(student, teacher, teacher_path)
    return shared_vocab_size(student, teacher, teacher_path)


def shared_vocab_size(student: ModelSource, teacher: ModelSource, teacher_path: str) -> int:
    """Returns the number of ids that both models have; as `check_same_language`, but content with
    models of one size that have no tokenizer here, of which `opdlm plan` knows no more.
    """
    ours, theirs = student.vocab_size, teacher.vocab_size
    shared = min(ours, theirs)
    if ours == theirs:
        return shared
    differ = f"teacher={teacher_path} has vocab_size={theirs}, the student {ours}"
    if student.num_ids is None or teacher.num_ids is None:
        raise ValueError(
            f"{differ}; without the tokenizers of both these must be equal: padding cannot be told "
            f"from tokens; put their files beside config.json, or {_FIX}"
        )
    _require_same_tokenizer(student, teacher, teacher_path)
    if student.num_ids > shared:
        raise ValueError(
            f"{differ}; the student's tokenizer has {student.num_ids} ids, all of which both must "
            f"hold: distillation compares whole distributions; {_FIX}"
        )
    return shared


def _require_same_tokenizer(student: ModelSource, teacher: ModelSource, teacher_path: str) -> None:
    ours, theirs = student.fingerprint, teacher.fingerprint
    if ours != theirs:
        raise ValueError(
            f"teacher={teacher_path} has another tokenizer than the student (fingerprints "
            f"{str(theirs)[:12]} and {str(ours)[:12]}); use two models of one family"
        )
