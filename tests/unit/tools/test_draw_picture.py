"""README's picture: the committed file is what the script makes of the committed trajectory."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tools.draw_picture import IMAGES, draw, shown, take

PICTURE = (IMAGES / "opdlm.svg").read_text(encoding="utf-8")
RECORD = json.loads((IMAGES / "trajectory.json").read_text(encoding="utf-8"))
SVG = "{http://www.w3.org/2000/svg}"


def test_the_committed_picture_is_what_the_script_makes():
    assert draw(RECORD) == PICTURE
    steps = RECORD["commit_steps"]
    assert draw(RECORD | {"commit_steps": [1 - steps[0], *steps[1:]]}) != PICTURE  # control


def test_it_is_small_and_brings_all_that_it_shows():
    assert len(PICTURE.encode()) < 60_000
    names = {element.tag.removeprefix(SVG) for element in ElementTree.fromstring(PICTURE).iter()}
    assert names == {"svg", "title", "style", "defs", "marker", "path", "rect", "text"}
    assert "@import" not in PICTURE and "@font-face" not in PICTURE and "href" not in PICTURE
    assert PICTURE.count("url(") == PICTURE.count("url(#")


def test_every_pass_makes_the_tokens_that_the_trajectory_says():
    """The coloured cells of all passes are the response, each token once."""
    texts = ElementTree.fromstring(PICTURE).iter(f"{SVG}text")
    made = [(float(t.get("y")), t.text) for t in texts if t.get("class") == "token new"]
    assert sorted(name for _, name in made) == sorted(map(shown, RECORD["tokens"]))
    size, steps = RECORD["block_size"], RECORD["commit_steps"]
    blocks = [steps[i : i + size] for i in range(0, len(steps), size)]
    counts = [block.count(step) for block in blocks for step in range(max(block) + 1)]
    rows = sorted({y for y, _ in made})
    assert [sum(y == row for y, _ in made) for row in rows] == counts
    assert f"{len(steps)} tokens in {len(counts)} forward passes" in PICTURE


def test_a_trajectory_is_taken_from_an_evaluation(tmp_path: Path):
    example = RECORD | {"prompt_tail": [], "correct": True}
    results = tmp_path / "after.json"
    settings = [{"setting": "static", "examples": []}]
    settings += [{"setting": "dynamic(0.9)", "examples": [example]}]
    results.write_text(json.dumps({"results": settings}))
    assert take(results, RECORD["id"]) == RECORD
    with pytest.raises(SystemExit, match="no dynamic example other"):
        take(results, "other")
