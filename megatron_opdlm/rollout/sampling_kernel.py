"""Triton kernels that read a shard's logits once: noise, best token, normaliser, mean logit.

The first kernel reads the logits in tiles of `TILE` logits, without changing them. A tile belongs
to one row, or to several rows if the vocabulary is small. The kernel writes a few numbers per tile.
The second kernel combines the tiles of a row. A tile covers the same columns in every batch, and
sums have a fixed order. So a row's result depends on this row alone.

NaN: the maximum of a GPU ignores NaN, so no NaN may reach it. Therefore NaN is first replaced with
+inf, and a row with +inf has the sum exp(inf - inf), which is NaN on every device.

The kernels are compiled for compute capability 9.0 (no registers spilled) and tested in Triton's
interpreter, but have not yet run on a device. With noise, a logit takes about 110 instructions,
half of them for two exact logarithms; without noise, about 30. So with noise the kernel is expected
to be limited by arithmetic, not by memory.

Shape letters: T rows; in the kernels R rows and C columns of a tile, S tiles of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_opdlm.diffusion import randomness

TILE = 1024
"""Logits of a tile, which one program reads. 151,936 columns make 149 programs, so that a single
row uses all 132 processors of an H100 or H200. Larger tiles would leave some idle; smaller ones
need more reductions per logit."""
NUM_WARPS = 2
"""Warps of a tile: each thread has 16 logits, which are two loads of 16 bytes in bfloat16. The cost
of a reduction does not depend on the logits per thread. With 16 logits all reductions are a tenth
of a thread's work; with 32 it would need twice the registers."""
COMBINED = 256
"""Tiles that one program of the second kernel combines; they belong to one row or several."""

SHIFT_1 = tl.constexpr(randomness.FINALISER_ROUNDS[0][0])
SHIFT_2 = tl.constexpr(randomness.FINALISER_ROUNDS[1][0])
SHIFT_3 = tl.constexpr(randomness.FINAL_SHIFT)
# uint32 products wrap, so the factors are taken modulo 2**32
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
    """Returns the statistics of a rank's columns; see `shard_statistics.ShardStatistics`.

    It starts two kernels on the current device, and the host waits for neither.

    Args:
        logits_TV: [T, V_local] bfloat16, float16 or float32 with any strides; T > 0.
        keys: [T] int64 noise key of each row.
        first: id of the first column.
        num_valid: number of columns that are not padding; the others are left out.
        mask_column: column of the mask token, which is left out; outside of [0, V_local) this shard
            does not have it.
        temperature: sampling temperature; 0 draws without noise.
        with_entropy: whether the result has its last row.

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
    """Writes five numbers of every tile to the planes of `tiles` [4 or 5, T, S] float32.

    They are the best score, its column in the tile, the largest logit, the sum of
    exp(logit - largest), and with entropy the sum of exp(logit - largest) (logit - largest).
    """
    # 1. the logits; all but the visible ones are -inf
    program = tl.program_id(0)
    tile = program % num_tiles
    row = program // num_tiles * ROWS + tl.arange(0, ROWS)
    in_tile = tl.arange(0, COLUMNS)
    column = tile * COLUMNS + in_tile
    is_row = row < num_rows
    # the bound is the number of all columns, not of the valid ones: it is mostly a multiple of 16,
    # so that threads load 16 bytes at once
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

    # 3. the sums; in a tile with nothing but -inf they are 0
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
    """Combines the tiles of every row into `record` [4 or 5, T] float64."""
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

    # 1. the best score; a score of -inf has the logit -inf: the column may be a left-out one
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
    """Returns `randomness._bits` as uint32; int64 keys and integer columns broadcast."""
    low = _finalise(key.to(tl.uint32))
    high = _finalise((key >> 32).to(tl.uint32) ^ KEY_SALT)
    multiplier = (low >> 1) | 1
    product = tl.mul(multiplier, _finalise(column.to(tl.uint32) ^ COLUMN_SALT), False)
    return _finalise(tl.add(product, high ^ low, False))


@triton.jit
def _finalise(bits):
    """Returns `randomness._finalise`; it relies on uint32 products that wrap."""
    bits = tl.mul(bits ^ (bits >> SHIFT_1), FACTOR_1, False)
    bits = tl.mul(bits ^ (bits >> SHIFT_2), FACTOR_2, False)
    return bits ^ (bits >> SHIFT_3)


@triton.jit
def gumbel(bits):
    """Returns `randomness.gumbel` of these bits: -log(-log(1 - u)), float32.

    Triton has no log1p. y = 1 - u is rounded where u < 1/2, and the rounding error is known
    exactly. It is added to the logarithm as if its slope were 1 there, which causes an error of
    less than 2**-24 of the result. With a logarithm that is exact to one unit in the last place,
    such as CUDA's, the error of the noise is at most 2.1e-7 max(1, |noise|); that of
    `randomness.gumbel` is at most 1.3e-7 max(1, |noise|).
    """
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, LARGEST_UNIFORM)
    y = 1.0 - u
    lost = (1.0 - y) - u
    return -tl.log(-(tl.log(y) + lost))
