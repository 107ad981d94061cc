"""Prompt files, tokenisation, and the order of presentation."""

import dataclasses
import json
import logging
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_opdlm.responses.given import tokenize_responses
from megatron_opdlm.responses.prompts import (
    Prompt,
    PromptSampler,
    PromptTokens,
    load_prompts,
    tokenize_prompts,
)

WORDS = ["?", "<|MASK|>", "<|im_end|>", "<user>", "<assistant>", "<think>", "a", "b", "c"]
TEMPLATE = (
    "{% for m in messages %}<user> {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
    "{% if enable_thinking %}<think>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="?",
        eos_token="<|im_end|>",
        mask_token="<|MASK|>",
        chat_template=TEMPLATE,
    )


def write(tmp_path, text, name="prompts.jsonl"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def prompt(text, name="1"):
    return Prompt(id=name, messages=[{"role": "user", "content": text}], where=f"p.jsonl:{name}")


def tokenize(prompts, tokenizer, enable_thinking=False, max_prompt_tokens=100):
    return tokenize_prompts(
        prompts, tokenizer, enable_thinking=enable_thinking, max_prompt_tokens=max_prompt_tokens
    )


def test_every_documented_form_of_a_line_loads(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    lines = [
        {"prompt": "a", "id": "x", "domain": "math", "answer": 4},
        {"messages": messages},
        {"question": "b", "other": [1]},
        {"prompt": "line\u2028separator"},
    ]
    path = write(tmp_path, "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    prompts = load_prompts(path)
    assert [p.id for p in prompts] == ["x", "2", "3", "4"]
    assert [p.where for p in prompts] == [f"{path}:{i}" for i in (1, 2, 3, 4)]
    assert prompts[0].domain == "math"
    assert prompts[1].messages == messages
    assert prompts[2].messages == [{"role": "user", "content": "b"}]


def test_the_released_json_list_loads(tmp_path):
    entries = [{"question": "a", "domain": "math"}, {"question": "b", "domain": "code"}]
    prompts = load_prompts(write(tmp_path, json.dumps(entries, indent=1), "prompts.json"))
    assert [(p.id, p.domain) for p in prompts] == [("1", "math"), ("2", "code")]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert load_prompts(write(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\n'))[0].id == "1"


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "holds no prompt"),
        ("[]", "holds no prompt"),
        (GOOD + "\n" + GOOD, ":2: empty line"),
        (GOOD + "\n", ":2: empty line"),
        (GOOD + '{"prompt": "b"', ":2: not valid JSON: .* at column"),
        (GOOD + "7\n", ":2: got 7; an entry must be an object"),
        (GOOD + "{}\n", ":2: needs exactly one of prompt, messages, question; found none"),
        ('{"prompt": "a", "question": "b"}', ":1: needs exactly one of .*prompt and question"),
        ('{"prompt": " "}', ':1: prompt=" " must be text, and not empty'),
        ('{"prompt": 7}', ":1: prompt=7 must be text"),
        ('{"prompt": "\\ud800"}', ":1: prompt holds half of a surrogate pair"),
        ('{"messages": []}', r":1: messages=\[\] must be a list of at least one message"),
        ('{"messages": ["a"]}', r":1: messages\[0\]=.* must have a role and content"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', r'messages\[0\].role="bot" must be'),
        ('{"messages": [{"role": "user", "content": ""}]}', r"messages\[0\].content="),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "it must be the user's"),
        ('{"prompt": "a", "domain": [4]}', r":1: domain=\[4\] must be text or a number"),
        ('{"prompt": "a", "id": NaN}', ":1: id=NaN must be text or a number"),
        ('{"prompt": "a", "id": true}', ":1: id=true must be text or a number"),
        ('{"prompt": "a", "id": "\\ud800"}', ":1: id holds half of a surrogate pair"),
        ('{"prompt": 0.00001}', ":1: prompt=0.00001 must be text"),
        (
            GOOD + '{"prompt": "a", "n": ' + "1" * 5000 + "}",
            ":2: JSON that cannot be read: .*digits",
        ),
        ('[{"n": ' + "1" * 5000 + "}]", "jsonl: JSON that cannot be read: .*digits"),
        (GOOD + '{"prompt": ' + "[" * 100000, ":2: JSON that cannot be read: .*recursion"),
        ('{"prompt": "a", "id": "2"}\n' + GOOD, ":2: id=2 must be unique and stands at .*:1 too"),
        (GOOD.encode() + b'{"prompt": "\xff"}', ":2: not UTF-8"),
        ('[{"question": "a"}, {"question": ""}]', ": entry 2: question="),
        ('[{"question": "a"},\n {"question"]', ":2: not valid JSON"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_line_is_named(tmp_path, text, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        load_prompts(write(tmp_path, text))
    assert "prompts.jsonl" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl does not exist"):
        load_prompts(tmp_path / "none.jsonl")


def test_prompts_become_the_templates_ids(tokenizer):
    kept = tokenize([prompt("a b")], tokenizer).kept
    assert kept[0].ids.tolist() == tokenizer.convert_tokens_to_ids(
        ["<user>", "a", "b", "<|im_end|>", "<assistant>"]
    )
    assert kept[0].ids.dtype == torch.int64
    thinking = tokenize([prompt("a b")], tokenizer, enable_thinking=True).kept
    assert thinking[0].ids.tolist() == [*kept[0].ids.tolist(), WORDS.index("<think>")]


def test_long_prompts_are_dropped_whole_and_reported(tokenizer, caplog):
    texts = ["a", "a b c a b c", "b", "a a a a a a a", "c"]
    prompts = [prompt(text, str(i)) for i, text in enumerate(texts)]
    with caplog.at_level(logging.WARNING):
        result = tokenize(prompts, tokenizer, max_prompt_tokens=6)
    assert [(p.index, p.id) for p in result.kept] == [(0, "0"), (2, "2"), (4, "4")]
    assert [p.ids[1].item() for p in result.kept] == [WORDS.index(w) for w in "abc"]
    assert result.dropped == [("1", 9), ("3", 10)]
    assert "2 of 5 prompts have more than max_prompt_tokens=6" in caplog.text
    assert "1 (9), 3 (10)" in caplog.text


def test_a_prompt_of_exactly_the_limit_stays(tokenizer):
    assert len(tokenize([prompt("a")], tokenizer, max_prompt_tokens=4).kept) == 1


def test_a_limit_that_leaves_nothing_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="max_prompt_tokens=3 leaves none of 1 prompts.* has 4"):
        tokenize([prompt("a")], tokenizer, max_prompt_tokens=3)


def test_a_prompt_with_the_mask_token_is_refused_by_line(tokenizer):
    with pytest.raises(ValueError, match=r"^p.jsonl:2: prompt 2 contains the mask token"):
        tokenize([prompt("a"), prompt("b <|MASK|>", "2")], tokenizer)


def test_chunks_keep_order_and_index(tokenizer, monkeypatch):
    monkeypatch.setattr("megatron_opdlm.responses.prompts._CHUNK", 2)
    prompts = [prompt("a b c"[: 1 + 2 * (i % 3)], str(i)) for i in range(5)]
    kept = tokenize(prompts, tokenizer).kept
    assert [p.index for p in kept] == [0, 1, 2, 3, 4]
    assert [len(p.ids) for p in kept] == [4, 5, 6, 4, 5]


class Incomplete:
    """A tokenizer that lacks something."""

    def __init__(self, mask_token_id, chat_template):
        self.mask_token_id, self.chat_template = mask_token_id, chat_template


@pytest.mark.parametrize(
    ("incomplete", "rule"),
    [
        (Incomplete(None, "t"), "has no mask_token.*convert import"),
        (Incomplete(1, None), "has no chat_template"),
    ],
)
def test_an_incomplete_tokenizer_is_refused(incomplete, rule):
    with pytest.raises(ValueError, match=rule):
        tokenize([prompt("a")], incomplete)


def test_a_prompt_that_renders_to_nothing_is_refused(tokenizer):
    class Silent:
        mask_token_id, mask_token, chat_template = 1, "<|MASK|>", ""

        def apply_chat_template(self, conversations, **options):
            return [[] for _ in conversations]

    with pytest.raises(ValueError, match=r"^p.jsonl:1: prompt 1 renders to no token"):
        tokenize([prompt("a")], Silent())


def test_responses_are_read_when_asked_for(tmp_path):
    lines = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": ["left alone"]}]
    path = write(tmp_path, "\n".join(json.dumps(line) for line in lines))
    assert [prompt.response for prompt in load_prompts(path)] == [None, None]
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: response=\["):
        load_prompts(path, with_responses=True)
    path = write(tmp_path, json.dumps(lines[:1]))
    assert load_prompts(path, with_responses=True)[0].response == "b"


class Letters:
    """Ids of characters; 1 is the end that the tokenizer names."""

    eos_token_id = 1

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def convert_ids_to_tokens(self, token_id):
        return chr(token_id)


def tokenized_responses(*texts, eos_token_ids=(2, 1)):
    prompts = [
        dataclasses.replace(prompt("a", str(i)), response=text) for i, text in enumerate(texts)
    ]
    kept = [PromptTokens(index=i, id=str(i), ids=torch.tensor([5])) for i in range(1, len(texts))]
    return tokenize_responses(
        prompts, kept, Letters(), path="p", eos_token_ids=eos_token_ids, mask_token_id=ord("m")
    )


def test_responses_of_the_kept_prompts_end():
    rows = tokenized_responses("m", "ab", "c")  # the first prompt was dropped
    assert [row.tolist() for row in rows] == [[97, 98, 1], [99, 1]]
    rows = tokenized_responses("m", "ab", eos_token_ids=(2, 3))  # the student knows another end
    assert [row.tolist() for row in rows] == [[97, 98, 2]]


def test_bad_responses():
    with pytest.raises(ValueError, match="p.jsonl:2: response holds the mask token 'm'; remove it"):
        tokenized_responses("a", "a", "am")
    with pytest.raises(ValueError, match="p.jsonl:1: response holds the end-of-sequence token 'b'"):
        tokenized_responses("a", "ab", eos_token_ids=(1, ord("b")))
    with pytest.raises(ValueError, match="the student names no eos_token_id"):
        tokenized_responses("a", "ab", eos_token_ids=())


def sampler(num_prompts=10, prompts_per_rollout=3, seed=7):
    return PromptSampler(
        num_prompts=num_prompts, prompts_per_rollout=prompts_per_rollout, seed=seed
    )


def test_an_epoch_holds_no_prompt_twice_and_epochs_differ():
    epochs = [[sampler().batch(3 * epoch + i) for i in range(3)] for epoch in range(2)]
    for epoch in epochs:
        places = [place for batch in epoch for place in batch]
        assert len(set(places)) == 9
        assert set(places) <= set(range(10))
    assert epochs[0] != epochs[1]


def test_a_batch_is_a_function_of_the_step_alone():
    forward = [sampler().batch(step) for step in range(8)]
    backward = [sampler().batch(step) for step in reversed(range(8))]
    assert forward == backward[::-1]
    assert forward != [sampler(seed=8).batch(step) for step in range(8)]  # control


def test_every_prompt_gets_its_turn():
    counts = Counter(place for step in range(300) for place in sampler().batch(step))
    assert set(counts) == set(range(10))
    assert min(counts.values()) > 75  # 90 expected each


def test_the_order_is_pinned():
    """A resumed run must see the same order under any version of torch."""
    assert [sampler().batch(step) for step in range(2)] == [[6, 4, 3], [1, 9, 0]]


def test_places_before_are_those_of_earlier_rollouts():
    for steps in (sampler(), sampler(num_prompts=9)):  # some left over in every epoch, and none
        taken = set()
        for step in range(12):
            assert steps.places_before(step) == taken
            taken |= set(steps.batch(step))
    assert sampler().places_before(3) != set(range(10))  # control: one was left over


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="prompts_per_rollout=3 must be at most .* 2"):
        sampler(num_prompts=2)
