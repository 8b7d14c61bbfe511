"""From the text of an address to a path that can be joined, read and listed."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator
from upath import UPath

from pipeline.errors import ConfigError
from pipeline.storage.patience import PatientFiles

_PACKAGES = {"s3": "'stillroom[s3]'", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def as_path(text: str | Path) -> Path:
    """A path of this machine, or of the object store that a URL names.

    Nothing is asked of the store. A path of a store, from wherever it comes, is given back as one
    that is patient.

    Raises:
        ConfigError: no such kind of store, or its package is not installed.
    """
    if isinstance(text, Path):
        return text
    if isinstance(text, str) and "://" not in text:
        return _expand(text)
    address = str(text)
    kind, _, name = address.partition("://")
    if kind == "file":
        return Path(name)
    try:
        if not name.strip("/"):
            raise ValueError("it names nothing")
        # Lists that fsspec keeps would hide what other processes write.
        remote: Any = text
        if not isinstance(text, UPath):
            remote = UPath(address.rstrip("/"), use_listings_cache=False)
        remote._fs_cached = PatientFiles(remote.protocol, remote.storage_options)
    except ImportError as error:
        package = _PACKAGES.get(kind, "its package")
        raise ConfigError(
            f"{address}: {kind}:// is not installed ({error}); pip install {package}"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{address}: is no address of a store ({error}); use a folder, s3://, gs://, az://,"
            " hf:// or memory://"
        ) from error
    except OSError as error:  # of kinds that are reached as soon as they are named
        raise ConfigError(
            f"{address}: cannot be reached ({error}); use a folder, s3://, gs://, az://, hf:// or"
            " memory://"
        ) from error
    path: Path = remote
    return path


def _expand(text: str) -> Path:
    """With the home that a `~` stands for, which no shell sees in a config or behind `=`."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # nobody's home: a folder of that name
        return Path(text)


def as_folder(text: str | Path) -> Path:
    """The place on this machine that a text names: of what is not a cache.

    Raises:
        ConfigError: it is an address of a store.
    """
    if "://" in str(text) and not str(text).startswith("file://"):
        raise ConfigError(f"{text}: stores hold caches alone; give a folder of this machine")
    return as_path(text)


Location = Annotated[Path, PlainValidator(as_path), PlainSerializer(str, when_used="json")]
Folder = Annotated[Path, PlainValidator(as_folder), PlainSerializer(str, when_used="json")]


def is_local(path: Path) -> bool:
    """Whether it lies on a file system of this machine."""
    return isinstance(path, Path)
