"""Rooms of the package import each other in one direction, as the real imports say."""

from pathlib import Path

from tools import structure

PACKAGE = Path(__file__).parents[2] / "megatron_opdlm"
ORDER = (
    "checks", "triton_support", "files", "diffusion", "distributed", "model", "checkpoint",
    "convert", "loss", "config", "rollout", "distill", "reporting", "responses", "plan",
    "generate", "evaluation", "train", "cli", "__main__",
)  # fmt: skip
"""A room imports only rooms before it."""
ALONE = {"diffusion": {"torch"}, "checks": set[str](), "config": {"omegaconf", "yaml"}}
"""What a room may import beside the standard library and the package; torch and the like make
`opdlm --help` slow."""


def imported() -> dict[str, set[str]]:
    return structure.imports(structure.read(PACKAGE), PACKAGE.name)


def wrong_ways(found: dict[str, set[str]]) -> list[str]:
    place = {name: number for number, name in enumerate(ORDER)}
    return sorted(
        f"{module} imports {target}"
        for module, targets in found.items()
        for target in targets
        if module and place[structure.room(target)] > place[structure.room(module)]
    )


def test_rooms_import_only_rooms_before_them() -> None:
    found = imported()
    assert {structure.room(name) for name in found if name} == set(ORDER)
    assert wrong_ways(found) == []
    assert structure.circles(structure.arrows(found)) == []


def test_control_an_arrow_back_is_found() -> None:
    found = imported()
    found["model.gpt"].add("convert.importer")
    assert wrong_ways(found) == ["model.gpt imports convert.importer"]
    (circle,) = structure.circles(structure.arrows(found))
    assert {"model", "convert"} <= set(circle)


def test_rooms_that_must_stay_light_import_no_library() -> None:
    libraries = structure.libraries(structure.read(PACKAGE), PACKAGE.name)
    for room, allowed in ALONE.items():
        used = {n for m, names in libraries.items() if structure.room(m) == room for n in names}
        assert used <= allowed, room
    assert "torch" in libraries["model.gpt"]  # control


def test_the_top_of_the_package_stays_small() -> None:
    top = [p.name for p in PACKAGE.glob("*.py") if p.name not in ("__init__.py", "__main__.py")]
    assert len(top) <= 3, top


def test_tests_stand_in_the_rooms_of_what_they_test() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    for kind in ("unit", "distributed"):
        folders = (PACKAGE.parent / "tests" / kind).iterdir()
        there = {path.name for path in folders if (path / "__init__.py").is_file()}
        assert there <= rooms | {"tools", "examples"}
