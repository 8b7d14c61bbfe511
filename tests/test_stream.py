"""The order of an epoch as mathematics, and the stream that follows it."""

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from cache_examples import assert_same, make_draft, make_example, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.batches import Collator, Selection, StepSampler
from pipeline.cache import CODECS, EpochOrder, TargetsSpec, TeacherCache, epoch_order
from pipeline.cache.codecs import Decoded, Ranking
from pipeline.cache.coded import JoinedTargets
from pipeline.cache.order import BUFFER_BLOCKS
from pipeline.targets import Targets
from pipeline.tasks import CausalLM

counts = st.integers(0, 3000)
blocks = st.integers(1, 100)
seeds = st.integers(-(2**40), 2**40)
epochs = st.integers(0, 1000)


@settings(max_examples=60, deadline=None)
@given(count=counts, block=blocks, seed=seeds, epoch=epochs)
def test_an_order_is_a_permutation_and_pure(count, block, seed, epoch):
    order = epoch_order(count, block, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))
    np.testing.assert_array_equal(order, epoch_order(count, block, seed, epoch))


@settings(max_examples=30, deadline=None)
@given(count=counts, block=blocks, seed=seeds, world=st.integers(1, 9))
def test_ranks_share_an_epoch_without_overlap(count, block, seed, world):
    order = epoch_order(count, block, seed, 0)
    parts = [order[rank::world] for rank in range(world)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(count))


@settings(max_examples=60, deadline=None)
@given(count=counts, block=blocks, seed=seeds, ends=st.tuples(counts, counts, st.integers(1, 9)))
def test_any_part_of_an_order_is_computed_alone(count, block, seed, ends):
    start, stop, step = ends
    places = slice(min(start, stop), max(start, stop), step)
    whole = epoch_order(count, block, seed, 2)
    np.testing.assert_array_equal(EpochOrder(count, block, seed, 2)[places], whole[places])


class Rows(Dataset):
    """As many rows as wanted, each its own number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return row


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(12, 400),
    size=st.integers(1, 9),
    ranks=st.integers(1, 6),
    workers=st.sampled_from([0, 0, 0, 0, 0, 0, 0, 2]),
    epoch=st.integers(0, 3),
    taken=st.integers(0, 5),
)
def test_ranks_and_workers_share_an_order_and_go_on(rows, size, ranks, workers, epoch, taken):
    """What all ranks see is the epoch's order cut into steps, and the rest of it after some."""
    order = epoch_order(rows, 64, 7, epoch)
    found = []
    for rank in range(ranks):
        sampler = StepSampler(rows, size, 7, rank, ranks)
        sampler.set_epoch(epoch)
        data = Rows(rows)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, collate_fn=list)
        steps = list(loader)
        assert steps == [list(step) for step in sampler]
        assert [list(step) for step in list(sampler)[taken:]] == steps[taken:]
        found.append(steps)
    assert len({len(steps) for steps in found}) == 1
    for number, parts in enumerate(zip(*found, strict=True)):
        place = number * size * ranks
        step = order[place : place + sum(len(part) for part in parts)]
        for rank, part in enumerate(parts):
            assert part == step[rank::ranks].tolist()
    assert sum(len(step) for steps in found for step in steps) == rows


def test_an_order_of_a_billion_rows_is_read_anywhere_from_little():
    order = EpochOrder(10**9, 64, 3, 4)
    far = order[999_000_000:999_000_016]
    assert len(set(far.tolist())) == 16 and far.max() < 10**9
    np.testing.assert_array_equal(order[999_000_003:999_000_016:4], far[3::4])
    sampler = StepSampler(10**9, 16, 3)
    assert len(sampler) == 10**9 // 16
    first = next(iter(sampler))
    assert list(first) == EpochOrder(10**9, 64, 3, 0)[:16].tolist()


def test_the_same_order_on_every_machine():
    """Numbers of version 1: an epoch that was begun elsewhere is continued here."""
    assert EpochOrder(10**6, 64, 0, 0)[500_000:500_004].tolist() == [433023, 363794, 363745, 363752]
    assert EpochOrder(40, 2, 5, 1)[:8].tolist() == [26, 7, 4, 25, 14, 5, 13, 30]


@settings(max_examples=30, deadline=None)
@given(block=blocks, seed=seeds, epoch=epochs)
def test_epochs_and_seeds_differ(block, seed, epoch):
    order = epoch_order(500, block, seed, epoch)
    assert (order != epoch_order(500, block, seed, epoch + 1)).any()
    assert (order != epoch_order(500, block, seed + 1, epoch)).any()


def test_a_subset_is_shuffled_like_its_places():
    rows = np.arange(1000)[::3]
    np.testing.assert_array_equal(epoch_order(rows, 8, 3, 4), rows[epoch_order(len(rows), 8, 3, 4)])


def test_the_shuffle_is_thorough():
    """Mean displacement of a full shuffle is n / 3; neighbours must not stay neighbours."""
    count = 64 * 400
    for epoch in range(3):
        order = epoch_order(count, 64, 0, epoch)
        displacement = np.abs(order - np.arange(count)).mean()
        assert abs(displacement / (count / 3) - 1) < 0.15
        assert (np.abs(np.diff(order)) == 1).mean() < 0.01


def test_reads_stay_local():
    """Any 16 blocks' worth of the order lies in 17 or 18 runs of neighbours, ends included."""
    order = epoch_order(64 * 400, 64, 5, 2)
    for start in range(0, len(order), 64 * 16):
        window = np.sort(order[start : start + 64 * 16])
        assert (np.diff(window) > 1).sum() < 18


def test_a_batch_is_as_mixed_as_a_buffer_allows():
    """Two of a batch are of one block as often as 1 in 16, and never of one batch's worth more."""
    order = epoch_order(64 * 4000, 64, 1, 0)
    batches = order[: len(order) // 32 * 32].reshape(-1, 32)
    near = np.abs(batches[:, :, None] - batches[:, None, :]) < 32
    others = near.sum() / len(batches) - 32
    assert others / (32 * 31) < 1 / BUFFER_BLOCKS


def test_no_two_rows_are_bound_together_for_ever():
    """Block borders move from epoch to epoch."""
    together = np.ones(1999, dtype=bool)
    for epoch in range(200):
        place = np.argsort(epoch_order(2000, 8, 1, epoch))
        together &= np.abs(np.diff(place)) < 8 * 16
    assert not together.any()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "stream"
    write_cache(path, make_draft(30))
    return TeacherCache.open(path)


def test_a_stream_gives_every_example_once_with_its_own_targets(cache):
    for epoch in range(2):
        examples = list(cache.stream(seed=3, epoch=epoch))
        assert sorted(int(e.example_id[5:]) for e in examples) == list(range(30))
        for example in examples:
            row = int(example.example_id[5:])
            assert_same(example, make_example(row, make_draft(30)))


def test_a_stream_follows_the_epochs_order(cache):
    order = epoch_order(30, 64, 3, 1)
    for rank in range(4):
        found = [e.example_id for e in cache.stream(3, 1, rank, 4)]
        assert found == [f"text-{row}" for row in order[rank::4]]


def test_a_stream_can_be_of_one_split_and_in_stored_order(cache):
    test = cache.split_indices("test")
    stored = [e.example_id for e in cache.stream(0, 0, indices=test, shuffle=False)]
    assert stored == [f"text-{row}" for row in test]
    shuffled = [e.example_id for e in cache.stream(0, 0, indices=test)]
    assert sorted(shuffled) == sorted(stored) and shuffled != stored


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_continues_where_it_was_left(cache, shuffle):
    for rank in range(3):
        whole = [e.example_id for e in cache.stream(5, 2, rank, 3, shuffle=shuffle)]
        for taken in (0, 1, 7, len(whole), 20):
            rest = cache.stream(5, 2, rank, 3, shuffle=shuffle, skip=taken)
            assert [e.example_id for e in rest] == whole[taken:]


def test_what_is_skipped_is_not_read(cache, tmp_path):
    """The shards of all that was seen before are gone."""
    order = epoch_order(30, 64, 3, 0)
    copy = Path(shutil.copytree(cache.path, tmp_path / "copy"))
    needed = {row // 4 for row in order[24:]}
    for shard in set(range(8)) - needed:
        shutil.rmtree(copy / f"shards/{shard:05d}")
    assert len(needed) < 8
    rest = TeacherCache.open(copy).stream(3, 0, skip=24)
    assert [e.example_id for e in rest] == [f"text-{row}" for row in order[24:]]


def read_slice(cache, row):
    """What the codec makes of one example's targets alone, read by Arrow, without a numbering."""
    draft = cache.manifest
    shard, local = divmod(row, draft.shard_examples)
    file = pa.ipc.open_file(cache.path / f"shards/{shard:05d}/rows.arrow")
    targets = file.read_all()["targets"].combine_chunks()[local].values
    columns = {}
    for name, (_, width) in draft.targets.codec.columns(draft.layout).items():
        field = targets.field(name)
        flat = field.flatten() if width > 1 else field
        columns[name] = flat.to_numpy().reshape(-1, width)
    out = Decoded.empty(len(targets), draft.layout)
    ranking = Ranking(np.zeros(0, dtype=np.int32), draft.num_classes)
    draft.targets.codec.decode(columns, draft.layout, ranking.find, out)
    return out


@pytest.mark.parametrize("codec", CODECS)
def test_a_batch_decoded_at_once_is_its_examples_decoded_one_by_one(tmp_path, codec):
    spec = TargetsSpec(top_k=5, tail_draws=2, temperatures=(1.0, 2.0), codec=codec)
    write_cache(tmp_path, make_draft(7, targets=spec))
    cache = TeacherCache.open(tmp_path)
    collate = Collator(CausalLM(block_size=16), pad_id=0)
    order = epoch_order(7, 64, 1, 0).tolist()
    joined = collate(list(cache.stream(1, 0)))["targets"]
    alone = [collate([TeacherCache.open(tmp_path)[row]])["targets"] for row in order]
    for name in ("ids", "logits", "draw_ids", "draw_logits", "logsumexp", "label_log_probs"):
        parts = [getattr(part, name) for part in alone]
        assert torch.equal(getattr(joined, name), torch.cat(parts)), name
        for row, part in zip(order, parts, strict=True):
            expected = torch.from_numpy(getattr(read_slice(cache, row), name))
            assert torch.equal(part, expected), name


def test_joined_targets_are_a_copy(cache):
    """Examples of a record batch share its memory; a training batch does not."""
    collate = Collator(CausalLM(block_size=16), pad_id=0)
    for count in (1, 3):
        before = [cache[row].targets.logits.clone() for row in range(count)]
        collate([cache[row] for row in range(count)])["targets"].logits.zero_()
        for row in range(count):
            assert torch.equal(cache[row].targets.logits, before[row])


def list_targets(targets):
    return {name: tensor for name, tensor in vars(targets).items() if isinstance(tensor, Tensor)}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
def test_codes_decoded_late_are_those_decoded_at_once(tmp_path, codec, compression):
    """Examples of several shards, each with its own numbering, as none of them alone."""
    spec = TargetsSpec(
        top_k=5, tail_draws=2, temperatures=(0.5, 1.0, 2.0), codec=codec, compression=compression
    )
    write_cache(tmp_path, make_draft(11, targets=spec, num_classes=300))
    examples = list(TeacherCache.open(tmp_path).stream(1, 0))
    collate = Collator(CausalLM(block_size=16), pad_id=0)
    now = collate(examples)["targets"]
    late = replace(collate, decode_late=True)(examples)["targets"]
    alone = Targets.cat([example.targets for example in examples])
    assert isinstance(now, Targets) and isinstance(late, JoinedTargets)
    assert (len(late), late.num_classes) == (len(now), now.num_classes)
    for other in (late.to("cpu"), pickle.loads(pickle.dumps(late)).to("cpu"), alone):
        for name, tensor in list_targets(now).items():
            found = getattr(other, name)
            assert torch.equal(found, tensor) and found.dtype == tensor.dtype, name


def test_codes_are_a_third_of_what_they_become(tmp_path):
    spec = TargetsSpec(top_k=64)
    write_cache(tmp_path, make_draft(8, targets=spec, num_classes=5_000))
    examples = list(TeacherCache.open(tmp_path).stream(1, 0))
    late = Collator(CausalLM(block_size=16), 0, decode_late=True)(examples)["targets"]
    decoded = sum(tensor.nbytes for tensor in list_targets(late.to("cpu")).values())
    assert decoded / 4 < late.nbytes < decoded / 2


def test_a_worker_decodes_whoever_asks_for_codes(cache):
    late = Collator(CausalLM(block_size=16), 0, decode_late=True)
    loader = DataLoader(
        Selection(cache), batch_sampler=StepSampler(30, 7, 0), num_workers=1, collate_fn=late
    )
    rows = [row for step in StepSampler(30, 7, 0) for row in step]
    found = Targets.cat([batch["targets"] for batch in loader])
    assert torch.equal(found.ids, Targets.cat([cache[row].targets for row in rows]).ids)


def test_memory_is_used_again_only_when_nobody_refers_to_it(tmp_path):
    """Targets that are kept hold what they held while others are decoded, in threads as well."""
    spec = TargetsSpec(top_k=1_000, codec="lossless")
    write_cache(tmp_path, make_draft(40, targets=spec, num_classes=2_000))
    collate = Collator(CausalLM(block_size=16), pad_id=0)

    def read(seed):
        opened = TeacherCache.open(tmp_path)
        examples = list(opened.stream(seed, 0))
        kept = [collate(examples[at : at + 20])["targets"] for at in (0, 20)]
        held = [kept[0].ids[:3], kept[1].logits[3:]]
        copies = [tensor.clone() for tensor in held]
        del kept
        for at in range(0, 40, 10):
            collate(examples[at : at + 10])
        return all(map(torch.equal, held, copies))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(read, range(12)))
