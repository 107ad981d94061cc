"""Responses of teacher and student side by side, as Markdown."""

from __future__ import annotations

import re

from measurement import Measured

SHOWN = 12
MOST_CHARACTERS = 400
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$])")


def samples(measured: Measured) -> str:
    """Returns the greedy responses to the first prompts, with every writer's below the other's."""
    dynamic = measured.after.dynamic
    writers = [
        ("teacher", measured.after, "autoregressive"),
        ("student before, static", measured.before, "static"),
        ("student after, static", measured.after, "static"),
    ]
    if dynamic is not None:
        writers.append((f"student after, {dynamic['setting']}", measured.after, dynamic["setting"]))
    parts = []
    for prompt in measured.after.values["prompts"][:SHOWN]:
        lines = [f"**{plain(prompt)}**", ""]
        for name, measurement, setting in writers:
            text = measurement.text_of(setting, prompt)
            if text is not None:
                lines.append(f"- {name}: {plain(text) or '(nothing)'}")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def plain(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line; the end of a long text is cut."""
    cut = text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " ..."
    one_line = " \u23ce ".join(part.strip() for part in cut.strip().splitlines())
    return _SPECIAL.sub(r"\\\1", one_line)
