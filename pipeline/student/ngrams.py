"""A tokenizer without a vocabulary file: hashed character n-grams, the same for every script.

    text -> NFC, lower case, one space around words -> code points -> windows -> FNV-1a -> buckets

Windows run across spaces and need none, so that scripts without spaces between words are no special
case. Id 0 is the padding; a bucket's id is its hash.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer

_OFFSET = np.uint64(0xCBF29CE484222325)  # FNV-1a, 64 bit
_PRIME = np.uint64(0x100000001B3)
_SPACE = ord(" ")
_PAD = "<pad>"


class HashedNgramTokenizer(PreTrainedTokenizer):  # type: ignore[misc]  # ships without types
    """Texts as buckets of n-grams; its whole state is two numbers, saved with the configuration.

    A bucket has a name, `<bucket 17>`, as its token: n-grams cannot be read back. The second text
    of a pair follows the first.

    Args:
        buckets: size of the hash space.
        ngram_sizes: lengths of the n-grams in code points.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(
        self, buckets: int = 2**16, ngram_sizes: Sequence[int] = (1, 2, 3, 4), **options: Any
    ) -> None:
        self.buckets = buckets
        self.ngram_sizes = list(ngram_sizes)
        options.setdefault("pad_token", _PAD)
        options.setdefault("model_max_length", 8192)
        super().__init__(buckets=buckets, ngram_sizes=self.ngram_sizes, **options)

    @property
    def vocab_size(self) -> int:
        """The buckets and the padding."""
        return self.buckets + 1

    def get_vocab(self) -> dict[str, int]:
        """The name of every bucket."""
        return {self._convert_id_to_token(index): index for index in range(self.vocab_size)}

    def tokenize(self, text: str, **options: Any) -> list[str]:
        """The names of the text's buckets."""
        ids = hash_ngrams(text, self.ngram_sizes, self.buckets)
        return [self._convert_id_to_token(index) for index in ids.tolist()]

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Nothing: there is no vocabulary."""
        return ()

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The ids of a text or a pair, nothing added."""
        return token_ids_0 + (token_ids_1 or [])

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """Hash texts to ids directly: naming each bucket and looking it up costs ten times more."""
        return super()._encode_plus(self._hash(text), self._hash(text_pair), **options)

    def _hash(self, text: Any) -> Any:
        if isinstance(text, str):
            return hash_ngrams(text, self.ngram_sizes, self.buckets).tolist()
        if isinstance(text, list | tuple) and text and not isinstance(text[0], int):
            return [self._hash(one) for one in text]
        return text

    def _convert_token_to_id(self, token: str) -> int:
        if token == _PAD:
            return 0
        return int(token.removeprefix("<bucket ").removesuffix(">"))

    def _convert_id_to_token(self, index: int) -> str:
        return _PAD if index == 0 else f"<bucket {index}>"


def hash_ngrams(text: str, sizes: Sequence[int], buckets: int) -> np.ndarray:
    """The buckets of all n-grams of a text, ordered by where they end.

    Args:
        text: any Unicode text; it is normalised here.
        sizes: lengths of the n-grams in code points.
        buckets: size of the hash space.

    Returns:
        [n] int64 in [1, buckets]; windows of spaces alone are left out, and an empty text is one
        n-gram, so that there is always something to read.
    """
    points = _normalized_points(text)
    last = len(points)
    buckets_of = np.zeros((last, len(sizes)), dtype=np.int64)  # by where the n-gram ends; 0 is none
    hashes = np.full(last, _OFFSET, dtype=np.uint64)
    spoken = np.zeros(last, dtype=bool)
    for size in range(1, min(max(sizes), last) + 1):
        added = points[size - 1 :]
        hashes = (hashes[: len(added)] ^ added) * _PRIME
        spoken = spoken[: len(added)] | (added != _SPACE)
        if size in sizes:
            column = _bucket(hashes, buckets) + 1
            buckets_of[size - 1 :, sizes.index(size)] = column * spoken
    found: np.ndarray = buckets_of[buckets_of > 0]
    return found if len(found) else np.ones(1, dtype=np.int64)


def _normalized_points(text: str) -> np.ndarray:
    plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    spaced = f" {' '.join(plain.split())} "
    points = np.frombuffer(spaced.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
    return points.astype(np.uint64)


def _bucket(hashes: np.ndarray, buckets: int) -> np.ndarray:
    mixed = hashes ^ (hashes >> np.uint64(32))  # FNV's low bits alone are weak
    bucket: np.ndarray = (mixed % np.uint64(buckets)).astype(np.int64)
    return bucket
