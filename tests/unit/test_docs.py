"""What README and docs say about files, commands, keys and modules, against what is there."""

import argparse
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_opdlm.cli import _SUBCOMMANDS, build_parser
from megatron_opdlm.config.run import Config
from megatron_opdlm.config.schema import collect_keys
from megatron_opdlm.diffusion.remasking import RULES, Sequential
from tools import structure

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "megatron_opdlm"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PLACES = (
    REPOSITORY,
    PACKAGE,
    *(REPOSITORY / n for n in ("docs", "tests/unit", "tests/distributed")),
)
NO_PAGE = REPOSITORY / "docs" / "LOG.md"
"""A log of what was: it may name what is gone."""
MADE_BY_RUNS = re.compile(
    r"^(report|modeling_|configuration_block|decoding_block|remasking_block|runs/|"
    r"config\.yaml|metrics\.jsonl|table\.md|summary\.json|scores\.json|teacher_responses\.jsonl|"
    r"sglang_dllm\.yaml|speed\.md)"
)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def anchors(page: Path) -> set[str]:
    """Those that a heading has on the forge."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(text: str, page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        other = page if not path else page.parent / path
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    return broken


@pages
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page.read_text(), page) == []
    # control
    assert broken_links("[a](nowhere.md) [b](#nothing) [c](https://x)", page) == [
        "nowhere.md", "#nothing",
    ]  # fmt: skip


def missing_files(text: str) -> list[str]:
    """Files of this project by name, between backticks; bare modules are looked for everywhere."""
    known = {p.name for top in ("megatron_opdlm", "tests", "tools", "examples", "docs")
             for p in (REPOSITORY / top).rglob("*")}  # fmt: skip
    names = re.findall(r"`([\w./{},-]+\.(?:py|sh|md|yaml|jinja))`", text)
    return [
        name
        for name in names
        if "{" not in name and not MADE_BY_RUNS.match(name)
        if not any((place / name).exists() for place in PLACES)
        if "/" in name or name not in known
    ]


@pages
def test_files_that_are_named_are_there(page: Path) -> None:
    if page != NO_PAGE:
        assert missing_files(page.read_text()) == []
    assert missing_files("`trainer.py` `gone.py` `tests/unit/test_gone.py`") == [  # control
        "gone.py", "tests/unit/test_gone.py",
    ]  # fmt: skip


def commands(text: str) -> Iterator[list[str]]:
    """Every command line that calls opdlm, without comments and continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        match = re.match(r"(?:    |\$ )+(?:torchrun .*-m megatron_|\.venv/bin/)?opdlm (\w.*)", line)
        match = match or re.match(r"(?:\.venv/bin/)?opdlm (\w.*)", line)
        if match and "[" not in match[1]:
            yield shlex.split(match[1], comments=True)


def wrong_commands(text: str) -> list[str]:
    wrong = []
    parser = build_parser()
    for words in commands(text):
        try:
            args, rest = parser.parse_known_args(words)
        except (SystemExit, argparse.ArgumentError):
            wrong.append(" ".join(words))
            continue
        overrides = [*getattr(args, "overrides", []), *rest]
        keys = {word.partition("=")[0] for word in overrides if "=" in word}
        if keys - set(collect_keys(Config)) or any("=" not in word for word in rest):
            wrong.append(" ".join(words))
    return wrong


@pages
def test_commands_have_options_and_keys_that_exist(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wrong_commands(page.read_text()) == []
    bad = "    opdlm eval --model m --tsk t=f\n    opdlm train c.yaml lrr=1\n    opdlm plan c.yaml"
    assert len(wrong_commands(bad)) == 3  # control


def test_commands_are_found() -> None:
    assert sum(len(list(commands(page.read_text()))) for page in PAGES) > 15


def script_commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Every command line that starts a script of this project: the line, and the script's words."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        if match := re.match(r"    [\w./ -]*?((?:examples|tools)/[\w./]+\.(?:sh|py).*)", line):
            yield line.strip(), re.split(r"[\s|\[\]]+", match[1].partition("#")[0])


def wrong_scripts(text: str) -> list[str]:
    """Commands whose script is not there, has not such an option, or needs an environment."""
    wrong = []
    for line, (name, *words) in script_commands(text):
        path = REPOSITORY / name
        if not path.is_file() or line.startswith("python examples/"):
            wrong.append(line)
            continue
        sources = {path, *path.parent.glob("*.py"), PACKAGE / "cli.py"}
        for other in re.findall(r"examples/\w+", path.read_text()):
            sources |= set((REPOSITORY / other).glob("*.py"))
        known = "".join(source.read_text() for source in sources)
        if any(word.startswith("--") and word not in known for word in words):
            wrong.append(line)
    return wrong


@pages
def test_scripts_that_are_shown_exist_and_have_these_options(page: Path) -> None:
    assert wrong_scripts(page.read_text()) == []
    bad = (
        "    bash examples/gone.sh\n    bash examples/quickstart.sh --nprocs 4\n"
        "    python examples/smollm2/check.py --run a"
    )
    assert len(wrong_scripts(bad)) == 3  # control
    good = ".venv/bin/" + bad.rpartition("    ")[2]
    assert wrong_scripts(f"    {good}") == [] and len(list(script_commands(f"    {good}"))) == 1


def test_scripts_are_found() -> None:
    assert sum(len(list(script_commands(page.read_text()))) for page in PAGES) > 15


def unmapped(text: str) -> set[str]:
    """Rooms, and modules outside convert and evaluation, that the map does not name in its room.

    Those two have pages of their own.
    """
    parts = re.split(r"^      (\w+(?:/|\.py)) ", text, flags=re.MULTILINE)
    named = {
        room: {room, *re.findall(r"\w+(?:\.py|/)", rest)}
        for room, rest in zip(parts[1::2], parts[2::2], strict=True)
    }
    here = {f"{p.name}/" if p.is_dir() else p.name for p in PACKAGE.iterdir() if p.name[0] != "_"}
    missing = here - set(named) - {"py.typed"}
    for path in PACKAGE.glob("*/*"):
        room, name = f"{path.parent.name}/", f"{path.name}/" if path.is_dir() else path.name
        if room in ("convert/", "evaluation/") or name[0] == "_" or room in missing:
            continue
        if name not in named[room]:
            missing.add(room + name)
    return missing


def test_the_map_names_every_module() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    assert unmapped(text) == set()
    assert unmapped(text.replace("trainer.py", "")) == {"train/trainer.py"}  # control
    assert "loss/" in unmapped(text.replace("      loss/ ", "      "))  # control


def section(text: str, title: str) -> str:
    """What stands under the heading of the second level that begins with a title."""
    return re.split(r"^## ", text.split(f"\n## {title}")[1], maxsplit=1, flags=re.MULTILINE)[0]


def broken_ways(text: str) -> list[str]:
    """Ways from the command that a reader of the code cannot follow, file by file.

    `cli.py` imports the modules of its subcommands by the names in `_SUBCOMMANDS`.
    """
    imported = structure.imports(structure.read(PACKAGE), PACKAGE.name)
    imported["cli"] |= {name.partition(".")[2] for name, _ in _SUBCOMMANDS}
    broken = []
    for way in section(text, "From the command").split("\n### ")[1:]:
        title = way.partition("\n")[0]
        files = re.findall(r"^\d\. `megatron_opdlm/([\w/]+)\.py`: ", way, re.MULTILINE)
        modules = [file.removesuffix("/__init__").replace("/", ".") for file in files]
        if len(modules) < 3 or len(modules) > 6 or modules[0] != "cli":
            broken.append(f"{title}: {len(modules)} files from {modules[:1]}")
        broken += [
            f"{title}: {name} does not import {following}"
            for name, following in zip(modules, modules[1:], strict=False)
            if following not in imported.get(name, ())
        ]
    return broken


def test_the_ways_from_the_command_can_be_followed() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    assert len(section(text, "From the command").split("\n### ")) == 6
    assert broken_ways(text) == []
    # controls: another file on the way, a way that is too long
    loss = "To the place where the loss is computed"
    skipping = text.replace(
        "`megatron_opdlm/distill/step.py`", "`megatron_opdlm/distill/host_weights.py`"
    )
    assert broken_ways(skipping) == [
        f"{loss}: train.trainer does not import distill.host_weights",
        f"{loss}: distill.host_weights does not import loss.fused",
    ]
    (last,) = re.findall(r"^6\. `megatron_opdlm/loss/divergence.py`.*\n", text, re.MULTILINE)
    longer = text.replace(last, last + "7. `megatron_opdlm/checks.py`: refuses.\n")
    assert broken_ways(longer) == [f"{loss}: 7 files from ['cli']"]


def wrong_seams(text: str) -> list[str]:
    """Rows of the table of extensions whose file has no such table, or whose test never says it."""
    rows = re.findall(
        r"^\| (an? [^|]+) \| [^|]*`([\w/]+\.py)`[^|]* \| `(\w+)` \| `([\w/]+\.py)` \|",
        section(text, "To add"),
        re.MULTILINE,
    )
    wrong = [] if len(rows) == 9 else [f"{len(rows)} rows"]
    for kind, file, table, test in rows:
        defined = re.search(rf"^(class )?{table}\b", (REPOSITORY / file).read_text(), re.MULTILINE)
        if not defined or not re.search(rf"\b{table}\b", (REPOSITORY / test).read_text()):
            wrong.append(kind)
    return wrong


def test_the_table_of_extensions_is_right() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    assert wrong_seams(text) == []
    assert wrong_seams(text.replace("`METHODS`", "`METHOD`")) == ["a method"]  # controls
    elsewhere = text.replace("`tests/distributed/evaluation/test_toy_grader.py`", "`tests/tiny.py`")
    assert wrong_seams(elsewhere) == ["a grader"]


@pages
def test_metrics_that_are_named_exist(page: Path) -> None:
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    for name in re.findall(r"`((?:train|rollout|perf|eval)/\w+)`", page.read_text()):
        assert f'"{name}"' in code, name


def rules_left_out() -> list[str]:
    """Remasking rules of which rollout.md has no row, or evaluation.md no flag or parameter."""
    rows = (REPOSITORY / "docs" / "rollout.md").read_text().replace("`", "")
    options = (REPOSITORY / "docs" / "evaluation.md").read_text()
    missing = []
    for name, rule in RULES.items():
        parameters = [field.name.replace("_", "-") for field in dataclasses.fields(rule)]
        texts = [f"`--{rule.flag or rule.label}`", *(f"`--{text} X ...`" for text in parameters)]
        if f"| {name} | {rule.summary} |" not in rows or any(t not in options for t in texts):
            missing.append(name)
    return missing


def test_pages_list_every_remasking_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rules_left_out() == []
    monkeypatch.setitem(RULES, "another", Sequential)  # control
    assert rules_left_out() == ["another"]


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set[Path](), [REPOSITORY / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#]+)", page.read_text())
        waiting += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
    assert {page.resolve() for page in PAGES} <= {page.resolve() for page in reached}
