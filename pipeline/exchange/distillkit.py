"""DistillKit's Parquet: packed ids, log-probabilities as exact numbers, curves and residuals.

    bytepacked_indices   [rows, B] uint8 -- bits, the highest first --> ids, the most probable first
    compressed_logprobs  [rows, B] uint8 = exact | coefficients | (scale | codes) per bin

Row t is about token t + 1. A capture by vLLM has one row less than tokens: what follows the last
was never asked. Packed data have as many rows as tokens, and in `attention_mask` the number of each
token's document. Format: arcee-ai/DistillKit, distillkit/compression and sample_logits_vllm.py.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config import StrictModel, load_config
from pipeline.errors import ConfigError, DataError
from pipeline.exchange.containers import Row, matrix, numbers
from pipeline.exchange.dump import Dump, Facts, Record, next_tokens, take
from pipeline.exchange.plain import Ragged

_BESIDE = "compression_config.yaml"
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_Dtype = Literal["float16", "bfloat16", "float32", "float64"]
_Size = Annotated[int, Field(gt=0)]


class ResidualBin(StrictModel):
    """Codes of neighbouring entries with one scale."""

    scale_dtype: _Dtype
    element_bits: int = Field(gt=0, le=32)
    num_elements: _Size


class Compression(StrictModel):
    """DistillKit's DistributionQuantizationConfig, by its own names."""

    d: _Size
    k: _Size
    exact_k: int = Field(ge=0)
    exact_dtype: _Dtype = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: _Dtype = "float32"
    residual_bins: list[ResidualBin] = []
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _require_room(self) -> Self:
        if self.exact_k + sum(part.num_elements for part in self.residual_bins) > self.k:
            raise ValueError("exact_k and the elements of residual_bins are more than k")
        return self

    @property
    def id_bits(self) -> int:
        """Bits of an id: those of d - 1."""
        return (self.d - 1).bit_length()

    def unpack_ids(self, packed: np.ndarray) -> np.ndarray:
        """[rows, k] of [rows, bytes]."""
        return _unpack(packed, self.id_bits, self.k)

    def decode(self, packed: np.ndarray) -> np.ndarray:
        """[rows, k] float64 log-probabilities of [rows, bytes].

        The curve is computed in the type of its coefficients, from which the residuals were
        measured; nothing else is rounded.

        Raises:
            ValueError: another number of bytes than this configuration takes.
        """
        reader = _Bytes(packed)
        exact = reader.floats(self.exact_k, self.exact_dtype).double()
        rest = self._curve(reader) if self.polynomial_terms else 0.0
        parts = [self._residuals(reader, part) for part in self.residual_bins]
        filled = sum(part.num_elements for part in self.residual_bins)
        parts.append(torch.zeros(len(packed), self.k - self.exact_k - filled, dtype=torch.float64))
        reader.require_end()
        found = torch.cat([exact, rest + torch.cat(parts, dim=1)], dim=1)
        log_probs: np.ndarray = (found.cumsum(dim=1) if self.delta_encoding else found).numpy()
        return log_probs

    def _curve(self, reader: "_Bytes") -> Tensor:
        terms, kind = self.polynomial_terms or [], _DTYPES[self.term_dtype]
        count = self.k - self.exact_k
        at = torch.arange(count, dtype=kind)
        if self.normalize_t:
            at = torch.linspace(0, 1, steps=count, dtype=kind)
        known = {"sqrt": torch.sqrt, "exp": torch.exp}
        basis = [at**term if isinstance(term, int) else known[term](at) for term in terms]
        coefficients = reader.floats(len(terms), self.term_dtype)
        return (torch.stack(basis, dim=-1) * coefficients[:, None, :]).sum(dim=-1).double()

    def _residuals(self, reader: "_Bytes", part: ResidualBin) -> Tensor:
        scale = reader.floats(1, part.scale_dtype).double()
        bits = part.element_bits
        packed = reader.take((bits * part.num_elements + 7) // 8)
        codes = torch.from_numpy(_unpack(packed, bits, part.num_elements)).double()
        centred = 2 * codes - 1 if bits == 1 else codes - 2 ** (bits - 1)
        return centred * scale


class DistillKit(Dump):
    """Rows of a DistillKit capture, compressed or as plain `token_ids` and `top_values`.

    Attributes:
        compression: the config of the capture; by default that of compression_config.yaml beside
            the first file.
    """

    open_questions: ClassVar = (
        "how far the log-probabilities are from the teacher's: ids are exact, curves and codes not",
    )

    name: Literal["distillkit"] = "distillkit"
    compression: Compression | None = None

    def prepare(self, files: Sequence[Path]) -> Self:
        """See `Dump.prepare`."""
        beside = files[0].parent / _BESIDE
        if self.compression is not None or not beside.is_file():
            return self
        return self.model_copy(update={"compression": load_config(Compression, beside)})

    def facts(self, files: Sequence[Path]) -> Facts:
        """See `Dump.facts`."""
        return Facts(id_room=None if self.compression is None else 2**self.compression.id_bits)

    def records(self, row: Row, tokenizer: Any) -> Iterator[Record]:
        """See `Dump.records`."""
        input_ids = numbers(take(row, "input_ids"), np.int64)
        ids, log_probs = self._entries(row)
        count, tokens = len(ids.lengths), len(input_ids)
        if count not in (tokens - 1, tokens):
            raise DataError(f"{count} rows for {tokens} tokens; expected as many, or one less")
        lengths = _read_documents(row, tokens)
        positions = np.arange(count)
        labels = next_tokens(input_ids, lengths, positions)
        yield Record(None, input_ids, lengths, positions, labels, ids, log_probs)

    def _entries(self, row: Row) -> tuple[Ragged, Ragged]:
        if "packed_indices" in row:
            raise DataError(
                "is of DistillKit's older compression, which keeps centred logits without what they"
                " would be divided by, so that their probabilities are not known"
            )
        if "top_values" in row:
            ids, values = take(row, "token_ids"), take(row, "top_values")
            return matrix(ids, np.int64), matrix(values, float)
        if self.compression is None:
            raise ConfigError(
                f"format.compression is missing, and there is no {_BESIDE} beside the dump;"
                " give the config that it was captured with"
            )
        packed = [take(row, name) for name in ("bytepacked_indices", "compressed_logprobs")]
        packed_ids, codes = (_rectangle(matrix(value, np.uint8)) for value in packed)
        if not len(codes):  # a text of one token
            return Ragged.of(np.zeros((0, 0), dtype=np.int64)), Ragged.of(np.zeros((0, 0)))
        return (
            Ragged.of(self.compression.unpack_ids(packed_ids)),
            Ragged.of(self.compression.decode(codes)),
        )


class _Bytes:
    """[rows, bytes] uint8, taken from the left."""

    def __init__(self, packed: np.ndarray) -> None:
        self._packed = packed
        self._at = 0

    def take(self, size: int) -> np.ndarray:
        found = self._packed[:, self._at : self._at + size]
        if found.shape[1] < size:
            raise ValueError(
                f"{self._packed.shape[1]} bytes of log-probabilities in a row, fewer than the"
                " compression config takes; give the config of the capture"
            )
        self._at += size
        return found

    def floats(self, count: int, dtype: _Dtype) -> Tensor:
        kind = _DTYPES[dtype]
        found = np.ascontiguousarray(self.take(count * kind.itemsize))
        return torch.from_numpy(found).view(kind)

    def require_end(self) -> None:
        if self._at != self._packed.shape[1]:
            raise ValueError(
                f"{self._packed.shape[1]} bytes of log-probabilities in a row, the compression"
                f" config takes {self._at}; give the config of the capture"
            )


def _unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """[rows, count] int64 of numbers of so many bits, the highest first."""
    if packed.shape[1] != (bits * count + 7) // 8:
        raise ValueError(
            f"{packed.shape[1]} bytes for {count} numbers of {bits} bits; give the compression"
            " config of the capture, with its d and k"
        )
    found = np.unpackbits(packed, axis=1, count=bits * count).reshape(-1, count, bits)
    return found @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def _rectangle(lists: Ragged) -> np.ndarray:
    if len(set(lists.lengths.tolist())) > 1:
        raise ValueError("rows of one size are expected")
    return lists.values.reshape(len(lists.lengths), int(lists.lengths[:1].sum()))


def _read_documents(row: Row, tokens: int) -> np.ndarray:
    """Lengths of the documents, by the runs of equal numbers in `attention_mask`."""
    if row.get("attention_mask") is None:
        return np.array([tokens])
    mask = numbers(row["attention_mask"], np.int64)
    if len(mask) != tokens or (mask == 0).any():
        raise ValueError(
            f"attention_mask has {len(mask)} entries for {tokens} tokens, or zeros; expected the"
            " number of each token's document"
        )
    starts = np.flatnonzero(np.diff(mask, prepend=mask[:1] - 1))
    return np.diff(np.append(starts, tokens))
