"""The local cache: never more than its size, the longest unused out first, and shared by processes."""

import multiprocessing

import pytest

from diffusers_sparse3d.data.range_cache import RangeCache


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
