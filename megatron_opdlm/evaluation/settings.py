"""The remasking rules that `opdlm eval` compares. Its flags are made from the table of rules."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence

from megatron_opdlm.checks import require
from megatron_opdlm.diffusion.remasking import RULES, RemaskingRule, make_rule
from megatron_opdlm.generate.arguments import add_parameter_arguments, parameter_users, require_used

DEFAULT_RULES = ("low_confidence_static", "low_confidence_dynamic")
"""Rules that are compared if none is given. The first shows the accuracy of the weights; the second
shows how much of it speed costs."""


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag per rule and an option per parameter. `chosen_rules` reads them.

    Raises:
        ValueError: two rules have one label, under which tables would average them, or none.
    """
    labels = [rule.label for rule in RULES.values()]
    for name, rule in RULES.items():
        rule_text = "must be a name of its own, in tables and as a flag"
        is_own = bool(rule.label) and labels.count(rule.label) == 1
        require(is_own, f"label of {name}", rule.label, rule_text, "give the rule another label")
    flags = " and ".join(_flag(name) for name in DEFAULT_RULES)
    group = parser.add_argument_group(
        "remasking rules",
        "Which tokens a denoising step keeps, n = block size / denoising steps. Several rules "
        f"are decoded side by side; without any: {flags}.",
    )
    for name, rule in RULES.items():
        group.add_argument(
            _flag(name),
            dest="rules",
            action="append_const",
            const=name,
            help=f"{name}: {rule.summary}".replace("%", "%%"),
        )
    add_parameter_arguments(group, several=True)


def check_settings(args: argparse.Namespace) -> None:
    """Refuses parameters of rules that are not compared.

    Raises:
        ValueError: a parameter has no effect; the message names argument, value, rule and fix.
    """
    for parameter, users in parameter_users().items():
        is_used = any(name in _names(args) for name in users)
        about = " or ".join(_flag(name) for name in users)
        given = getattr(args, parameter)
        require_used(is_used, parameter, given, about, "the decoding asked for")


def require_no_repeats(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuses a value that is given twice, of the named arguments and of the rules' parameters.

    Raises:
        ValueError: the message names argument, value, rule and fix.
    """
    for name in (*names, *parameter_users()):
        values = getattr(args, name) or ()
        for value in values:
            require(values.count(value) == 1, name, value, "is given twice", "give it once")


def chosen_rules(args: argparse.Namespace) -> list[RemaskingRule]:
    """Returns the rules to compare, in the order of the table.

    There is one for every combination of the given values of a rule's parameters.

    Raises:
        ValueError: a value is out of its range.
    """
    rules = []
    for name in _names(args):
        given = {
            field.name: getattr(args, field.name)
            for field in dataclasses.fields(RULES[name])
            if getattr(args, field.name) is not None
        }
        for values in itertools.product(*given.values()):
            rules.append(make_rule(name, **dict(zip(given, values, strict=True))))
    return rules


def rule_flags(names: Sequence[str]) -> str:
    """Returns the flags of rules, as a user gave them."""
    return " ".join(map(_flag, names))


def _names(args: argparse.Namespace) -> list[str]:
    asked = args.rules or DEFAULT_RULES
    return [name for name in RULES if name in asked]


def _flag(name: str) -> str:
    return f"--{RULES[name].flag or RULES[name].label}"
