"""The noise of the sampling: a token is a function of the logits, the seed of its row and its position alone."""


def random_bits(seed, position, token):
    """32 random bits for a token at a position, by hashing one after the other; in exact integers.

    For int64 tensors of torch, and compiled by Triton too. No product reaches 2^63.
    """
    x = seed & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ (x >> 15)) + position & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ (x >> 15)) + token & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x21F0AAAD & 0xFFFFFFFF
    return x ^ (x >> 15)
