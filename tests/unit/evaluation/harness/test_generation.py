"""What lm-eval's tasks ask of a response, and where a response is cut."""

import importlib.util

import pytest

from megatron_opdlm.evaluation.harness.generation import (
    Generation,
    cut,
    read_generation,
    thoughts_length,
)

GSM8K = {"until": ["Question:", "</s>"], "do_sample": False, "temperature": 0.0}


def generation(**changes):
    return read_generation(GSM8K | changes, task="t", default_limit=256)


def test_a_task_is_read():
    greedy = Generation(response_limit=256, until=("Question:", "</s>"), temperature=0.0)
    assert generation() == greedy
    assert generation(temperature=0.7, top_p=0.9) == greedy  # do_sample is false
    sampled = generation(do_sample=True, temperature=0.7, top_p=0.9, top_k=20, max_gen_toks=12)
    assert sampled == Generation(
        response_limit=12, until=("Question:", "</s>"), temperature=0.7, top_k=20, top_p=0.9
    )
    assert generation(do_sample=None, temperature=1).temperature == 1.0
    assert generation(do_sample=True, temperature=1, top_k=-1).top_k == 0
    assert generation(until="\n").until == ("\n",)
    assert generation(until=None).until == ()
    assert read_generation({}, task="t", default_limit=9) == Generation(
        response_limit=9, until=(), temperature=0.0
    )


@pytest.mark.parametrize(
    "name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"]
)
def test_the_limit_has_the_names_that_lm_eval_reads(name):
    assert generation(**{name: 31}).response_limit == 31
    assert generation(max_gen_toks=7, **{name: 31} if name != "max_gen_toks" else {}) == generation(
        max_gen_toks=7
    )


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"do_sample": None}, {"do_sample": None, "temperature": 0.5},
        {"do_sample": True, "temperature": 0.5}, {"temperature": 0.5}, {"until": "x"},
        {"max_tokens": 3, "max_new_tokens": 4}, {"max_gen_toks": 5, "max_new_tokens": 4},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_mean_what_they_mean_in_lm_eval(changes):
    from lm_eval.models.utils import normalize_gen_kwargs

    theirs, ours = normalize_gen_kwargs(GSM8K | changes, 256), generation(**changes)
    assert ours.response_limit == theirs["max_gen_toks"]
    assert list(ours.until) == theirs["until"]
    assert ours.temperature == theirs["temperature"]
    assert bool(theirs["do_sample"]) == (ours.temperature > 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_beams": 4}, "num_beams=4 of task t must be 1: block decoding has no num_b"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1 of task t must be 1.0"),
        ({"max_length": 9}, "max_length=9 of task t is not an argument of block decoding, which"),
        ({"do_sample": True}, "temperature=0.0 of task t must be above 0, because do_sample is"),
        ({"do_sample": True, "temperature": None}, "temperature=null of task t must be above 0"),
        ({"do_sample": None, "temperature": -1}, "temperature=-1 of task t must be at least 0"),
        ({"do_sample": "maybe"}, "do_sample=maybe of task t must be true or false"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 of task t must be a whole number above 0; give the"),
        ({"max_gen_toks": "12"}, "max_gen_toks=12 of task t must be a whole number above 0"),
        ({"do_sample": True, "temperature": "hot"}, "temperature=hot of task t must be a number"),
        ({"do_sample": None, "temperature": [1]}, "temperature=[1] of task t must be a number"),
        ({"do_sample": None, "temperature": "nan"}, "temperature=nan of task t must be a number"),
        ({"do_sample": True, "temperature": 1, "top_k": "x"}, "top_k=x of task t must be a number"),
        ({"do_sample": True, "temperature": 1, "top_k": 2.5}, "top_k=2.5 of task t must be a who"),
        ({"do_sample": True, "temperature": 1, "top_p": ""}, "top_p= of task t must be a number"),
        ({"until": [1]}, "until=[1] of task t must be a text or a list of texts"),
    ],
    ids=str,
)  # fmt: skip
def test_what_block_decoding_does_not_do_is_refused(changes, says):
    with pytest.raises(ValueError) as refused:
        generation(**changes)
    assert str(refused.value).startswith(says)


def test_a_value_that_asks_for_nothing_is_no_error():
    assert generation(num_beams=1, repetition_penalty=1.0, min_p=0.0) == generation()


@pytest.mark.parametrize(
    ("text", "until", "kept"),
    [
        ("a b c", [], "a b c"),
        ("a b c", [""], "a b c"),
        ("a b c", ["b"], "a "),
        ("a b c", ["c", "b"], "a "),  # the first in the text, not in the list
        ("a b b", ["b"], "a "),
        ("b", ["b"], ""),
        ("a\n\nb", ["\n\n"], "a"),
        ("abc", ["bcd"], "abc"),
        ("", ["a"], ""),
    ],
)
def test_a_response_ends_before_the_first_stop_string(text, until, kept):
    assert cut(text, until) == kept


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_texts_are_cut_as_lm_eval_cuts_them():
    import itertools

    from lm_eval.models.utils import postprocess_generated_text

    texts = ["".join(letters) for letters in itertools.product("abc", repeat=4)]
    stops = [["ab"], ["ab", "c"], ["c", "ab"], ["", "ca"], ["abc", "b"], []]
    for text, until in itertools.product(texts, stops):
        assert cut(text, until) == postprocess_generated_text(text, until, None)


THOUGHTS = (
    "<think>7, c?</think>\n\n7, a. c", "7, a. c", "</think>", "a</think>b</think> 7 c",
    "<think>7, c", " 7", "",
)  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
@pytest.mark.parametrize("text", THOUGHTS)
def test_thoughts_end_where_they_end_in_lm_eval(text):
    from lm_eval.models.utils import postprocess_generated_text

    answer = text[thoughts_length(text) :]
    for until in ([], ["c"], ["7"]):
        assert cut(answer, until) == postprocess_generated_text(text, until, "</think>")
