"""Arithmetic of the block grid, which begins at absolute position 0.

Position p belongs to block p // block_size. The last prompt tokens may share a block with the first
response tokens, as in the engines that serve these models. There is no left padding.
"""

from __future__ import annotations


def block_start(position: int, block_size: int) -> int:
    """Returns the first position of the block that holds `position`.

    >>> block_start(6, 4)
    4
    """
    return position // block_size * block_size


def round_up(length: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `length`.

    >>> round_up(6, 4), round_up(8, 4)
    (8, 8)
    """
    return -(-length // multiple) * multiple


def num_decoded_tokens(prompt_length: int, response_limit: int, block_size: int) -> int:
    """Returns how many positions after the prompt are decoded if the response reaches its limit.

    Blocks are decoded whole, so the last block may end after the limit. Tokens after the limit are
    context, never response.

    >>> num_decoded_tokens(prompt_length=6, response_limit=5, block_size=4)
    6
    """
    return round_up(prompt_length + response_limit, block_size) - prompt_length
