"""The local cache: never more than its size, the longest unused out first, and shared by processes."""

import errno
import logging
import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from diffusers_sparse3d.data import range_cache
from diffusers_sparse3d.data.range_cache import RangeCache


HASHES = [f"{number:02x}" * 16 for number in range(8)]


class Source:
    """Bytes by name, and how often each was fetched."""

    def __init__(self, size=10):
        self.size, self.fetched = size, []

    def get(self, cache, name):
        def fetch():
            self.fetched.append(name)
            return name.encode() * self.size

        assert cache.get(name, fetch) == name.encode() * self.size


def names(folder):
    return sorted(path.name for path in folder.glob("??/*"))


def test_the_longest_unused_goes_first(tmp_path):
    cache, source = RangeCache(tmp_path, 90), Source()
    for name in ("aaa", "bbb", "ccc"):
        source.get(cache, name)
    assert names(tmp_path) == ["aaa", "bbb", "ccc"] and cache.num_bytes == 90
    source.get(cache, "aaa")
    source.get(cache, "ddd")
    assert names(tmp_path) == ["aaa", "ccc", "ddd"] and cache.num_bytes == 90
    assert source.fetched == ["aaa", "bbb", "ccc", "ddd"]
    # What is larger than the cache goes past it.
    Source(31).get(cache, "eee")
    assert names(tmp_path) == ["aaa", "ccc", "ddd"]
    # The order of use survives the process.
    Source(20).get(RangeCache(tmp_path, 90), "fff")
    assert names(tmp_path) == ["ddd", "fff"] and cache.num_bytes == 90
    # A smaller limit is kept from the next file on.
    source.get(RangeCache(tmp_path, 40), "ggg")
    assert names(tmp_path) == ["ggg"]


def test_a_failure_to_fetch_leaves_nothing(tmp_path):
    cache = RangeCache(tmp_path, 90)

    def fail():
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        cache.get("aaa", fail)
    assert names(tmp_path) == [] and cache.num_bytes == 0
    Source().get(cache, "aaa")
    with pytest.raises(ValueError, match="`max_bytes` must be positive, got 0"):
        RangeCache(tmp_path, 0)


def read_many(folder, start):
    cache, source = RangeCache(folder, 300), Source()
    for number in range(60):
        source.get(cache, f"{(start + 7 * number) % 20:03d}")
        assert cache.num_bytes <= 300


def test_processes_share_a_folder_and_its_limit(tmp_path):
    RangeCache(tmp_path, 300)
    processes = [
        multiprocessing.get_context("fork").Process(target=read_many, args=(tmp_path, start)) for start in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert RangeCache(tmp_path, 300).num_bytes == sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 300


def full_disk(self, data):
    with self.open("wb") as file:
        file.write(data[:5])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_fetching_again(tmp_path, monkeypatch, caplog):
    cache, source = RangeCache(tmp_path, 90), Source(1)
    source.get(cache, HASHES[0])
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Path, "write_bytes", full_disk)
        for name in (*HASHES[:3], *HASHES[:3]):
            source.get(cache, name)
    assert source.fetched == [HASHES[0], *HASHES[1:3], *HASHES[1:3]]
    assert names(tmp_path) == HASHES[:1] and cache.num_bytes == 32
    (message,) = caplog.messages
    assert str(tmp_path) in message and "No space left on device" in message
    # As soon as there is room, files are kept again, and those that went are made up for.
    for name in HASHES[1:3]:
        source.get(cache, name)
    assert names(tmp_path) == HASHES[1:3] and cache.num_bytes == 64


@pytest.mark.parametrize("statement", ["UPDATE files", "INSERT INTO files", "PRAGMA user_version =", "COMMIT"])
def test_a_list_on_a_full_disk(tmp_path, monkeypatch, caplog, statement):
    """What is in the cache can be read, also after a new start, and a file that cannot be listed does not stay."""
    monkeypatch.setattr(range_cache, "SEARCH_MINUTES", 0)

    class Full(sqlite3.Connection):
        def execute(self, sql, *arguments):
            if sql.startswith(statement):
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(sql, *arguments)

    cache, source, connect = RangeCache(tmp_path, 90), Source(1), sqlite3.connect
    source.get(cache, HASHES[0])
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *arguments, **options: connect(*arguments, factory=Full, **options))
        source.get(RangeCache(tmp_path, 90), HASHES[0])
        source.get(cache, HASHES[1])
    assert source.fetched == HASHES[:2] and "database or disk is full" in caplog.text
    kept = HASHES[:1] if statement in ("INSERT INTO files", "COMMIT") else HASHES[:2]
    assert names(tmp_path) == kept and cache.num_bytes == 32 * len(kept)


@pytest.mark.parametrize("place", ["write_bytes", "replace"])
def test_what_a_killed_process_leaves_is_removed_at_the_start(tmp_path, monkeypatch, place):
    """It is killed in the middle of a file, or between its renaming and its entry in the list."""
    monkeypatch.setattr(range_cache, "SEARCH_MINUTES", 0)
    cache, source, whole = RangeCache(tmp_path, 90), Source(1), getattr(Path, place)
    source.get(cache, HASHES[0])

    def killed(self, argument):
        whole(self, argument[:5] if place == "write_bytes" else argument)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Path, place, killed)
    process = multiprocessing.get_context("fork").Process(target=source.get, args=(cache, HASHES[1]))
    process.start()
    process.join()
    monkeypatch.setattr(Path, place, whole)
    left = HASHES[1] + (".partial" if place == "write_bytes" else "")
    assert process.exitcode == -signal.SIGKILL and names(tmp_path) == [HASHES[0], left]
    # Files of others are nobody's to remove.
    others = [tmp_path / HASHES[1][:2] / "01-notes.partial", tmp_path / "en" / HASHES[2]]
    others[1].parent.mkdir()
    for path in others:
        path.write_text("")
    cache = RangeCache(tmp_path, 90)
    assert names(tmp_path) == sorted([HASHES[0], HASHES[2], "01-notes.partial"]) and cache.num_bytes == 32
    source.get(cache, HASHES[0])
    assert source.fetched == [HASHES[0]]


def test_a_folder_is_searched_once_by_all_that_start_together(tmp_path, monkeypatch):
    partial = tmp_path / HASHES[1][:2] / f"{HASHES[1]}.partial"
    partial.parent.mkdir()
    for minutes, searched in ((0, True), (5, False), (10, True), (-60, True)):
        partial.write_text("")
        monkeypatch.setattr(range_cache.time, "time", lambda minutes=minutes: 1e9 + 60 * minutes)
        RangeCache(tmp_path, 90)
        assert partial.exists() != searched


def test_no_file_is_written_while_a_start_removes_files(tmp_path, monkeypatch):
    monkeypatch.setattr(range_cache, "SEARCH_MINUTES", 0)
    cache, context = RangeCache(tmp_path, 90), multiprocessing.get_context("fork")
    searching, listdir, replace = context.Event(), os.listdir, Path.replace
    (tmp_path / HASHES[1][:2]).mkdir()

    def slow_search(folder):
        searching.set()
        time.sleep(0.2)
        return listdir(folder)

    def slow_replace(self, target):
        time.sleep(0.4)
        replace(self, target)

    def start():
        RangeCache(tmp_path, 90)
        assert tmp_path not in range_cache._failing

    monkeypatch.setattr(os, "listdir", slow_search)
    monkeypatch.setattr(Path, "replace", slow_replace)
    starter = context.Process(target=start)
    starter.start()
    assert searching.wait(10)
    Source(1).get(cache, HASHES[1])
    starter.join()
    assert starter.exitcode == 0 and names(tmp_path) == HASHES[1:2] and cache.num_bytes == 32
