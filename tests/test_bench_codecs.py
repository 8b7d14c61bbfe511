"""The comparison of codecs: sizes and errors of records that can be worked out by hand."""

import numpy as np
import torch

from stages.bench.rivals import RIVALS, Polynomial, keep_naively
from stages.bench.vocabulary import CLASSES, synthesize_logits


def make_log_probs(top_k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    log_probs = -np.sort(rng.exponential(2, (40, top_k)) + 1, axis=1)
    ids = np.stack([rng.choice(128_256, top_k, replace=False) for _ in log_probs])
    return ids, log_probs


def test_the_records_of_others_have_their_published_sizes():
    ids, log_probs = make_log_probs(64)
    sizes = {name: keep(ids, log_probs, 128_256)[0] for name, keep in RIVALS.items()}
    assert sizes["int32 + float16"] == 384
    assert sizes["like DistillKit, 16 exact"] == 192
    assert sizes["like DistillKit, 1 exact"] == 150
    assert sizes["like Megatron-LM"] < 264


def test_a_polynomial_of_enough_terms_is_exact():
    ids, log_probs = make_log_probs(6)
    _, coarse = Polynomial(exact=0, terms=2)(ids, log_probs, 100)
    _, found = Polynomial(exact=0, terms=6)(ids, log_probs, 100)
    np.testing.assert_allclose(found, log_probs, atol=1e-4)
    assert np.abs(coarse - log_probs).max() > 1e-2
    _, exact = Polynomial(exact=6, terms=1)(ids, log_probs, 100)
    np.testing.assert_allclose(exact, log_probs, rtol=2**-8)


def test_halves_are_halves():
    ids, log_probs = make_log_probs(5)
    np.testing.assert_allclose(keep_naively(ids, log_probs, 10)[1], log_probs, rtol=2**-11)


def test_synthetic_logits_are_the_same_each_time_and_look_like_a_language():
    logits = torch.cat(list(synthesize_logits(130)))
    assert logits.shape == (130, CLASSES) and logits.dtype == torch.float32
    assert torch.equal(logits[:128], next(synthesize_logits(200)))
    p = logits.softmax(dim=1)
    entropy = -(p * logits.log_softmax(dim=1)).sum(dim=1)
    assert 0.3 < float(p.amax(dim=1).mean()) < 0.6
    assert 1.5 < float(entropy.mean()) < 4.0
