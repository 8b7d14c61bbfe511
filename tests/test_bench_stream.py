"""What the bench of streams measures is what it says: mixing, and content that is made up."""

import numpy as np
import pytest
import torch

from pipeline.cache import EpochOrder, TargetsSpec
from stages.bench.made_up import CLASSES, SEQUENCE, make_draft, write_made_up
from stages.bench.stream import measure_mixing

ROWS = 2**17


def test_a_full_shuffle_mixes_perfectly_and_the_stored_order_not_at_all():
    full = np.random.default_rng(1).permutation(ROWS)
    assert measure_mixing(full, 64) == pytest.approx(1, abs=0.1)
    assert measure_mixing(np.arange(ROWS), 64) == pytest.approx(32, rel=0.1)
    assert measure_mixing(np.arange(ROWS), 8) == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize(("run", "limit"), [(1, 1.1), (8, 1.4), (64, 3.2)])
def test_the_epochs_order_mixes_as_well_as_is_stated(run, limit):
    """Two of a batch of 32 share a block in one of 16 cases: at most 1 + 31 / 16."""
    assert 0.9 < measure_mixing(EpochOrder(ROWS, 64, 5, 1)[:], run) < limit


def test_made_up_targets_are_distributions_over_distinct_classes(tmp_path):
    targets = TargetsSpec(top_k=6, tail_draws=2, temperatures=(1.0, 2.0))
    cache = write_made_up(tmp_path, make_draft(3, targets, width=4))
    for row in range(3):
        example = cache[row]
        assert (example.example_id, len(example.input_ids)) == (f"made-up-{row}", SEQUENCE)
        kept = example.targets.ids.sort(dim=1).values
        assert (kept[:, 1:] > kept[:, :-1]).all() and int(kept.max()) < CLASSES
        for temperature in (1.0, 2.0):
            mass = 1 - example.targets.at(temperature).tail_mass
            assert (mass > 0.3).all() and (mass < 1.001).all()
        assert example.hidden["layer.4"].shape == (SEQUENCE - 1, 4)
    assert not torch.equal(cache[0].targets.ids, cache[1].targets.ids)
