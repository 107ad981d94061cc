"""A Llama in a GGUF as a Hugging Face directory in float32, checked against the GGUF itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from megatron_opdlm.files.folders import write_json

LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
PROMPTS = (
    "What is the capital of Italy?",
    "Write one sentence about a dog that learns to swim.",
    "Add 17 and 25, then explain how: 2, 3; naïve café — 日本",
)
"""Their logits must be equal, and their tokens there and back."""
NOT_OF_THE_MODEL = (
    "_name_or_path", "_model_name_or_path", "quantization_config", "transformers_version",
    "dtype", "torch_dtype",
)  # fmt: skip
"""Keys of a configuration that say where it came from."""
NOTICE = """# SmolLM2-135M-Instruct, dequantised

Model by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), Apache License 2.0; the text is in `LICENSE`.

The weights are those of `{name}` (sha256 `{sha256}`), which the Python package `{package}` holds. The file
has 4 bits per weight; transformers turned them into float32 without training. So this model is not bit-equal to the published one.
"""  # noqa: E501


def require_readers() -> None:
    """Refuses to begin without the packages that read a GGUF.

    Raises:
        ImportError: gguf or accelerate is missing.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{' and '.join(missing)} must be installed to read a GGUF; run: "
            "bash tools/setup_venv.sh --extra gguf"
        )


def quiet_transformers() -> None:
    """Makes transformers silent, and keeps it off the network."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in files here
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_gguf(path: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer as transformers reads them from a GGUF.

    Raises:
        ValueError: transformers cannot read it as a Llama.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, str] = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype="float32", **where)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    if model.config.model_type != "llama" or not tokenizer.chat_template:
        raise ValueError(
            f"{path.name} holds a {model.config.model_type}"
            f"{'' if tokenizer.chat_template else ' without a chat template'}; needs a Llama with "
            "a chat template"
        )
    return model.eval(), tokenizer


def write_directory(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes config, weights and tokenizer into an existing folder.

    Args:
        model: as transformers loaded it from a GGUF; it refuses to be saved itself.
        tokenizer: of the same file.
        folder: where files go.
    """
    from safetensors import SafetensorError
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    values = model.config.to_dict()
    values = {key: value for key, value in values.items() if key not in NOT_OF_THE_MODEL}
    values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")  # the GGUF has it in float32
    plain = LlamaForCausalLM(LlamaConfig(**values))
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    ids = {f"{name}_token_id": values[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    plain.generation_config = GenerationConfig(**ids)
    try:
        plain.save_pretrained(folder)
    except SafetensorError as error:  # it says so of a full disk, too
        raise OSError(
            f"cannot write the weights to {folder}: {error}; if the disk is full, make room or "
            "choose another folder"
        ) from None
    (folder / "model.safetensors").chmod(0o644)
    write_tokenizer(tokenizer, folder, values["max_position_embeddings"])


def write_tokenizer(tokenizer: Any, folder: Path, longest: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template.

    `save_pretrained` would note where the tokenizer was loaded from.

    Args:
        tokenizer: of the GGUF.
        folder: where files go.
        longest: tokens that the model can read.
    """
    text = tokenizer.backend_tokenizer.to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: str(getattr(tokenizer, name)) for name in names if getattr(tokenizer, name)}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest}
    write_json(folder / "tokenizer_config.json", special | values)


def write_licence(folder: Path, *, name: str, sha256: str, package: str) -> None:
    """Writes whose model this is, and its licence."""
    shutil.copyfile(LICENSE, folder / "LICENSE")
    notice = NOTICE.format(name=name, sha256=sha256, package=package)
    (folder / "README.md").write_text(notice, encoding="utf-8")


def require_equal(model: Any, tokenizer: Any, folder: Path) -> None:
    """Reloads a directory and compares it with the GGUF's model and tokenizer, exactly.

    Raises:
        ValueError: tokens, text, a rendered chat or a logit differs.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read_model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    read_tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        texts = [
            t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for t in (tokenizer, read_tokenizer)
        ]
        ids = [t(texts[0]).input_ids for t in (tokenizer, read_tokenizer)]
        back = [t.decode(ids[0]) for t in (tokenizer, read_tokenizer)]
        if texts[0] != texts[1] or ids[0] != ids[1] or back[0] != back[1]:
            raise ValueError(f"the written tokenizer differs from the GGUF's on {prompt!r}")
        batch = torch.tensor([ids[0]])
        with torch.no_grad():
            delta = (model(batch).logits - read_model(batch).logits).abs().max().item()
        if delta != 0:  # NaN is no zero
            raise ValueError(f"logits of the written model differ by {delta:g} on {prompt!r}")
