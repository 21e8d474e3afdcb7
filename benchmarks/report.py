"""
Writes docs/performance.md, and the figures of README.md, from the files in benchmarks/results/.

    python benchmarks/report.py

Every figure comes from a file there; what has no file yet is named as missing. After a run of a benchmark,

    python benchmarks/ssa.py --json benchmarks/results/ssa.json

this script is run again, and both go into one commit; a test compares page and files.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
README_FIGURES = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- end of figures -->)", re.S)
# What every file says about its run. It may have a `note` as well, which the page shows.
PROVENANCE = ("command", "commit", "hardware", "versions")

Report = dict[str, Any]


def figure(value: float | None, digits: int = 2) -> str:
    """A number with so many digits after the point, "-" for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def pair(row: dict[str, Any], first: str, second: str, digits: int = 2) -> str:
    """Two figures of a row, as in "1.20 / 3.40"."""
    return f"{figure(row.get(first), digits)} / {figure(row.get(second), digits)}"


def ratio(other: dict[str, float], own: dict[str, float]) -> dict[str, float]:
    """How many times as long the other one takes, forward and backward; empty if it was not measured."""
    return {way: other[way] / own[way] for way in ("forward", "backward") if way in other}


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *map(list, rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def attention_tables(report: Report) -> list[str]:
    """SSA beside dense attention, then a block and the whole SparseDiT."""
    columns = ("tokens", "top-k", "SSA, ms", "FlashAttention, 32 x 32, ms", "cuDNN, 16 x 64, ms")
    columns += ("times FlashAttention", "times cuDNN", "SSA, GiB")
    rows = [
        (
            f"{row['tokens']:,}",
            str(row["topk"]),
            *(pair(row[name], "forward", "backward") for name in ("ssa", "flash", "wide")),
            *(pair(ratio(row[name], row["ssa"]), "forward", "backward", 1) for name in ("flash", "wide")),
            pair(row["ssa"], "forward_gib", "with_backward_gib"),
        )
        for row in report.get("attention", [])
    ]
    lines = table(columns, rows)
    if "model" in report:
        columns = ("SparseDiT, tokens", "one block, ms", "GiB", "24 blocks, ms", "forward as CUDA graphs, ms", "GiB")
        parts = {(row["part"], row["tokens"]): row for row in report["model"]}
        rows = []
        for tokens in sorted({tokens for _, tokens in parts}):
            block, model = (parts.get((part, tokens), {}) for part in ("block", "model"))
            rows.append(
                (
                    f"{tokens:,}",
                    pair(block, "forward", "backward"),
                    pair(block, "forward_gib", "with_backward_gib"),
                    pair(model, "forward", "backward"),
                    figure(model.get("replayed", {}).get("forward")),
                    pair(model, "forward_gib", "with_backward_gib"),
                )
            )
        lines += ["", *table(columns, rows)]
    return lines


def convolution_table(report: Report) -> list[str]:
    columns = ("case", "voxels", "map", "forward / backward", "map and forward", "training step")
    columns += ("plain PyTorch, forward / backward",)
    rows = [
        (
            row["case"],
            f"{row['voxels']:,}",
            figure(row["map"]),
            pair(row, "forward", "backward"),
            figure(row["all"]),
            figure(row["step"]),
            pair(row, "plain_forward", "plain_backward"),
        )
        for row in report["results"]
    ]
    return table(columns, rows)


def pivot(rows: list[dict[str, Any]], about: tuple[str, ...], memory: str, memory_digits: int) -> list[str]:
    """A table with a row for each mesh and resolution, and a column of seconds and memory for each step.

    Args:
        rows: of a benchmark, each with `mesh`, `resolution`, `step`, `seconds` and its memory.
        about: names of further values that belong to a mesh and resolution.
        memory: the name of the memory in a row.
        memory_digits: of it after the point.
    """
    steps = list(dict.fromkeys(row["step"] for row in rows))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = (row["mesh"], f"{row['resolution']}^3", *(f"{row[name]:,}" for name in about))
        peak = figure(row.get(memory), memory_digits)
        cells.setdefault(key, {})[row["step"]] = f"{figure(row['seconds'], 3)} / {peak}"
    return table(
        ("mesh", "grid", *about, *steps),
        ((*key, *(by_step.get(step, "-") for step in steps)) for key, by_step in cells.items()),
    )


def vae_table(report: Report) -> list[str]:
    rows = [row for row in report["rows"] if not row["step"].startswith("window attention")]
    return pivot(rows, ("latents",), "peak_gib", 2)


def geometry_table(report: Report) -> list[str]:
    return pivot(report["rows"], (), "mib", 0)


ESTIMATED_GPUS = ("A100 80GB", "RTX 4090")


def pipeline_table(report: Report) -> list[str]:
    """A row a step: what it took, its floor on the GPU that ran it, and what the same share would take on others."""
    gpu = report["hardware"].get("device", "")
    rows = []
    for row in report["steps"]:
        floor = row.get("floors", {}).get(gpu)
        cells = [figure(floor, 3), "-", *["-"] * len(ESTIMATED_GPUS)]
        if floor:
            share = floor / row["seconds"]
            cells[1:] = [f"{share:.0%}", *(figure(row["floors"][other] / share, 1) for other in ESTIMATED_GPUS)]
        rows.append((row["step"], figure(row["seconds"], 3), figure(row["peak_gib"]), *cells))
    columns = (
        "step",
        "seconds",
        "peak GiB",
        "floor, s",
        "reached",
        *(f"{other}, estimated" for other in ESTIMATED_GPUS),
    )
    total = (*pipeline_total(report), *["-"] * (len(columns) - 3))
    peers = [f"Published by others: {seconds:.1f} s, {system}." for system, seconds in report.get("peers", {}).items()]
    return [*table(columns, [*rows, total]), *([""] if peers else []), *peers]


def pipeline_total(report: Report) -> tuple[str, str, str]:
    peaks = [row["peak_gib"] for row in report["steps"] if row["peak_gib"] is not None]
    return "all steps", figure(report["total"], 3), figure(max(peaks, default=None))


def offload_sentence(report: Report) -> list[str]:
    _, seconds, peak = pipeline_total(report)
    recipe = report.get("settings", {}).get("recipe")
    settings = "the settings for the least memory" if recipe else "`enable_model_cpu_offload()`"
    return [f"With {settings} all steps take {seconds} s and {peak} GiB."]


def recipes_table(report: Report) -> list[str]:
    """Time and quality of each recipe, and what another seed changes."""
    rows = report["rows"] + [{"recipe": "exact, another seed", **report.get("other_seed", {})}]
    columns = {"seconds": 2, "denoising_seconds": 2, "f1": 3, "chamfer": 4}
    lines = ((row["recipe"], *(figure(row.get(name), digits) for name, digits in columns.items())) for row in rows)
    return table(("recipe", "call, s", "denoising, s", "F1", "Chamfer"), lines)


def lora_sentence(report: Report) -> list[str]:
    """What a LoRA gives on shapes held back: each figure without and with it."""
    base, tuned = report["rows"]
    changes = [
        f"loss of {part} {figure(loss, 3)} to {figure(tuned['losses'][part], 3)}"
        for part, loss in base["losses"].items()
    ]
    for name, metric in (("F1(0.05)", "f1_0.05"), ("F1(0.02)", "f1_0.02"), ("Chamfer distance", "chamfer_l1")):
        changes.append(f"{name} {figure(base[metric], 3)} to {figure(tuned[metric], 3)}")
    names = ("shapes", "held_back", "steps", "batch_size")
    shapes, held_back, steps, size = (report["settings"][name] for name in names)
    return [
        f"LoRA of the small pipeline on {shapes} shapes of a family that it has not seen, {steps} steps of {size};"
        f" means over {held_back} shapes held back, without and with it: {', '.join(changes)}"
        " ([pictures](training.md#5-fine-tuning))."
    ]


def tests_sentence(report: Report) -> list[str]:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in report["counts"].items())
    return [f"Native tests of operators and models: {counts}."]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: of the section; without one, it goes on with the section before it.
        command: that writes its file.
        text: what is in the table.
        render: from a file to the lines of the table.
    """

    title: str
    command: str
    text: str
    render: Callable[[Report], list[str]]


SECTIONS = {
    "ssa": Section(
        "Spatial Sparse Attention",
        "python benchmarks/ssa.py",
        "Forward / backward. Dense attention is `scaled_dot_product_attention` with PyTorch's FlashAttention backend"
        " at 32 heads x 32, the model's own heads, and with cuDNN at 16 heads x 64, the same width in heads that suit"
        " it better. GiB is the additional peak, forward / with backward.",
        attention_tables,
    ),
    "sparse_conv": Section(
        "Submanifold convolution, 3x3x3",
        "python benchmarks/sparse_conv.py",
        "Milliseconds. A case is grid and channels of a spherical shell of voxels.",
        convolution_table,
    ),
    "vae": Section(
        "SparseVAE of the published size",
        "python benchmarks/vae.py",
        "Seconds / peak GiB.",
        vae_table,
    ),
    "geometry": Section(
        "Mesh to sparse SDF and back",
        "python benchmarks/geometry.py",
        "Seconds / MiB of memory. Steps that name a device ran there, the others on the processor.",
        geometry_table,
    ),
    "full_size": Section(
        "An image to a mesh of 1024^3 with models of the published sizes",
        "python benchmarks/full_size.py --work DIR",
        "The weights are random; the sparse stages get the cells of tori. After a first call of one step a stage. The"
        " floor counts products, convolutions and attention (`benchmarks/floors.py`). An estimate is the floor of that"
        " GPU over the share that is reached here; nothing ran there.",
        pipeline_table,
    ),
    "full_size_offload": Section(
        "",
        "python benchmarks/full_size.py --work DIR --offload",
        "",
        offload_sentence,
    ),
    "full_size_low_memory": Section(
        "",
        "python benchmarks/full_size.py --work DIR --recipe low_memory",
        "",
        offload_sentence,
    ),
    "cache_recipes": Section(
        "Fewer and cheaper steps",
        "python benchmarks/cache_recipes.py",
        "The small pipeline: means over photos and seeds. F1 at 0.05 and the Chamfer distance, in model space"
        " [-1, 1]^3, compare a mesh with that of the exact run for the same photo and seed.",
        recipes_table,
    ),
    "cache_recipes_full_size": Section(
        "",
        "python benchmarks/cache_recipes.py --work DIR",
        "At the published sizes, with random weights:",
        recipes_table,
    ),
    "lora": Section("", "python benchmarks/lora.py --work DIR", "", lora_sentence),
    "test_gpu": Section("", "make test-gpu", "", tests_sentence),
}


def read_reports(folder: Path = RESULTS) -> dict[str, Report]:
    """The result files by name, in the order of the page.

    Raises:
        ValueError: if a file has no section here, or does not say which run it comes from.
    """
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    for name, report in reports.items():
        if name not in SECTIONS:
            raise ValueError(f"`{name}.json` must be one of {', '.join(SECTIONS)}: the page has no section for it")
        missing = [part for part in PROVENANCE if not report.get(part)]
        if missing:
            raise ValueError(f"`{name}.json` must say its {', '.join(missing)}")
    return {name: reports[name] for name in SECTIONS if name in reports}


def hardware_text(hardware: dict[str, Any]) -> str:
    processor = f"{hardware['processor']}, {hardware['cores']} cores"
    return f"{hardware['device']}; {processor}" if "device" in hardware else processor


def render_page(reports: dict[str, Report]) -> str:
    """The text of docs/performance.md."""
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/report.py` from [benchmarks/results](../benchmarks/results); do not edit.",
        "Times hold on the named hardware only. Why the code is as it is: [design](design/README.md). What was tried",
        "and measured on the way, with figures of earlier states of the code: [log](log/README.md).",
    ]
    missing = [f"- `{section.command}` ({name}.json)" for name, section in SECTIONS.items() if name not in reports]
    if missing:
        lines += ["", "Missing, since no run is recorded:", *missing]
    for name, report in reports.items():
        section = SECTIONS[name]
        lines += ["", f"## {section.title}", ""] if section.title else [""]
        lines += [section.text, ""] if section.text else []
        lines += section.render(report)
        lines += ["", report["note"]] if "note" in report else []
    if reports:
        columns = ("file", "command", "commit", "hardware", "versions")
        rows = [
            (
                f"[{name}.json](../benchmarks/results/{name}.json)",
                f"`{report['command']}`",
                report["commit"],
                hardware_text(report["hardware"]),
                ", ".join(f"{package} {version}" for package, version in report["versions"].items()),
            )
            for name, report in reports.items()
        ]
        lines += ["", "## Runs", "", *table(columns, rows)]
    return "\n".join(lines) + "\n"


def readme_figures(reports: dict[str, Report]) -> str:
    """The list of figures in README.md: a line for each file that one of them comes from."""
    lines = []
    if "ssa" in reports:
        report = reports["ssa"]
        device = report["hardware"].get("device", "a CPU")
        row = max(report["attention"], key=lambda row: (row["tokens"], -row["topk"]))
        times = [ratio(row[name], row["ssa"]) for name in ("flash", "wide")]
        if all(times):
            flash, wide = ([figure(way, 1) for way in both.values()] for both in times)
            lines.append(
                f"- At {row['tokens']:,} tokens on one {device}, SSA is {flash[0]} times as fast forward and"
                f" {flash[1]} times backward as PyTorch's FlashAttention backend with the model's 32 heads of 32"
                f" channels, and {wide[0]} and {wide[1]} times as fast as cuDNN's attention with 16 heads of 64."
            )
        for row in report.get("model", []):
            if row["part"] == "model" and row["tokens"] == 10_000 and row.get("replayed"):
                lines.append(
                    f"- With a few thousand tokens a model waits for the host: a call at 10,000 tokens takes"
                    f" {figure(row['forward'], 0)} ms, and {figure(row['replayed']['forward'], 0)} ms as a CUDA"
                    f" graph, which the pipeline does by itself."
                )
    for name, way in (("full_size", ""), ("full_size_offload", " with `enable_model_cpu_offload()`")):
        if name in reports:
            report = reports[name]
            peaks = [row["peak_gib"] for row in report["steps"] if row["peak_gib"] is not None]
            memory = f" and {figure(max(peaks), 0)} GiB of GPU memory" if peaks else ""
            device = report["hardware"].get("device", "a CPU")
            lines.append(
                f"- With models of the published sizes and random weights, an image to a mesh of 1024^3 takes"
                f" {figure(report['total'], 0)} s{memory} on one {device}{way}."
            )
    if "test_gpu" in reports:
        report = reports["test_gpu"]
        counts, versions = report["counts"], report["versions"]
        lines.append(
            f"- `make test-gpu` on one {report['hardware']['device']} (torch {versions['torch']}, triton"
            f" {versions['triton']}): {counts['passed']} passed, {counts['failed']} failed,"
            f" {counts['skipped']} skipped."
        )
    lines = lines or ["- No figures are recorded for this state of the code yet."]
    return "\n".join(lines) + "\n"


def main() -> None:
    reports = read_reports()
    PAGE.write_text(render_page(reports), encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    README.write_text(README_FIGURES.sub(lambda _: readme_figures(reports), readme), encoding="utf-8")


if __name__ == "__main__":
    main()
