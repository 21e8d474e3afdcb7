"""The Python of docs/data.md runs as it stands there, and the sizes that its tables state are those of the format."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tests.data.shapes import RESOLUTIONS, write_dataset


PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_code_of_the_page(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data" / "shapes")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    names = {}
    exec(compile(code, "data.md", "exec"), names)
    assert names["coords"].shape[1] == 3 and names["picture"].size == (8, 8)


def test_the_page_describes_every_byte(tmp_path):
    """A shard read by what the page says, with nothing of this package."""
    write_dataset(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    rows = pq.read_table(tmp_path / "index.parquet").to_pylist()
    columns = set(pq.read_schema(next((tmp_path / "shards").glob("*.parquet"))).names)
    for section in ("occupancy", *(f"sdf_{resolution}" for resolution in RESOLUTIONS), "images"):
        columns -= {f"{section}_{part}" for part in ("offset", "length", "hash")}
    for resolution in RESOLUTIONS:
        columns -= {f"tokens_{resolution}", f"voxels_{resolution}"}
    assert all(f"`{column}`" in page for column in columns)
    covered = {}
    for row in rows:
        data = (tmp_path / "shards" / f"{row['shard']}.bin").read_bytes()
        position = row["offset"]
        for section in ("occupancy", "sdf_16", "sdf_32", "images"):
            start, length = row[f"{section}_offset"], row[f"{section}_length"]
            assert start == -(-position // 64) * 64 and not any(data[position:start])
            header = int.from_bytes(data[start : start + 8], "little")
            tensors = json.loads(data[start + 8 : start + 8 + header])
            begin = start + 8 + header
            assert max(tensor["data_offsets"][1] for tensor in tensors.values()) == length - 8 - header
            if section == "sdf_32":
                first, last = tensors["values"]["data_offsets"]
                values = np.frombuffer(data[begin + first : begin + last], "<f2").reshape(-1, 512)
                assert len(values) == row["tokens_32"] and (np.abs(values) < 1).sum() == row["voxels_32"]
            position = start + length
        assert position == row["offset"] + row["length"]
        covered[row["shard"]] = position
        size = len(data)
        assert position <= size
    assert all((tmp_path / "shards" / f"{shard}.bin").stat().st_size == end for shard, end in covered.items())
