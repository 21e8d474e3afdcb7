"""
Writes docs/performance.md, and the figures of README.md, from the files in benchmarks/results/.

    python benchmarks/report.py

Every figure comes from a file there; what has no file yet is named as missing. After a run of a benchmark,

    python benchmarks/ssa.py --json benchmarks/results/ssa.json

this script is run again, and both go into one commit; a test compares page and files.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_claims import attentions_table, formats_table, volume_table
from report_data import data_tables
from report_tables import (
    Report,
    attention_tables,
    context_parallel_table,
    convolution_table,
    figure,
    geometry_table,
    lora_sentence,
    mutants_sentence,
    offload_sentence,
    offloading_table,
    pipeline_table,
    quantization_table,
    ratio,
    recipes_table,
    scaling_table,
    selection_sentence,
    soak_sentence,
    table,
    tests_sentence,
    vae_table,
)


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
README_FIGURES = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- end of figures -->)", re.S)
# Other pages that have sections, each at a place between two marks.
RECIPES_PAGE = ROOT / "docs" / "speed_and_memory.md"
TRAINING_PAGE = ROOT / "docs" / "training.md"
FAQ_PAGE = ROOT / "docs" / "faq.md"
CONTRIBUTING_PAGE = ROOT / "CONTRIBUTING.md"
LOADING_PAGE = ROOT / "docs" / "loading.md"
CLAIMS_PAGE = ROOT / "docs" / "claims.md"
DATA_PAGE = ROOT / "docs" / "data.md"
# By the name in the marks.
PLACES = {
    "recipes": RECIPES_PAGE,
    "parallel": RECIPES_PAGE,
    "offloading": RECIPES_PAGE,
    "quantization": RECIPES_PAGE,
    "steps": TRAINING_PAGE,
    "soak": FAQ_PAGE,
    "mutants": CONTRIBUTING_PAGE,
    "selection": LOADING_PAGE,
    "claims": CLAIMS_PAGE,
    "reading": DATA_PAGE,
}
# What every file says about its run. It may have a `note` as well, which the page shows.
PROVENANCE = ("command", "commit", "hardware", "versions")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: of the section; without one, it goes on with the section before it.
        command: that writes its file.
        text: what is in the table.
        render: from a file to the lines of the table.
        place: of the section on another page, one of `PLACES`.
    """

    title: str
    command: str
    text: str
    render: Callable[[Report], list[str]]
    place: str = ""

    @property
    def page(self) -> Path:
        """The page that has the section."""
        return PLACES.get(self.place, PAGE)


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
        "",
        "python benchmarks/cache_recipes.py",
        "The small pipeline: means over photos and seeds. F1 at 0.05 and the Chamfer distance, in model space"
        " [-1, 1]^3, compare a mesh with that of the exact run for the same photo and seed.",
        recipes_table,
        "recipes",
    ),
    "cache_recipes_full_size": Section(
        "",
        "python benchmarks/cache_recipes.py --work DIR",
        "At the published sizes, with random weights:",
        recipes_table,
        "recipes",
    ),
    "context_parallel": Section(
        "",
        "torchrun --nproc_per_node 2 benchmarks/context_parallel.py",
        "A call of SparseDiT of the published size, on cells at 1024^3; memory is that beside the weights. The"
        " difference is over the largest value.",
        context_parallel_table,
        "parallel",
    ),
    "offloading": Section(
        "",
        "python benchmarks/offloading.py --work DIR",
        "A call to 512^3 in few steps, models of the published sizes without refiners, 16 bits. Difference: the"
        " largest of what the stages give, over its largest value; the first row is compared with its own first call."
        " Rows that load single layers call them one after the other in place of fused kernels, which round otherwise;"
        " whether rounding is all of their difference has not been measured on a GPU.",
        offloading_table,
        "offloading",
    ),
    "quantization": Section(
        "",
        "python benchmarks/quantization.py",
        "Both transformers of the small pipeline: means over photos and seeds; F1 at 0.05 and the Chamfer distance to"
        " the mesh without quantisation.",
        quantization_table,
        "quantization",
    ),
    "scaling_dit": Section(
        "",
        "python benchmarks/scaling.py --models dit",
        "SparseDiT at 1024^3, two samples of 46,000 tokens a GPU:",
        scaling_table,
        "steps",
    ),
    "scaling_dit_two": Section(
        "",
        "python benchmarks/scaling.py --gpus 2 --models dit",
        "The same on two GPUs, in a run of its own:",
        scaling_table,
        "steps",
    ),
    "scaling_vae": Section(
        "",
        "python benchmarks/scaling.py --models vae",
        "SparseVAE at 1024^3, one sample of 46,000 cells a GPU:",
        scaling_table,
        "steps",
    ),
    "data": Section(
        "",
        "python benchmarks/data.py",
        "Random blocks in the numbers of a surface, read by the loader of the trainings; nothing of them is in memory"
        " before. The wait is the share of the time that a step of SparseVAE of the published size on one H200 would"
        " wait.",
        data_tables,
        "reading",
    ),
    "claims_formats": Section(
        "2. One sparse format, measured",
        "python -m benchmarks.claims.formats --data DIR",
        "Means over seeds. Spread: the deviation of the validation loss between seeds over its mean. Roughness: the"
        " deviation of the changes of the logarithm of the training loss, in the second half.",
        formats_table,
        "claims",
    ),
    "claims_volume": Section(
        "3. Training at 1024^3, measured",
        "python -m benchmarks.claims.volume",
        "GPUs: as many as process the shapes of 8 with SparseDiT and SSA in the same time.",
        volume_table,
        "claims",
    ),
    "claims_attentions": Section(
        "4. Attentions in the sparse stage, measured",
        "python -m benchmarks.claims.attentions --data DIR --vae DIR --image_encoder DIR",
        "Spread and roughness as above.",
        attentions_table,
        "claims",
    ),
    "selection": Section("", "python benchmarks/selection.py --data DIR", "", selection_sentence, "selection"),
    "lora": Section("", "python benchmarks/lora.py --work DIR", "", lora_sentence),
    "soak": Section("", "python benchmarks/soak.py", "", soak_sentence, "soak"),
    "mutants": Section("", "make mutants", "", mutants_sentence, "mutants"),
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


def run_sentence(name: str, report: Report, page: Path) -> str:
    """Where the figures of a file come from, with a link to it from the page."""
    file = f"[{name}.json]({os.path.relpath(RESULTS, page.parent)}/{name}.json)"
    return f"{file}: `{report['command']}` at commit {report['commit']} on {hardware_text(report['hardware'])}."


def render_sections(reports: dict[str, Report], place: str = "") -> list[str]:
    """The lines of the sections of a place, each with an empty line before it; sentences alone make one paragraph."""
    lines: list[str] = []
    follows_sentence = False
    for name, report in reports.items():
        section = SECTIONS[name]
        if section.place != place:
            continue
        is_sentence = not section.title and not section.text
        lines += [] if is_sentence and follows_sentence else [""]
        lines += [f"## {section.title}", ""] if section.title else []
        lines += [section.text, ""] if section.text else []
        lines += section.render(report)
        if place == "claims":
            picture = section.page.with_name(f"{name}.png")
            lines += ["", f"![{section.title}]({picture.name})"] if picture.exists() else []
        # docs/performance.md has a table of its runs.
        lines += ["", run_sentence(name, report, section.page)] if place else []
        lines += ["", report["note"]] if "note" in report else []
        follows_sentence = is_sentence and "note" not in report
    return lines


def between_marks(place: str) -> re.Pattern[str]:
    """What stands between the marks of a place."""
    return re.compile(f"(?<=<!-- {place} -->\\n).*?(?=<!-- end of {place} -->)", re.S)


def render_part(reports: dict[str, Report], place: str) -> str:
    """The part of a page between the marks of a place."""
    lines = render_sections(reports, place)
    return "\n".join([*lines, "", ""]) if lines else "\n"


def render_page(reports: dict[str, Report]) -> str:
    """The text of docs/performance.md."""
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/report.py` from [benchmarks/results](../benchmarks/results); do not edit.",
        "Times hold on the named hardware only. Why the code is as it is: [design](design/README.md). What was tried",
        "and measured on the way, with figures of earlier states of the code: [log](log/README.md).",
    ]
    missing = [f"`{section.command}` ({name}.json)" for name, section in SECTIONS.items() if name not in reports]
    if missing:
        lines += ["", f"Missing, since no run is recorded: {', '.join(missing)}."]
    lines += render_sections(reports)
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
            if not SECTIONS[name].place
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
    for place, page in PLACES.items():
        part, text = render_part(reports, place), page.read_text(encoding="utf-8")
        page.write_text(between_marks(place).sub(lambda _, part=part: part, text), encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    README.write_text(README_FIGURES.sub(lambda _: readme_figures(reports), readme), encoding="utf-8")


if __name__ == "__main__":
    main()
