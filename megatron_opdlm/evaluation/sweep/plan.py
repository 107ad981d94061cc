"""The cells of a sweep, from its arguments, before any model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.checks import require
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.evaluation.decode import seeds_of
from megatron_opdlm.evaluation.settings import chosen_rules
from megatron_opdlm.evaluation.sweep.arguments import (
    THINKING,
    each_setting,
    parse_labelled,
    parse_training_tokens,
)
from megatron_opdlm.evaluation.sweep.cell import Cell, SweptModel
from megatron_opdlm.evaluation.sweep.digests import files_digest, questions_digest
from megatron_opdlm.evaluation.sweep.training import TrainingCost, read_cost
from megatron_opdlm.evaluation.task import Task
from megatron_opdlm.evaluation.teacher import open_reference
from megatron_opdlm.generate.arguments import decoding_options, prompt_room
from megatron_opdlm.generate.decoder import chosen_dtype
from megatron_opdlm.responses.rendering import check_rendering
from megatron_opdlm.rollout.request import DecodingOptions


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep computes, and what its report shows."""

    cells: Sequence[Cell]
    """All cells; those of one model stand together."""
    costs: Mapping[str, TrainingCost]
    """What the training of models cost, by label, as far as it is known."""
    samples: int
    """Questions per task whose responses are shown."""

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON values; `from_json` is the inverse."""
        return {
            "cells": [cell.to_json() for cell in self.cells],
            "training": {label: cost.to_json() for label, cost in self.costs.items()},
            "samples": self.samples,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """Returns the plan that `to_json` returned."""
        costs = values["training"].items()
        return cls(
            cells=[Cell.from_json(cell) for cell in values["cells"]],
            costs={label: TrainingCost.from_json(cost) for label, cost in costs},
            samples=values["samples"],
        )


def make_plan(args: argparse.Namespace, tasks: Sequence[Task]) -> Plan:
    """Returns the cells, after checks of everything that can be checked without weights.

    Args:
        args: arguments of `opdlm sweep`, checked.
        tasks: the tasks, from `task_arguments.load_tasks`.

    Raises:
        ValueError: a path has no model, a model cannot be decoded with a setting, a prompt does not
            fit its chat template, or --seeds-temperature has no effect.
    """
    has_seeds = args.seeds_temperature is None or any(task.seeds > 1 for task in tasks)
    rule = "has no effect: no task asks for several seeds"
    fix = "leave it out, or use --temperature"
    require(has_seeds, "--seeds-temperature", args.seeds_temperature, rule, fix)
    cells: list[Cell] = []
    costs: dict[str, TrainingCost] = {}
    for text in args.model or ():
        label, path = parse_labelled(text)
        source = ModelSource.open(path)
        costs[label] = read_cost(source)
        model = _swept(label, source, is_teacher=False)
        cells += _cells(args, model, source, tasks)
    for text in args.teacher or ():
        label, path = parse_labelled(text)
        source = open_reference(path)
        model = _swept(label, source, is_teacher=True)
        cells += _cells(args, model, source, tasks)
    for label, tokens in parse_training_tokens(args.training_tokens or ()).items():
        costs[label] = TrainingCost(tokens=tokens)
    known = {label: cost for label, cost in costs.items() if cost.tokens is not None}
    unique = list(dict.fromkeys(cells))  # a teacher has one cell for several settings
    return Plan(cells=unique, costs=known, samples=args.samples)


def _swept(label: str, source: ModelSource, *, is_teacher: bool) -> SweptModel:
    digest = files_digest(source.folder)
    return SweptModel(label=label, path=source.path, is_teacher=is_teacher, files=digest)


def _cells(
    args: argparse.Namespace, model: SweptModel, source: ModelSource, tasks: Sequence[Task]
) -> Iterator[Cell]:
    """Yields the cells of one model, task by task."""
    # transformers decodes a teacher in the type that the device has, see `evaluate_teacher`
    dtype = chosen_dtype("auto" if model.is_teacher else args.params_dtype)
    for task in tasks:
        digest = questions_digest(task.questions)
        for thinks in THINKING[args.thinking]:
            check_rendering(task.questions, source, enable_thinking=thinks)
        for setting in each_setting(args, seeds=task.seeds):
            for options, limit, seed in _ways(setting, model, source, task):
                yield Cell(
                    model=model,
                    task=task.name,
                    questions=digest,
                    num_questions=len(task.questions),
                    options=options,
                    response_limit=limit,
                    enable_thinking=setting.enable_thinking,
                    seed=seed,
                    params_dtype=dtype,
                )


def _ways(
    setting: argparse.Namespace, model: SweptModel, source: ModelSource, task: Task
) -> Iterator[tuple[DecodingOptions | None, int, int]]:
    """Yields decoding options, response limit and seed of every rule and seed of a setting."""
    limit = setting.max_new_tokens or task.response_limit
    positions = source.config.max_position_embeddings
    if model.is_teacher:
        prompt_room(positions, limit, block_size=1)
        yield None, limit, 0
        return
    for rule in chosen_rules(setting):
        options = decoding_options(setting, source, rule)
        prompt_room(positions, limit, options.block_size)
        for seed in seeds_of(task, setting.seeds, options.temperature):
            yield options, limit, seed
