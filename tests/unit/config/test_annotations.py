"""Keys that derive from a table, on a section of this file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest

from megatron_opdlm.config.annotations import MAY_CHANGE, PATH, OneOf, ParametersOf
from megatron_opdlm.config.run import Config, load_config
from megatron_opdlm.config.schema import build, collect_keys, describe_type, keys_as_markdown
from megatron_opdlm.config.section import Section


@dataclass(frozen=True, kw_only=True)
class Tea:
    """A drink."""

    summary: ClassVar[str] = "leaves in hot water"


@dataclass(frozen=True, kw_only=True)
class Coffee:
    """Another."""

    summary: ClassVar[str] = "beans in hot water"
    strength: float = 0.5
    """Share of beans."""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength} must lie in (0, 1]; use e.g. 0.5")


DRINKS: dict[str, Any] = {"tea": Tea, "coffee": Coffee}


@dataclass(frozen=True, kw_only=True)
class Table(Section):
    """What stands on it."""

    drink: Annotated[str, OneOf(DRINKS)] = "tea"
    """What to drink:"""
    drink_parameters: Annotated[Mapping[str, Any], ParametersOf(DRINKS)] = field(
        default_factory=dict
    )
    """Settings of the drinks."""
    cloth: Annotated[str | None, PATH, MAY_CHANGE] = None
    """Where the cloth is."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Holds a table."""

    table: Table = field(default_factory=Table)


def test_keys_types_and_texts_come_from_the_table() -> None:
    keys = collect_keys(Room)
    assert list(keys) == ["drink", "strength", "cloth"]
    assert describe_type(keys["drink"].annotation) == "{tea, coffee}"
    assert keys["drink"].doc.endswith("tea = leaves in hot water; coffee = beans in hot water.")
    assert keys["strength"].doc == "coffee: Share of beans."
    assert keys["strength"].default == 0.5
    assert "| `strength` | float | `0.5` |  | coffee: Share of beans. |" in keys_as_markdown(Room)
    assert [key.may_change for key in keys.values()] == [False, False, True]


def test_parameters_are_filled_in_and_read_back() -> None:
    room = build(Room, {"drink": "coffee", "strength": 1})
    assert room.table.drink_parameters == {"strength": 1.0}
    assert collect_keys(Room)["strength"].read(room) == 1.0
    assert Table().drink_parameters == {"strength": 0.5}
    drink = ParametersOf(DRINKS).make("coffee", room.table.drink_parameters)
    assert drink == Coffee(strength=1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"drink": "wine"}, r"drink=wine must be one of \{tea, coffee\}"),
        ({"strength": 2.0}, r"strength=2.0 must lie in \(0, 1\]; use"),
        ({"strength": "much"}, "strength=much must have type float"),
        ({"strenght": 0.1}, "unknown key strenght; did you mean strength"),
    ],
)
def test_bad_values_are_refused_by_the_entry(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Room, values)


def test_an_entry_that_is_added_later_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Strong(Coffee):
        """Shares a parameter with coffee."""

        summary: ClassVar[str] = "coffee for two"

    monkeypatch.setitem(DRINKS, "strong", Strong)
    assert build(Room, {"drink": "strong"}).table.drink == "strong"
    assert collect_keys(Room)["strength"].doc.startswith("coffee, strong: ")


def test_a_parameter_without_a_default_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bare:
        """Wants to be told."""

        summary: ClassVar[str] = "water"
        degrees: float
        """Temperature."""

    monkeypatch.setitem(DRINKS, "bare", Bare)
    with pytest.raises(AssertionError, match="parameter degrees of bare needs a default"):
        collect_keys(Room)


def test_entries_that_disagree_about_a_parameter_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Weak:
        """Has another default."""

        summary: ClassVar[str] = "hot water"
        strength: float = 0.1
        """Share of beans."""

    monkeypatch.setitem(DRINKS, "weak", Weak)
    with pytest.raises(AssertionError, match="coffee and weak differ"):
        collect_keys(Room)


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Table(cloth="~/linen").cloth == str(tmp_path / "linen")
    file = tmp_path / "run.yaml"
    file.write_text("student: ~/m\ndata: ~/d\nsave: ~/s\ntrain_rollouts: 1\n")
    config = load_config(file)
    assert config.model.student == str(tmp_path / "m")
    assert (config.train.data, config.train.save) == (str(tmp_path / "d"), str(tmp_path / "s"))
    marked = {name for name, key in collect_keys(Config).items() if PATH in key.marks}
    assert marked == {
        "student", "teacher", "import_cache", "data", "save", "teacher_responses", "eval_data",
    }  # fmt: skip
