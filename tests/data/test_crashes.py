"""Writers that are killed before any of their file operations, and go on to the same files."""

import os
import sys

import numpy as np
import pyarrow as pa

from diffusers_sparse3d.data.index import merge_index
from diffusers_sparse3d.data.records import Record
from diffusers_sparse3d.data.sections import encode
from diffusers_sparse3d.data.writer import ShardWriter


OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir")
KILLED = 17


def write(folder):
    """Writes three records into two shards, and the index."""
    with ShardWriter(folder, ["a"], pa.schema([]), shard_bytes=200) as writer:
        for number in range(3):
            if str(number) not in writer.ids:
                writer.add(Record(str(number), {"a": encode({"values": np.full(10, number)})}))
    merge_index(str(folder))


def write_in_child(folder, place):
    """Writes in a child that is killed before the operation `place`; returns the exit status and what it has done."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def audit(event, arguments):
            nonlocal count
            if event in OPERATIONS and str(arguments[0]).startswith(str(folder)):
                if event == "open" and not (isinstance(arguments[1], str) and set("wax+") & set(arguments[1])):
                    return
                if count == place:
                    os._exit(KILLED)
                count += 1

        sys.addaudithook(audit)
        try:
            write(folder)
            os.write(writing, str(count).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), pipe.read()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_at_every_file_operation(tmp_path, monkeypatch):
    # A killed process loses nothing that it has written, so that nothing needs to reach the disk.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    (tmp_path / "whole").mkdir()
    status, operations = write_in_child(tmp_path / "whole", -1)
    assert status == 0 and int(operations) > 8
    whole = contents(tmp_path / "whole")
    assert len(whole) == 5
    for place in range(int(operations)):
        folder = tmp_path / str(place)
        folder.mkdir()
        assert write_in_child(folder, place)[0] == KILLED
        # What is there under its name is complete.
        assert all(data == whole[name] for name, data in contents(folder).items() if "partial" not in name)
        write(folder)
        assert contents(folder) == whole, place
