"""What a task of lm-eval asks of a response: its limit, its stop strings, and its sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.checks import require

NO_LIKELIHOOD = (
    "a block-diffusion model has no likelihood token by token, and a likelihood block by block is "
    "not implemented; choose a task that generates"
)
"""Why tasks that compare likelihoods are refused."""
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the response limit. lm-eval takes the first of them that is given."""
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
}
"""Arguments of other engines, with the one value that asks for nothing."""
_READ = (*_LIMITS, "until", "do_sample", "temperature", "top_k", "top_p")
_FIX = "give the task another value with --gen-kwargs"
_THOUGHTS_END = "</think>"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How a response is decoded, beside the options of block decoding."""

    response_limit: int
    """Most response tokens."""
    until: tuple[str, ...]
    """Strings before the first of which a response ends."""
    temperature: float
    """Sampling temperature; 0 is greedy."""
    top_k: int = 0
    """Number of tokens that the top-k filter keeps; 0 keeps all."""
    top_p: float = 1.0
    """Probability mass that the top-p filter keeps."""


def read_generation(given: Mapping[str, Any], *, task: str, default_limit: int) -> Generation:
    """Reads the `generation_kwargs` of a request.

    As in lm-eval, `do_sample: false` is greedy whatever the temperature is, and without
    `do_sample` a temperature above 0 samples.

    Args:
        given: the arguments.
        task: name of the task, for messages.
        default_limit: response limit if the task names none.

    Raises:
        ValueError: an argument is malformed, or asks for what block decoding does not do.
    """
    for name, value in given.items():
        if name in _NEUTRAL:
            rule = f"of task {task} must be {_NEUTRAL[name]}: block decoding has no {name}"
            require(value in (None, _NEUTRAL[name]), name, value, rule, _FIX)
        else:
            known = ", ".join(_READ)
            rule = f"of task {task} is not an argument of block decoding, which has {known}"
            require(name in _READ, name, value, rule, "leave it out of the task")
    limits = [given[name] for name in _LIMITS if given.get(name) is not None]
    limit = limits[0] if limits else default_limit
    is_count = isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1
    rule = f"of task {task} must be a whole number above 0"
    require(is_count, "max_gen_toks", limit, rule, _FIX)
    until, temperature = _until(given, task), _temperature(given, task)
    if temperature == 0:
        return Generation(response_limit=limit, until=until, temperature=0.0)
    top_k = _number(given, "top_k", task, default=0.0)
    rule = f"of task {task} must be a whole number"
    require(top_k == int(top_k), "top_k", given.get("top_k"), rule, _FIX)
    return Generation(
        response_limit=limit,
        until=until,
        temperature=temperature,
        top_k=max(0, int(top_k)),  # other engines write -1 for all
        top_p=_number(given, "top_p", task, default=1.0),
    )


def cut(text: str, until: Sequence[str]) -> str:
    """Returns the text before the first of the stop strings. Empty strings stop nothing.

    >>> cut("7 apples. Question: why?", ["Question:", "."])
    '7 apples'
    """
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]


def thoughts_length(text: str) -> int:
    """Returns how many characters of a response stand before its answer.

    They are its thoughts, up to the last </think>, and white space.

    >>> thoughts_length("<think>7 or 8?</think> 7")
    23
    """
    return len(text) - len(text.rpartition(_THOUGHTS_END)[2].lstrip())


def _until(given: Mapping[str, Any], task: str) -> tuple[str, ...]:
    until = given.get("until")
    if until is None:
        return ()
    strings = [until] if isinstance(until, str) else until
    is_list = isinstance(strings, list) and all(isinstance(each, str) for each in strings)
    rule = f"of task {task} must be a text or a list of texts"
    require(is_list, "until", until, rule, "correct the task")
    return tuple(strings)


def _temperature(given: Mapping[str, Any], task: str) -> float:
    sample, value = given.get("do_sample"), given.get("temperature")
    temperature = _number(given, "temperature", task, default=0.0)
    rule = f"of task {task} must be true or false"
    require(sample in (None, True, False), "do_sample", sample, rule, _FIX)
    if sample is False:
        return 0.0
    needs = f"of task {task} must be above 0, because do_sample is true"
    require(not sample or temperature > 0, "temperature", value, needs, _FIX)
    require(temperature >= 0, "temperature", value, f"of task {task} must be at least 0", _FIX)
    return temperature


def _number(given: Mapping[str, Any], name: str, task: str, *, default: float) -> float:
    value = given.get(name)
    try:
        number = default if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    require(math.isfinite(number), name, value, f"of task {task} must be a number", _FIX)
    return number
