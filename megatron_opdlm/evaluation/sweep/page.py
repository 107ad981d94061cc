"""The page of a sweep's report: one HTML file without other files.

Text from models and data is escaped. The page has no script.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_opdlm.evaluation.html import STYLE, image_html, table_html
from megatron_opdlm.evaluation.sweep.figures import Figure
from megatron_opdlm.evaluation.sweep.samples import LONGEST, Sample
from megatron_opdlm.evaluation.sweep.tables import Table


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows."""

    title: str
    facts: Sequence[str]
    """Sentences under the title."""
    tables: Sequence[Table]
    figures: Sequence[Figure]
    folder: Path
    """Folder of the figures' files."""
    samples: Sequence[Sample]

    def render(self) -> str:
        """Returns the page."""
        sections = [_section(f"table-{t.name}", t.title, _table(t)) for t in self.tables]
        if self.figures:
            figures = "".join(map(self._figure, self.figures))
            sections.append(_section("figures", "Figures", f'<div class="plots">{figures}</div>'))
        if self.samples:
            samples = "".join(map(_sample, self.samples))
            sections.append(_section("samples", "Responses side by side", samples))
        return "".join([
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{html.escape(self.title)}</title>\n<style>{STYLE}{_MORE_STYLE}</style>\n",
            f"</head>\n<body>\n<main>\n<h1>{html.escape(self.title)}</h1>\n",
            "".join(f"<p>{html.escape(fact)}</p>\n" for fact in self.facts),
            self._contents(),
            "".join(sections),
            "</main>\n</body>\n</html>\n",
        ])  # fmt: skip

    def _contents(self) -> str:
        links = [(f"table-{table.name}", table.title) for table in self.tables]
        links += [("figures", "Figures")] if self.figures else []
        links += [("samples", "Responses side by side")] if self.samples else []
        items = "".join(
            f'<li><a href="#{html.escape(name)}">{html.escape(title)}</a></li>'
            for name, title in links
        )
        return f'<nav aria-label="contents"><ul>{items}</ul></nav>\n'

    def _figure(self, figure: Figure) -> str:
        image = image_html(self.folder / f"{figure.name}.svg", figure.caption)
        caption = f"<figcaption>{html.escape(figure.caption)}</figcaption>"
        return f'<figure><div class="scroll" tabindex="0">{image}</div>{caption}</figure>\n'


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{html.escape(name)}"><h2>{html.escape(title)}</h2>\n{content}</section>\n'


def _table(table: Table) -> str:
    cells = table_html(table.header, table.rows)
    scrolled = f'<div class="scroll left-{table.left}" tabindex="0">{cells}</div>'
    return f'{scrolled}\n<p class="note">{html.escape(table.note)}</p>\n'


def _sample(sample: Sample) -> str:
    cards = []
    for name, line in sample.responses:
        verdict = "correct" if line["correct"] else "wrong"
        mark = "\u2713" if line["correct"] else "\u2717"
        more = "" if line["prompt_fits"] else ", the prompt is too long to decode"
        more += "" if line["error"] is None else f", not graded: {line['error']}"
        counts = f"{_count(line['num_tokens'])} tokens, {_count(line['num_passes'])} passes"
        cards.append(
            f'<div class="card"><h4>{html.escape(name)}</h4>'
            f'<p class="said">{html.escape(_short(line["response"]))}</p>'
            f'<p class="verdict {verdict}">{mark} {verdict}{html.escape(more)}</p>'
            f'<p class="note">{counts}</p></div>'
        )
    return (
        f"<h3>{html.escape(sample.task)}</h3>"
        f'<p class="said">{html.escape(_short(sample.question))}</p>'
        f'<p class="note">reference: {html.escape(_short(sample.reference))}</p>'
        f'<div class="cards">{"".join(cards)}</div>\n'
    )


def _short(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} \u2026 ({len(text) - LONGEST:,} more characters)"


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


_MORE_STYLE = """
main { max-width: 76rem; }
h3 { font-size: 1rem; margin: 2rem 0 .25rem; } h4 { font-size: .85rem; margin: 0 0 .5rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; list-style: none; }
a { color: var(--link); }
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--page) 1.5rem, transparent)
    local 0 0 / 3rem 100%, linear-gradient(to left, var(--page) 1.5rem, transparent) local 100% 0 /
    3rem 100%, linear-gradient(to right, var(--line), transparent) 0 0 / 1rem 100%,
    linear-gradient(to left, var(--line), transparent) 100% 0 / 1rem 100%;
  background-repeat: no-repeat; }
.scroll table { width: auto; min-width: 60%; }
.scroll th, .scroll td { white-space: nowrap; }
.left-1 :is(th, td):first-child, .left-2 :is(th, td):nth-child(-n+2),
.left-3 :is(th, td):nth-child(-n+3) { text-align: left; white-space: normal;
  overflow-wrap: break-word; }
.note { color: var(--soft); font-size: .85rem; margin: .5rem 0 0; max-width: 60rem; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.plots img { background: #ffffff; }
figure { margin: 0; min-width: 0; } figcaption { color: var(--soft); font-size: .85rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr));
  gap: .75rem; margin-top: .75rem; }
.card { min-width: 0; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-height: 24rem;
  overflow-y: auto; }
.verdict { font-weight: 600; margin: .75rem 0 0; }
.correct { color: var(--good); } .wrong { color: var(--bad); }
:root { --link: #1d4ed8; color-scheme: light dark; }
@media (max-width: 40rem) {
  main { padding: 1rem .75rem 3rem; }
  .scroll th, .scroll td { padding: .35rem .4rem; font-size: .85rem; }
  .scroll th { white-space: normal; }
  .plots img { min-width: 32rem; }
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --page: #111827; --card: #1f2937;
    --good: #4ade80; --bad: #f87171; --link: #93c5fd; }
}
"""
