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
from pathlib import Path
from typing import Any

from report_sections import PAGE, PLACES, ROOT, SECTIONS, Section
from report_tables import Report, figure, ratio, table


RESULTS = ROOT / "benchmarks" / "results"
FILES = [name for name, section in SECTIONS.items() if not section.counted_from]
README = ROOT / "README.md"
README_FIGURES = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- end of figures -->)", re.S)
# What every file says about its run. It may have a `note` as well, which the page shows.
PROVENANCE = ("command", "commit", "hardware", "versions")


def read_reports(folder: Path = RESULTS) -> dict[str, Report]:
    """The result files by name, in the order of the page.

    Raises:
        ValueError: if a file has no section here, or does not say which run it comes from.
    """
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    for name, report in reports.items():
        if name not in FILES:
            raise ValueError(f"`{name}.json` must be one of {', '.join(FILES)}: the page has no section for it")
        missing = [part for part in PROVENANCE if not report.get(part)]
        if missing:
            raise ValueError(f"`{name}.json` must say its {', '.join(missing)}")
    return {name: reports[name] for name in FILES if name in reports}


def hardware_text(hardware: dict[str, Any]) -> str:
    processor = f"{hardware['processor']}, {hardware['cores']} cores"
    return f"{hardware['device']}; {processor}" if "device" in hardware else processor


def run_sentence(name: str, report: Report, page: Path) -> str:
    """Where the figures of a file come from, with a link to it from the page."""
    run = f"`{report['command']}` at commit {report['commit']} on {hardware_text(report['hardware'])}"
    return f"{file_link(name, page)}: {run}."


def file_link(name: str, page: Path) -> str:
    """A link from the page to a result file."""
    return f"[{name}.json]({os.path.relpath(RESULTS, page.parent)}/{name}.json)"


def render_counted(section: Section, reports: dict[str, Report]) -> list[str]:
    """The lines of a section that is counted from the file of another, with a link to it."""
    lines = section.render(reports[section.counted_from])
    return ["", section.text, "", *lines, "", f"Counted from {file_link(section.counted_from, section.page)}."]


def render_sections(reports: dict[str, Report], place: str = "") -> list[str]:
    """The lines of the sections of a place, each with an empty line before it; sentences alone make one paragraph."""
    lines: list[str] = []
    follows_sentence = False
    for name, section in SECTIONS.items():
        if section.place != place:
            continue
        if section.counted_from:
            lines += render_counted(section, reports) if section.counted_from in reports else []
            continue
        if name not in reports:
            continue
        report = reports[name]
        is_sentence = not section.title and not section.text
        lines += [] if is_sentence and follows_sentence else [""]
        lines += [f"## {section.title}", ""] if section.title else []
        lines += [section.text, ""] if section.text else []
        lines += section.render(report, *(reports.get(other) for other in section.beside))
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
    missing = [f"`{SECTIONS[name].command}` ({name}.json)" for name in FILES if name not in reports]
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


def recipe_lines(reports: dict[str, Report]) -> list[str]:
    """A line about the fastest recipe at the published sizes whose quality on the small pipeline is known."""
    full, small = (
        {row["recipe"]: row for row in reports[name]["rows"]} if name in reports else {}
        for name in ("cache_recipes_full_size", "cache_recipes")
    )
    known = [recipe for recipe in full if "f1" in small.get(recipe, {})]
    if not known:
        return []
    best = min(known, key=lambda recipe: full[recipe]["seconds"])
    device = reports["cache_recipes_full_size"]["hardware"].get("device", "a CPU")
    return [
        f"- The recipe [{best}](docs/speed_and_memory.md#a-fast-recipe) takes {figure(full[best]['seconds'], 1)} s on"
        f" one {device}; meshes of the small pipeline agree with those of all steps with an F1 of"
        f" {figure(small[best]['f1'], 2)} at a distance of 0.05."
    ]


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
    for row in reports.get("ssa", {}).get("model", []):
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
            lines += recipe_lines(reports) if name == "full_size" else []
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
