"""The chat template of a tokenizer directory: whether it has one, and giving it another."""

from pathlib import Path
from typing import Any

import jinja2

from megatron_opdlm.convert.tokenizer import has_tokenizer
from megatron_opdlm.convert.tokenizer_files import (
    TOKENIZER_CONFIG,
    read_tokenizer_config,
    special_tokens,
)
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import write_json

TEMPLATE_FILE = "chat_template.jinja"
NO_CHAT_TEMPLATE = (
    "tokenizer has no chat_template; prompts are rendered with it; use an instruct model, or give "
    "it one: opdlm convert import --chat-template FILE"
)
_PROBE = "probe"
"""What the user says in a trial of a template."""
_FAILURES = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError),
    *(SyntaxError, TypeError, ValueError),
)
"""Of a template, which applies operators and filters to what it likes."""


def has_chat_template(directory: Path) -> bool:
    """Whether prompts can be rendered with the tokenizer files of a directory.

    Of several named templates the one called `default` counts, as for transformers; those in
    `additional_chat_templates` stand beside a default one, and an import leaves them behind.

    Args:
        directory: Hugging Face directory or tokenizer folder.

    Raises:
        ConversionError: a malformed tokenizer_config.json.
    """
    if (directory / TEMPLATE_FILE).is_file():
        return True
    found: Any = read_tokenizer_config(directory).get("chat_template")
    if isinstance(found, list):
        return any(isinstance(item, dict) and item.get("name") == "default" for item in found)
    return found is not None


def set_chat_template(directory: Path, template_file: Path) -> None:
    """Make a Jinja file the chat template of a copied tokenizer.

    Args:
        directory: tokenizer files, changed in place.
        template_file: the template.

    Raises:
        ConversionError: no tokenizer, no such file, not text, not a Jinja template, or one that
            fails for a user's message or leaves it out.
    """
    if not has_tokenizer(directory):
        raise ConversionError(f"{directory}: there is no tokenizer to give a chat template")
    try:
        text = template_file.read_text(encoding="utf-8")
        rendered = _render(text, special_tokens(directory))
    except FileNotFoundError:
        raise ConversionError(f"{template_file}: file not found") from None
    except UnicodeDecodeError as error:
        raise ConversionError(f"{template_file}: not UTF-8 text (byte {error.start})") from None
    except jinja2.TemplateSyntaxError as error:
        raise ConversionError(f"{template_file}:{error.lineno}: {error.message}") from None
    except _FAILURES as error:
        raise ConversionError(
            f"{template_file}: fails for a conversation of one user message: {error}"
        ) from None
    if _PROBE not in rendered:
        raise ConversionError(
            f"{template_file}: the template leaves out what the user says: a message {_PROBE!r} "
            f"becomes {rendered[:80]!r}; it must write messages[i].content"
        )
    (directory / TEMPLATE_FILE).write_text(text, encoding="utf-8")
    # transformers before 4.43 and some engines read the key, later ones prefer the file
    write_json(
        directory / TOKENIZER_CONFIG, read_tokenizer_config(directory) | {"chat_template": text}
    )


def _render(template: str, named: dict[str, str]) -> str:
    """A prompt of one user message, by transformers: its sandbox, functions and tags."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **named)
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": _PROBE}],
        chat_template=template,
        add_generation_prompt=True,
        enable_thinking=False,
        tokenize=False,
    )
    return rendered
