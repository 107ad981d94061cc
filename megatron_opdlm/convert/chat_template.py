"""The chat template of a tokenizer directory: what it is, how it is rendered, giving it another."""

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
"""What rendering may raise: a template applies operators and filters to what it likes."""
_PROBE = "probe"
"""What the user says in a trial of a template."""
_ANSWER = "rejoinder"
"""What the assistant says in it."""


def read_chat_template(files: TokenizerFiles) -> str | None:
    """The template that prompts are rendered with; None if there is none.

    Of several named templates the one called `default` counts, as for transformers; those in
    `additional_chat_templates` stand beside a default one, and an import leaves them behind.

    Args:
        files: of a Hugging Face directory or a tokenizer folder.

    Raises:
        ConversionError: a malformed tokenizer_config.json, or a template that is no text.
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
    """A transformers tokenizer without a vocabulary, whose `apply_chat_template` renders as that of
    the real one does: with transformers' sandbox, functions and tags. It takes no time to make.

    Args:
        template: the chat template.
        files: whose named tokens the template may write.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **files.named)
    tokenizer.chat_template = template
    return tokenizer


def end_of_turn(files: TokenizerFiles) -> str | None:
    """The special token that closes the assistant's turn in the rendered chat template.

    It is the one that directly follows the assistant's words, spaces apart. So what is found ends
    a response whatever it is called: nothing behind it is the assistant's.

    Returns:
        Its text; None without a template, for one that takes no such conversation, and for one
        that closes the turn with ordinary text.
    """
    template = read_chat_template(files)
    if template is None:
        return None
    turns = [("user", _PROBE), ("assistant", _ANSWER)]
    try:
        rendered = _render(template, files, turns, add_generation_prompt=False)
    except TEMPLATE_ERRORS:  # said where prompts are rendered
        return None
    _, words, rest = rendered.rpartition(_ANSWER)
    rest = rest.lstrip()
    found = [text for text in files.special if words and text and rest.startswith(text)]
    return max(found, key=len, default=None)


def set_chat_template(directory: Path, template_file: Path) -> None:
    """Makes a Jinja file the chat template of a copied tokenizer.

    Args:
        directory: tokenizer files, changed in place.
        template_file: the template.

    Raises:
        ConversionError: no tokenizer, no such file, not text, not a Jinja template, or one that
            fails for a user's message or leaves it out.
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
