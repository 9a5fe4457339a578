"""Whole files or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bac.files import write_whole


def test_writes_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_whole(path, lambda partial: partial.write_text("whole"))
    assert path.read_text() == "whole"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_the_file_appears_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def write(partial: Path) -> None:
        assert partial.parent == path.parent, "only a rename inside one file system is a single step"
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")

    write_whole(path, write)
    assert path.read_text() == "whole"


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def write(partial: Path) -> None:
        partial.write_text("first")
        # As another thread, or a process of another container, would in between.
        write_whole(path, lambda other: other.write_text("second"))
        assert (partial.read_text(), path.read_text()) == ("first", "second")

    write_whole(path, write)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_the_contents_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "file.txt", []

    def sync(descriptor: int) -> None:
        assert not path.exists()
        synced.append(os.pread(descriptor, 10, 0))

    monkeypatch.setattr(os, "fsync", sync)
    write_whole(path, lambda partial: partial.write_text("whole"))
    assert synced == [b"whole"]


def test_an_error_keeps_the_earlier_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("earlier")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process to kill")
def test_a_killed_process_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("earlier")

    def die(partial: Path) -> None:
        partial.write_text("half")
        os._exit(9)  # no handler and no finally runs

    child = os.fork()
    if child == 0:
        write_whole(path, die)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_text() == "earlier"
    # What the dead process left does not stand in the way of the next.
    write_whole(path, lambda partial: partial.write_text("later"))
    assert path.read_text() == "later"
