"""Finds prompts that a chat template refuses, and names them in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from megatron_opdlm.convert.chat_template import TEMPLATE_ERRORS, template_renderer
from megatron_opdlm.convert.model_source import ModelSource

if TYPE_CHECKING:
    from megatron_opdlm.responses.prompts import Prompt


def check_rendering(
    prompts: Sequence[Prompt], source: ModelSource, *, enable_thinking: bool
) -> None:
    """Renders prompts as training and decoding do, with nothing but the tokenizer's files.

    So a bad prompt is found before an import that may take minutes. A prompt takes a tenth of a
    millisecond.

    Args:
        prompts: prompts from `load_prompts`.
        source: source of the student.
        enable_thinking: passed to the template.

    Raises:
        ValueError: there is no template, or it refuses a prompt; the message names the prompt's
            file and line.
    """
    template = source.require_chat_template()
    if template is not None and source.tokenizer is not None:
        renderer = template_renderer(template, source.tokenizer)
        require_rendering(prompts, renderer, enable_thinking=enable_thinking)


def require_rendering(prompts: Sequence[Prompt], tokenizer: Any, *, enable_thinking: bool) -> None:
    """Refuses the first prompt that cannot be rendered.

    Args:
        prompts: prompts from `load_prompts`.
        tokenizer: a transformers tokenizer with a chat template.
        enable_thinking: passed to the template.

    Raises:
        ValueError: the template refuses a prompt; the message has the prompt's file and line, and
            the error text of the template.
    """
    for prompt in prompts:
        try:
            tokenizer.apply_chat_template(
                prompt.messages,
                add_generation_prompt=True,
                enable_thinking=enable_thinking,
                tokenize=False,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"the student's chat template, line {error.lineno}: {_words(error)}; mend it, or "
                "give the student another: opdlm convert import --chat-template FILE"
            ) from None
        except TEMPLATE_ERRORS as error:
            raise ValueError(
                f"{prompt.where}: the student's chat template refuses this prompt: "
                f"{_words(error)}; change its messages, or give the student another template: "
                "opdlm convert import --chat-template FILE"
            ) from None


def _words(error: Exception) -> str:
    """Returns the text of a template's error, in one line."""
    text = " ".join(str(error).split())
    is_plain = isinstance(error, jinja2.TemplateError) and text
    return text if is_plain else f"{type(error).__name__} {text}".strip()
