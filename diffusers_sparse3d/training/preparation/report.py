"""What a preparation tells of a dataset: metadata.json, failures.csv and the dataset card."""

import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...data.hub import card_header
from ...data.index import INDEX
from ...data.records import FORMAT_VERSION
from ...files import write_text
from ..worker_pool import Failure
from .groups import Part
from .index import CHANGED, ODD_ROW, MeshEntry, readable
from .settings import Settings


FAILURE_COLUMNS = ("id", "source", "split", "mesh", "cause", "reason")
FAILURES = "failures.csv"
# Rows of a table in the card; more are summed up.
MAX_ROWS = 100
Row = dict[str, Any]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_failures(output: Path, part: Part, failures: Iterable[tuple[MeshEntry, Failure]]) -> None:
    """Writes the meshes that a part of a run could not prepare, with the reasons."""
    rows = [
        {
            "id": entry.id,
            "source": entry.source,
            "split": entry.split,
            "mesh": readable(str(entry.mesh)),
            "cause": failure.cause,
            "reason": readable(failure.reason),
        }
        for entry, failure in sorted(failures, key=lambda pair: pair[0].position)
    ]
    _write_rows(output / f"failures-{part.index}-{part.count}.csv", rows)


def merge_failures(output: Path) -> list[dict[str, str]]:
    """Joins the failures of all parts in failures.csv, without those of meshes that are there by now; returns them.

    Earlier failures stay, of meshes that were not tried again; what is known from the rows of the input is told anew
    by each run.
    """
    parts = sorted(output.glob("failures-*-*.csv"))
    failures = read_rows(output / FAILURES)
    if parts:
        failures = [row for row in failures if row["cause"] not in (ODD_ROW, CHANGED)]
    latest = {}
    for row in itertools.chain(failures, *map(read_rows, parts)):
        # A row that repeats an id fails beside the one before it.
        latest[row["id"], row["mesh"] if row["cause"] == ODD_ROW else ""] = row
    names, there = {row["id"] for row in latest.values()}, set[str]()
    with pq.ParquetFile(output / INDEX) as index:
        for batch in index.iter_batches(columns=["id"]):
            there |= names & set(batch["id"].to_pylist())
    rows = [row for row in latest.values() if row["id"] not in there or row["cause"] in (ODD_ROW, CHANGED)]
    _write_rows(output / FAILURES, rows)
    for path in parts:
        path.unlink()
    return rows


def _write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, FAILURE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def count_meshes(output: Path, columns: list[str]) -> list[Row]:
    """The number of meshes, `meshes`, for each combination of values of some columns of the index, ascending."""
    counts: Counter[tuple] = Counter()
    with pq.ParquetFile(output / INDEX) as index:
        known = [column for column in columns if column in index.schema_arrow.names]
        if known == columns:
            for batch in index.iter_batches(columns=columns):
                groups = pa.Table.from_batches([batch]).group_by(columns).aggregate([([], "count_all")])
                for row in groups.to_pylist():
                    counts[tuple(row[column] or "" for column in columns)] += row["count_all"]
    return [{**dict(zip(columns, key)), "meshes": counts[key]} for key in sorted(counts)]


def write_metadata(output: Path, settings: Settings) -> None:
    """Writes metadata.json: resolutions, image size, and the number of meshes by source, split and licence."""
    counts: dict[str, dict[str, int]] = {}
    licenses = {}
    if (output / INDEX).exists():
        for row in count_meshes(output, ["source", "split"]):
            counts.setdefault(row["source"], {})[row["split"]] = row["meshes"]
        licenses = {row["license"]: row["meshes"] for row in count_meshes(output, ["license"])}
    metadata = {
        "format_version": FORMAT_VERSION,
        "resolutions": list(settings.sdf_resolutions),
        "dense_resolution": min(settings.resolutions) // 8,
        "image_size": settings.image_size,
        "counts": counts,
        "licenses": licenses,
    }
    write_text(output / "metadata.json", json.dumps(metadata, indent=2) + "\n")


def causes(failures: Iterable[dict[str, str]]) -> str:
    """How many meshes failed for which cause, the most frequent first, as a list in a sentence."""
    counts = Counter(row["cause"] for row in failures)
    return ", ".join(f"{count} {cause}" for cause, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair)))


def _table(rows: list[Row]) -> str:
    """A Markdown table of at most `MAX_ROWS` rows, those with the most meshes."""
    if not rows:
        return "None."
    columns = list(rows[0])
    shown = rows
    if len(rows) > MAX_ROWS:
        kept = {id(row) for row in sorted(rows, key=lambda row: -row["meshes"])[:MAX_ROWS]}
        shown = [row for row in rows if id(row) in kept]
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
    lines += [" | ".join(str(row[column] or "(unknown)").replace("|", "/") for column in columns) for row in shown]
    text = "\n".join(f"| {line} |" for line in lines)
    if len(rows) > len(shown):
        left = sum(row["meshes"] for row in rows) - sum(row["meshes"] for row in shown)
        text += f"\n\nand {len(rows) - len(shown)} more rows with {left} meshes; index.parquet has all."
    return text


def write_card(output: Path, settings: Settings, failures: list[dict[str, str]]) -> None:
    """Writes the dataset card, README.md: contents, ranges of the views, counts, licences and failures."""
    with pq.ParquetFile(output / INDEX) as index:
        number = index.metadata.num_rows
    failed = Counter((row["source"], row["cause"]) for row in failures)
    failure_rows = [
        {"source": source, "cause": cause, "meshes": failed[source, cause]} for source, cause in sorted(failed)
    ]
    card = f"""# Sparse SDF dataset

{number} {"shapes, made of meshes by augmentation," if settings.augment else "meshes"} as

{_contents(settings)}

`diffusers_sparse3d` reads them: `SparseSDFDataset(folder)`; its `docs/data.md` has the format to the byte.

{_views(settings)}

## Counts

{_table(count_meshes(output, ["source", "split"]))}

## Licences and attributions

The licence of each mesh is that of its row in `index.parquet`.

{_table(count_meshes(output, ["source", "license", "author"]))}

## Meshes that failed

{f"{len(failures)}, listed with the reasons in `{FAILURES}`:" if failures else ""}

{_table(failure_rows)}
"""
    write_text(output / "README.md", card_header() + card)


def _contents(settings: Settings) -> str:
    """What a record has, as a list of the card."""
    size, dense = settings.image_size, min(settings.resolutions) // 8
    grids = ", ".join(f"{resolution}^3" for resolution in settings.sdf_resolutions)
    lines = [f"sparse signed distance fields at {grids}, with sharp-edge flags;"] if grids else []
    lines += [f"dense occupancy at {dense}^3;", f"pictures with alpha, renders of {size} x {size} pixels among them."]
    return "\n".join(f"- {line}" for line in lines)


def _views(settings: Settings) -> str:
    """From where the pictures were taken, for the card."""
    if not settings.rendered:
        return "The pictures came from elsewhere."
    ranges = (
        ("azimuth", settings.azimuth_range, "degrees; 0 looks at the front (from +z; y is up), 90 from +x"),
        ("elevation", settings.elevation_range, "degrees"),
        ("focal length", settings.focal_range, "mm, on a 36 mm sensor"),
    )
    views = "\n".join(f"| {name} | {low:g} | {high:g} | {unit} |" for name, (low, high), unit in ranges)
    header = "| | from | to | |\n| --- | --- | --- | --- |"
    text = f"Views of the renders are random (seed {settings.seed}):\n\n{header}\n{views}"
    if settings.augment:
        text += "\n\nEach shape was turned about y so that all of its cameras are at azimuth 0."
    return text
