"""What a disk refuses is told in one line: the file, the reason, what is safe, how to go on."""

import errno
from pathlib import Path

import pytest
import torch

from pipeline.errors import CacheError, DiskError
from stages.disk import count_shards, name_checkpoint, tells_of_disk


def stage(error: Exception, folder: Path) -> None:
    """A stage that ends with an error."""

    @tells_of_disk(lambda error, folder: (folder, count_shards(folder)))
    def run(error: Exception, folder: Path) -> None:
        raise error

    run(error, folder)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, r"No space left on device\); 1 shard is safe, make room and run the same"),
        (errno.EDQUOT, "quota exceeded.*make room"),
        (errno.EROFS, "Read-only file system.*make the folder writable"),
        (errno.EMFILE, r"Too many open files.*allow more open files \(ulimit -n\)"),
        (errno.EIO, "Input/output error.*look after the disk"),
    ],
)
def test_an_error_of_the_disk_is_one_line_with_its_remedy(
    tmp_path: Path, number: int, told: str
) -> None:
    (tmp_path / "shards/00000").mkdir(parents=True)
    (tmp_path / "shards/00000/shard.json").touch()
    with pytest.raises(DiskError, match=f"a/file: cannot be used .*{told}"):
        stage(OSError(number, "", "a/file"), tmp_path)


def test_torch_that_cannot_write_is_understood_too(tmp_path: Path) -> None:
    @tells_of_disk(lambda: (tmp_path, name_checkpoint(tmp_path)))
    def save() -> None:
        torch.save({"a": torch.zeros(4)}, tmp_path / "missing" / "weights.pt")

    with pytest.raises(DiskError, match=r"cannot be used .*none of the run is there.*again"):
        save()


def test_the_first_of_several_errors_is_told(tmp_path: Path) -> None:
    @tells_of_disk(lambda: (tmp_path, "nothing is lost"))
    def run() -> None:
        try:
            raise CacheError("the shard is full")
        finally:
            (tmp_path / "scratch").unlink()

    with pytest.raises(CacheError, match="the shard is full"):
        run()


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("a bug"), ConnectionError("hub")])
def test_what_no_disk_is_to_blame_for_stays_as_it_is(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        stage(error, tmp_path)
    assert caught.value is error
