"""Checks that every token id means the same text to teacher and student.

Their embeddings may have different numbers of rows. Models of one family pad them to different
sizes: Qwen2.5 has 151,936 rows up to 3B and 152,064 from 7B on, with one tokenizer of 151,665 ids.
Rows that only one model has stand for no text, so they are in no softmax of a run.
"""

from __future__ import annotations

from megatron_opdlm.convert.model_source import ModelSource

_FIX = "use two models of one family, both imported with a mask token"


def check_same_language(student: ModelSource, teacher: ModelSource, teacher_path: str) -> int:
    """Refuses a teacher whose token ids mean other texts than the student's.

    Args:
        student: source of the student.
        teacher: source of the teacher.
        teacher_path: path of the teacher, for messages.

    Returns:
        The number of ids that both models have, from 0 on.

    Raises:
        ValueError: the tokenizers differ, or one of the models lacks a token of the tokenizer.
    """
    _require_same_tokenizer(student, teacher, teacher_path)
    return shared_vocab_size(student, teacher, teacher_path)


def shared_vocab_size(student: ModelSource, teacher: ModelSource, teacher_path: str) -> int:
    """Returns the number of ids that both models have.

    Unlike `check_same_language` it accepts models without tokenizer files if their sizes are equal:
    `opdlm plan` may know nothing but their sizes.
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
