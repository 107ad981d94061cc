"""The page of a report: one HTML file without other files, with a player of denoising steps.

Text from models and data enters the page in two ways only: escaped in HTML, or as JSON that the
script shows with `textContent`. So no response can add markup to the page.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def render_page(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    facts: Sequence[tuple[str, str]],
    plots: Sequence[Path],
    examples: Sequence[Mapping[str, Any]],
) -> str:
    """Returns the page.

    Args:
        title: heading of the page.
        columns: headings of the table's columns.
        rows: cells of the table, row by row.
        facts: (name, value) pairs under the table.
        plots: PNG files to include.
        examples: decodings to replay, see `examples.example_record`; each has a key "setting", and
            None as `correct` if there is no right answer.
    """
    facts_html = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts
    )
    parts = {
        "TITLE": html.escape(title),
        "STYLE": STYLE,
        "TABLE": table_html(columns, rows),
        "FACTS": facts_html,
        "PLAYER": _PLAYER if examples else "",
        "PLOTS": "".join(map(image_html, plots)),
        "DATA": script_json(list(examples)),
        "SCRIPT": _SCRIPT,
    }
    # All keys are replaced in one pass, because a response may contain text like "@TITLE@".
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], _PAGE)


def script_json(value: Any) -> str:
    """Returns JSON that is safe inside a <script> element."""
    text = json.dumps(value, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table_html(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of escaped text."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def image_html(path: Path, name: str | None = None) -> str:
    """Returns an image that is part of the page.

    Args:
        path: PNG or SVG file. A script in an SVG does not run, because it is shown as an image.
        name: text for readers who do not see it; None for the file's name.
    """
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    alt = html.escape(path.stem.replace("_", " ") if name is None else name)
    kind = {".svg": "image/svg+xml", ".png": "image/png"}[path.suffix]
    return f'<img alt="{alt}" src="data:{kind};base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>@STYLE@</style>
</head>
<body>
<main>
<h1>@TITLE@</h1>
@TABLE@
<dl>@FACTS@</dl>
@PLAYER@
<h2>Training</h2>
<div class="plots">@PLOTS@</div>
</main>
<script type="application/json" id="data">@DATA@</script>
<script>@SCRIPT@</script>
</body>
</html>
"""

STYLE = """
:root { --ink: #111827; --soft: #6b7280; --line: #e5e7eb; --page: #ffffff; --card: #f9fafb;
  --good: #15803d; --bad: #b91c1c; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 1.25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .45rem .75rem; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; margin: 1rem 0 0; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.plots img { width: 100%; border: 1px solid var(--line); border-radius: .5rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  padding: 1rem 1.25rem; }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: .75rem; }
select, button { font: inherit; padding: .3rem .7rem; border: 1px solid var(--line);
  border-radius: .4rem; background: var(--page); color: inherit; }
select { flex: 1 1 100%; min-width: 0; } button { cursor: pointer; min-width: 5.5rem; }
input[type=range] { flex: 1 1 12rem; }
#count { color: var(--soft); font-size: .85rem; font-variant-numeric: tabular-nums;
  min-width: 16rem; }
#question { margin: 1rem 0 .75rem; }
#stream { display: flex; flex-wrap: wrap; gap: .4rem; min-height: 5rem; align-content: flex-start; }
.block { display: flex; gap: 2px; padding: 3px; border: 1px solid var(--line);
  border-radius: .4rem; background: var(--page); }
.block.later { visibility: hidden; }
.cell { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .95rem;
  padding: .2rem .3rem; min-width: 1.9rem; min-height: 2rem; text-align: center;
  border-radius: .25rem; white-space: pre; }
.cell.prompt { color: var(--soft); } .cell.after { opacity: .35; }
.cell.mask { background: repeating-linear-gradient(45deg, #d1d5db 0 4px, #e5e7eb 4px 8px); }
.cell.new { outline: 2px solid var(--ink); }
#legend { display: flex; flex-wrap: wrap; gap: .4rem 1rem; margin-top: 1rem; font-size: .8rem;
  color: var(--soft); align-items: center; }
#legend span.swatch { display: inline-block; width: .9rem; height: .9rem; border-radius: .2rem;
  margin-right: .35rem; vertical-align: -.1rem; }
#verdict { margin-top: 1rem; font-weight: 600; }
#verdict.good { color: var(--good); } #verdict.bad { color: var(--bad); }
"""

_PLAYER = """<h2>How a response is decoded</h2>
<div class="card">
<div class="controls">
<select id="pick" aria-label="question"></select>
<button id="play" type="button">Play</button>
<input id="step" type="range" min="0" value="0" aria-label="denoising pass">
<span id="count"></span>
</div>
<p id="question"></p>
<div id="stream"></div>
<div id="legend"></div>
<div id="verdict"></div>
</div>
"""

_SCRIPT = """
(() => {
  const data = JSON.parse(document.getElementById('data').textContent);
  if (!data.length) return;
  const at = (id) => document.getElementById(id);
  const make = (parent, tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  };
  const color = (step, size) => {
    const t = size > 1 ? step / (size - 1) : 0;
    return `hsl(${Math.round(145 + 130 * t)} 70% ${Math.round(82 - 8 * t)}%)`;
  };
  const shown = (text) => text.replace(/\\n/g, '\\u23ce').replace(/^ | $/g, '\\u00b7');
  let example, cells, blocks, timer = null;

  data.forEach((item, index) => {
    // A response to an open prompt is neither: its `correct` is null.
    const mark = item.correct === null ? '' : item.correct ? '\\u2713 ' : '\\u2717 ';
    make(at('pick'), 'option', '', `${mark}${item.setting}: ${item.question}`).value = index;
  });

  function load(index) {
    example = data[index];
    const size = example.block_size, tail = example.prompt_tail.length;
    at('question').textContent = example.question;
    at('stream').replaceChildren();
    cells = []; blocks = [];
    const texts = example.prompt_tail.concat(example.tokens);
    texts.forEach((text, place) => {
      if (place % size === 0) {
        blocks.push({node: make(at('stream'), 'div', 'block'), first: Infinity});
      }
      const block = blocks[blocks.length - 1];
      const index = place - tail;
      if (index < 0) { make(block.node, 'span', 'cell prompt', shown(text)); return; }
      const node = make(block.node, 'span', 'cell');
      block.first = Math.min(block.first, example.passes_at[index]);
      cells.push({node, text: shown(text), pass: example.passes_at[index],
        step: example.commit_steps[index], after: index >= example.num_tokens});
    });
    at('legend').replaceChildren();
    for (let step = 0; step < size; step++) {
      const entry = make(at('legend'), 'span', '');
      make(entry, 'span', 'swatch').style.background = color(step, size);
      entry.appendChild(document.createTextNode(`committed at step ${step + 1} of its block`));
    }
    make(at('legend'), 'span', '', 'faint: after the end of the response');
    at('step').max = example.passes;
    show(example.passes);
  }

  function show(pass) {
    at('step').value = pass;
    // A block begins, all masks, when the one before it is finished.
    blocks.forEach((block) => block.node.classList.toggle('later', block.first > pass));
    let committed = 0;
    cells.forEach((cell) => {
      const visible = cell.pass < pass;
      if (visible && !cell.after) committed++;
      cell.node.classList.toggle('mask', !visible);
      cell.node.classList.toggle('after', visible && cell.after);
      cell.node.classList.toggle('new', cell.pass === pass - 1);
      cell.node.textContent = visible ? cell.text : '';
      cell.node.style.background = visible ? color(cell.step, example.block_size) : '';
    });
    const speed = pass ? (committed / pass).toFixed(2) : '0.00';
    at('count').textContent =
      `pass ${pass} of ${example.passes}, ${committed} tokens, ${speed} per pass`;
    const judged = pass === example.passes && example.correct !== null;
    at('verdict').className = example.correct ? 'good' : 'bad';
    at('verdict').textContent = !judged ? '' : example.correct
      ? `Correct: the answer is ${example.reference}.`
      : `Wrong: the answer is ${example.reference}.`;
  }

  function stop() { clearInterval(timer); timer = null; at('play').textContent = 'Play'; }

  at('pick').addEventListener('change', () => { stop(); load(Number(at('pick').value)); });
  at('step').addEventListener('input', () => { stop(); show(Number(at('step').value)); });
  at('play').addEventListener('click', () => {
    if (timer !== null) { stop(); return; }
    let pass = Number(at('step').value) >= example.passes ? 0 : Number(at('step').value);
    show(pass);
    at('play').textContent = 'Pause';
    timer = setInterval(() => { pass++; show(pass); if (pass >= example.passes) stop(); }, 450);
  });
  load(0);
})();
"""
