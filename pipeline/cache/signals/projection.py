"""Hidden states in fewer dimensions: a fixed linear map for each signal, kept with the cache.

    vectors [n, D] -- project --> (vectors - mean) @ components.T, [n, d] -- reconstruct --> [n, D]

    first shard's vectors (pca) or a seed (random) -- fit --> Basis --> projections.safetensors

A basis is written before the first shard stands and never again, so every session of a capture
projects alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.config import StrictModel
from pipeline.errors import CacheError, DataError, say
from pipeline.storage import hash_file, remove_file, write_bytes

FILE = "projections.safetensors"
Blocks = Callable[[], Iterable[Tensor]]  # passes through the same vectors every time, [n, D] each


@dataclass(frozen=True)
class Basis:
    """A projection, all float32.

    Attributes:
        components: [d, D], orthonormal rows; those of a PCA by falling variance.
        mean: [D], zeros for a random projection.
        explained_variance: [d], the share of the vectors' variance along each component; none, [0],
            for a random projection.
    """

    components: Tensor
    mean: Tensor
    explained_variance: Tensor

    def project(self, vectors: Tensor) -> Tensor:
        """[n, D] to [n, d], in float32."""
        return (vectors.float() - self.mean) @ self.components.T

    def reconstruct(self, projected: Tensor) -> Tensor:
        """[n, d] to the nearest vectors that project there, [n, D] float32."""
        return projected @ self.components + self.mean


class Projection(StrictModel, ABC):
    """A member of the family: how a basis is found.

    Attributes:
        width: d, numbers that are kept of a vector.
    """

    name: str
    width: int = Field(gt=0)

    @abstractmethod
    def fit(self, signal: str, source_width: int, blocks: Blocks) -> Basis:
        """Find the basis of a signal from the vectors of the first shard.

        Raises:
            DataError: they are too few.
        """


class Pca(Projection):
    """The directions of the highest variance in the first shard, around its mean."""

    name: Literal["pca"] = "pca"

    def fit(self, signal: str, source_width: int, blocks: Blocks) -> Basis:
        total, count = torch.zeros(source_width, dtype=torch.float64), 0
        for block in blocks():
            total += block.double().sum(dim=0)
            count += len(block)
        require_vectors(self, signal, count)
        mean = (total / count).float()
        covariance = torch.zeros(source_width, source_width, dtype=torch.float64)
        for block in blocks():
            centred = block.float() - mean
            covariance += centred.T @ centred
        variances, vectors = torch.linalg.eigh(covariance)
        components = vectors.flip(1)[:, : self.width].T
        share = variances.flip(0)[: self.width].clamp(min=0) / variances.sum().clamp(min=1e-300)
        return Basis(_fix_signs(components).float().contiguous(), mean, share.float())


class Random(Projection):
    """Orthonormal directions drawn at random: distances shrink by about sqrt(d / D), all alike."""

    name: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0)

    def fit(self, signal: str, source_width: int, blocks: Blocks) -> Basis:
        rng = np.random.default_rng([self.seed, *signal.encode()])
        drawn = torch.from_numpy(rng.normal(size=(source_width, self.width)))
        components = torch.linalg.qr(drawn).Q.T
        mean, share = torch.zeros(source_width), torch.zeros(0)
        return Basis(_fix_signs(components).float().contiguous(), mean, share)


PROJECTIONS: dict[str, type[Projection]] = {"pca": Pca, "random": Random}


def require_vectors(projection: Projection, signal: str, count: int) -> None:
    """Refuse to fit a PCA to too few vectors.

    Raises:
        DataError: `count` vectors do not span `width` directions around their mean.
    """
    if isinstance(projection, Pca) and count <= projection.width:
        raise DataError(
            f"hidden {signal}: {count:,} vectors in the first shard are too few for"
            f" {projection.width:,} principal components; lower hidden.projection.width, raise"
            " shard.examples, or use projection random"
        )


class Bases:
    """The bases of a cache under way; those that stand in its file, then those that are added."""

    def __init__(self, cache: Path, expected: Iterable[str]) -> None:
        """Read the file where there is one; one that is damaged counts as absent.

        Args:
            cache: the folder.
            expected: signals with a projection.
        """
        self._file = cache / FILE
        self._expected = set(expected)
        self._digest: str | None = None
        try:
            self._found = _parse(self._file.read_bytes()) if self._expected else {}
        except (OSError, SafetensorError, LookupError, ValueError):
            self._found = {}

    @property
    def complete(self) -> bool:
        """Whether every signal that is projected has its basis."""
        return self._found.keys() >= self._expected

    @property
    def digest(self) -> str | None:
        """sha256 of the file; None where nothing is projected, or it is not there yet."""
        if self._digest is None and self._expected and self._file.is_file():
            self._digest = hash_file(self._file)
        return self._digest

    def forget(self) -> None:
        """Find them anew: the file is not the one that vectors were projected with."""
        remove_file(self._file)
        self._found, self._digest = {}, None

    def get(self, signal: str) -> Basis | None:
        """The basis of a signal, if it stands already."""
        return self._found.get(signal)

    def add(self, signal: str, basis: Basis) -> None:
        """Add one; with the last the file is written and brought to the disk."""
        self._found[signal] = basis
        self._digest = None
        if self.complete:
            write_bytes(self._file, _dump(self._found))


def read_bases(cache: Path, sha256: str) -> dict[str, Basis]:
    """The bases of a finished cache by signal, to project other vectors or to reconstruct these.

    Args:
        sha256: `projections` of the manifest.

    Raises:
        CacheError: the file is missing, or not the one that the manifest was written for.
    """
    file = cache / FILE
    if not file.is_file() or hash_file(file) != sha256:
        raise CacheError(f"{file}: is not the one of the manifest; copy or cache it again")
    try:
        return _parse(file.read_bytes())
    except (SafetensorError, LookupError, ValueError) as error:
        raise CacheError(
            f"{file}: cannot be read ({say(error)}); copy or cache it again"
        ) from error


def has_bases(cache: Path) -> bool:
    """Whether vectors of a cache under way need not be fitted to: bases stand there."""
    return (cache / FILE).is_file()


def copy_bases(source: Path, cache: Path) -> None:
    """Give a cache to be begun the bases of another one."""
    write_bytes(cache / FILE, (source / FILE).read_bytes())


def _fix_signs(components: Tensor) -> Tensor:
    """Turn each row so that its largest number is positive: signs are free, bytes are not."""
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    return components * torch.where(largest < 0, -1.0, 1.0)


def _dump(bases: Mapping[str, Basis]) -> bytes:
    tensors = {f"{n}.{part}": t for n, basis in bases.items() for part, t in vars(basis).items()}
    content: bytes = save(tensors)
    return content


def _parse(content: bytes) -> dict[str, Basis]:
    tensors = load(content)
    names = {name.rpartition(".")[0] for name in tensors}
    parts = Basis.__dataclass_fields__
    bases = {name: Basis(**{part: tensors[f"{name}.{part}"] for part in parts}) for name in names}
    for name, basis in bases.items():
        shape = list(basis.components.shape)
        like = all(tensor.dtype == torch.float32 for tensor in vars(basis).values())
        if len(shape) != 2 or list(basis.mean.shape) != shape[1:] or not like:
            raise ValueError(f"the basis of {name} does not fit itself")
    return bases
