"""The order in which an epoch visits a cache: shuffled, and yet kind to the disk.

    rows -> cut into blocks of neighbours -> blocks shuffled -> rows shuffled within a few blocks

Reads stay local, because only the few blocks of one buffer are in use at a time. The order is a
pure function of its arguments, on any machine: it sorts by the raw output of Philox, which numpy
promises never to change.
"""

import numpy as np

BUFFER_BLOCKS = 16


def epoch_order(rows: int | np.ndarray, block: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle rows for one epoch.

    Args:
        rows: how many rows there are, or [n] the rows themselves.
        block: neighbouring rows that stay together until the last step; the order is a full shuffle
            where all rows fit into 16 blocks.
        seed: of the run, epoch: from 0; each pair gives another order. Both may be any integers.

    Returns:
        [n] int64, a permutation of the rows. Rank r of w ranks takes `order[r::w]`.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, found {block}")
    rows = np.arange(rows) if isinstance(rows, int) else np.asarray(rows, dtype=np.int64)
    count = len(rows)
    bits = np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch % 2**64]))
    # Borders move from epoch to epoch, so that no two rows are together in every one.
    offset = int(bits.random_raw()) % block
    of_block = (np.arange(count) + offset) // block
    rank = np.argsort(bits.random_raw(int(of_block[-1]) + 1 if count else 0), kind="stable")
    rows = rows[np.argsort(rank[of_block], kind="stable")]
    return _shuffle_buffers(rows, block * BUFFER_BLOCKS, bits)


def _shuffle_buffers(rows: np.ndarray, size: int, bits: np.random.Philox) -> np.ndarray:
    keys = bits.random_raw(len(rows))
    whole = len(rows) // size * size
    inner = np.argsort(keys[:whole].reshape(-1, size), axis=1, kind="stable")
    head = np.take_along_axis(rows[:whole].reshape(-1, size), inner, axis=1).ravel()
    return np.concatenate([head, rows[whole:][np.argsort(keys[whole:], kind="stable")]])
