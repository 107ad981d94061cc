"""Loads and saves with the transformers of this environment; knows nothing of megatron_opdlm.

    python program.py save ROOT      save what this version loads, for our import
    python program.py check ROOT     check that this version loads what we wrote

ROOT is a folder of `inputs.py`. Results are written to ROOT/results/VERSION.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoTokenizer

VERSION = transformers.__version__
IS_OLD = VERSION.startswith("4.")
OWN_DTYPE: dict[str, Any] = {"torch_dtype" if IS_OLD else "dtype": "auto"}
AUTO_CLASSES = {"sdar": "AutoModelForCausalLM", "a2d": "AutoModelForMaskedLM"}
MASK_TEXTS = {"a2d": "<|mask|>"}
TOLERANCE = 1e-5
# What a directory that does not load raises, in one version or another.
FAILURES = (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)
EVERY = ("4.", "5.")
BEFORE_4_57 = tuple(f"4.{minor}." for minor in range(51, 57))
CONTROLS = {  # folder -> model, versions that must refuse it, what the message says
    "only rope_parameters": ("qwen3", ("4.",), "theta is 10000"),
    "no theta": ("qwen3", EVERY, "theta"),
    "no RoPE scaling": ("llama", EVERY, "logits differ"),
    "key rows rolled": ("qwen3", EVERY, "logits differ"),
    "tokenizer without mask token": ("tokenizer", EVERY, "mask token is"),
    "tokenizer as version 5 saves it": ("tokenizer", ("4.",), "'list' object|TokenizersBackend"),
    "sdar in a folder named v1.5": ("qwen3", BEFORE_4_57, "No module named"),
}


class WrongError(ValueError):
    """Something loaded, and is not what it should be."""


@dataclass(frozen=True)
class Result:
    """What came of one check.

    Attributes:
        group: row of the report.
        subject: what was loaded.
        passed: whether it went as it must; a control passes by failing.
        detail: a figure, or the error.
    """

    group: str
    subject: str
    passed: bool
    detail: str


def require(what: str, found: Any, wanted: Any) -> None:
    """Refuse anything but what is wanted."""
    if found != wanted:
        raise WrongError(f"{what} is {str(found)[:80]}, not {str(wanted)[:80]}")


def has_code(directory: Path) -> bool:
    """Whether the directory brings its own classes, which need trust_remote_code."""
    return "auto_map" in json.loads((directory / "config.json").read_text())


def load_model(directory: Path, form: str) -> Any:
    """A model in whose directory all tensors were found, and no others."""
    auto_class = getattr(transformers, AUTO_CLASSES.get(form, "AutoModelForCausalLM"))
    ours = has_code(directory)
    options = {} if ours else {"attn_implementation": "eager"}  # which honours a 4-D mask
    model, info = auto_class.from_pretrained(
        directory, trust_remote_code=ours, output_loading_info=True, **OWN_DTYPE, **options
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        require(key, sorted(info[key]), [])
    return model.eval()


def load_tokenizer(directory: Path, **options: Any) -> Any:
    """As the model cards say; transformers 5 reads config.json for a tokenizer too."""
    return AutoTokenizer.from_pretrained(
        directory, trust_remote_code=has_code(directory), **options
    )


def check_model(directory: Path, form: str, root: Path, name: str) -> str:
    """Config, dtype, eos ids and logits under a block-causal mask; returns the difference."""
    want = json.loads((root / f"{name}.json").read_text(encoding="utf-8"))
    tensors = load_file(root / f"{name}.safetensors")
    config = AutoConfig.from_pretrained(directory, trust_remote_code=has_code(directory))
    # The one that this version's own classes compute with.
    theta = config.rope_theta if IS_OLD else config.rope_parameters["rope_theta"]
    require("theta", theta, want["theta"])
    declared = config.torch_dtype if IS_OLD else config.dtype
    require("dtype of the config", declared, torch.float32)
    model = load_model(directory, form)
    require("dtype", model.dtype, torch.float32)
    require("eos", model.generation_config.eos_token_id, want["eos"])
    require("pad", model.generation_config.pad_token_id, want["pad"])
    with torch.no_grad():
        mask = tensors["mask"].expand(len(tensors["tokens"]), -1, -1, -1)
        found = model(tensors["tokens"], attention_mask=mask).logits
    delta = float((found - tensors["logits"]).abs().max())
    if not delta <= TOLERANCE:
        raise WrongError(f"logits differ by {delta:.1e}")
    if has_code(directory):
        require("mask token", config.mask_token_id, want["mask"])
        whole = AutoModel.from_pretrained(directory, trust_remote_code=True)
        require("AutoModel", type(whole).__name__, config.auto_map["AutoModel"].split(".")[-1])
    return f"{delta:.1e}"


def check_bfloat16(directory: Path) -> str:
    """The dtype of config.json is found, and no value changes."""
    model = load_model(directory, "sdar")
    require("dtype", {value.dtype for value in model.parameters()}, {torch.bfloat16})
    values = model.state_dict()
    for key, stored in load_file(directory / "model.safetensors").items():
        require(key, torch.equal(values[key], stored), True)
    return "bit for bit"


def check_generate(directory: Path, root: Path, name: str) -> str:
    """Decoded tokens equal those of transformers' own class, which has no cache of blocks."""
    tensors = load_file(root / f"{name}.safetensors")
    wanted, prompts = tensors["decoded"], tensors["prompts"]
    model, length = load_model(directory, "sdar"), prompts.shape[1]
    number = wanted.shape[1] - length
    found = model.generate(prompts, max_new_tokens=number, denoising_steps=1, eos_token_id=[])
    require("decoded", found.tolist(), wanted.tolist())
    return f"{found[:, length:].numel()} tokens"


def check_tokenizer(directory: Path, root: Path, name: str, mask: str, fast: bool = True) -> str:
    """Only the mask token is new; returns its id."""
    want = json.loads((root / f"{name}.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(directory, use_fast=fast)
    require("mask token", (tokenizer.mask_token, tokenizer.mask_token_id), (mask, want["mask"]))
    require("eos", tokenizer.eos_token_id, want["eos"][0])
    require("pad", tokenizer.pad_token_id, want["pad"])
    original = Tokenizer.from_file(str(root / "original" / name / "tokenizer.json")).get_vocab()
    same = tokenizer.get_vocab() == original | {mask: want["mask"]}
    require("equality of the vocabularies", same, True)
    require("number of tokens", len(tokenizer), len(original) + 1)
    for text, ids in want["encodings"].items():
        require(f"encoding of {text!r}", tokenizer.encode(text, add_special_tokens=False), ids)
        require("decoded text", tokenizer.decode(ids, clean_up_tokenization_spaces=False), text)
    thought = "<think>x</think>"
    ids = tokenizer.encode(f"{thought}{mask}", add_special_tokens=False)
    require("last id", ids[-1], want["mask"])
    require("decoded thought", tokenizer.decode(ids, skip_special_tokens=True), thought)
    require("chat template", tokenizer.chat_template, want["chat_template"])
    for thinking, text in want["rendered"].items():
        chat = tokenizer.apply_chat_template(
            want["messages"],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking == "with thinking",
        )
        require("chat", chat, text)
    return f"mask {want['mask']}"


def attempt(group: str, subject: str, check: Callable[..., str], *arguments: Any) -> Result:
    """Run a check; FAILURES are its failing."""
    try:
        return Result(group, subject, True, check(*arguments))
    except FAILURES as error:
        text = str(error) if isinstance(error, WrongError) else repr(error)
        return Result(group, subject, False, " ".join(text.split()))


def check_exports(root: Path) -> list[Result]:
    """Directories FORMAT-MODEL, or base-MODEL-saved-by-VERSION of those that `saved.py` made."""
    results = []
    forms = ("sdar", "a2d", "base")
    for directory in [d for f in forms for d in sorted((root / "exports").glob(f"{f}-*"))]:
        form, name = directory.name.split("-", 1)
        if name == "bfloat16":
            results.append(attempt("sdar: bfloat16", directory.name, check_bfloat16, directory))
            continue
        name, again, _ = name.partition("-saved-by-")
        group = "saved by any, imported, exported" if again else form
        logits = (check_model, directory, form, root, name)
        results.append(attempt(f"{group}: logits", directory.name, *logits))
        if form == "sdar":
            generate = (check_generate, directory, root, name)
            results.append(attempt("sdar: generate", directory.name, *generate))
        group = f"{group}: tokenizer" if again else "sdar, a2d, base: tokenizer"
        arguments = (directory, root, name, MASK_TEXTS.get(form, "<|MASK|>"))
        results.append(attempt(group, directory.name, check_tokenizer, *arguments))
        if IS_OLD and not again and (directory / "vocab.json").exists():  # 5 has no slow ones
            slow = f"{directory.name}, slow"
            results.append(attempt(group, slow, check_tokenizer, *arguments, False))
    return results


def check_saved(root: Path) -> list[Result]:
    """Exports with code load again from what this version made of them; the code came along."""
    results = []
    for directory in sorted((root / "saved" / VERSION).iterdir()):
        form, _, name = directory.name.partition("-")
        if form in AUTO_CLASSES and name != "bfloat16":
            again = (check_again, directory, form, root, name)
            results.append(attempt("saved by it, loaded: logits", directory.name, *again))
    return results


def check_again(directory: Path, form: str, root: Path, name: str) -> str:
    """As `check_model`; and the keys of RoPE are those that we wrote, for readers of every age."""
    export = root / "exports" / directory.name
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (export, directory)
    )
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        require(key, after.get(key, "absent"), before[key])
    return check_model(directory, form, root, name)


def check_controls(root: Path) -> list[Result]:
    """A control passes if its check fails, for its own reason, in the versions where it must."""
    results = []
    for folder, (model, versions, reason) in CONTROLS.items():
        directory, group = root / "controls" / folder, f"control: {folder}"
        if not directory.is_dir():  # no version 5 was there to save one
            continue
        if folder.startswith("tokenizer"):
            tokenizer = (directory, root, model, "<|MASK|>")
            found = attempt(group, folder, check_tokenizer, *tokenizer)
        else:
            form = "sdar" if folder.startswith("sdar") else "base"
            found = attempt(group, folder, check_model, directory, form, root, model)
        if VERSION.startswith(versions):
            fails = not found.passed and re.search(reason, found.detail) is not None
            found = replace(found, passed=fails, detail=f"fails: {found.detail[:50]}")
        elif found.passed:
            found = replace(found, detail="loads")
        results.append(found)
    return results


def save(root: Path) -> list[Result]:
    """Load every original and every export with code; save it as this version does."""
    exports = [path for form in AUTO_CLASSES for path in (root / "exports").glob(f"{form}-*")]
    return [
        attempt("saved by it", directory.name, save_again, root, directory)
        for directory in [*(root / "original").iterdir(), *exports]
    ]


def save_again(root: Path, directory: Path) -> str:
    """Load one and save it to ROOT/saved/VERSION."""
    out = root / "saved" / VERSION / directory.name
    load_model(directory, directory.name.split("-")[0]).save_pretrained(out)
    load_tokenizer(directory).save_pretrained(out)
    return "saved"


def check(root: Path) -> list[Result]:
    """Everything that ROOT holds."""
    packages = ("tokenizers", "huggingface_hub", "torch")
    numbers = [Result(name, name, True, version(name)) for name in packages]
    return numbers + check_exports(root) + check_saved(root) + check_controls(root)


def write_results(root: Path, of_version: str, kind: str, results: list[Result]) -> None:
    """For `report.py`."""
    folder = root / "results" / of_version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{kind}.json").write_text(json.dumps([asdict(result) for result in results]))


def main() -> None:
    """See the top of this file."""
    command, root = sys.argv[1], Path(sys.argv[2])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if command == "save":
        write_results(root, VERSION, "2-saved", save(root))
    else:
        write_results(root, VERSION, "1-loaded", check(root))


if __name__ == "__main__":
    main()
