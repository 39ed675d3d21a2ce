"""Philox: known answers, the counter layout, distributions, and independence of how the draw is split."""

import math

import pytest
import torch

from ig_dist import rng
from ig_dist.rng import Purpose

MASK = 0xFFFFFFFF
# Ids that need more than 32 bits, the sign bit, and neighbours that differ in the high half only.
WIDE_IDS = [0, 1, MASK, 1 << 32, (1 << 32) + 1, (1 << 63) - 1, -1, -(1 << 63), -(1 << 32)]


def reference_philox(counter, key):
    """Philox 4x32-10 in Python's unbounded integers: no splitting, no signs, nothing shared with rng.py."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def reference_integers(seed, purpose, id_, n, step):
    words = []
    for block in range(math.ceil(n / 4)):
        counter = (block, int(purpose) + step * 256, id_ % 2**32, id_ % 2**64 >> 32)
        words += reference_philox(counter, (seed % 2**32, seed >> 32))
    return words[:n]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    words = rng.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("seed", [0, 5, (1 << 40) + 3, (1 << 64) - 1])
def test_counter_layout_for_ids_of_64_bits(seed):
    words = rng.integers(seed, Purpose.FLIP, torch.tensor(WIDE_IDS), 7, step=(1 << 24) - 1)
    expected = [reference_integers(seed, Purpose.FLIP, i, 7, (1 << 24) - 1) for i in WIDE_IDS]
    assert words.tolist() == expected


def test_uniform_is_the_middle_of_its_cell():
    ids = torch.tensor(WIDE_IDS)
    words = rng.integers(3, Purpose.TIME, ids, 6)
    values = rng.uniform(3, Purpose.TIME, ids, (2, 3))
    assert values.shape == (len(WIDE_IDS), 2, 3) and values.dtype == torch.float64
    assert [int(v * 2**33) for v in values.flatten()] == [2 * int(w) + 1 for w in words.flatten()]
    assert rng.uniform(3, Purpose.TIME, ids).tolist() == values[:, 0, 0].tolist()


def test_normal_is_box_muller_of_word_pairs():
    w = [(word + 0.5) / 2**32 for word in reference_integers(9, Purpose.NOISE, 1 << 33, 8, 2)]
    expected = []
    for first, second in zip(w[0::2], w[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(first))
        expected += [radius * math.cos(2 * math.pi * second), radius * math.sin(2 * math.pi * second)]
    drawn = rng.normal(9, Purpose.NOISE, torch.tensor([1 << 33]), (7,), step=2)
    assert drawn.shape == (1, 7) and drawn.dtype == torch.float32
    torch.testing.assert_close(drawn[0], torch.tensor(expected[:7]), rtol=1e-7, atol=0)


def test_normal_distribution():
    x = rng.normal(1, Purpose.NOISE, torch.arange(2000), (101,)).flatten().double()
    n = len(x)
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    cdf = 0.5 * (1 + torch.erf(x.sort().values / 2**0.5))
    assert (cdf - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / n**0.5  # Kolmogorov-Smirnov at 0.1%


def test_uniform_distribution_and_bernoulli_rate():
    u = rng.uniform(1, Purpose.TIME, torch.arange(100_000)).sort().values
    assert (u - (torch.arange(len(u)) + 0.5) / len(u)).abs().max() < 1.95 / len(u) ** 0.5
    ids = torch.arange(100_000)
    drops = rng.bernoulli(1, Purpose.LABEL_DROP, ids, 0.1)
    assert drops.shape == (100_000,) and drops.dtype == torch.bool
    assert abs(drops.double().mean() - 0.1) < 4 * (0.09 / 100_000) ** 0.5
    assert not rng.bernoulli(1, Purpose.LABEL_DROP, ids, 0.0).any()
    assert rng.bernoulli(1, Purpose.LABEL_DROP, ids, 1.0).all()


def test_streams_are_uncorrelated():
    ids = torch.arange(64)
    shape = (500,)
    streams = [rng.normal(0, purpose, ids, shape).flatten() for purpose in Purpose]
    streams += [
        rng.normal(1, Purpose.NOISE, ids, shape).flatten(),
        rng.normal(1 << 32, Purpose.NOISE, ids, shape).flatten(),
        rng.normal(0, Purpose.NOISE, ids, shape, step=1).flatten(),
        rng.normal(0, Purpose.NOISE, ids + 64, shape).flatten(),
        rng.normal(0, Purpose.NOISE, ids + (1 << 32), shape).flatten(),
        streams[0].roll(1),  # the words and pairs of a block among themselves
        streams[0].roll(2),
        streams[0].roll(500),  # neighbouring ids
    ]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / (64 * 500) ** 0.5


def test_draws_do_not_depend_on_batch_split_or_threads():
    ids = torch.tensor(WIDE_IDS)
    shape = (3, 37, 41)
    threads = torch.get_num_threads()
    whole = rng.normal(7, Purpose.NOISE, ids, shape)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (1, 2, 4):
                parts = [rng.normal(7, Purpose.NOISE, part, shape) for part in ids.split(rows)]
                assert torch.equal(torch.cat(parts), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(rng.normal(7, Purpose.NOISE, ids.flip(0), shape), whole.flip(0))
    # Fewer values per id are a prefix of more values.
    assert torch.equal(rng.normal(7, Purpose.NOISE, ids, (10,)), whole.flatten(1)[:, :10])


def test_compiled_words_are_the_eager_ones():
    """The counter is made inside what is compiled, where index arithmetic has 32 bits; see test_objective for more."""

    def draw(ids, later):
        words = rng.Draws((1 << 64) - 1, {Purpose.NOISE: 67}, ids.device)(ids, later)[Purpose.NOISE]
        return torch.stack(words, dim=-1).flatten(1)[:, :67]

    ids, compiled = torch.tensor(WIDE_IDS), torch.compile(draw, fullgraph=True)
    for step in (0, 3, (1 << 24) - 1):
        expected = rng.integers((1 << 64) - 1, Purpose.NOISE, ids, 67, step=step)
        assert torch.equal(expected, draw(ids, step)) and torch.equal(expected, compiled(ids, torch.tensor(step)))


def test_draws_side_by_side_are_those_made_alone():
    ids = torch.tensor(WIDE_IDS)
    words = rng.Draws(7, {Purpose.NOISE: 30, Purpose.TIME: 1, Purpose.POSTERIOR: 5}, ids.device, step=3)(ids)
    assert list(words) == [Purpose.NOISE, Purpose.TIME, Purpose.POSTERIOR]
    for purpose, shape in ((Purpose.NOISE, (2, 15)), (Purpose.TIME, ()), (Purpose.POSTERIOR, (5,))):
        assert torch.equal(rng.to_normal(words[purpose], shape), rng.normal(7, purpose, ids, shape, step=3))
        assert torch.equal(rng.to_uniform(words[purpose], shape), rng.uniform(7, purpose, ids, shape, step=3))


def test_permutation():
    order = rng.permutation(11, Purpose.WINDOW_ORDER, 5, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.dtype == torch.int64
    words = reference_integers(11, Purpose.WINDOW_ORDER, 5, 2000, 0)
    keys = [(words[2 * i] >> 1) * 2**31 + (words[2 * i + 1] >> 1) for i in range(1000)]
    assert order.tolist() == sorted(range(1000), key=keys.__getitem__)
    assert not torch.equal(order, rng.permutation(11, Purpose.WINDOW_ORDER, 6, 1000))
    assert not torch.equal(order, rng.permutation(11, Purpose.SHARD_ORDER, 5, 1000))
    assert rng.permutation(11, Purpose.SHARD_ORDER, 5, 0).tolist() == []
    assert rng.permutation(11, Purpose.SHARD_ORDER, 5, 1).tolist() == [0]


def test_permutation_first_places_are_uniform():
    counts = torch.zeros(8)
    for i in range(2000):
        counts[rng.permutation(0, Purpose.SHARD_ORDER, i, 8)[0]] += 1
    assert ((counts - 250) ** 2 / 250).sum() < 24.3  # chi-square, 7 degrees of freedom, 0.1%


def test_permutation_takes_signed_and_unsigned_ids():
    assert torch.equal(
        rng.permutation(0, Purpose.SHARD_ORDER, -1, 50), rng.permutation(0, Purpose.SHARD_ORDER, 2**64 - 1, 50)
    )


def test_purposes_and_name_ids_are_frozen():
    """Every run, plan and shard order depends on these numbers: a change breaks resume."""
    assert {p.name: p.value for p in Purpose} == {
        "NOISE": 1,
        "TIME": 2,
        "LABEL_DROP": 3,
        "POSTERIOR": 4,
        "FLIP": 5,
        "INIT": 6,
        "SHARD_ORDER": 7,
        "WINDOW_ORDER": 8,
        "SAMPLE_NOISE": 9,
        "SAMPLE_STEP": 10,
        "SAMPLE_LABEL": 11,
        "ENCODE_ORDER": 12,
        "VALIDATION_NOISE": 13,
        "ENCODE_POSTERIOR": 14,
    }
    # First 8 bytes of sha256("abc") = ba7816bf8f01cfea, little end first, as a signed number.
    assert rng.name_id("abc") == 0xEACF018FBF1678BA - 2**64
    assert torch.tensor([rng.name_id("abc")]).dtype == torch.int64


@pytest.mark.parametrize(
    ("seed", "step", "ids", "message"),
    [
        (-1, 0, torch.tensor([0]), "seed"),
        (1 << 64, 0, torch.tensor([0]), "seed"),
        (0, 1 << 24, torch.tensor([0]), "step"),
        (0, 0, torch.tensor([0], dtype=torch.int32), "int64"),
        (0, 0, torch.tensor(0), "int64"),
    ],
)
def test_what_does_not_fit_the_counter_is_refused(seed, step, ids, message):
    with pytest.raises(ValueError, match=message):
        rng.integers(seed, Purpose.NOISE, ids, 4, step=step)
