"""README.md of an export: what it is, where it comes from, how to load and serve it."""

import dataclasses
import re
import shlex
from importlib import resources
from pathlib import PurePath
from typing import Any

from megatron_opdlm.convert.formats import FORMATS
from megatron_opdlm.convert.formats.format import ExportedModel, ExportFormat
from megatron_opdlm.diffusion.remasking import RULES
from megatron_opdlm.model.families import FAMILIES

# Key of the lineage or of the training state -> label, in the order of the table.
_LABELS = {
    "source": "base model",
    "teacher": "teacher",
    "data": "training data",
    "method": "method",
    "response_tokens": "response tokens",
    "optimizer_steps": "optimizer steps",
    "rollout_step": "rollouts",
    "seed": "seed",
}
_PREDICTION = {
    "same_position": "Position i predicts token i: logits are unshifted.",
    "next_position": "Position i - 1 predicts token i, as in the autoregressive model: logits are"
    " shifted. The token before a block predicts its first token.",
}
_PREDICTING = {
    "same_position": "position i predicting token i",
    "next_position": "position i - 1 predicting token i",
}
_PATHS = ("teacher", "data")


def model_card(
    model: ExportedModel, export_format: ExportFormat, *, has_chat_template: bool
) -> str:
    """Returns the text of the card. Its code blocks run unchanged next to the exported folder.

    Args:
        model: the exported model; numbers and strings of its lineage and state are listed.
        export_format: format of the export, which names the sections.
        has_chat_template: whether the tokenizer has a chat template; without one the code begins
            with plain text.
    """
    sections = (_read(name).strip() for name in export_format.card_sections(model))
    tags = ["megatron-opdlm"]
    if export_format.for_students:
        tags = ["block-diffusion", export_format.name, *tags]
    text = _read("card.md").replace("@SECTIONS@", "\n\n".join(sections))
    substitutions = {
        "@INTRODUCTION@": _introduction(model, export_format, has_chat_template),
        "@PROMPT@": _read("prompt_chat.md" if has_chat_template else "prompt_text.md").strip(),
        "@TAGS@": ", ".join(tags),
        "@TABLE@": "\n".join(f"| {key} | {value} |" for key, value in _rows(model).items()),
        "@FAMILY@": model.config.family,
        "@BLOCK@": str(model.block_size),
        "@MASK@": str(model.mask_token_id),
        "@RULES@": ", ".join(map(_rule, RULES)),
        "@THINKING@": str(bool(model.lineage.get("enable_thinking", False))),
    }
    for key, value in substitutions.items():
        text = text.replace(key, value)
    names = {
        "@NAME@": model.name,
        "@PYTHON_NAME@": repr(model.name),
        "@SHELL_NAME@": shlex.quote(model.name),
    }  # last and in one pass, because the user's names may contain such keys
    return re.sub("|".join(names), lambda found: names[found[0]], text)


def _introduction(
    model: ExportedModel, export_format: ExportFormat, has_chat_template: bool
) -> str:
    if not model.is_trained:
        text = "The weights of an autoregressive language model, not trained any further."
        if export_format.for_students:
            text += (
                " In this form they decode blocks of @BLOCK@ tokens, which they have not learnt"
                " yet: a starting point for training."
            )
    elif export_format.for_students:
        text = (
            "A block-diffusion language model: text is decoded block by block (@BLOCK@ tokens"
            " each), several tokens per forward pass. It was made from an autoregressive model with"
            f" megatron-opdlm. {_PREDICTION[model.prediction]}"
        )
    else:
        text = (
            "**These are the weights of a block-diffusion student** (blocks of @BLOCK@ tokens),"
            " under the @FAMILY@ names. Programs load them as an autoregressive model, but they"
            f" were trained to predict masked tokens, {_PREDICTING[model.prediction]}, under"
            " block-causal attention: generating token after token is not what they learnt. To"
            f" decode text, export the checkpoint {_student_formats()}."
        )
    if model.moved_mask_from is not None:
        text += (
            f"\n\nThe mask token was moved from id {model.moved_mask_from} to id @MASK@, which"
            " serving engines hard-code: its input embedding was copied there, and the output layer"
            " is a tensor of its own with the rows as trained."
        )
    if export_format.for_students and not has_chat_template:
        text += (
            "\n\nThe tokenizer of the base model has no chat template: a prompt is text that the"
            " model continues."
        )
    return text


def _student_formats() -> str:
    """The formats that decode, and for which families where that is not for all."""
    formats = [item for item in FORMATS.values() if item.for_students]
    texts = []
    for item in sorted(formats, key=lambda item: -len(item.families)):
        names = " or ".join(FAMILIES[name].class_name for name in item.families)
        condition = "" if len(item.families) == len(FAMILIES) else f", if it is a {names},"
        texts.append(f"{condition} as `{item.name}`")
    return " or".join(texts).lstrip(", ")


def _rows(model: ExportedModel) -> dict[str, Any]:
    config = model.config
    rows: dict[str, Any] = {"layers x hidden": f"{config.num_layers} x {config.hidden_size}"}
    rows["vocabulary"] = config.vocab_size
    if model.mask_token_id is not None:
        rows["mask token id"] = model.mask_token_id
    if model.block_size is not None:
        rows["block size"] = model.block_size
        rows["prediction"] = model.prediction
    recorded = {
        key: _without_folders(value) if key in _PATHS else value
        for key, value in (dict(model.state) | dict(model.lineage)).items()
        if isinstance(value, str | int | float)
    }
    rows |= {label: recorded.pop(key) for key, label in _LABELS.items() if key in recorded}
    return rows | recorded


def _without_folders(value: Any) -> Any:
    """Returns the last part of an absolute path, because its folders are private."""
    is_absolute = isinstance(value, str) and PurePath(value).is_absolute()
    return PurePath(value).name if is_absolute else value


def _rule(name: str) -> str:
    """Returns a remasking rule with its parameters, as `generate` accepts them."""
    parameters = [f"`{field.name}={field.default}`" for field in dataclasses.fields(RULES[name])]
    return f"`{name}` with {', '.join(parameters)}" if parameters else f"`{name}`"


def _read(name: str) -> str:
    card = resources.files("megatron_opdlm.convert.formats") / "cards" / name
    return card.read_text(encoding="utf-8")
