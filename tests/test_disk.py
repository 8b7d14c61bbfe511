"""What a disk refuses is told in one line: the file, the reason, what is safe, how to go on."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from few_files import few_files

from pipeline.errors import CacheError, DiskError, ModelError
from stages.disk import count_shards, name_checkpoint, tell_of_disk, tells_of_disk


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
        (errno.EACCES, "Permission denied.*see to who may read and write there"),
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

    with pytest.raises(DiskError, match=r"cannot be used .*none of the run is there, bring.*again"):
        save()


@pytest.mark.parametrize("length", [0, 1, 40, 500])
def test_a_checkpoint_that_cannot_be_read_is_named_as_such(tmp_path: Path, length: int) -> None:
    @tells_of_disk(lambda: (tmp_path, "nothing is lost"))
    def load() -> None:
        torch.load(tmp_path / "optimizer.pt")

    torch.save({"a": torch.zeros(400)}, tmp_path / "optimizer.pt")
    os.truncate(tmp_path / "optimizer.pt", length)
    with pytest.raises(DiskError, match=r"cannot be read \(.*\); delete the newest .*again to go"):
        load()


def test_the_first_of_several_errors_is_told(tmp_path: Path) -> None:
    @tells_of_disk(lambda: (tmp_path, "nothing is lost"))
    def run() -> None:
        try:
            raise CacheError("the shard is full")
        finally:
            (tmp_path / "scratch").unlink()

    with pytest.raises(CacheError, match="the shard is full"):
        run()


def test_a_folder_that_may_not_be_made_is_not_one_that_is_gone(tmp_path: Path) -> None:
    @tells_of_disk(lambda: (tmp_path, "nothing is lost"))
    def run() -> None:
        try:  # as pathlib makes a folder with its parents
            raise FileNotFoundError(errno.ENOENT, "", "view/rows")
        except FileNotFoundError:
            raise PermissionError(errno.EACCES, "", "view")  # noqa: B904

    with pytest.raises(DiskError, match=r"view: cannot be used \(Permission denied\)"):
        run()


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("a bug"), ConnectionError("hub")])
def test_what_no_disk_is_to_blame_for_stays_as_it_is(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        stage(error, tmp_path)
    assert caught.value is error
    assert tell_of_disk(error) is error  # as the command does, which ends too


def test_what_was_told_without_its_remedy_gets_it(tmp_path: Path) -> None:
    named = "allow more open files (ulimit -n) and run the same command again"
    told = "a: cannot be written (Too many open files); run the same command again to continue"
    with pytest.raises(CacheError, match=re.escape(f"files); {named} to continue")):
        stage(CacheError(told), tmp_path)
    with pytest.raises(ModelError, match=re.escape(f"; no shards are safe, {named}")):
        stage(ModelError("a: cannot be loaded (Too many open files)"), tmp_path)
    with pytest.raises(CacheError, match=r"^a: no cache$"):
        stage(CacheError("a: no cache"), tmp_path)


def test_the_reason_that_torch_gives_in_words_has_its_remedy(tmp_path: Path) -> None:
    @tells_of_disk(lambda: (tmp_path, "nothing is lost"))
    def save() -> None:
        with few_files(0):
            torch.save({}, tmp_path / "weights.pt")

    with pytest.raises(DiskError, match=r"Too many open files\); nothing is lost, allow more open"):
        save()
