"""The tokens that end a response, from all files of a model.

config.json and generation_config.json name ids, the tokenizer names an eos token, and the chat
template closes the assistant's turn with a token. If these differ and only one is used, the model
may write an end that is not recognised, and every response runs to its limit. After each of these
tokens there is nothing of the response. So all of them end a response. A pad token that is also an
eos does no harm, because no response continues after its padding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_opdlm.convert.chat_template import end_of_turn
from megatron_opdlm.convert.tokenizer_files import TOKENIZER_CONFIG, TokenizerFiles
from megatron_opdlm.files.errors import ConversionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ResponseEnds:
    """The ids that end a response, and their sources."""

    declared: tuple[int, ...]
    """Ids in config.json and generation_config.json, or in a checkpoint's description."""
    found: dict[int, str]
    """Sources of other ids, by id."""

    @classmethod
    def read(cls, declared: Sequence[int], files: TokenizerFiles | None) -> ResponseEnds:
        """Compares declared ids with a tokenizer.

        Args:
            declared: ids in the model's description.
            files: tokenizer files; None if there is no tokenizer.
        """
        found: dict[int, str] = {}
        if files is not None:
            for text, who in (
                (files.named.get("eos_token"), f"eos_token of {TOKENIZER_CONFIG}"),
                (end_of_turn(files), "the end of the assistant's turn in the chat template"),
            ):
                token_id = None if text is None else files.ids.get(text)
                if token_id is not None and token_id not in (*declared, *found):
                    found[token_id] = f"{text} (id {token_id}), {who}"
        return cls(declared=tuple(declared), found=found)

    @property
    def ids(self) -> tuple[int, ...]:
        """All ids, the declared ones first."""
        return (*self.declared, *self.found)

    def require(self, path: str | Path) -> None:
        """Refuses a student without a token that ends a response.

        Args:
            path: path of the model, for the message.

        Raises:
            ConversionError: there is no such id.
        """
        if not self.ids:
            raise ConversionError(
                f"{path}: no token ends a response, so every one would run to its limit; name one: "
                "eos_token_id in generation_config.json, before an import, or eos_token in "
                f"{TOKENIZER_CONFIG}"
            )

    def warn(self, path: str | Path) -> None:
        """Logs the ids that the description lacks.

        Args:
            path: path of the model.
        """
        if self.found:
            logger.warning(
                "%s: responses end at ids %s by its eos_token_id, and also at %s; add what is "
                "missing to eos_token_id in its generation_config.json",
                path, list(self.declared), "; ".join(self.found.values()),
            )  # fmt: skip
