"""What the page about data shows of results of `data.py`, `loader_wait.py` and `preparation.py`: tables in Markdown.

The scripts of this folder import it as their neighbour, as `python benchmarks/NAME.py` finds it.
"""

from typing import Any

from report_tables import Report, figure, table


STORAGE = {"disk": "local disk", "s3": "S3 on the same machine"}
# The share of the time that a step may wait for its batch.
ALLOWED_WAIT = 0.02
# Bytes of a block: coordinates, 512 values of 2 bytes, 512 bits. Those of a latent: mean and logarithm of the variance
# of 16 channels, coordinates of 2 bytes.
BLOCK_BYTES, LATENT_BYTES = 3 + 2 * 512 + 512 // 8, 2 * 2 * 16 + 3 * 2
NUMBERS = (1_000, 100_000, 10_000_000)
# The least of what a unit of `duration_text` is for, and its seconds.
DURATIONS = (
    (2 * 365 * 86_400, 365 * 86_400, "years"),
    (2 * 86_400, 86_400, "days"),
    (2 * 3600, 3600, "hours"),
    (120, 60, "minutes"),
    (0, 1, "s"),
)
# From which difference on, over tau, two distances of `preparation.py` are not the same.
TOLERANCE = 0.01


def data_tables(report: Report) -> list[str]:
    """Reading at each resolution and storage, the workers that a step needs, and the large index."""
    rows: list[dict[str, Any]] = report["rows"]
    reading = [row for row in rows if row["kind"] == "reading"]
    waits = {_about(row): row["wait"] for row in rows if row["kind"] == "wait"}
    columns = ("resolution", "tokens", "from", "workers", "samples/s", "MB/s", "wait of a step")
    lines = table(
        columns,
        (
            (
                f"{row['resolution']}^3",
                f"{row['tokens']:,}",
                STORAGE[row["storage"]],
                str(row["workers"]),
                figure(row["samples_per_second"], 1),
                figure(row["mb_per_second"], 0),
                f"{waits[_about(row)]:.1%}" if _about(row) in waits else "-",
            )
            for row in reading
        ),
    )
    for row in rows:
        if row["kind"] == "index":
            lines += [
                "",
                f"An index of {row['rows']:,} meshes is open after {figure(row['open_seconds'], 1)} s and adds"
                f" {figure(row['index_mb'], 0)} MB to the memory of the process; the first balanced batch is there"
                f" after {figure(row['first_batch_seconds'], 1)} s.",
            ]
    return [*lines, "", *_needed(waits, rows), "", *size_lines(reading)]


def size_lines(reading: list[dict[str, Any]]) -> list[str]:
    """A table of the sizes of datasets, counted from the format, for the samples that were read."""
    tokens = {row["resolution"]: row["tokens"] for row in reading}
    rows = []
    for resolution, count in sorted(tokens.items()):
        sdf, latents = count * BLOCK_BYTES, count * LATENT_BYTES
        cells = [f"{resolution}^3", size_text(sdf), size_text(latents)]
        rows.append([*cells, *(f"{size_text(number * sdf)} / {size_text(number * latents)}" for number in NUMBERS)])
    columns = ("resolution", "SDF of a mesh", "its latents", *(f"{number:,} meshes" for number in NUMBERS))
    return [
        f"Counted, not measured: {BLOCK_BYTES:,} bytes a block and {LATENT_BYTES} bytes a latent of 16 channels, SDFs"
        " and latents of one orientation:",
        "",
        *table(columns, rows),
    ]


def size_text(size: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB" if size < 1000 else f"{size:,.0f} TB"


def _about(row: dict[str, Any]) -> tuple[int, str, int]:
    return row["resolution"], row["storage"], row["workers"]


def _needed(waits: dict[tuple[int, str, int], float], rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each storage: the fewest workers with which no step waits longer than it may."""
    seconds = next((row["step_seconds"] for row in rows if row["kind"] == "wait"), None)
    if seconds is None:
        return []
    lines = []
    for storage, name in STORAGE.items():
        enough = {}
        for (resolution, own, workers), wait in sorted(waits.items()):
            if own == storage and wait <= ALLOWED_WAIT:
                enough.setdefault(resolution, workers)
        resolutions = sorted({resolution for resolution, own, _ in waits if own == storage})
        parts = [f"{enough.get(resolution, 'more than were tried')} at {resolution}^3" for resolution in resolutions]
        if parts:
            text = ", ".join(parts) if enough else "more than were tried, on this machine"
            lines.append(
                f"Workers that keep the wait of a step of {seconds:.2f} s at most {ALLOWED_WAIT:.0%}, {name}: {text}."
            )
    return lines


def loader_wait_table(report: Report) -> list[str]:
    """The time that a training on a GPU spends outside of its steps, by loader workers."""
    rows = (
        (STORAGE[row["storage"]], str(row["workers"]), figure(row["step_seconds"], 3), f"{row['outside']:.1%}")
        for row in report["rows"]
    )
    enough = [row["workers"] for row in report["rows"] if row["outside"] <= ALLOWED_WAIT]
    found = "more workers than were tried"
    if enough:
        found = f"{min(enough)} worker{'s' * (min(enough) > 1)}"
    return [
        *table(("from", "workers", "s a step", "outside of steps"), rows),
        "",
        f"At most {ALLOWED_WAIT:.0%} of the time is outside of steps with {found}.",
    ]


def preparation_table(report: Report) -> list[str]:
    """Meshes a second of processes on the GPU and on the CPU, the times of many, and how far records are alike."""
    rates: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for row in report["rows"]:
        if "meshes_per_second" in row:
            rates.setdefault(row["resolution"], {}).setdefault(row["device"], []).append(row)
    rows = []
    for resolution, devices in rates.items():
        best = {device: max(row["meshes_per_second"] for row in found) for device, found in devices.items()}
        for device, found in devices.items():
            for row in found:
                rate = row["meshes_per_second"]
                times = rate / best["cpu"] if device == "cuda" and "cpu" in best else None
                name = "GPU" if device == "cuda" else "CPU"
                rows.append((f"{resolution}^3", name, str(row["workers"]), figure(rate, 1), figure(times, 1)))
    lines = table(("resolution", "distances on", "processes", "meshes/s", "times those of the CPU"), rows)
    lines += ["", *duration_lines(report["rows"])]
    for row in report["rows"]:
        if row["kind"] == "comparison":
            lines += ["", comparison_sentence(row)]
    return lines


def duration_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table of the times that numbers of meshes take at the rates that were measured."""
    timed = (
        (
            f"{row['resolution']}^3",
            f"one GPU, {row['workers']} processes" if row["device"] == "cuda" else f"{row['workers']} CPU processes",
            *(duration_text(number / row["meshes_per_second"]) for number in NUMBERS),
        )
        for row in rows
        if "meshes_per_second" in row
    )
    return [
        "Counted from these rates, not measured, without the start of the processes and without pictures; two machines"
        " take half, if the storage keeps up:",
        "",
        *table(("resolution", "on", *(f"{number:,} meshes" for number in NUMBERS)), timed),
    ]


def duration_text(seconds: float) -> str:
    """A time in the unit that suits it."""
    unit, name = next((unit, name) for least, unit, name in DURATIONS if seconds >= least)
    value = seconds / unit
    return f"{value:,.0f} {name}" if value >= 10 else f"{value:.1f} {name}"


def comparison_sentence(row: dict[str, Any]) -> str:
    """How far the records of some meshes on the GPU are those of the CPU."""
    same = f"At {row['resolution']}^3, {row['same_blocks']} of {row['meshes']} meshes have the same blocks on both"
    if "differing_share" not in row:  # of an earlier form of the file
        return f"{same}; the largest difference between two distances is {row['largest_difference']:.2f} tau."
    return (
        f"{same}; {row['differing_share']:.2%} of their distances in the band differ by more than {TOLERANCE:g} tau."
    )
