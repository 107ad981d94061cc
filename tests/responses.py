"""A student's responses one by one, and their figures by hand: an oracle of evaluations.

A question is put into the tests' chat template here, and the engine is asked for this one response.
Nothing of tasks, of what is dropped or of how figures are taken from trajectories is used.
"""

import torch

from tests.tiny import EOS_TOKEN_IDS


def open_student(model):
    from megatron_opdlm.generate.decoder import Decoder

    return Decoder.open(str(model.checkpoint))


def _decode_one(decoder, name, text, options, *, seed=0, limit, suffix=""):
    """(token ids up to the end, commit steps up to the end of the block, prompt length)."""
    from megatron_opdlm.diffusion import randomness
    from megatron_opdlm.rollout.decodable import Decodable
    from megatron_opdlm.rollout.engine import RolloutEngine
    from megatron_opdlm.rollout.request import Request

    tokenizer = decoder.student.tokenizer
    ids = tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{suffix}")
    decodable = Decodable(
        model=decoder.student.model,
        parallel=decoder.parallel,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_ids=EOS_TOKEN_IDS,
    )
    engine = RolloutEngine(decodable, options)
    request = Request(
        prompt_id=name,
        sample=0,
        prompt_ids=torch.tensor(ids),
        response_limit=limit,
        key=randomness.key(seed, "generate", name, 0),
    )
    (found,) = engine.generate([request])
    return found.response_ids.tolist(), found.commit_step.tolist(), len(ids)


def by_hand(decoder, name, text, options, *, limit, **choice):
    """One response and its figures: text, tokens, passes, whether it ended."""
    ids, steps, start = _decode_one(decoder, name, text, options, limit=limit, **choice)
    ends = [place for place, token in enumerate(ids[:limit]) if token in EOS_TOKEN_IDS]
    length = ends[0] + 1 if ends else limit
    blocks = {}
    for place, step in enumerate(steps, start):
        block = place // options.block_size
        blocks[block] = max(blocks.get(block, 0), step + 1)
    text = decoder.student.tokenizer.decode(ids[:length], skip_special_tokens=True)
    return {"text": text, "tokens": length, "passes": sum(blocks.values()), "ended": bool(ends)}
