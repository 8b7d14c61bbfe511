"""Finding a vector among others by its direction."""

import numpy as np

_ROWS_AT_ONCE = 1024  # similarities that are held at a time, by as many candidates as there are


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine similarity of [n, D] and [n, D], row by row, [n] float64; 0 for a vector of zeros."""
    similarities: np.ndarray = (_directions(one) * _directions(other)).sum(axis=1, dtype=np.float64)
    return similarities


def retrieve(own: np.ndarray, sources: np.ndarray, ids: np.ndarray) -> tuple[float, float]:
    """How often the nearest vector of the other side is one of the same id, as two shares.

    Args:
        own: [n, D] vectors of texts, several of which may be of one source.
        sources: [n, D] vectors of their sources, equal where ids are.
        ids: [n] of the sources.

    Returns:
        For every text, that it finds its source among all distinct sources; for every source, that
        it finds one of its texts among all texts. Artetxe & Schwenk 2019 call the mean error of
        both similarity search error.
    """
    texts = _directions(own)
    distinct, firsts = np.unique(ids.astype(str), return_index=True)
    candidates, named = _directions(sources[firsts]), ids.astype(str)
    there = distinct[_nearest(texts, candidates)] == named
    back = named[_nearest(candidates, texts)] == distinct
    return float(there.mean()), float(back.mean())


def _nearest(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """[n] the candidate of the largest dot product with each query."""
    parts = [
        (queries[start : start + _ROWS_AT_ONCE] @ candidates.T).argmax(axis=1)
        for start in range(0, len(queries), _ROWS_AT_ONCE)
    ]
    found: np.ndarray = np.concatenate(parts)
    return found


def _directions(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled.astype(np.float32)
