"""Caches of format 1 that were written once are read for ever."""

import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from cache_examples import make_example
from golden_cache import CASES, GOLDEN, describe_example, make_golden_draft

from pipeline.cache import CODECS, PROJECTIONS, TeacherCache, read_bases, read_manifest
from pipeline.cache.signals.quantization import ENCODINGS
from pipeline.config import canonical_json

# Of the largest number of the row; exact in the other dtypes, whose numbers were rounded before.
_ERRORS = {"float8_e4m3fn": 1 / 16, "int8": 0.501 / 127}
_PROJECTED_ERRORS = {**_ERRORS, "float16": 2**-11, "bfloat16": 2**-8}
_ROUNDED = {"logits", "draw_logits", "logsumexp", "label_log_probs"}  # by a logarithm


def test_every_codec_and_every_dtype_has_golden_bytes() -> None:
    drafts = [make_golden_draft(name) for name in CASES]
    assert {draft.targets.codec.name for draft in drafts} == set(CODECS)
    assert {draft.targets.compression for draft in drafts} == {"zstd", "lz4", "none"}
    kept = {signal.dtype for draft in drafts for signal in draft.signals.values()}
    assert kept == set(ENCODINGS)
    projections = [s.projection for draft in drafts for s in draft.signals.values() if s.projection]
    assert {projection.name for projection in projections} == set(PROJECTIONS)
    assert sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_golden_bytes_hold_what_they_held(name: str) -> None:
    cache = TeacherCache.open(GOLDEN / name)
    expected = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert cache.manifest.version == 1
    assert len(cache) == len(expected) > 0
    for row, wanted in enumerate(expected):
        found: dict[str, Any] = describe_example(cache[row])
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            if key in _ROUNDED:
                np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-6, err_msg=key)
            else:
                assert found[key] == value, key
        assert describe_example(cache.by_id(wanted["example_id"])) == found


@pytest.mark.parametrize("name", CASES)
def test_what_golden_bytes_held_is_what_was_put_in(name: str) -> None:
    draft = make_golden_draft(name)
    lossless = draft.targets.codec.name == "lossless"
    projections = read_manifest(GOLDEN / name).projections
    bases = read_bases(GOLDEN / name, projections) if projections else {}
    for wanted in json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8")):
        given = make_example(int(wanted["example_id"].split("-")[1]), draft)
        assert wanted["input_ids"] == given.input_ids.tolist()
        assert dict(given.columns) == wanted["columns"]
        for kept in ("ids", "draw_ids"):
            expected = getattr(given.targets, kept).sort(dim=1).values
            assert torch.equal(torch.tensor(wanted[kept]).long().sort(dim=1).values, expected)
        for signal, vectors in given.hidden.items():
            values = bases[signal].project(vectors) if signal in bases else vectors
            peak = values.abs().amax(dim=1, keepdim=True)
            errors = _PROJECTED_ERRORS if signal in bases else _ERRORS
            limit = errors.get(draft.signals[signal].dtype, 0.0) * peak
            assert bool(((torch.tensor(wanted["hidden"][signal]) - values).abs() <= limit).all())
        if lossless:
            given_logits = given.targets.logits.sort(dim=1).values
            assert torch.equal(torch.tensor(wanted["logits"]).sort(dim=1).values, given_logits)
            assert torch.equal(torch.tensor(wanted["logsumexp"]), given.targets.logsumexp)
        elif draft.layout.top_k:
            own, read = given.targets.at(1.0), torch.tensor(wanted["logits"])
            log_probs = (
                read - torch.tensor(wanted["logsumexp"])[:, [wanted["temperatures"].index(1.0)]]
            )
            torch.testing.assert_close(
                log_probs.exp().sum(dim=1), own.log_probs.exp().sum(dim=1), rtol=0, atol=1e-3
            )


@pytest.mark.parametrize("name", CASES)
def test_a_golden_cache_keeps_its_name(name: str) -> None:
    """The digest that students know a cache by holds nothing that came later."""
    raw = json.loads((GOLDEN / name / "manifest.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(canonical_json(raw).encode()).hexdigest()
    assert read_manifest(GOLDEN / name).digest == digest
