"""What README and docs say about files, commands, keys and modules, against what is there."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_opdlm.cli import build_parser
from megatron_opdlm.config import Config
from megatron_opdlm.config_schema import collect_keys

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
    r"^(report|modeling_|configuration_block|decoding_block|config\.yaml|metrics\.jsonl|runs/|"
    r"table\.md|summary\.json|scores\.json|teacher_responses\.jsonl|sglang_dllm\.yaml)"
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


def unmapped(text: str) -> set[str]:
    """Modules at the top of the package that the map does not name."""
    here = {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    named = set(re.findall(r"\w+\.py", text))
    patterns = [re.compile(n.replace("*", r"\w*")) for n in re.findall(r"\w+\*\.py", text)]
    return {n for n in here - named if not any(p.fullmatch(n) for p in patterns)}


def test_the_map_names_every_module() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    assert unmapped(text) == set()
    assert unmapped(text.replace("trainer.py", "")) == {"trainer.py"}  # control


@pages
def test_metrics_that_are_named_exist(page: Path) -> None:
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    for name in re.findall(r"`((?:train|rollout|perf|eval)/\w+)`", page.read_text()):
        assert f'"{name}"' in code, name


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
