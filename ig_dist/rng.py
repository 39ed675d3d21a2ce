"""Counter-based randomness: every draw is a pure function of (seed, purpose, id, step).

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) written in plain
integer tensor operations, so that the same bits come out on any device and no generator state exists
that would have to be saved.

Layout: key = (seed low 32 bits, seed high 32 bits);
counter = (block index, purpose | step << 8, id low 32 bits, id high 32 bits).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_TWO_TO_MINUS_32 = 2.0**-32

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Purpose(IntEnum):
    """What a draw is for. Different purposes never share a counter; the values are part of the format."""

    NOISE = 1
    TIME = 2
    LABEL_DROP = 3
    POSTERIOR = 4
    FLIP = 5
    INIT = 6
    SHARD_ORDER = 7
    WINDOW_ORDER = 8
    SAMPLE_NOISE = 9
    SAMPLE_STEP = 10
    SAMPLE_LABEL = 11
    ENCODE_ORDER = 12
    VALIDATION_NOISE = 13
    ENCODE_POSTERIOR = 14


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox 4x32-10: four output words for each counter; all are int64 tensors or integers in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _WEYL[0]) & _MASK32
        k1 = (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def integers(seed: int, purpose: Purpose, ids: Tensor, n: int, *, step: int = 0) -> Tensor:
    """Draw `n` uniform 32-bit words for each id: (B, n) int64 in [0, 2^32), on the device of `ids`.

    Row i depends on `ids[i]`, not on the other rows.

    Args:
        seed: in [0, 2^64).
        purpose: what the draw is for.
        ids: (B,) int64 on any device; all 64 bits count (negative: the high bit is set).
        n: words per id.
        step: in [0, 2^24), for draws that repeat for one id, such as the steps of a sampler.
    """
    return _flat(Draws(seed, {purpose: n}, ids.device, step=step)(ids)[purpose], n)


def uniform(seed: int, purpose: Purpose, ids: Tensor, shape: Sequence[int] = (), *, step: int = 0) -> Tensor:
    """Draw uniforms (k + 0.5) 2^-32 in the open interval (0, 1): (B, *shape) float64. See `integers`."""
    return to_uniform(Draws(seed, {purpose: math.prod(shape)}, ids.device, step=step)(ids)[purpose], shape)


def bernoulli(seed: int, purpose: Purpose, ids: Tensor, p: float) -> Tensor:
    """Draw (B,) bool, true with probability `p` (exactly never at 0, always at 1). See `integers`."""
    return uniform(seed, purpose, ids) < p


def normal(seed: int, purpose: Purpose, ids: Tensor, shape: Sequence[int], *, step: int = 0) -> Tensor:
    """Draw standard normals: (B, *shape) float32. See `integers`."""
    return to_normal(Draws(seed, {purpose: math.prod(shape)}, ids.device, step=step)(ids)[purpose], shape)


class Draws:
    """Draws for several purposes in one pass of Philox: a launch costs the same for all of them as for one.

    `wanted` are words per id of each purpose, of ids on `device`; seed and step as for `integers`.
    """

    def __init__(self, seed: int, wanted: Mapping[Purpose, int], device: torch.device, *, step: int = 0) -> None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed {seed} does not fit 64 bits; give an integer in [0, 2^64)")
        if not 0 <= step < 1 << 24:
            raise ValueError(f"step {step} does not fit the 24 bits it has in the counter; use other ids instead")
        if (most := max(wanted.values())) > 1 << 34:
            raise ValueError(f"{most} words for one id exceed the 2^34 of one counter; use more ids")
        self._key = seed & _MASK32, seed >> 32
        self._blocks = {purpose: (n + 3) // 4 for purpose, n in wanted.items()}
        blocks = torch.cat([torch.arange(count, device=device) for count in self._blocks.values()])
        whose = [torch.full((count,), int(p) | step << 8, device=device) for p, count in self._blocks.items()]
        # A mask that changes nothing, but hides from torch.compile that the first factor of Philox is an index:
        # it would compute the product of index and constant in 32 bits.
        self._counter = (blocks & _MASK32)[None, :], torch.cat(whose)[None, :]

    def __call__(self, ids: Tensor, later: int | Tensor = 0) -> dict[Purpose, Words]:
        """Four (B, ceil(n / 4)) int64 tensors of words in [0, 2^32) for each purpose.

        Args:
            ids: as for `integers`.
            later: added to the step, where that is 0; as a tensor on the device it is no constant to torch.compile.
        """
        if ids.dtype != torch.int64 or ids.dim() != 1:
            raise ValueError(f"ids must be a (B,) int64 tensor, not {tuple(ids.shape)} {ids.dtype}")
        low, high = ids & _MASK32, (ids >> 32) & _MASK32  # the shift is arithmetic: mask the copies of the sign bit
        block, kind = self._counter
        words = philox((block, kind + (later << 8), low[:, None], high[:, None]), self._key)
        w0, w1, w2, w3 = (torch.split(word, list(self._blocks.values()), dim=1) for word in words)
        return dict(zip(self._blocks, zip(w0, w1, w2, w3, strict=True), strict=True))


def to_uniform(words: Words, shape: Sequence[int] = ()) -> Tensor:
    """What `uniform` makes of its words."""
    return _to_unit(_flat(words, math.prod(shape))).reshape(-1, *shape)


def to_normal(words: Words, shape: Sequence[int] = ()) -> Tensor:
    """What `normal` makes of its words.

    Box-Muller: words (0, 1) and (2, 3) of a block give a pair each. It runs in float64 and is rounded at
    the end, because in float32 the last bits depend on the vector width and on the compiler.
    """
    w0, w1, w2, w3 = words
    radius = torch.sqrt(-2.0 * torch.log(_to_unit(torch.stack([w0, w2], dim=-1))))
    angle = _to_unit(torch.stack([w1, w3], dim=-1)) * (2.0 * math.pi)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, : math.prod(shape)].to(torch.float32).reshape(-1, *shape)


def permutation(seed: int, purpose: Purpose, ids: int, n: int, *, step: int = 0) -> Tensor:
    """Return a permutation of 0..n-1 as (n,) int64 on the CPU, a function of the arguments only.

    `ids` is one id, any 64-bit integer, signed or unsigned; the rest as for `integers`.
    """
    words = integers(seed, purpose, torch.tensor([_signed64(ids)]), 2 * n, step=step).reshape(n, 2)
    # 31 bits of each word: a 62-bit sort key stays positive in int64. The stable sort settles ties.
    keys = (words[:, 0] >> 1 << 31) | (words[:, 1] >> 1)
    return torch.argsort(keys, stable=True)


def name_id(name: str) -> int:
    """Return the 64-bit id of a name (from its sha256) as a signed integer that fits an int64 tensor."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def _multiply(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers, the constant from 2^31 on.

    The constant less 2^32 keeps the product within 63 bits and its low half as it is; the high half lacks `value`.
    """
    product = value * (constant - (1 << 32))
    return (product >> 32) + value, product & _MASK32


def _flat(words: Words, n: int) -> Tensor:
    """The first `n` words of each id in their order, (B, n)."""
    return torch.stack(words, dim=-1).flatten(1)[:, :n]


def _to_unit(words: Tensor) -> Tensor:
    return (words.to(torch.float64) + 0.5) * _TWO_TO_MINUS_32


def _signed64(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
