"""What versions of transformers saved, imported by us, and exported again for every version.

ROOT/saved/VERSION/NAME                     by `program.py save`; NAME is an original or an export
ROOT/exports/base-MODEL-saved-by-VERSION    for `program.py check`
ROOT/controls/tokenizer as version 5 saves it
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_opdlm.checkpoint.layout import read_description
from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.files.errors import ConversionError
from tests.unit.convert.models import read_weights
from tests.versions.inputs import MODELS
from tests.versions.program import Result, attempt, require

_ITERATION = "iter_0000000"
_LAYOUT_5 = "controls/tokenizer as version 5 saves it"


def import_saved(root: Path, version: str) -> list[Result]:
    """Import everything that a version saved, and compare it with the originals."""
    saved = root / "saved" / version
    results = [
        attempt("saved by it, imported", directory.name, check_import, root, directory, version)
        for directory in sorted(saved.iterdir())
    ]
    layout = saved / "sdar-tokenizer"
    if not version.startswith("4.") and layout.is_dir() and not (root / _LAYOUT_5).exists():
        shutil.copytree(layout, root / _LAYOUT_5)
    return [*results, _refusal(root, saved / "qwen3")]


def check_import(root: Path, directory: Path, version: str) -> str:
    """Config, vocabulary, chat template and weights are those of the original."""
    name = directory.name.split("-")[-1]
    model = "qwen3" if name == "bfloat16" else name
    checkpoint = root / "imported" / version / directory.name
    import_hf(directory, checkpoint, progress=False)
    found = read_description(checkpoint / _ITERATION)
    wanted = read_description(root / "checkpoints" / model / _ITERATION)
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    tied = _is_tied(root, directory.name)
    fields = asdict(wanted.config) | {"dtype": dtype, "tie_word_embeddings": tied}
    for field, value in fields.items():
        require(field, asdict(found.config)[field], value)
    require("mask token", found.mask_token_id, wanted.mask_token_id)
    require("fingerprint", found.tokenizer_fingerprint, wanted.tokenizer_fingerprint)
    out = root / "exports" / f"base-{model}-saved-by-{version}"
    if directory.name not in MODELS:
        out = root / "imported" / version / f"{directory.name}-exported"
    export(checkpoint, out, format="base", progress=False)
    weights, originals = read_weights(out), read_weights(root / "original" / model)
    if not tied:
        originals.setdefault("lm_head.weight", originals["model.embed_tokens.weight"])
    require("names", sorted(weights), sorted(originals))
    for key, value in originals.items():
        same = torch.equal(weights[key], value.to(getattr(torch, dtype)))
        require(f"equality of {key}", same, True)
    return f"theta {found.config.rope_theta:.0f}"


def _is_tied(root: Path, name: str) -> bool:
    """What the directory said before a version of transformers saved it."""
    source = root / ("original" if name in MODELS else "exports") / name / "config.json"
    return json.loads(source.read_text())["tie_word_embeddings"]


def _refusal(root: Path, directory: Path) -> Result:
    """Control: without any theta the import must fail."""
    copy = root / "imported/no theta"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)
    values = json.loads((copy / "config.json").read_text())
    for key in ("rope_theta", "rope_parameters"):
        values.pop(key, None)
    (copy / "config.json").write_text(json.dumps(values))
    title = "control: saved by it, theta removed"
    try:
        import_hf(copy, root / "imported/not", progress=False)
    except ConversionError as error:
        text = str(error).split(": ")[-1]
        return Result(title, copy.name, "no rope_theta" in text, f"fails: {text[:60]}")
    return Result(title, copy.name, False, "imported")
