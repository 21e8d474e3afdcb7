"""The local cache: never more than its size, the longest unused out first, and shared by processes."""

import contextlib
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
from diffusers_sparse3d.data.sections import content_hash


class Source:
    """Some bytes by their content hash, and which were fetched."""

    def __init__(self, size=32, count=8):
        parts = [number.to_bytes(2, "big") * (size // 2) for number in range(count)]
        self.data = {content_hash([part]): part for part in parts}
        self.hashes, self.fetched = sorted(self.data), []

    def get(self, cache, name):
        def fetch():
            self.fetched.append(name)
            return self.data[name]

        assert cache.get(name, fetch) == self.data[name]


HASHES = Source().hashes


def names(folder):
    return sorted(path.name for path in folder.glob("??/*"))


def test_the_longest_unused_goes_first(tmp_path):
    cache, source = RangeCache(tmp_path, 90), Source(30)
    first, second, third, fourth, last, *_ = source.hashes
    for name in (first, second, third):
        source.get(cache, name)
    assert names(tmp_path) == [first, second, third] and cache.num_bytes == 90
    source.get(cache, first)
    source.get(cache, fourth)
    assert names(tmp_path) == [first, third, fourth] and cache.num_bytes == 90
    assert source.fetched == [first, second, third, fourth]
    # What is larger than the cache goes past it.
    large, half = Source(92), Source(60)
    large.get(cache, large.hashes[0])
    assert names(tmp_path) == [first, third, fourth]
    # The order of use survives the process.
    half.get(RangeCache(tmp_path, 90), half.hashes[0])
    assert names(tmp_path) == sorted([fourth, half.hashes[0]]) and cache.num_bytes == 90
    # A smaller limit is kept from the next file on.
    source.get(RangeCache(tmp_path, 40), last)
    assert names(tmp_path) == [last]


def test_a_failure_to_fetch_leaves_nothing(tmp_path):
    cache = RangeCache(tmp_path, 90)

    def fail():
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        cache.get(HASHES[0], fail)
    assert names(tmp_path) == [] and cache.num_bytes == 0
    Source().get(cache, HASHES[0])
    with pytest.raises(ValueError, match="`max_bytes` must be positive, got 0"):
        RangeCache(tmp_path, 0)


def test_bytes_with_another_hash_are_refused_and_not_kept(tmp_path):
    cache, source = RangeCache(tmp_path, 90), Source()
    message = f"shards/0.bin must have the content hash {HASHES[0]}, .*, got {HASHES[1]}: .* do not belong together"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            cache.get(HASHES[0], lambda: source.data[HASHES[1]], "shards/0.bin")
    assert names(tmp_path) == [] and cache.num_bytes == 0
    source.get(cache, HASHES[0])
    assert names(tmp_path) == HASHES[:1]


def read_many(folder, start):
    cache, source = RangeCache(folder, 300), Source(30, 20)
    for number in range(60):
        source.get(cache, source.hashes[(start + 7 * number) % 20])
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
    cache, source = RangeCache(tmp_path, 90), Source()
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

    cache, source, connect = RangeCache(tmp_path, 90), Source(), sqlite3.connect
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
    cache, source, whole = RangeCache(tmp_path, 90), Source(), getattr(Path, place)
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
    notes = f"{HASHES[1][:2]}-notes.partial"
    others = [tmp_path / HASHES[1][:2] / notes, tmp_path / "en" / HASHES[2]]
    others[1].parent.mkdir()
    for path in others:
        path.write_text("")
    cache = RangeCache(tmp_path, 90)
    assert names(tmp_path) == sorted([HASHES[0], HASHES[2], notes]) and cache.num_bytes == 32
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
    Source().get(cache, HASHES[1])
    starter.join()
    assert starter.exitcode == 0 and names(tmp_path) == HASHES[1:2] and cache.num_bytes == 32


def damage(folder, start):
    """Overwrites the list of the files from a byte on."""
    path = folder / "files.sqlite"
    data = path.read_bytes()
    path.write_bytes(data[:start] + b"\xff" * (len(data) - start))


@pytest.mark.parametrize("start", [0, 100, 4096])
def test_a_damaged_list_costs_fetching_again(tmp_path, caplog, start):
    """The process that has the cache goes on without it; the next one that starts makes the list anew."""
    cache, source = RangeCache(tmp_path, 90), Source()
    source.get(cache, HASHES[0])
    damage(tmp_path, start)
    for name in (*HASHES[:2], *HASHES[:2]):
        source.get(cache, name)
    assert source.fetched == [HASHES[0], *HASHES[:2], *HASHES[:2]]
    (message,) = caplog.messages
    assert str(tmp_path) in message and "made anew at the next start" in message
    cache = RangeCache(tmp_path, 90)
    assert "is damaged" in caplog.messages[1] and len(caplog.messages) == 2
    assert cache.num_bytes == 0 and names(tmp_path) == []
    source.fetched.clear()
    for name in (*HASHES[:2], *HASHES[:2]):
        source.get(cache, name)
    assert source.fetched == HASHES[:2] and names(tmp_path) == HASHES[:2] and cache.num_bytes == 64


def test_damage_in_the_rows_is_found_at_the_start(tmp_path, caplog):
    cache, source = RangeCache(tmp_path, 10**6), Source(count=200)
    for name in source.hashes:
        source.get(cache, name)
    path = tmp_path / "files.sqlite"
    with sqlite3.connect(path) as database:
        ((root,),) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'files'")
    database.close()
    data = bytearray(path.read_bytes())
    data[4096 * (root - 1) : 4096 * root] = b"\xff" * 4096
    path.write_bytes(data)
    cache = RangeCache(tmp_path, 10**6)
    assert "is damaged" in caplog.text and cache.num_bytes == 0 and names(tmp_path) == []


def start_and_fill(folder, barrier, name):
    barrier.wait()
    cache = RangeCache(folder, 10**4)
    Source().get(cache, name)


def test_processes_that_start_together_make_a_damaged_list_anew_once(tmp_path):
    context = multiprocessing.get_context("fork")
    for turn in range(5):
        RangeCache(tmp_path, 10**4)
        damage(tmp_path, 0)
        barrier = context.Barrier(4)
        processes = [context.Process(target=start_and_fill, args=(tmp_path, barrier, name)) for name in HASHES[:4]]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        assert names(tmp_path) == HASHES[:4] and RangeCache(tmp_path, 10**4).num_bytes == 4 * 32, turn


def test_a_process_that_has_the_damaged_list_open_does_not_disturb(tmp_path, monkeypatch, caplog):
    """SQLite takes the journal of a list for that of a damaged one which had its name, and deletes it."""
    RangeCache(tmp_path, 10**4)
    damage(tmp_path, 0)
    late, refused = sqlite3.connect(tmp_path / "files.sqlite"), []
    original = RangeCache._database

    def read_late(statement):
        if statement == "COMMIT":
            try:
                late.execute("SELECT * FROM files")
            except sqlite3.DatabaseError:
                refused.append(statement)

    @contextlib.contextmanager
    def watched(*args):
        with original(*args) as database:
            database.set_trace_callback(read_late)
            yield database

    monkeypatch.setattr(RangeCache, "_database", watched)
    cache = RangeCache(tmp_path, 10**4)
    late.close()
    assert refused and cache.num_bytes == 0
    assert len(caplog.messages) == 1 and "is damaged" in caplog.text
    Source().get(cache, HASHES[0])
    assert names(tmp_path) == HASHES[:1] and cache.num_bytes == 32
    assert [path.name for path in tmp_path.glob("files*")] == ["files.sqlite"]
