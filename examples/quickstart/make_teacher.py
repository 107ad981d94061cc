"""Makes the quickstart's teacher: a really trained, very small Qwen3 in Hugging Face format.

    python examples/quickstart/make_teacher.py --seed 0

Regenerates the task data, trains a byte-level BPE tokenizer and a causal Qwen3 model from scratch
on one CPU core, and writes ``teacher/`` and ``data/`` next to this file. The committed copies come
from the default arguments; running it is only needed to change the task or the model.

Shapes: B batch, S sequence, V vocab.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from task import Problem, is_correct, make_problem, make_split
from tokenizer_files import write_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.cli import run_script
from megatron_opdlm.files.paths import folder

HERE = Path(__file__).resolve().parent
NUM_TRAIN_PROMPTS = 4096
NUM_HELDOUT = 1024
IGNORE = -100
NOISE = 0.5
"""Largest share of a response that is replaced by wrong tokens while the teacher trains."""
SPARE_ROWS = 9
"""Embedding rows above the tokenizer, as in the released Qwen3; one becomes the mask token."""


def build_config(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict[str, object]:
    """The content of ``config.json``, readable by transformers 4 and 5 (both spellings)."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "hidden_size": args.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": args.intermediate_size,
        "max_position_embeddings": 512,
        "max_window_layers": args.num_layers,
        "num_attention_heads": 4,
        "num_hidden_layers": args.num_layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "dtype": "float32",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": len(tokenizer) + SPARE_ROWS,
    }


def prompt_texts(tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> list[str]:
    """What the model sees before its response: the chat template with thinking switched off."""
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    return tokenizer.apply_chat_template(
        chats, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def training_batch(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of worked examples, padded on the right.

    Returns:
        ids: [B, S] int64, prompt, response and end-of-sequence token.
        labels: [B, S] int64, the response and end-of-sequence ids; IGNORE elsewhere.
    """
    prompts = tokenizer(prompt_texts(tokenizer, problems))["input_ids"]
    responses = tokenizer([p.response + tokenizer.eos_token for p in problems])["input_ids"]
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(problems), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORE)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    return ids, labels


def corrupt(ids: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
    """Replaces response tokens in the input of some rows; the labels stay as they are.

    The model learns to get back on track after a wrong token, which makes it a useful teacher on
    text that a half-trained student wrote. A large pretrained model has this already.

    Args:
        ids: [B, S] int64, worked examples.
        labels: [B, S] int64, IGNORE outside the response.
        share: expected share of rows with replaced tokens.

    Returns:
        [B, S] int64; up to NOISE of a row's response is drawn from the batch's response tokens.
    """
    in_response = labels != IGNORE
    pool = ids[in_response]
    rate = torch.rand(len(ids), 1) * NOISE * (torch.rand(len(ids), 1) < share)
    replace = in_response & (torch.rand(ids.shape) < rate)
    return torch.where(replace, pool[torch.randint(len(pool), ids.shape)], ids)


def learning_rate(step: int, num_steps: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    args: argparse.Namespace,
    exclude: set[str],
) -> None:
    """Next-token training on fresh problems, none of which is in ``exclude``."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    index = 0
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("teacher", total=args.steps)
        for step in range(args.steps):
            problems: list[Problem] = []
            while len(problems) < args.batch_size:
                problem = make_problem(args.seed, "teacher", index)
                index += 1
                if problem.prompt not in exclude:
                    problems.append(problem)
            assert exclude.isdisjoint(p.prompt for p in problems), "held-out question in training"
            ids, labels = training_batch(tokenizer, problems)
            ids = corrupt(ids, labels, share=0.5 if 4 * step >= args.steps else 0.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
            hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
            keep = labels[:, 1:] != IGNORE
            logits = model.lm_head(hidden[keep])
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][keep])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(bar, advance=1, description=f"teacher  loss {loss.item():.4f}")


@torch.no_grad()
def responses(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    temperature: float,
    seed: int = 0,
) -> list[str]:
    """The model's response to each problem; temperature 0 is greedy."""
    tokenizer.padding_side = "left"
    batch = tokenizer(prompt_texts(tokenizer, problems), return_tensors="pt", padding=True)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    out = model.generate(
        **batch, max_new_tokens=48, **(sampling if temperature else {"do_sample": False})
    )
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    tokenizer.padding_side = "right"
    return texts


def accuracy(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    temperature: float,
) -> float:
    """Share of problems answered correctly."""
    model.eval()
    texts = responses(model, tokenizer, problems, temperature=temperature)
    pairs = zip(texts, problems, strict=True)
    return sum(is_correct(text, problem.answer) for text, problem in pairs) / len(problems)


def write_jsonl(path: Path, problems: list[Problem]) -> None:
    """Writes prompt records, one per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(p.as_record()) + "\n" for p in problems))


def save_model(model: Qwen3ForCausalLM, config: dict[str, object], out: Path) -> None:
    """Writes weights and configs; ``lm_head`` is tied to the embedding and is not stored."""
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": config["bos_token_id"],
        "do_sample": False,
        "eos_token_id": [config["eos_token_id"], config["pad_token_id"]],
        "pad_token_id": config["pad_token_id"],
        "transformers_version": "4.51.0",
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    """Command line; the defaults make the committed teacher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=folder, default=HERE)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-threads", type=int, default=1, help="1 keeps runs bit-identical")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, int):
            require_at_least(int(name != "seed"), f"--{name.replace('_', '-')}", value)
    require(0 < args.lr < math.inf, "--lr", args.lr, "must be positive and finite", "use e.g. 3e-3")
    return args


def main() -> None:
    """Data, tokenizer, model, report."""
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    heldout = make_split(args.seed, "heldout", NUM_HELDOUT)
    heldout_prompts = {problem.prompt for problem in heldout}
    prompts = make_split(args.seed, "train", NUM_TRAIN_PROMPTS, exclude=heldout_prompts)
    assert heldout_prompts.isdisjoint(p.prompt for p in prompts), "held-out question in train"
    write_jsonl(args.out / "data" / "heldout.jsonl", heldout)
    write_jsonl(args.out / "data" / "train_prompts.jsonl", prompts)

    teacher_dir = args.out / "teacher"
    write_tokenizer(teacher_dir, make_split(args.seed, "tokenizer", 4000, heldout_prompts))
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    config = build_config(tokenizer, args)
    model = Qwen3ForCausalLM(Qwen3Config(**config))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"vocabulary {len(tokenizer)} + {SPARE_ROWS} spare rows, {num_parameters:,} parameters")
    train(model, tokenizer, args=args, exclude=heldout_prompts)
    for name, temperature in (("greedy", 0.0), ("sampled at temperature 1", 1.0)):
        share = accuracy(model, tokenizer, heldout, temperature=temperature)
        print(f"held-out accuracy, {name}: {share:.2%} of {len(heldout)}")
    save_model(model, config, teacher_dir)


if __name__ == "__main__":
    run_script(main)
