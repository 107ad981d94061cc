"""Makes the report of a run from its measurements.

    report.py --out DIR

Reads DIR/before.json and DIR/after.json (and DIR/at_*.json, measurements of checkpoints between),
as measure.py wrote them, and DIR/run/metrics.jsonl. Writes DIR/report: report.md, summary.json,
plots as PNG files, and report.html, a page on which the masks fill in.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from curves import share, write_curves
from measurement import Measured, Measurement, read_measured
from samples import samples
from table import COLUMNS, STATES_COLUMNS, markdown, rows, states_rows

from megatron_opdlm.cli import run_script
from megatron_opdlm.evaluation.html import render_page
from megatron_opdlm.files.folders import replacing
from megatron_opdlm.files.paths import folder

TITLE = "SmolLM2-135M-Instruct as a block-diffusion model"
WITHOUT = ("responses", "page")
"""Parts of a result that the summary leaves out."""
MARKDOWN, SUMMARY, PAGE = "report.md", "summary.json", "report.html"
EXPLANATION = """\
Nats per token: minus log probability under the teacher of the decoded text, through its end of
sequence, over all tokens of all responses, with the standard error over prompts; lower is likelier.
Agreement: of the questions that the teacher's greedy answer gets right, those that the student gets
right, with the standard error over questions. Distinct-2: share of bigrams of all responses
together that differ. First token, first four: responses that begin as the teacher's greedy ones.
All but the second column is about greedy decoding. Tokens per second: all prompts in one batch, on
this machine.
"""
STATES = """\
KL(teacher || student), whichever divergence was trained, at all states of static rollouts at
temperature 1: mean over all masked positions, by position in the block, by masked positions there.
"""


def main() -> None:
    """Writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--out", required=True, type=folder, metavar="DIR", help="folder of the run"
    )
    written = write_report(parser.parse_args().out)
    print(f"report: {written / MARKDOWN}\nwatch it decode: {written / PAGE}")


def write_report(out: Path) -> Path:
    """Writes the folder `report` of a run and returns it.

    Raises:
        ValueError: a measurement is missing or malformed.
        ImportError: matplotlib is not installed.
    """
    measured = read_measured(out)
    lines, states = rows(measured), states_rows(measured.before, measured.after)
    target = out / "report"
    target.mkdir(exist_ok=True)
    plots = write_curves(target, measured)
    page = render_page(
        TITLE, COLUMNS, lines, facts=facts(measured.after), plots=plots, examples=shown(measured)
    )
    parts = [f"# {TITLE}\n", facts_text(measured.after), markdown(COLUMNS, lines), EXPLANATION]
    if states:
        parts += [
            "## Divergence at the student's own states\n",
            STATES,
            markdown(STATES_COLUMNS, states),
        ]
    parts += ["## Curves\n", *(f"![{plot.stem}]({plot.name})\n" for plot in plots)]
    parts += ["## Samples, greedy\n", samples(measured)]
    texts = {
        MARKDOWN: "\n".join(parts),
        SUMMARY: json.dumps(summary(measured), indent=2) + "\n",
        PAGE: page,
    }
    for name, text in texts.items():
        with replacing(target / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return target


def summary(measured: Measured) -> dict[str, Any]:
    """Returns the figures that a run is judged by, and all others below them."""
    teacher, after = measured.teacher(), measured.after
    static, dynamic = after.find("static"), after.dynamic
    figures: dict[str, Any] = {
        "response_tokens": after.response_tokens,
        "teacher_nll": teacher["nll"],
        "student_nll": None if static is None else static["nll"],
        "nll_above_teacher": None if static is None else static["nll"] - teacher["nll"],
        "questions": after.values["num_questions"],
        "teacher_right": after.values["teacher_right"],
        "agreement_static": share(static),
        "dynamic_setting": None if dynamic is None else dynamic["setting"],
        "agreement_dynamic": share(dynamic),
        "tokens_per_forward_static": None if static is None else static["tokens_per_forward"],
        "tokens_per_forward_dynamic": None if dynamic is None else dynamic["tokens_per_forward"],
    }
    names = ["before", *(f"at {m.response_tokens}" for m in measured.between), "after"]
    every = [measured.before, *measured.between, after]
    return figures | {"measurements": dict(zip(names, map(without_texts, every), strict=True))}


def without_texts(measurement: Measurement) -> dict[str, Any]:
    """Returns a measurement without its prompts, responses and decodings."""
    results = [
        {key: value for key, value in result.items() if key not in WITHOUT}
        for result in measurement.values["results"]
    ]
    kept = {key: value for key, value in measurement.values.items() if key != "prompts"}
    return kept | {"results": results}


def facts(measurement: Measurement) -> list[tuple[str, str]]:
    """Returns what the figures were measured on, as (name, value)."""
    values = measurement.values
    threads = f", threads: {values['threads']}" if values["device"] == "CPU" else ""
    return [
        ("response tokens trained on", f"{measurement.response_tokens:,}"),
        ("optimizer steps", f"{values['optimizer_steps']:,}"),
        ("parameters", f"{values['parameters']:,}"),
        ("block size", str(values["block_size"])),
        ("prediction", values["prediction"]),
        (
            "held-out prompts",
            f"{len(values['prompts'])}, at most {values['max_new_tokens']} tokens",
        ),
        ("questions", f"{values['num_questions']}, teacher right: {values['teacher_right']}"),
        ("device", f"{values['device']}{threads}, {values['dtype']}"),
        ("seed", str(values["seed"])),
    ]


def facts_text(measurement: Measurement) -> str:
    """Returns the facts as one paragraph."""
    return "; ".join(f"{name}: {value}" for name, value in facts(measurement)) + ".\n"


def shown(measured: Measured) -> list[dict[str, Any]]:
    """Returns the decodings that the page replays: after, dynamic first, then before."""
    dynamic = measured.after.dynamic
    sources = [
        ("after", dynamic),
        ("after", measured.after.find("static")),
        ("before", measured.before.find("static")),
    ]
    return [
        record | {"setting": f"{name}, {record['setting']}"}
        for name, result in sources
        if result is not None
        for record in result["page"]
    ]


if __name__ == "__main__":
    run_script(main)
