"""Random numbers without a state: Philox4x32-10 (Salmon et al., SC 2011), one uniform per (seed, position)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from warmroute_worker.step_plan import Int64s

Words = npt.NDArray[np.uint64]
Float64s = npt.NDArray[np.float64]

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ROUNDS = 10


def uniforms(seeds: Words, positions: Int64s) -> Float64s:
    """[n] numbers in (0, 1), each a function of its own seed and position alone."""
    counters = positions.astype(np.uint64)
    zero = np.zeros_like(counters)
    first, second, _, _ = philox4x32((counters & _LOW, counters >> _32, zero, zero), (seeds & _LOW, seeds >> _32))
    # 52 random bits, in the middle of their interval: neither 0 nor 1 can come out, and float64 holds it exactly.
    bits = (first << np.uint64(20)) ^ (second >> np.uint64(12))
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Ten rounds over 32-bit words that are held in 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> _32) ^ c1 ^ k0, product1 & _LOW, (product0 >> _32) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3
