"""The method on one screen: a causal language model becomes a block-diffusion one, on-policy.

The student starts as the teacher, but sees whole blocks and fills in masked tokens. It decodes; at
each token that was masked it learns what the frozen teacher would have said. Section and equation
numbers are the paper's. Left out: batches, KV cache, packing, parallelism, resume, other methods.
Shapes: L positions, N blocks of K, S stream tokens, H heads, T masked positions, V vocabulary."""

import hashlib
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent / "quickstart/teacher"
K, STEPS, THRESHOLD = 4, 4, 0.9  # block size, denoising steps per block, confidence to commit early
ROLLOUTS, PROMPTS, ROWS, SEED = 12, 64, 8, 0  # prompts per rollout, rows per optimizer step
L_MIN, L_MAX, S_WARM = 4, 40, 8  # most response tokens: of the first rollout, and from S_WARM on
LR, MIN_LR, WARMUP, DECAY = 1.5e-3, 1.5e-4, 5, ROLLOUTS * PROMPTS // ROWS  # in optimizer steps
CONFIG, TOKENS = (json.loads((HERE / f"{n}.json").read_text()) for n in ("config", "tokenizer"))
VOCAB = TOKENS["model"]["vocab"] | {t["content"]: t["id"] for t in TOKENS["added_tokens"]}
EOS, MASK = {VOCAB["<|im_end|>"], VOCAB["<|endoftext|>"]}, len(VOCAB)  # MASK: a row that is free
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
LONGEST = re.compile("|".join(map(re.escape, sorted(VOCAB, key=len, reverse=True))))


def encode(question):  # the longest token that fits: on these prompts, what byte-pair merges give
    text = CHAT.format(question).replace(" ", "Ġ").replace("\n", "Ċ")
    return torch.tensor([VOCAB[token] for token in LONGEST.findall(text)])


def read_weights(path):  # safetensors: length of the header, header in JSON, here float32 numbers
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    kept = [(n, e) for n, e in json.loads(raw[8:start]).items() if "shape" in e]
    raw = torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8)
    return {n: raw[slice(*e["data_offsets"])].view(torch.float32).view(e["shape"]) for n, e in kept}


def key(*parts):  # a draw is a function of what it is for, not of what was drawn before it
    text = "".join(f"{type(part).__name__[0]}{len(str(part))}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniform(keys, columns):  # [T, C] in (0, 1), of keys [T] and columns [C]
    def mix(bits):  # a 32-bit finaliser, github.com/skeeto/hash-prospector
        for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97 - (1 << 32))):
            bits = (bits ^ bits >> shift) * factor & 0xFFFFFFFF
        return bits ^ bits >> 15

    low, high = mix(keys & 0xFFFFFFFF)[:, None], mix(keys >> 32 ^ 0x9E3779B9)[:, None]
    bits = mix((low ^ high) + (low >> 1 | 1) * mix(columns ^ 0x85EBCA6B) & 0xFFFFFFFF)
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def visible(noisy, block):  # tags [S] -> [S, S], who (row) sees whom; causal = blocks of one token
    to_clean = (block < block[:, None]) | (block == block[:, None]) & ~noisy[:, None]  # x_0^{<b}
    return torch.where(noisy, (block == block[:, None]) & noisy[:, None], to_clean)  # own x_t^b


def transformer(w, ids, wanted, block_size=K, parts=1):  # [T, V] logits of a Qwen3 where wanted
    def layer(name, x):  # in layer `at`; the weight of a norm is a vector, of a product a matrix
        y = w[f"{at}{name}.weight"]
        return F.linear(x, y) if y.dim() == 2 else F.rms_norm(x, y.shape, y, CONFIG["rms_norm_eps"])

    length, size, x = len(ids) // parts, CONFIG["head_dim"], w["model.embed_tokens.weight"][ids]
    position = torch.arange(length).repeat(parts)  # two parts are [clean | noisy]
    mask = visible(torch.arange(len(ids)) >= length, position // block_size)
    angle = position[:, None] / CONFIG["rope_theta"] ** (torch.arange(0, size, 2) / size)
    cos, sin = torch.cat([angle, angle], dim=1).cos(), torch.cat([-angle, angle], dim=1).sin()
    for at in (f"model.layers.{i}." for i in range(CONFIG["num_hidden_layers"])):  # noqa: B007
        h = layer("input_layernorm", x)
        q, k, v = (layer(f"self_attn.{n}_proj", h).T.unflatten(0, (-1, size)).mT for n in "qkv")
        q, k = layer("self_attn.q_norm", q), layer("self_attn.k_norm", k)  # [H, S, size]
        q, k = (y * cos + y.roll(size // 2, dims=2) * sin for y in (q, k))  # RoPE
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + layer("self_attn.o_proj", h.transpose(0, 1).flatten(1))
        h = layer("post_attention_layernorm", x)
        x = x + layer("mlp.down_proj", F.silu(layer("mlp.gate_proj", h)) * layer("mlp.up_proj", h))
    at = "model."  # the head is the embedding; nobody ever says the mask token
    return layer("embed_tokens", layer("norm", x[wanted])).index_fill(1, torch.tensor(MASK), -1e9)


@torch.no_grad()
def rollout(w, prompt, limit, temperature, noise_key):  # Algorithm 1, line 3: tau ~ Gamma_theta^rev
    end = len(prompt) + limit
    x = F.pad(prompt, (0, -end % K + limit), value=MASK)  # [L], whole blocks
    commit = torch.full_like(x, -1)  # [L] denoising step that made the token; -1: not decoded
    for block in range(len(prompt) // K * K, len(x), K):
        step = 0
        while len(masked := (x[: block + K] == MASK).nonzero()[:, 0]):  # [T]
            logits = transformer(w, x[: block + K], masked)
            noise = uniform(noise_key ^ (masked << 8 | step), torch.arange(logits.shape[1]))
            tokens = (logits - temperature * (-(-noise).log1p()).log()).argmax(1)  # Gumbel-max
            confidence = logits.softmax(1).gather(1, tokens[:, None])[:, 0]
            rank = confidence.argsort(descending=True, stable=True).argsort()
            quota = K // STEPS + (step < K % STEPS)  # static remasking; dynamic: all that are sure
            chosen = (rank < quota) | (confidence > THRESHOLD)
            x[masked[chosen]], commit[masked[chosen]] = tokens[chosen], step
            step += 1
        response = range(max(block, len(prompt)), min(block + K, end))
        if ends := [place + 1 for place in response if int(x[place]) in EOS]:
            return x[: block + K], commit[: block + K], ends[0]
    return x, commit, end


def select_state(commit, state_key):  # nu: every block before one of its own denoising steps
    grid = commit.view(-1, K)  # [N, K]
    block = torch.arange(len(grid)) - int((commit < 0).sum()) // K  # 0: holds the first response
    draws = uniform(torch.tensor([state_key]), block.clamp(min=0))[0].double()
    return (grid >= (draws * (grid.amax(1) + 1)).long()[:, None]).flatten()  # [L] masked in x_t


def distill_loss(student, teacher, x, masked, end):  # Eq. 6, w(t) = 1, mean over the row
    wanted = (masked & (torch.arange(len(x)) < end)).nonzero()[:, 0]  # [T]
    stream = torch.cat([x, x.masked_fill(masked, MASK)])  # [clean x_0 | noisy x_t]
    output = transformer(student, stream, len(x) + wanted, parts=2).log_softmax(1)
    target = transformer(teacher, x, wanted - 1, block_size=1).log_softmax(1)  # of the next token
    return (target.exp() * (target - output)).sum(1).mean()  # forward KL over the vocabulary


if __name__ == "__main__":
    torch.set_num_threads(1)  # for a model this small a second one costs more than it gives
    lines = (HERE.parent / "data/train_prompts.jsonl").read_text().splitlines()
    noise = uniform(torch.tensor([key(SEED, "prompt order", 0)]), torch.arange(len(lines)))[0]
    prompts = [json.loads(lines[i]) for i in noise.argsort(stable=True)[: ROLLOUTS * PROMPTS + 1]]
    teacher = read_weights(HERE / "model.safetensors")
    student = {name: tensor.clone().requires_grad_() for name, tensor in teacher.items()}
    adam = torch.optim.AdamW(student.values(), betas=(0.9, 0.95), weight_decay=0.0)
    for r in range(ROLLOUTS + 1):  # the last round only answers
        x, _, _ = rollout(student, encode(prompts[-1]["prompt"]), L_MAX, 0.0, 0)
        print("".join(list(VOCAB)[i] for i in x).replace("Ġ", " ").replace("Ċ", " "))
        limit, rows = min(L_MAX, L_MIN + r * (L_MAX - L_MIN) // S_WARM), []  # section 4.3
        for prompt in prompts[:-1][r * PROMPTS : (r + 1) * PROMPTS]:
            keys = [key(SEED, use, r, prompt["id"], 0) for use in ("rollout", "state")]
            x, commit, end = rollout(student, encode(prompt["prompt"]), limit, 1.0, keys[0])
            rows.append((x, select_state(commit, keys[1]), end))
        for i in range(0, len(rows), ROWS):
            loss = torch.stack([distill_loss(student, teacher, *row) for row in rows[i : i + ROWS]])
            loss.nanmean().backward()  # a row without a masked response token has no loss
            norm = torch.nn.utils.clip_grad_norm_(student.values(), 1.0)
            step = (r * PROMPTS + i) // ROWS
            cosine = 1 + math.cos(math.pi * max(0, step - WARMUP) / (DECAY - WARMUP))
            lr = min(LR * (step + 1) / WARMUP, MIN_LR + (LR - MIN_LR) * cosine / 2)
            adam.param_groups[0]["lr"] = lr
            adam.step()
            adam.zero_grad()
            print(f"rollout {r} step {step} limit {limit} KL {loss.nanmean():.4f} norm {norm:.2f}")
