"""One pass over a shard's logits on a GPU, with Triton: noise, best token, normaliser, mean logit.

The first kernel reads the logits once, as they are, in tiles of `TILE` logits: of one row, or of
several where the vocabulary is small. It writes a few numbers per tile. The second kernel puts the
tiles of a row together. Every tile covers the same columns whatever else is in the batch, and sums
have a fixed order, so a row's result depends on nothing but the row.

NaN: the maximum of a GPU skips it, so none may get into one. Before anything else a NaN is counted
as +inf, and a row with +inf has the sum exp(inf - inf), which is NaN on every device.

Compiled for compute capability 9.0 (no registers spilled) and tested in Triton's interpreter; not
yet run on a device. With noise, a logit takes some 110 instructions, half of them for two exact
logarithms, so arithmetic is expected to bound it, not memory; without noise, some 30.

Shape letters: T rows; in the kernels R rows and C columns of a tile, S tiles of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_opdlm.diffusion import randomness

TILE = 1024
"""Logits of a program. 151,936 columns make 149 programs, so that a single row occupies all 132
processors of an H100 or H200. Larger tiles would leave some idle; smaller ones have more reductions
per logit."""
NUM_WARPS = 2
"""Of a tile: 16 logits per thread, which are two loads of 16 bytes in bfloat16. A reduction costs a
thread the same however many logits it has, and with 16 of them all reductions are a tenth of its
work; with 32 it would need twice the registers."""
COMBINED = 256
"""Tiles that a program of the second kernel puts together, of one row or several."""

SHIFT_1 = tl.constexpr(randomness.FINALISER_ROUNDS[0][0])
SHIFT_2 = tl.constexpr(randomness.FINALISER_ROUNDS[1][0])
SHIFT_3 = tl.constexpr(randomness.FINAL_SHIFT)
# uint32 products wrap, so the factors are wanted modulo 2**32
FACTOR_1 = tl.constexpr(randomness.FINALISER_ROUNDS[0][1] & randomness.MASK_32)
FACTOR_2 = tl.constexpr(randomness.FINALISER_ROUNDS[1][1] & randomness.MASK_32)
KEY_SALT = tl.constexpr(randomness.KEY_SALT)
COLUMN_SALT = tl.constexpr(randomness.COLUMN_SALT)
LARGEST_UNIFORM = tl.constexpr(randomness.LARGEST_UNIFORM)
INFINITY = tl.constexpr(float("inf"))


def kernel_statistics(
    logits_TV: Tensor,
    keys: Tensor,
    *,
    first: int,
    num_valid: int,
    mask_column: int,
    temperature: float,
    with_entropy: bool,
) -> Tensor:
    """Returns what a rank knows about its columns; see `shard_statistics.ShardStatistics`.

    Two launches on the current device, of which the host waits for none.

    Args:
        logits_TV: [T, V_local] bfloat16, float16 or float32 with any strides; T > 0.
        keys: [T] int64 noise key of each row.
        first: id of the first column.
        num_valid: columns that are not padding; the others are left out.
        mask_column: column that is left out; outside of [0, V_local) there is none.
        temperature: 0 draws without noise.
        with_entropy: whether to add the last row of the result.

    Returns:
        [4, T] float64, or [5, T] with entropy.
    """
    num_rows, num_columns = logits_TV.shape
    columns = min(TILE, triton.next_power_of_2(max(num_valid, 1)))
    num_tiles = max(1, triton.cdiv(num_valid, columns))
    rows = TILE // columns
    tiles = logits_TV.new_empty((4 + with_entropy, num_rows, num_tiles), dtype=torch.float32)
    _reduce_tiles[(triton.cdiv(num_rows, rows) * num_tiles,)](
        logits_TV, keys.contiguous(), tiles, *logits_TV.stride(), num_rows, num_columns, num_valid,
        num_tiles, first, mask_column, 1.0 / temperature if temperature > 0 else 1.0,
        HAS_NOISE=temperature > 0, WITH_ENTROPY=with_entropy, ROWS=rows, COLUMNS=columns,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    record = logits_TV.new_empty((4 + with_entropy, num_rows), dtype=torch.float64)
    padded_tiles = triton.next_power_of_2(num_tiles)
    rows = max(1, COMBINED // padded_tiles)
    _combine_tiles[(triton.cdiv(num_rows, rows),)](
        logits_TV, tiles, record, *logits_TV.stride(), num_rows, num_tiles, first,
        WITH_ENTROPY=with_entropy, COLUMNS=columns, ROWS=rows, TILES=padded_tiles, num_warps=1,
    )  # fmt: skip
    return record


@triton.jit(
    do_not_specialize=["num_rows", "num_valid", "num_tiles", "first", "mask_column"],
)
def _reduce_tiles(
    logits, keys, tiles, row_stride, column_stride, num_rows, num_columns, num_valid, num_tiles,
    first, mask_column, inverse_temperature,
    HAS_NOISE: tl.constexpr, WITH_ENTROPY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of every tile: best score, its column in the tile, largest logit, sum of exp(logit - largest)
    and of exp(logit - largest) (logit - largest), as planes of `tiles` [4 or 5, T, S] float32.
    """
    # 1. the logits, nothing but visible ones above -inf
    program = tl.program_id(0)
    tile = program % num_tiles
    row = program // num_tiles * ROWS + tl.arange(0, ROWS)
    in_tile = tl.arange(0, COLUMNS)
    column = tile * COLUMNS + in_tile
    is_row = row < num_rows
    # bounded by the columns that exist, not by the valid ones: their number is mostly a multiple of
    # 16, so that threads load 16 bytes at once
    x = tl.load(
        logits
        + row.to(tl.int64)[:, None] * row_stride
        + column.to(tl.int64)[None, :] * column_stride,
        mask=is_row[:, None] & (column < num_columns)[None, :],
        other=0.0,
    ).to(tl.float32)
    is_visible = (column < num_valid) & (column != mask_column)
    x = tl.where(is_visible[None, :], x, -INFINITY)
    x = tl.where(x != x, INFINITY, x)

    # 2. the best score, the lowest column on ties
    score = x
    if HAS_NOISE:
        key = tl.load(keys + row, mask=is_row, other=0)
        bits = noise_bits(key[:, None], (first + column)[None, :])
        score = x * inverse_temperature + gumbel(bits)
    best = tl.max(score, axis=1)
    best_column = tl.min(tl.where(score == best[:, None], in_tile[None, :], COLUMNS - 1), axis=1)

    # 3. sums; a tile of -inf alone has none
    largest = tl.max(x, axis=1)
    relative = x - tl.where(largest == -INFINITY, 0.0, largest)[:, None]
    weight = tl.exp(relative)
    plane = num_rows * num_tiles
    out = tiles + row * num_tiles + tile
    tl.store(out, best, mask=is_row)
    tl.store(out + plane, best_column.to(tl.float32), mask=is_row)
    tl.store(out + 2 * plane, largest, mask=is_row)
    tl.store(out + 3 * plane, tl.sum(weight, axis=1), mask=is_row)
    if WITH_ENTROPY:
        moment = tl.where(relative == -INFINITY, 0.0, weight * relative)
        tl.store(out + 4 * plane, tl.sum(moment, axis=1), mask=is_row)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "first"])
def _combine_tiles(
    logits, tiles, record, row_stride, column_stride, num_rows, num_tiles, first,
    WITH_ENTROPY: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The tiles of every row to `record` [4 or 5, T] float64."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.arange(0, TILES)
    is_row = row < num_rows
    is_tile = is_row[:, None] & (tile < num_tiles)[None, :]
    plane = num_rows * num_tiles
    of_tile = tiles + row[:, None] * num_tiles + tile[None, :]
    score = tl.load(of_tile, mask=is_tile, other=-INFINITY)
    in_tile = tl.load(of_tile + plane, mask=is_tile, other=0.0)
    largest = tl.load(of_tile + 2 * plane, mask=is_tile, other=-INFINITY)
    total = tl.load(of_tile + 3 * plane, mask=is_tile, other=0.0).to(tl.float64)

    # 1. the best score; -inf has no logit but -inf, so that a left-out column has none
    best = tl.max(score, axis=1)
    column = tile[None, :] * COLUMNS + in_tile.to(tl.int32)
    column = tl.min(tl.where(score == best[:, None], column, TILES * COLUMNS), axis=1)
    logit = tl.load(
        logits + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride,
        mask=is_row & (best > -INFINITY),
        other=-INFINITY,
    )

    # 2. the normaliser
    shift = tl.max(largest, axis=1)
    shift = tl.where(shift == -INFINITY, 0.0, shift)
    relative = (largest - shift[:, None]).to(tl.float64)
    share = tl.exp(relative)
    row_total = tl.sum(share * total, axis=1)
    out = record + row
    tl.store(out, best.to(tl.float64), mask=is_row)
    tl.store(out + num_rows, (first + column).to(tl.float64), mask=is_row)
    tl.store(out + 2 * num_rows, logit.to(tl.float64), mask=is_row)
    tl.store(out + 3 * num_rows, shift.to(tl.float64) + tl.log(row_total), mask=is_row)

    # 3. the mean logit
    if WITH_ENTROPY:
        moment = tl.load(of_tile + 4 * plane, mask=is_tile, other=0.0).to(tl.float64)
        moment += tl.where(relative == -INFINITY, 0.0, total * relative)
        mean = tl.sum(share * moment, axis=1) / row_total
        tl.store(out + 4 * num_rows, shift.to(tl.float64) + mean, mask=is_row)


@triton.jit
def noise_bits(key, column):
    """`randomness._bits`: uint32 of int64 keys and integer columns, whose shapes broadcast."""
    low = _finalise(key.to(tl.uint32))
    high = _finalise((key >> 32).to(tl.uint32) ^ KEY_SALT)
    multiplier = (low >> 1) | 1
    product = tl.mul(multiplier, _finalise(column.to(tl.uint32) ^ COLUMN_SALT), False)
    return _finalise(tl.add(product, high ^ low, False))


@triton.jit
def _finalise(bits):
    """`randomness._finalise`: products of uint32 wrap, and that is what is wanted of them."""
    bits = tl.mul(bits ^ (bits >> SHIFT_1), FACTOR_1, False)
    bits = tl.mul(bits ^ (bits >> SHIFT_2), FACTOR_2, False)
    return bits ^ (bits >> SHIFT_3)


@triton.jit
def gumbel(bits):
    """`randomness.gumbel` of these bits: -log(-log(1 - u)), float32.

    There is no log1p. y = 1 - u is rounded where u < 1/2, and what the rounding took is known
    exactly. It is added as if the logarithm had the slope 1 there, which is off by less than 2**-24
    of the result. With a logarithm of one unit in the last place, such as CUDA's, the noise is off
    by at most 2.1e-7 max(1, |noise|), and `randomness.gumbel` by 1.3e-7 of it.
    """
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, LARGEST_UNIFORM)
    y = 1.0 - u
    lost = (1.0 - y) - u
    return -tl.log(-(tl.log(y) + lost))
