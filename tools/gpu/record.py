"""What an item of the survey says while it runs: lines of figures, each with its checks.

A line goes to the runner as soon as it is there, so an item that hangs or dies later has it kept. A
figure whose check fails is no speed: it is kept under `void`, and the table shows what failed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu.roofline import Card

Send = Callable[[dict[str, Any]], None]
"""Hands a message, of JSON values, to the runner."""


class Skip(Exception):
    """This item cannot run here; the text says why."""


@dataclass(frozen=True)
class Check:
    """A number that has to be small where the figures are right.

    Attributes:
        what: what is compared with what.
        error: found.
        limit: the most that rounding explains; inclusive.
        control: the same number of something that is wrong on purpose, which has to exceed the
            limit: without it a check might pass whatever it is given. None: there is none, as for
            exact equality.
    """

    what: str
    error: float
    limit: float
    control: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the figures count; NaN is neither small nor large."""
        has_teeth = self.control is None or self.control > self.limit
        return self.error <= self.limit and has_teeth

    def __str__(self) -> str:
        if self.error <= self.limit and self.control is not None and not self.holds:
            return f"{self.what}: the control passes, {self.control:.2g} of {self.limit:.2g}"
        sign = "<=" if self.error <= self.limit else ">"
        return f"{self.what} {self.error:.2g} {sign} {self.limit:.2g}"


def exact(what: str, num_different: float) -> Check:
    """A check that nothing differs."""
    return Check(what, float(num_different), 0.0)


@dataclass
class Context:
    """What an item is given.

    Attributes:
        send: hands a message to the runner.
        work: folder that the items of a run share; gone afterwards.
        rehearsal: whether the device computes nothing, so that no figure means anything.
        deadline: `time.monotonic()` at which the item is killed.
        settings: options of the command line by name.
        card: what the device can do; None: unknown.
    """

    send: Send
    work: Path
    rehearsal: bool = False
    deadline: float = math.inf
    settings: Mapping[str, Any] = field(default_factory=dict)
    card: Card | None = None
    num_failed: int = 0

    def repeats(self, number: int) -> int:
        """So many repetitions; one where numbers mean nothing."""
        return 1 if self.rehearsal else number

    @property
    def seconds_left(self) -> float:
        """Until the item is killed."""
        return self.deadline - time.monotonic()

    def tell(self, **about: Any) -> None:
        """Says something of the machine: `card`, for example."""
        self.send({"about": about})

    def attach(self, name: str, content: Any) -> None:
        """Keeps something long, JSON values, beside the results."""
        self.send({"attach": {name: content}})

    def line(
        self, case: str, figures: Mapping[str, Any], checks: Sequence[Check] = (), note: str = ""
    ) -> None:
        """Reports one case.

        Args:
            case: what was measured, short.
            figures: numbers by name with their unit: `ms`, `tflops`, `gb_per_s`, `of_bound`.
            checks: of what was measured; no speed without one.
            note: for people.
        """
        failed = [str(check) for check in checks if not check.holds]
        self.num_failed += bool(failed)
        is_void = self.rehearsal or bool(failed)
        message: dict[str, Any] = {"case": case, "status": "failed" if failed else "ok"}
        if self.rehearsal:
            message["status"] = "void"
        found = {name: rounded(value) for name, value in figures.items()}
        message |= {"void" if is_void else "figures": found}
        message |= {"checks": [_plain(check) for check in checks], "failed": failed}
        self.send({"line": message | ({"note": note} if note else {})})

    def skipped(self, case: str, reason: str) -> None:
        """Reports a case that cannot be measured here."""
        self.send({"line": {"case": case, "status": "skipped", "note": reason}})

    def timed(
        self,
        case: str,
        ms: float,
        checks: Sequence[Check],
        *,
        flops: float = 0.0,
        num_bytes: float = 0.0,
        bound_ms: float | None = None,
        **figures: Any,
    ) -> None:
        """Reports a time, its rates and how near it is to what the card can do.

        Args:
            case: see `line`.
            ms: milliseconds.
            checks: see `line`.
            flops: floating-point operations in that time.
            num_bytes: bytes of device memory that have to move.
            bound_ms: least time on this card; None: the larger of operations and bytes over the
                card's peaks.
            figures: more of them.
        """
        found: dict[str, Any] = {"ms": ms}
        if flops:
            found["tflops"] = flops / ms / 1e9
        if num_bytes:
            found["gb_per_s"] = num_bytes / ms / 1e6
        if bound_ms is None and self.card is not None and (flops or num_bytes):
            bound_ms = 1e3 * self.card.seconds(flops, num_bytes)
        if bound_ms is not None:
            found |= {"bound_ms": bound_ms, "of_bound": bound_ms / ms}
        self.line(case, found | figures, checks)


def rounded(value: Any) -> Any:
    """Six significant digits, and NaN and infinities as texts, which JSON does not know."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _plain(check: Check) -> dict[str, Any]:
    return {name: rounded(value) for name, value in asdict(check).items() if value is not None}
