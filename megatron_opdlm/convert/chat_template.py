"""The chat template of a tokenizer directory: reading, rendering and replacing it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from megatron_opdlm.convert.tokenizer import has_tokenizer
from megatron_opdlm.convert.tokenizer_files import TOKENIZER_CONFIG, TokenizerFiles
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import write_json

TEMPLATE_FILE = "chat_template.jinja"
NO_CHAT_TEMPLATE = (
    "tokenizer has no chat_template; prompts are rendered with it; use an instruct model, or give "
    "it one: opdlm convert import --chat-template FILE"
)
TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError),
    *(SyntaxError, TypeError, ValueError),
)
"""Errors that rendering may raise: a template may apply operators and filters to any value."""
_PROBE = "probe"
"""The user's message when a template is tested."""
_ANSWER = "rejoinder"
"""The assistant's message when a template is tested."""


def read_chat_template(files: TokenizerFiles) -> str | None:
    """Returns the template that renders prompts; None if there is none.

    Of several named templates it is the one with the name `default`, as in transformers. Templates
    in `additional_chat_templates` are additions to a default one; an import does not copy them.

    Args:
        files: tokenizer files of a Hugging Face directory or a tokenizer folder.

    Raises:
        ConversionError: tokenizer_config.json is malformed, or the template is not a text.
    """
    if (files.folder / TEMPLATE_FILE).is_file():
        return _read_text(files.folder / TEMPLATE_FILE)
    found: Any = files.config.get("chat_template")
    if isinstance(found, list):
        named = (item for item in found if isinstance(item, dict) and item.get("name") == "default")
        found = next(named, {}).get("template")
    if not isinstance(found, str | None):
        raise ConversionError(f"{files.folder / TOKENIZER_CONFIG}: chat_template must be text")
    return found


def template_renderer(template: str, files: TokenizerFiles) -> Any:
    """Returns a transformers tokenizer without a vocabulary, for rendering only.

    Its `apply_chat_template` renders like that of the real tokenizer, with transformers' sandbox,
    functions and tags. It takes almost no time to make.

    Args:
        template: the chat template.
        files: tokenizer files, with the named tokens that the template may write.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **files.named)
    tokenizer.chat_template = template
    return tokenizer


def end_of_turn(files: TokenizerFiles) -> str | None:
    """Returns the special token that closes the assistant's turn in the rendered chat template.

    It is the special token directly after the assistant's message, apart from spaces. Such a token
    ends a response, whatever its name: nothing after it belongs to the assistant.

    Returns:
        Text of the token. It is None if there is no template, if the template refuses such a
        conversation, or if it closes the turn with ordinary text.
    """
    template = read_chat_template(files)
    if template is None:
        return None
    turns = [("user", _PROBE), ("assistant", _ANSWER)]
    try:
        rendered = _render(template, files, turns, add_generation_prompt=False)
    except TEMPLATE_ERRORS:  # the error is reported when prompts are rendered
        return None
    _, words, rest = rendered.rpartition(_ANSWER)
    rest = rest.lstrip()
    found = [text for text in files.special if words and text and rest.startswith(text)]
    return max(found, key=len, default=None)


def set_chat_template(directory: Path, template_file: Path) -> None:
    """Makes a Jinja file the chat template of a copied tokenizer.

    Args:
        directory: folder of tokenizer files, which are changed in place.
        template_file: file of the template.

    Raises:
        ConversionError: there is no tokenizer or no such file, the file is not text or not a Jinja
            template, or the template fails for a user's message or leaves it out.
    """
    if not has_tokenizer(directory):
        raise ConversionError(f"{directory}: there is no tokenizer to give a chat template")
    files = TokenizerFiles(directory)
    try:
        text = _read_text(template_file)
        rendered = _render(text, files, [("user", _PROBE)], add_generation_prompt=True)
    except FileNotFoundError:
        raise ConversionError(f"{template_file}: file not found") from None
    except jinja2.TemplateSyntaxError as error:
        raise ConversionError(f"{template_file}:{error.lineno}: {error.message}") from None
    except ConversionError:
        raise
    except TEMPLATE_ERRORS as error:
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
    write_json(directory / TOKENIZER_CONFIG, files.config | {"chat_template": text})


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _render(
    template: str,
    files: TokenizerFiles,
    turns: Sequence[tuple[str, str]],
    *,
    add_generation_prompt: bool,
) -> str:
    rendered: str = template_renderer(template, files).apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        add_generation_prompt=add_generation_prompt,
        enable_thinking=False,
        tokenize=False,
    )
    return rendered
