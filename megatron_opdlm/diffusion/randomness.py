"""Counter-based random numbers: noise is a function of its coordinates, not of the order of calls.

A key, made of (seed, step, prompt id, sample, block ...), names a row of noise; a column names an
entry of the row. So results do not depend on batch composition, data-parallel size, vocabulary
sharding or resume.

The bits come from integer arithmetic and are the same on CPU and CUDA. Every product stays below
2**63, so nothing relies on overflow.

Shape letters: T rows (one key each), C columns.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

MASK_32 = 0xFFFFFFFF
# This is the two-round 32-bit finaliser "21f0aaad/d35a2d97" of
# https://github.com/skeeto/hash-prospector. It has less bias than murmur3's. The second factor is
# written as its negative residue modulo 2**32, so that products stay within 63 bits.
FINALISER_ROUNDS = ((16, 0x21F0AAAD), (15, 0xD35A2D97 - (1 << 32)))
FINAL_SHIFT = 15
KEY_SALT, COLUMN_SALT = 0x9E3779B9, 0x85EBCA6B
LARGEST_UNIFORM = 1.0 - 2.0**-24  # the float32 before 1


def key(*parts: int | str) -> int:
    """Returns the 63-bit key that names a row of noise, stable across processes and machines.

    Distinct part lists give distinct keys up to a collision chance of 2**-63: `key(1, 23) !=
    key(12, 3)`, `key(1) != key("1")`.

    Args:
        *parts: values that the noise depends on, for example (seed, step, prompt id, sample,
            block).

    Raises:
        TypeError: a part is neither an int nor a str.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if not isinstance(part, (int, str)):
            raise TypeError(f"key part {part!r} is a {type(part).__name__}; use int or str")
        kind, text = (b"s", part.encode()) if isinstance(part, str) else (b"i", b"%d" % part)
        digest.update(b"%s%d:%s" % (kind, len(text), text))
    return int.from_bytes(digest.digest(), "big") >> 1


def uniform(keys: Tensor, columns: Tensor) -> Tensor:
    """Returns uniform noise; entry [t, c] depends only on keys[t] and columns[c].

    The resolution near 0 is 2**-32. The value is never 0 and never 1.

    Args:
        keys: [T] int64, from `key`.
        columns: [C] int64 in [0, 2**32), the same columns for all rows; or [T, C] int64, other
            columns for every row.

    Returns:
        [T, C] float32 in (0, 1), bit-identical on every device.
    """
    bits = _bits(keys, columns).to(torch.float32)
    return bits.add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_UNIFORM)


def gumbel(keys: Tensor, columns: Tensor) -> Tensor:
    """Returns standard Gumbel noise, -log(-log(1 - u)) of `uniform`.

    The argmax of logits + noise is a sample from their softmax. Large values, which decide the
    argmax, come from u near 0, where the resolution is finest. They reach 22.9, so a token of
    probability 1e-9 can be drawn.

    Args:
        keys: [T] int64, from `key`.
        columns: [C] int64 in [0, 2**32), the same columns for all rows; or [T, C] int64, other
            columns for every row.

    Returns:
        [T, C] float32. Devices differ only by the rounding of their logarithm.
    """
    return uniform(keys, columns).neg_().log1p_().neg_().log_().neg_()


def permutation(key: int, count: int) -> list[int]:
    """Returns the numbers below `count` in an order that is a function of the key.

    It is an argsort of counter-based noise, so it is the same in every version of torch.
    """
    noise = uniform(torch.tensor([key]), torch.arange(count))[0]
    return torch.argsort(noise, stable=True).tolist()


def _bits(keys: Tensor, columns: Tensor) -> Tensor:
    """Returns [T, C] int64 in [0, 2**32): finaliser of multiplier_t * column_c + offset_t."""
    shape = columns.shape
    # One call mixes all three small inputs: kernel launches cost more than this arithmetic.
    mixed = _finalise(
        torch.cat(
            [
                keys & MASK_32,
                (keys >> 32 & MASK_32) ^ KEY_SALT,
                (columns.reshape(-1) & MASK_32) ^ COLUMN_SALT,
            ]
        )
    )
    num_rows = len(keys)
    # An odd multiplier maps the columns of a row one to one. It is below 2**31, so that the product
    # fits into 63 bits.
    multiplier = (mixed[:num_rows] >> 1 | 1).unsqueeze(1)
    offset = (mixed[num_rows : 2 * num_rows] ^ mixed[:num_rows]).unsqueeze(1)
    column = mixed[2 * num_rows :].view(shape)
    if column.dim() == 1:
        column = column.unsqueeze(0)
    return _finalise(torch.addcmul(offset, multiplier, column).bitwise_and_(MASK_32))


def _finalise(bits: Tensor) -> Tensor:
    """Mixes every 32-bit value of an int64 tensor in place. The map is one to one; a change of one
    input bit changes about half of the output bits.
    """
    for shift, factor in FINALISER_ROUNDS:
        bits.bitwise_xor_(bits >> shift).mul_(factor).bitwise_and_(MASK_32)
    return bits.bitwise_xor_(bits >> FINAL_SHIFT)
