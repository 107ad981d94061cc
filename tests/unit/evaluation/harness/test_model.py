"""The student as lm-eval's model: the text of a response, and what is counted; by hand."""

import dataclasses

import pytest
import torch

from megatron_opdlm.diffusion.trajectory import Trajectory
from tests.harness_tasks import needs_lm_eval
from tests.tiny import write_tokenizer

pytestmark = needs_lm_eval


@dataclasses.dataclass
class FakeDecoder:
    """A decoder with nothing but its tokenizer."""

    student: object


@dataclasses.dataclass
class FakeStudent:
    tokenizer: object
    mask_token_id: int = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture
def model(tokenizer):
    from megatron_opdlm.evaluation.harness.model import StudentLM
    from megatron_opdlm.rollout.request import DecodingOptions

    return StudentLM(FakeDecoder(FakeStudent(tokenizer)), DecodingOptions())


def trajectory(tokenizer, text, *, after=""):
    """A response of one token per character, in blocks of 4, two steps each."""
    ids = tokenizer(text)["input_ids"]
    more = tokenizer(after)["input_ids"] if after else []
    padded = ids + more
    padded += [0] * (-len(padded) % 4)
    return Trajectory(
        prompt_id="a", sample=0, prompt_ids=torch.arange(4), response_ids=torch.tensor(padded),
        commit_step=torch.tensor([0, 1] * (len(padded) // 2)), num_response_tokens=len(ids),
        ended=text.endswith("<|im_end|>"), block_size=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "until", "kept", "cut_off"),
    [
        ("It is 14.", (), "It is 14.", 0),
        ("It is 14.<|im_end|>", (), "It is 14.", 0),
        ("It is 14.<|im_end|>", ("<|im_end|>",), "It is 14.", 0),  # the end is part of a response
        ("It is 14.<|im_end|>", (".",), "It is 14", 2),
        ("It is 14.", ("4", "is"), "It ", 6),
        # a special token that does not end the model's responses
        ("It is 14.<|endoftext|>And 15.", ("<|endoftext|>",), "It is 14.", 8),
        ("It is 14.<|endoftext|>And 15.", (), "It is 14.And 15.", 0),
        ("It is 14.<|endoftext|>And 15.", ("<|endoftext|>", "is"), "It ", 14),
    ],
)
def test_a_response_ends_before_its_stop_string(model, tokenizer, text, until, kept, cut_off):
    from megatron_opdlm.evaluation.harness.counts import Counts
    from megatron_opdlm.evaluation.harness.generation import Generation

    counts = Counts()
    found = trajectory(tokenizer, text, after="zz")
    generation = Generation(response_limit=99, until=until, temperature=0.0)
    assert model._text(found, generation, counts) == kept
    assert counts.tokens == found.num_response_tokens
    assert counts.tokens_cut == cut_off
    assert counts.stopped == (cut_off > 0)
    assert counts.ended == text.endswith("<|im_end|>")
    assert counts.passes == found.num_passes


def test_a_special_token_that_has_no_name_is_a_stop_string_too(tokenizer):
    """As <|eot_id|> of Llama 3: decoding leaves it out, and it is neither bos, eos nor pad."""
    import copy

    from megatron_opdlm.evaluation.harness.counts import Counts
    from megatron_opdlm.evaluation.harness.generation import Generation
    from megatron_opdlm.evaluation.harness.model import StudentLM
    from megatron_opdlm.rollout.request import DecodingOptions

    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<|eot|>"], special_tokens=True)
    assert "<|eot|>" not in more.all_special_tokens
    model = StudentLM(FakeDecoder(FakeStudent(more)), DecodingOptions())
    found = trajectory(more, "It is 14.<|eot|>And 15.")
    for until, kept in {("<|eot|>",): "It is 14.", (): "It is 14.And 15."}.items():
        generation = Generation(response_limit=99, until=until, temperature=0.0)
        assert model._text(found, generation, Counts()) == kept


THOUGHTS = "<think>1. or 2.</think>\n"


@pytest.mark.parametrize(
    ("thinks", "text", "kept", "cut_off"),
    [
        (True, f"{THOUGHTS}It is 14. Or", "It is 14", 4),
        (True, f"{THOUGHTS}It is 14", "It is 14", 0),
        (True, "It is 14. Or", "It is 14", 4),  # no thoughts
        (True, "<think>1. or 2", "<think>1", 6),  # they did not end
        (False, f"{THOUGHTS}It is 14. Or", "<think>1", 28),
    ],
)
def test_thoughts_that_were_asked_for_are_not_graded(model, tokenizer, thinks, text, kept, cut_off):
    from megatron_opdlm.evaluation.harness.counts import Counts
    from megatron_opdlm.evaluation.harness.generation import Generation

    model.enable_thinking = thinks
    counts = Counts()
    generation = Generation(response_limit=99, until=(".",), temperature=0.0)
    assert model._text(trajectory(tokenizer, text), generation, counts) == kept
    assert (counts.tokens, counts.tokens_cut) == (len(text), cut_off)


def test_characters_of_several_tokens_are_counted_whole(model, tokenizer):
    """Two bytes, so two tokens, per letter."""
    from megatron_opdlm.evaluation.harness.counts import Counts
    from megatron_opdlm.evaluation.harness.generation import Generation

    counts = Counts()
    generation = Generation(response_limit=99, until=("\u00fc",), temperature=0.0)
    assert (
        model._text(trajectory(tokenizer, "\u00e4\u00f6\u00fc\u00df"), generation, counts)
        == "\u00e4\u00f6"
    )
    assert (counts.tokens, counts.tokens_cut) == (8, 4)


def test_a_rendered_prompt_has_no_second_beginning(model, tokenizer, monkeypatch):
    """A tokenizer that puts a token before plain text must not put one before the template's."""
    text = model.apply_chat_template([{"role": "user", "content": "a"}])
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    added = []

    class Marking:
        bos_token = "<|im_start|>"

        def __call__(self, text, add_special_tokens):
            added.append(add_special_tokens)
            return {"input_ids": [1, 2]}

    monkeypatch.setattr(model.decoder.student, "tokenizer", Marking())
    for context in (text, "<|im_start|>other", "plain"):
        model._tokens(context, "t/0")
    assert added == [False, False, True]


def test_an_answer_that_has_begun_is_continued(model):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is"}]
    assert model.apply_chat_template(turns, add_generation_prompt=False).endswith("It is")


def test_a_conversation_that_the_template_refuses_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system message') }}")
    with pytest.raises(ValueError) as refused:
        model.apply_chat_template([{"role": "system", "content": "a"}])
    assert str(refused.value) == (
        "the chat template refuses a conversation of system: no system message; change the task, "
        "or render none with --no-chat-template"
    )


@pytest.mark.parametrize(("ids", "says"), [([], "has no token"), ([1, 300], "contains the mask")])
def test_a_prompt_that_cannot_be_decoded_is_refused(model, monkeypatch, ids, says):
    class Fixed:
        bos_token = None
        mask_token = "<mask>"

        def __call__(self, text, add_special_tokens):
            return {"input_ids": ids}

    monkeypatch.setattr(model.decoder.student, "tokenizer", Fixed())
    with pytest.raises(ValueError, match=f"the prompt of t/0 {says}"):
        model._tokens("text", "t/0")
