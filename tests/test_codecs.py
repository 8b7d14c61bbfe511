"""The codecs' promises, as properties, for every member of the family."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import CODECS, Codec, TargetsSpec
from pipeline.cache.codecs import Entries, Layout, Steps
from pipeline.config import parse_config
from pipeline.errors import ConfigError

LAYOUTS = [
    Layout(1, 1, 0),
    Layout(7, 7, 0),
    Layout(50, 0, 5),
    Layout(300, 20, 4),
    Layout(32_000, 12, 0),
    Layout(128_256, 64, 16),
    Layout(2**20, 50, 30),
]
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.0, 1e-6, 0.01, 1.0, 5.0, 60.0, 3000.0])
codecs = pytest.mark.parametrize("codec", [codec() for codec in CODECS.values()], ids=str)


def make_entries(layout: Layout, seed: int, scale: float, rows: int = 9) -> Entries:
    """Random entries: kept ids distinct and above the draws, draws repeating."""
    rng = np.random.default_rng(seed)
    size = layout.top_k + max(1, layout.tail_draws // 2) * bool(layout.tail_draws)
    ids = np.stack([rng.choice(layout.num_classes, size, replace=False) for _ in range(rows)])
    logits = -np.sort(-rng.normal(rng.normal() * 10, scale, (rows, size)), axis=1)
    logits = logits.astype(np.float32)
    pick = rng.integers(layout.top_k, max(size, layout.top_k + 1), (rows, layout.tail_draws))
    order = rng.permuted(np.tile(np.arange(layout.top_k), (rows, 1)), axis=1)
    return Entries(
        ids=np.take_along_axis(ids, order, axis=1),
        logits=np.take_along_axis(logits, order, axis=1),
        draw_ids=np.take_along_axis(ids, pick, axis=1),
        draw_logits=np.take_along_axis(logits, pick, axis=1),
    )


def by_id(ids: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(ids, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logits, order, axis=1)


def round_trip(codec: Codec, entries: Entries, layout: Layout) -> Entries:
    return codec.decode(codec.encode(entries, layout), layout)


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=1, keepdims=True)
    return (top + np.log(np.exp(logits.astype(np.float64) - top).sum(axis=1, keepdims=True)))[:, 0]


@codecs
@settings(max_examples=60, deadline=None)
@given(layout=layouts, seed=seeds, scale=scales)
def test_ids_come_back_with_their_logits(codec, layout, seed, scale):
    entries = make_entries(layout, seed, scale)
    found = round_trip(codec, entries, layout)
    parts = [("ids", "logits"), ("draw_ids", "draw_logits")]
    for ids_name, logits_name in parts:
        ids, logits = by_id(getattr(entries, ids_name), getattr(entries, logits_name))
        np.testing.assert_array_equal(getattr(found, ids_name), ids)
        assert getattr(found, ids_name).dtype == np.int64
        assert getattr(found, logits_name).dtype == np.float32
        if codec.name == "exact":
            np.testing.assert_array_equal(getattr(found, logits_name), logits)
        else:
            error = np.abs(getattr(found, logits_name).astype(np.float64) - logits)
            assert (error <= promised_error(codec, entries, logits)).all()


def promised_error(codec: Codec, entries: Entries, logits: np.ndarray) -> np.ndarray:
    """Rounding at a logit's own depth, plus at most as much for the head, plus float32 itself."""
    kept = entries.logits if entries.logits.size else entries.draw_logits
    top = kept.max(axis=1, keepdims=True).astype(np.float64)
    depth = np.maximum(top - logits, 0.0)
    float32 = 4e-7 * (np.abs(top) + depth) + 1e-6
    if codec.name == "half":
        return (depth + 1) * 2.0**-10 + float32
    step = codec.step
    reach = 2 * np.expm1(255 * step / 2)
    rounding = 1.1 * step * (0.5 + depth / 4)
    return np.where(depth > reach, depth - reach, rounding) + 1.1 * step + float32


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
@given(layout=layouts, seed=seeds, scale=scales)
def test_kept_mass_at_temperature_one_stays(codec, layout, seed, scale):
    entries = make_entries(layout, seed, scale)
    if layout.top_k:
        found = round_trip(codec, entries, layout)
        drift = log_sum_exp(found.logits) - log_sum_exp(entries.logits)
        float32 = 2e-7 * np.abs(entries.logits).max()
        assert (np.abs(drift) < 1e-5 + float32).all()


@codecs
@settings(max_examples=30, deadline=None)
@given(layout=layouts, seed=seeds)
def test_a_target_is_encoded_alike_in_any_company(codec, layout, seed):
    entries = make_entries(layout, seed, 3.0)
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


@codecs
def test_no_id_width_wraps(codec):
    ids = np.array([[2**20 - 1, 0, 151_645, 131_072, 2**16 - 1, 2**16, 255, 256]])
    logits = np.arange(8, dtype=np.float32)[None]
    none = np.zeros((1, 0))
    layout = Layout(2**20, 8, 0)
    found = round_trip(codec, Entries(ids, logits, none.astype(int), none), layout)
    np.testing.assert_array_equal(found.ids, np.sort(ids))


@codecs
def test_logits_far_below_stay_finite_and_far(codec):
    logits = np.array([[3.0, 2.0, -40.0, -1e4, -1e6]], dtype=np.float32)
    draws = np.array([[-1e6, -200.0]], dtype=np.float32)
    layout = Layout(10, 5, 2)
    entries = Entries(np.arange(5)[None], logits, np.array([[5, 6]]), draws)
    found = round_trip(codec, entries, layout)
    assert np.isfinite(found.logits).all() and np.isfinite(found.draw_logits).all()
    assert (3.0 - found.logits[0, 3:] > 100).all() and (3.0 - found.draw_logits > 100).all()


def test_near_ties_keep_their_first_choice():
    base = np.float32(17.0)
    rivals = [base, np.nextafter(base, np.float32(99)), base - np.float32(1e-5), base]
    layout = Layout(4, 4, 0)
    none = np.zeros((4, 0))
    logits = np.stack([np.roll(rivals, shift) for shift in range(4)]).astype(np.float32)
    entries = Entries(np.tile(np.arange(4), (4, 1)), logits, none.astype(int), none)
    for codec in CODECS.values():
        found = round_trip(codec(), entries, layout)
        np.testing.assert_array_equal(found.logits.argmax(axis=1), logits.argmax(axis=1))


def make_language_logits(rows: int, num_classes: int) -> np.ndarray:
    """Zipf's law bent by a random context of 32 dimensions: entropy of 3 to 6 nats."""
    rng = np.random.default_rng(7)
    rank = np.arange(num_classes)
    context = rng.normal(0, 1, (rows, 32)) * rng.uniform(0.3, 1.0, (rows, 1))
    return context @ rng.normal(0, 1, (32, num_classes)) - np.log(rank + 3.0)


def kl_with_bucket(logits: np.ndarray, found: np.ndarray, lse: np.ndarray) -> float:
    """Mean KL(teacher || decoded) in nats, what is not kept being one outcome."""
    log_p, log_q = logits - lse[:, None], found - lse[:, None]
    p, q = np.exp(log_p), np.exp(log_q)
    tail_p, tail_q = 1 - p.sum(axis=1), np.maximum(1 - q.sum(axis=1), 1e-12)
    tail = tail_p * np.log(np.maximum(tail_p, 1e-12) / tail_q)
    return float(((p * (log_p - log_q)).sum(axis=1) + tail).mean())


@pytest.mark.parametrize(
    ("codec", "at_one", "at_two"),
    [(Steps(), 1.5e-4, 5e-5), (Steps(step=1 / 16), 6e-4, 2e-4), (CODECS["half"](), 1e-7, 1e-7)],
    ids=["steps", "coarse", "half"],
)
def test_what_rounding_costs_on_language(codec, at_one, at_two):
    logits = make_language_logits(256, 8_192)
    ids = np.argsort(-logits, axis=1)[:, :50]
    kept = np.take_along_axis(logits, ids, axis=1).astype(np.float32)
    none = np.zeros((256, 0))
    layout = Layout(8_192, 50, 0)
    found = round_trip(codec, Entries(ids, kept, none.astype(int), none), layout)
    kept = np.take_along_axis(logits, found.ids, axis=1)
    for temperature, limit in ((1.0, at_one), (2.0, at_two)):
        lse = log_sum_exp(logits / temperature)
        kl = kl_with_bucket(kept / temperature, found.logits / temperature, lse)
        assert -1e-7 < kl < limit


def test_a_codec_is_its_own_configuration():
    spec = TargetsSpec(codec={"name": "steps", "step": 0.0625})
    assert spec.codec == Steps(step=0.0625)
    assert parse_config(TargetsSpec, spec.model_dump(mode="json"), "x") == spec
    assert {name: codec().name for name, codec in CODECS.items()} == {n: n for n in CODECS}
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        parse_config(TargetsSpec, {"codec": "stpes"}, "x")
    with pytest.raises(ConfigError, match=r"^x: codec.*step: .*found 3"):
        parse_config(TargetsSpec, {"codec": {"name": "steps", "step": 3}}, "x")
