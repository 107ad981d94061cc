"""Draws docs/images/opdlm.svg, the picture of README: a real trajectory, and one training step.

    python tools/draw_picture.py
    python tools/draw_picture.py --results runs/quickstart/after.json --example heldout-0-1

The second form first takes another trajectory, from what `opdlm eval --json` wrote, into
docs/images/trajectory.json. The same trajectory gives the same bytes.
"""

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH, HEIGHT = 1000, 392
CELL, ROW, TOP = 22, 29, 96  # height of a cell, distance of rows, first row
STYLE = """
  text { font: 12px ui-sans-serif, system-ui, Helvetica, Arial, sans-serif; fill: #57606a; }
  .title { font-size: 15px; font-weight: 600; fill: #24292f; }
  .token { font: 11px ui-monospace, Menlo, Consolas, monospace; }
  .token, .label, .sub { text-anchor: middle; fill: #1f2328; }
  .new { fill: #ffffff; font-weight: 600; }
  .label { font-weight: 600; } .sub { font-size: 11px; fill: #57606a; }
  .step0 { fill: #0b6e99; } .step1 { fill: #b35900; } .step2 { fill: #a02c5a; }
  .step3 { fill: #5e3c99; }
  .old { fill: #d0d7de; } .mask { fill: none; stroke: #8c959f; stroke-dasharray: 2 2; }
  .box { fill: #f6f8fa; stroke: #8c959f; } .live { fill: #ddf4ff; stroke: #0b6e99; }
  .frozen { fill: #eaeef2; stroke: #57606a; stroke-dasharray: 5 3; }
  .noisy { fill: #fff1e5; stroke: #b35900; }
  .line { fill: none; stroke: #8c959f; stroke-width: 1.5; marker-end: url(#head); }
  .head { fill: #8c959f; }
  @media (prefers-color-scheme: dark) { text { fill: #9198a1; } .title { fill: #f0f6fc; } }
"""


def text(x: float, y: float, content: str, kind: str = "") -> str:
    """One line of text."""
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{kind}>{escape(content)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle with round corners."""
    size = f'width="{width:g}" height="{height:g}"'
    return f'<rect x="{x:g}" y="{y:g}" {size} rx="4" class="{kind}"/>'


def shown(token: str) -> str:
    """What stands in a token's cell."""
    return "end" if token.startswith("<|") else token.strip() or "␣"


def trajectory(record: dict[str, Any]) -> list[str]:
    """The denoising of a response: a line per forward pass.

    A pass works on one block. What it makes tokens is in the colour of the denoising step of the
    block; other positions of the block are masked; blocks to come are not there yet.
    """
    tokens, steps, size = record["tokens"], record["commit_steps"], record["block_size"]
    widths = [11 + 7 * len(shown(token)) for token in tokens]
    left = [48 + sum(widths[:i]) + 2 * i + 6 * (i // size) for i in range(len(tokens))]
    blocks = [range(start, start + size) for start in range(0, len(tokens), size)]
    passes = [(b, step) for b in blocks for step in range(max(steps[i] for i in b) + 1)]
    rate = f"{len(tokens)} tokens in {len(passes)} forward passes"
    parts = [
        text(20, 28, "Decoding: several tokens per forward pass", "title"),
        text(20, 50, record["question"]),
        text(20, 68, f"{rate}; an autoregressive model takes {len(tokens)}."),
    ]
    for number, (block, step) in enumerate(passes):
        y = TOP + ROW * number
        parts.append(text(20, y + 15, str(number + 1)))
        for i in range(block.stop):
            middle = left[i] + widths[i] / 2
            is_open = i in block and steps[i] >= step
            kind = f"step{step}" if is_open and steps[i] == step else "mask" if is_open else "old"
            parts.append(rect(left[i], y, widths[i], CELL, kind))
            if kind != "mask":
                colour = "token new" if kind != "old" else "token"
                parts.append(text(middle, y + 15, shown(tokens[i]), colour))
    return parts + legend(TOP + ROW * len(passes) + 22, max(steps) + 1)


def legend(y: float, num_steps: int) -> list[str]:
    """What the colours of cells mean."""
    names = ["made at a block's step 1", *(f"step {step + 1}" for step in range(1, num_steps))]
    kinds = [(f"step{step}", name) for step, name in enumerate(names)]
    parts, x = [], 20.0
    for kind, name in [*kinds, ("mask", "masked"), ("old", "earlier pass")]:
        parts += [rect(x, y - 11, 14, 14, kind), text(x + 19, y, name)]
        x += 36 + 6.4 * len(name)
    return parts


def box(x: float, y: float, width: float, kind: str, label: str, sub: str) -> list[str]:
    """A part of the training step."""
    middle = x + width / 2
    return [
        rect(x, y, width, 42, kind),
        text(middle, y + 18, label, "label"),
        text(middle, y + 34, sub, "sub"),
    ]


def line(path: str) -> str:
    """An arrow."""
    return f'<path d="{path}" class="line"/>'


def training_step() -> list[str]:
    """From prompts to AdamW."""
    x, wide, narrow = 590.0, 390.0, 185.0
    right = x + wide - narrow
    parts = [text(x, 28, "One training step", "title")]
    parts += box(x, 48, 120, "box", "prompts", "nothing else")
    parts += box(x + 145, 48, 245, "live", "rollout", "the student's live weights, KV cache")
    parts += box(x, 116, wide, "box", "trajectories", "token ids, and the step that made each one")
    parts += box(x, 184, narrow, "box", "clean tokens", "what was decoded")
    parts += box(right, 184, narrow, "noisy", "noisy states", "what it looked like before")
    parts += box(x, 252, narrow, "frozen", "frozen teacher", "causal; row i - 1 is about i")
    parts += box(right, 252, narrow, "live", "student", "reads [clean | noisy] blocks")
    parts += box(x, 330, 245, "box", "forward KL", "at masked tokens, whole vocabulary")
    parts += box(x + 270, 330, 120, "box", "AdamW", "new live weights")
    parts += [
        line(f"M {x + 120:g} 69 H {x + 142:g}"),
        line(f"M {x + 267:g} 90 V 113"),
        line(f"M {x + 92:g} 158 V 181"),
        line(f"M {right + 92:g} 158 V 181"),
        line(f"M {x + 92:g} 226 V 249"),
        line(f"M {right + 92:g} 226 V 249"),
        line(f"M {x + narrow:g} 216 C {x + 200:g} 222 {x + 195:g} 250 {right - 3:g} 262"),
        line(f"M {x + 92:g} 294 V 327"),
        line(f"M {right + 20:g} 294 V 327"),
        line(f"M {x + 245:g} 351 H {x + 267:g}"),
        line(f"M {x + wide:g} 351 H {x + wide + 12:g} V 69 H {x + wide + 3:g}"),
    ]
    return parts


def draw(record: dict[str, Any]) -> str:
    """Returns the picture as SVG text."""
    head = '<path d="M 0 0 L 8 4 L 0 8 z" class="head"/>'
    size = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        "<title>A denoising trajectory, and one training step</title>",
        f"<style>{STYLE}</style>",
        f'<defs><marker id="head" {size}>{head}</marker></defs>',
        *trajectory(record),
        *training_step(),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def take(results: Path, name: str) -> dict[str, Any]:
    """Returns the trajectory of an example under dynamic decoding, from `opdlm eval --json`."""
    found = [
        example
        for result in json.loads(results.read_text(encoding="utf-8"))["results"]
        for example in result["examples"]
        if result["setting"].startswith("dynamic") and example["id"] == name
    ]
    if not found or found[0]["prompt_tail"]:
        raise SystemExit(f"{results} has no dynamic example {name} that begins with a whole block")
    keys = ("id", "question", "tokens", "commit_steps", "block_size")
    return {key: found[0][key] for key in keys}


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, help="of opdlm eval --json --examples N")
    parser.add_argument("--example", default="heldout-0-1", help="id of a question")
    args = parser.parse_args()
    source = IMAGES / "trajectory.json"
    if args.results is not None:
        record = json.dumps(take(args.results, args.example), ensure_ascii=False)
        source.write_text(record + "\n", encoding="utf-8")
    picture = draw(json.loads(source.read_text(encoding="utf-8")))
    (IMAGES / "opdlm.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
