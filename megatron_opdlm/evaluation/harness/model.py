"""The student as a model of lm-eval, under the name "opdlm".

`opdlm eval --harness` uses it. A program of one's own gets it by importing this file:

    import lm_eval
    import megatron_opdlm.evaluation.harness.model
    lm_eval.simple_evaluate("opdlm", "model=runs/mine,dynamic=True", tasks=["gsm8k"])
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from megatron_opdlm.convert.chat_template import TEMPLATE_ERRORS
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.evaluation.harness.arguments import open_model
from megatron_opdlm.evaluation.harness.counts import Counts
from megatron_opdlm.evaluation.harness.generation import (
    NO_LIKELIHOOD,
    Generation,
    cut,
    read_generation,
    thoughts_length,
)
from megatron_opdlm.evaluation.labels import setting_name
from megatron_opdlm.generate.decoder import Decoder
from megatron_opdlm.responses.prompts import PromptTokens
from megatron_opdlm.rollout.request import DecodingOptions

DEFAULT_LIMIT = 256
"""Response limit of tasks that name none, as in lm-eval."""


@register_model("opdlm")
class StudentLM(LM):
    """A student that answers the requests of lm-eval, all of one kind side by side.

    Every rank of the job has one, with the same requests, and reports rank 0 of 1 to lm-eval:
    the decoder itself shares the requests among the ranks.
    """

    counts: dict[str, Counts]
    """What was decoded so far, by task."""

    def __init__(
        self,
        decoder: Decoder,
        options: DecodingOptions,
        *,
        default_limit: int = DEFAULT_LIMIT,
        seed: int = 0,
        enable_thinking: bool = False,
    ) -> None:
        """Takes a loaded student.

        Args:
            decoder: the student.
            options: decoding options; those of sampling are the task's.
            default_limit: response limit of tasks that name none.
            seed: seed of the sampling.
            enable_thinking: passed to the chat template.
        """
        super().__init__()
        self.decoder = decoder
        self.options = options
        self.default_limit = default_limit
        self.seed = seed
        self.enable_thinking = enable_thinking
        self.counts = defaultdict(Counts)
        self._rendered: set[str] = set()
        """Contexts that the chat template wrote, with all special tokens that they need."""

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> StudentLM:
        """Loads the student that `model_args` describe, with the names of `opdlm eval`.

        Raises:
            ValueError: an argument is unknown or malformed.
        """
        decoder, settings = open_model(arg_dict, additional_config or {})
        return cls(decoder, **settings)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> StudentLM:
        """Loads the student that a text like "model=runs/mine,block_size=4" describes."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the student."""
        return self.decoder.student.tokenizer

    @functools.cached_property
    def _special_ids(self) -> dict[str, int]:
        """Id of every special token by its text. Decoding leaves these tokens out."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {token.content: number for number, token in added if token.special}

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval keeps requests that this chat template rendered."""
        return str(self.decoder.student.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the chat template, for lm-eval's records."""
        return str(self.tokenizer.chat_template) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation. One that ends in the middle of an answer is continued.

        Raises:
            ValueError: the template refuses the conversation.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                enable_thinking=self.enable_thinking,
            )
        except TEMPLATE_ERRORS as error:
            roles = ", ".join(message["role"] for message in chat_history)
            raise ValueError(
                f"the chat template refuses a conversation of {roles}: {error}; change the task, "
                "or render none with --no-chat-template"
            ) from None
        self._rendered.add(text)
        return str(text)

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Refuses."""
        raise NotImplementedError(f"loglikelihood: {NO_LIKELIHOOD}")

    def loglikelihood_rolling(self, requests: list[Instance]) -> NoReturn:
        """Refuses."""
        raise NotImplementedError(f"loglikelihood_rolling: {NO_LIKELIHOOD}")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decodes one response per request. Call on all ranks with the same requests.

        Returns:
            The texts before the stop strings, in the order of the requests; the same on every rank.

        Raises:
            ValueError: a request asks for what block decoding does not do.
        """
        texts = [""] * len(requests)
        groups: dict[Generation, list[PromptTokens]] = {}
        for prompt, generation, task in self._read(requests):
            self.counts[task].responses += 1
            if len(prompt.ids) > self._room(generation):
                self.counts[task].too_long += 1
            else:
                groups.setdefault(generation, []).append(prompt)
        show = self.decoder.parallel.is_main and not disable_tqdm
        total = sum(map(len, groups.values()))
        with tqdm(total=total, desc=setting_name(self.options), disable=not show) as bar:
            for generation, prompts in groups.items():
                trajectories = self.decoder.decode(
                    prompts,
                    self._options(generation),
                    response_limit=generation.response_limit,
                    seed=self.seed,
                    on_progress=functools.partial(_advance, bar, bar.n),
                )
                for prompt, trajectory in zip(prompts, trajectories, strict=True):
                    task = str(requests[prompt.index].task_name)
                    texts[prompt.index] = self._text(trajectory, generation, self.counts[task])
        return texts

    def _read(self, requests: Sequence[Instance]) -> list[tuple[PromptTokens, Generation, str]]:
        """Returns prompt, generation and task of each request."""
        found = []
        repeats: Counter[tuple[Any, ...]] = Counter()
        for index, request in enumerate(requests):
            context, given = request.args[:2]
            task = str(request.task_name)
            generation = read_generation(given, task=task, default_limit=self.default_limit)
            place = (task, request.doc_id, request.idx)
            # Samples of one question differ, because random numbers depend on the id.
            name = "/".join(map(str, (*place, repeats[place])))
            repeats[place] += 1
            prompt = PromptTokens(index=index, id=name, ids=self._tokens(context, name))
            found.append((prompt, generation, task))
        return found

    def _tokens(self, context: str, name: str) -> torch.Tensor:
        bos = self.tokenizer.bos_token
        is_whole = context in self._rendered or (bos is not None and context.startswith(bos))
        ids = self.tokenizer(context, add_special_tokens=not is_whole)["input_ids"]
        if not ids:
            raise ValueError(f"the prompt of {name} has no token; change the task")
        if self.decoder.student.mask_token_id in ids:
            raise ValueError(
                f"the prompt of {name} contains the mask token {self.tokenizer.mask_token}, which "
                "must stand for masked positions only; change the task"
            )
        return torch.tensor(ids, dtype=torch.int64)

    def _options(self, generation: Generation) -> DecodingOptions:
        return dataclasses.replace(
            self.options,
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
        )

    def _room(self, generation: Generation) -> int:
        return self.decoder.prompt_room(self.options, generation.response_limit, key="max_gen_toks")

    def _text(self, trajectory: Trajectory, generation: Generation, counts: Counts) -> str:
        """Returns the text before the stop strings, and counts.

        Thoughts that were asked for are no part of it, and stop strings in them stop nothing.
        """
        ids = trajectory.text_ids.tolist()
        kept = ids[: _special_stop(self._special_ids, ids, generation.until)]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        start = thoughts_length(text) if self.enable_thinking else 0
        graded = cut(text[start:], generation.until)
        is_cut = start + len(graded) < len(text)
        counts.stopped += len(kept) < len(ids) or is_cut
        if is_cut:
            kept = kept[: _length_of(self.tokenizer, kept, text[: start + len(graded)])]
        counts.tokens += len(ids)
        counts.tokens_cut += len(ids) - len(kept)
        counts.passes += trajectory.num_passes
        counts.ended += trajectory.ended
        return graded


def _advance(bar: Any, before: int, done: int) -> None:
    bar.update(before + done - bar.n)


def _special_stop(special: Mapping[str, int], ids: Sequence[int], until: Sequence[str]) -> int:
    """Returns how many tokens stand before a special token that is a stop string.

    Decoding leaves special tokens out, so `cut` would not see them. The last token is kept: it is
    the end of sequence that a response counts.
    """
    stops = {special[stop] for stop in until if stop in special}
    places = (place for place, token in enumerate(ids[:-1]) if token in stops)
    return next(places, len(ids))


def _length_of(tokenizer: Any, ids: Sequence[int], text: str) -> int:
    """Returns how many of the first tokens are needed for the first part of their text.

    A character may have several tokens, and fewer of them are another text.
    """
    return bisect.bisect_left(
        range(len(ids)),
        True,
        key=lambda count: tokenizer.decode(ids[:count], skip_special_tokens=True).startswith(text),
    )
