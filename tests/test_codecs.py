"""The codecs' promises, as properties, for every member of the family."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import CODECS, Codec, TargetsSpec
from pipeline.cache.codecs import Columns, Decoded, Entries, Layout, Lossless, Ranking, Steps
from pipeline.config import parse_config
from pipeline.errors import ConfigError

TEMPERATURES = (0.5, 1.0, 2.0)
LAYOUTS = [
    Layout(1, 1, 0, TEMPERATURES),
    Layout(2, 1, 0, TEMPERATURES),
    Layout(7, 7, 0, TEMPERATURES),
    Layout(50, 0, 5, TEMPERATURES),
    Layout(256, 256, 0, TEMPERATURES),
    Layout(257, 20, 4, TEMPERATURES),
    Layout(4_096, 2_000, 0, TEMPERATURES),
    Layout(2**16, 12, 0, TEMPERATURES),
    Layout(2**16 + 1, 8, 4, TEMPERATURES),
    Layout(128_256, 64, 16, TEMPERATURES),
    Layout(151_669, 0, 12, TEMPERATURES),
    Layout(2**20, 50, 30, TEMPERATURES),
]
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.0, 1e-6, 0.01, 1.0, 5.0, 60.0, 3000.0])
codecs = pytest.mark.parametrize("codec", [codec() for codec in CODECS.values()], ids=str)


def make_entries(layout: Layout, seed: int, scale: float, rows: int = 9) -> Entries:
    """Random entries: kept ids distinct and above the draws, draws repeating, a tail below all."""
    rng = np.random.default_rng(seed)
    size = layout.top_k + max(1, layout.tail_draws // 2) * bool(layout.tail_draws)
    ids = np.stack([rng.choice(layout.num_classes, size, replace=False) for _ in range(rows)])
    logits = -np.sort(-rng.normal(rng.normal() * 10, scale, (rows, size)), axis=1)
    logits = logits.astype(np.float32)
    pick = rng.integers(layout.top_k, max(size, layout.top_k + 1), (rows, layout.tail_draws))
    order = rng.permuted(np.tile(np.arange(layout.top_k), (rows, 1)), axis=1)
    tail = layout.num_classes - size
    rest = np.log(tail * rng.uniform(0.01, 1, rows)) if tail else np.full(rows, -np.inf)
    lowest = logits[:, -1:].astype(np.float64)
    lse = [
        np.logaddexp(log_sum_exp(logits / t), lowest[:, 0] / t + rest) for t in layout.temperatures
    ]
    return Entries(
        ids=np.take_along_axis(ids, order, axis=1),
        logits=np.take_along_axis(logits, order, axis=1),
        draw_ids=np.take_along_axis(ids, pick, axis=1),
        draw_logits=np.take_along_axis(logits, pick, axis=1),
        logsumexp=np.stack(lse, axis=1).astype(np.float32),
        label_log_probs=(logits[:, -1] - lse[layout.temperatures.index(1.0)]).astype(np.float32),
    )


def by_id(ids: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(ids, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logits, order, axis=1)


def number_ids(entries: Entries, layout: Layout) -> Layout:
    """Number the classes by how often they occur."""
    ids = np.concatenate([entries.ids.ravel(), entries.draw_ids.ravel()])
    return replace(layout, ranking=Ranking.learn(ids, layout.num_classes))


def decode(codec: Codec, columns: Columns, layout: Layout) -> Entries:
    """What a codec reads, the same from arrays as from a device's tensors."""
    arrays = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    count = len(next(iter(arrays.values())))
    out, other = (Decoded.empty(count, layout, where) for where in (None, torch.device("cpu")))
    codec.decode(arrays, layout, layout.ranking.find, out)
    codec.decode(tensors, layout, layout.ranking.find, other)
    for name, array in vars(out).items():
        np.testing.assert_array_equal(array, getattr(other, name), err_msg=name)
    return Entries(**vars(out))


def round_trip(codec: Codec, entries: Entries, layout: Layout) -> Entries:
    """Through the codec, with the shard's numbering; entries in the order of their ids."""
    codec, layout = codec.resolve(layout.top_k), number_ids(entries, layout)
    found = decode(codec, codec.encode(entries, layout), layout)
    ids, logits = by_id(found.ids, found.logits)
    draw_ids, draw_logits = by_id(found.draw_ids, found.draw_logits)
    return replace(found, ids=ids, logits=logits, draw_ids=draw_ids, draw_logits=draw_logits)


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=1, keepdims=True)
    return (top + np.log(np.exp(logits.astype(np.float64) - top).sum(axis=1, keepdims=True)))[:, 0]


@codecs
@settings(max_examples=60, deadline=None)
@given(layout=layouts, seed=seeds, scale=scales)
def test_ids_come_back_with_their_logits(codec, layout, seed, scale):
    entries = make_entries(layout, seed, scale)
    found = round_trip(codec, entries, layout)
    for ids_name, logits_name in (("ids", "logits"), ("draw_ids", "draw_logits")):
        ids, logits = by_id(getattr(entries, ids_name), getattr(entries, logits_name))
        decoded = getattr(found, logits_name)
        np.testing.assert_array_equal(getattr(found, ids_name), ids)
        assert getattr(found, ids_name).dtype == np.int32
        assert decoded.dtype == np.float32
        if codec.name == "lossless":
            np.testing.assert_array_equal(decoded, logits)
            continue
        one = layout.temperatures.index(1.0)
        log_probs = logits.astype(np.float64) - entries.logsumexp[:, one, None]
        if logits_name == "draw_logits":
            log_probs += found.logsumexp[:, one, None]
            promised = 1 / 8 + np.maximum(-255 / 4 - log_probs, 0) + np.maximum(log_probs, 0)
        else:
            promised = promised_rounding(codec.resolve(layout.top_k).levels, log_probs)
        float32 = 1e-6 * (1 + np.abs(logits))
        assert (np.abs(decoded - log_probs) <= promised + float32).all()


def promised_rounding(levels: int, log_probs: np.ndarray) -> np.ndarray:
    """Half a level at the entry's own depth; a whole one more where it would be the highest's."""
    root = np.floor(levels * np.exp(np.minimum(log_probs, 0) / 4))
    width = np.where(root > 1, -4 * np.log1p(-1 / np.maximum(root, 2)), 4 * np.log(2))
    reach = 4 * np.log(levels) + 96
    highest = log_probs.max(axis=1, keepdims=True, initial=-np.inf)
    near = log_probs > highest - 1.5 * width
    # What rounds to more than 1 counts as 1, and what lies below the reach as the reach.
    beyond = np.maximum(log_probs, 0) + np.maximum(-reach - log_probs, 0)
    return width * (0.501 + near) + beyond


@codecs
@settings(max_examples=60, deadline=None)
@given(layout=layouts, seed=seeds, scale=scales)
def test_the_first_choice_never_changes(codec, layout, seed, scale):
    entries = make_entries(layout, seed, scale)
    if layout.top_k:
        ids, logits = by_id(entries.ids, entries.logits)
        best = np.take_along_axis(ids, logits.argmax(axis=1)[:, None], axis=1)
        found = round_trip(codec, entries, layout)
        at = found.logits.argmax(axis=1)[:, None]
        np.testing.assert_array_equal(np.take_along_axis(found.ids, at, axis=1), best)


@codecs
@settings(max_examples=60, deadline=None)
@given(layout=layouts, seed=seeds, scale=st.sampled_from([0.0, 1e-6, 0.01, 1.0, 5.0]))
def test_kept_mass_stays_and_the_tail_never_shrinks(codec, layout, seed, scale):
    entries = make_entries(layout, seed, scale)
    if layout.top_k:
        found = round_trip(codec, entries, layout)
        for index, temperature in enumerate(layout.temperatures):
            before = log_sum_exp(entries.logits / temperature) - entries.logsumexp[:, index]
            after = log_sum_exp(found.logits / temperature) - found.logsumexp[:, index]
            float32 = 1e-6 * (1 + np.abs(entries.logits).max() / temperature)
            assert (np.exp(after) <= np.exp(before) + float32).all()
            assert (np.exp(after) >= np.exp(before) - 5e-4 - float32).all()


@codecs
@settings(max_examples=40, deadline=None)
@given(layout=layouts, seed=seeds, scale=st.sampled_from([0.0, 0.01, 1.0, 5.0]))
def test_what_there_is_one_of_in_a_target_stays(codec, layout, seed, scale):
    entries = make_entries(layout, seed, scale)
    found = round_trip(codec, entries, layout)
    error = np.abs(found.label_log_probs - entries.label_log_probs)
    assert found.label_log_probs.dtype == found.logsumexp.dtype == np.float32
    assert (error <= (0 if codec.name == "lossless" else 1 / 256 + 1e-5)).all()
    if layout.top_k == 0:
        one = layout.temperatures.index(1.0)
        for index, temperature in enumerate(layout.temperatures):
            truth = entries.logsumexp[:, index] - entries.logsumexp[:, one] / temperature
            ours = found.logsumexp[:, index] - found.logsumexp[:, one] / temperature
            np.testing.assert_allclose(ours, truth, atol=5e-4 + 1e-4)


@codecs
@settings(max_examples=30, deadline=None)
@given(layout=layouts, seed=seeds)
def test_a_target_is_encoded_alike_in_any_company(codec, layout, seed):
    entries = make_entries(layout, seed, 3.0)
    codec, layout = codec.resolve(layout.top_k), number_ids(entries, layout)
    together = codec.encode(entries, layout)
    parts = [
        codec.encode(Entries(*(getattr(entries, f.name)[rows] for f in fields(Entries))), layout)
        for rows in (slice(0, 4), slice(4, None))
    ]
    kinds = codec.columns(layout)
    assert list(together) and set(together) == set(kinds)
    for name, (dtype, width) in kinds.items():
        assert together[name].dtype == dtype and together[name].shape == (9, width)
        np.testing.assert_array_equal(
            together[name], np.concatenate([part[name] for part in parts])
        )


def make_row(ids: list[int], logits: list[float], draws: dict[int, float], mass: float) -> Entries:
    """One target at T = 1 whose kept entries hold that share of the mass."""
    kept = np.array([logits], dtype=np.float32)
    return Entries(
        ids=np.array([ids]),
        logits=kept,
        draw_ids=np.array([list(draws)], dtype=np.int64),
        draw_logits=np.array([list(draws.values())], dtype=np.float32),
        logsumexp=(log_sum_exp(kept) - np.log(mass)).astype(np.float32)[:, None],
        label_log_probs=np.zeros(1, dtype=np.float32),
    )


@codecs
def test_no_id_width_wraps(codec):
    ids = [2**20 - 1, 0, 151_645, 131_072, 2**16 - 1, 2**16, 255, 256]
    found = round_trip(codec, make_row(ids, list(range(8)), {}, 0.9), Layout(2**20, 8, 0))
    np.testing.assert_array_equal(found.ids, [sorted(ids)])


@codecs
def test_logits_far_below_stay_finite_and_far(codec):
    draws = {5: -1e6, 6: -200.0}
    entries = make_row([0, 1, 2, 3, 4], [3.0, 2.0, -40.0, -1e4, -1e6], draws, 0.99)
    found = round_trip(codec, entries, Layout(10, 5, 2))
    assert np.isfinite(found.logits).all() and np.isfinite(found.draw_logits).all()
    assert (found.logits[0, 0] - found.logits[0, 3:] > 100).all()
    assert (found.logits[0, 0] - found.draw_logits > 60).all()


@codecs
@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_any_level_of_logits_is_one_distribution(codec, level):
    logits = [level + offset for offset in (3.0, 1.0, -2.0)]
    found = round_trip(codec, make_row([4, 2, 9], logits, {}, 0.75), Layout(10, 3, 0))
    p = np.exp(found.logits.astype(np.float64) - found.logsumexp)
    expected = np.exp([1.0, 3.0, -2.0]) / np.exp([1.0, 3.0, -2.0]).sum() * 0.75
    np.testing.assert_allclose(p[0], expected, rtol=0.1, atol=2e-3)
    assert p.sum() == pytest.approx(0.75, abs=1e-3)


def test_near_ties_keep_their_first_choice():
    base = np.float32(17.0)
    rivals = [base, np.nextafter(base, np.float32(99)), base - np.float32(1e-5), base]
    for codec in CODECS.values():
        for shift in range(4):
            logits = np.roll(rivals, shift)
            entries = make_row([0, 1, 2, 3], logits.tolist(), {}, 1.0)
            found = round_trip(codec(), entries, Layout(4, 4, 0))
            assert found.logits.argmax() == logits.argmax()


def make_language_logits(rows: int, num_classes: int) -> np.ndarray:
    """Zipf's law bent by a random context of 32 dimensions: entropy of 3 to 6 nats."""
    rng = np.random.default_rng(7)
    rank = np.arange(num_classes)
    context = rng.normal(0, 1, (rows, 32)) * rng.uniform(0.3, 1.5, (rows, 1))
    return context @ rng.normal(0, 1, (32, num_classes)) - np.log(rank + 3.0)


def kl_with_bucket(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(teacher || decoded) in nats, what is not kept being one outcome."""
    p, q = np.exp(log_p), np.exp(log_q)
    tail_p, tail_q = 1 - p.sum(axis=1), np.maximum(1 - q.sum(axis=1), 1e-12)
    tail = tail_p * np.log(np.maximum(tail_p, 1e-12) / tail_q)
    return (p * (log_p - log_q)).sum(axis=1) + tail


@pytest.mark.parametrize("top_k", [8, 50, 128])
@pytest.mark.parametrize(
    ("codec", "mean", "tail"),
    [(Steps(), 3e-4, 2e-3), (Steps(levels=24), 8e-3, 2e-2), (Lossless(), 1e-6, 1e-6)],
    ids=["steps", "coarse", "lossless"],
)
def test_what_rounding_costs_on_language(codec, mean, tail, top_k):
    logits = make_language_logits(256, 8_192)
    ids = np.argsort(-logits, axis=1)[:, :top_k]
    kept = np.take_along_axis(logits, ids, axis=1).astype(np.float32)
    none = np.zeros((256, 0))
    lse = np.stack([log_sum_exp(logits / t) for t in (1.0, 2.0)], axis=1)
    entries = Entries(ids, kept, none.astype(int), none, lse.astype(np.float32), kept[:, 0])
    found = round_trip(codec, entries, Layout(8_192, top_k, 0, (1.0, 2.0)))
    kept = np.take_along_axis(logits, found.ids, axis=1)
    for index, temperature in enumerate((1.0, 2.0)):
        decoded = found.logits.astype(np.float64) / temperature - found.logsumexp[:, index, None]
        kl = kl_with_bucket(kept / temperature - lse[:, index, None], decoded)
        assert -1e-9 < kl.mean() < mean and np.quantile(kl, 0.99) < tail
        if codec.name == "steps":
            entry = 1 / codec.resolve(top_k).levels ** 2  # its part, on average and at most
            expected = {1.0: 2 / 3 * np.sqrt(top_k) * entry, 2.0: top_k / 6 * entry}[temperature]
            assert kl.mean() < expected and (kl < 4 * expected).all()


@settings(max_examples=60, deadline=None)
@given(
    num_classes=st.sampled_from([2, 300, 70_000]),
    seed=seeds,
    size=st.integers(0, 3_000),
)
def test_a_ranking_numbers_every_class_once_and_the_frequent_ones_first(num_classes, seed, size):
    rng = np.random.default_rng(seed)
    ids = (rng.pareto(1.0, size).astype(np.int64) * 7) % num_classes
    ranking = Ranking.parse(str(Ranking.learn(ids, num_classes)), num_classes)
    classes = np.arange(num_classes)
    ranks = ranking.rank(classes)
    np.testing.assert_array_equal(np.sort(ranks), classes)
    found = torch.empty(num_classes, dtype=torch.int32)
    ranking.find(torch.from_numpy(ranks.astype(np.int32)), found)
    np.testing.assert_array_equal(found, classes)
    counts = np.bincount(ids, minlength=num_classes)
    assert set(ranking.frequent) == set(np.flatnonzero(counts >= 2) if num_classes > 256 else [])
    assert (np.diff(counts[ranking.frequent]) <= 0).all()


@pytest.mark.parametrize("text", ["1 2 x", "1 2 1", "5 300", "-1"])
def test_a_ranking_of_no_classes_is_refused(text):
    with pytest.raises(ValueError, match=r"classes|invalid literal"):
        Ranking.parse(text, 300)


def test_frequent_ids_take_fewer_bytes_wherever_they_are():
    rng = np.random.default_rng(0)
    frequent = rng.choice(100_000, 500, replace=False)
    ids = np.stack([rng.choice(frequent, 40, replace=False) for _ in range(300)])
    logits = rng.normal(0, 1, ids.shape).astype(np.float32)
    none, lse = np.zeros((300, 0)), log_sum_exp(logits)[:, None].astype(np.float32)
    entries = Entries(ids, logits, none.astype(np.int64), none, lse, lse[:, 0])
    layout = Layout(100_000, 40, 0)
    codec = Lossless()
    plain = codec.encode(entries, layout)
    ranked = codec.encode(entries, number_ids(entries, layout))
    assert plain["gap_1"].any() and not ranked["gap_1"].any()
    np.testing.assert_array_equal(round_trip(codec, entries, layout).ids, np.sort(ids, axis=1))


def test_a_codec_is_its_own_configuration():
    spec = TargetsSpec(codec={"name": "steps", "levels": 50})
    assert spec.codec == Steps(levels=50)
    assert parse_config(TargetsSpec, spec.model_dump(mode="json"), "x") == spec
    assert {name: codec().name for name, codec in CODECS.items()} == {n: n for n in CODECS}
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        parse_config(TargetsSpec, {"codec": "stpes"}, "x")
    with pytest.raises(ConfigError, match=r"^x: codec.*levels: .*found 3"):
        parse_config(TargetsSpec, {"codec": {"name": "steps", "levels": 3}}, "x")


def test_levels_follow_the_number_of_kept_classes_until_they_are_set():
    assert [Steps().resolve(k).levels for k in (0, 1, 16, 81)] == [35, 35, 70, 105]
    assert Steps(levels=40).resolve(81).levels == 40
    assert Lossless().resolve(81) == Lossless()
