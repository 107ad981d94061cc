"""The chat template of a copied tokenizer."""

from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from megatron_opdlm.convert.errors import ConversionError
from megatron_opdlm.convert.files import write_json
from megatron_opdlm.convert.tokenizer import (
    TOKENIZER_CONFIG,
    has_tokenizer,
    read_tokenizer_config,
)

TEMPLATE_FILE = "chat_template.jinja"


class _Generation(Extension):
    """`{% generation %}`, by which templates of transformers mark what the assistant said."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Accepts the block; it is transformers that renders it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def has_chat_template(directory: Path) -> bool:
    """Whether the tokenizer of a directory has a chat template, if there is a tokenizer at all.

    Raises:
        ConversionError: malformed tokenizer_config.json.
    """
    template = read_tokenizer_config(directory).get("chat_template")
    return bool(template) or (directory / TEMPLATE_FILE).is_file()


def set_chat_template(directory: Path, template_file: Path) -> None:
    """Make a Jinja file the chat template of a copied tokenizer.

    Args:
        directory: tokenizer files, changed in place.
        template_file: the template.

    Raises:
        ConversionError: no tokenizer, no such file, not text, or not a Jinja template.
    """
    if not has_tokenizer(directory):
        raise ConversionError(f"{directory}: there is no tokenizer to give a chat template")
    try:
        text = template_file.read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(text)
    except FileNotFoundError:
        raise ConversionError(f"{template_file}: file not found") from None
    except UnicodeDecodeError as error:
        raise ConversionError(f"{template_file}: not UTF-8 text (byte {error.start})") from None
    except jinja2.TemplateSyntaxError as error:
        raise ConversionError(f"{template_file}:{error.lineno}: {error.message}") from None
    (directory / TEMPLATE_FILE).write_text(text, encoding="utf-8")
    # transformers before 4.43 and some engines read the key, later ones prefer the file
    write_json(
        directory / TOKENIZER_CONFIG, read_tokenizer_config(directory) | {"chat_template": text}
    )
