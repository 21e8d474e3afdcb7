"""The page of figures, and those of README.md, come from the result files and from nowhere else."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, report_tables


RUN = {
    "command": "python benchmarks/x.py --json x.json",
    "commit": "0123456789",
    "hardware": {"device": "NVIDIA H200", "processor": "Xeon", "cores": 16},
    "versions": {"python": "3.11.7", "torch": "2.11.0", "triton": "3.6.0"},
}
BOTH = {"forward": 1.0, "backward": 2.0, "forward_gib": 0.5, "with_backward_gib": 0.75}
ATTENTION = {
    "tokens": 131_072,
    "topk": 8,
    "ssa": BOTH,
    "flash": {"forward": 12.0, "backward": 34.0},
    "wide": {"forward": 5.0, "backward": 7.0},
}


def write(folder: Path, name: str, figures: dict[str, Any], run: dict[str, Any] = RUN) -> None:
    (folder / f"{name}.json").write_text(json.dumps(run | figures))


def test_page_and_readme_agree_with_the_files() -> None:
    reports = report.read_reports()
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == report.render_page(reports), "run `make performance`"
    assert len(page.splitlines()) <= 100
    for place, page in report.PLACES.items():
        part = report.between_marks(place).findall(page.read_text(encoding="utf-8"))
        assert part == [report.render_part(reports, place)], "run `make performance`"
    figures = report.README_FIGURES.findall(report.README.read_text(encoding="utf-8"))
    assert figures == [report.readme_figures(reports)], "run `make performance`"


def test_missing_files_are_named(tmp_path: Path) -> None:
    page = report.render_page(report.read_reports(tmp_path))
    for section in report.SECTIONS.values():
        assert f"`{section.command}`" in page
    assert "\n## " not in page
    assert report.readme_figures({}) == "- No figures are recorded for this state of the code yet.\n"


def test_figures_of_attention(tmp_path: Path) -> None:
    other = ATTENTION | {"topk": 32, "flash": {"forward": 1.0, "backward": 1.0}}
    write(tmp_path, "ssa", {"attention": [ATTENTION, other, ATTENTION | {"tokens": 20, "wide": {}}]})
    reports = report.read_reports(tmp_path)
    page = report.render_page(reports)
    cells = "1.00 / 2.00 | 12.00 / 34.00 | 5.00 / 7.00 | 12.0 / 17.0 | 5.0 / 3.5 | 0.50 / 0.75"
    assert f"| 131,072 | 8 | {cells} |" in page
    assert "| 20 | 8 | 1.00 / 2.00 | 12.00 / 34.00 | - / - | 12.0 / 17.0 | - / - | 0.50 / 0.75 |" in page
    for part in (
        "`python benchmarks/x.py --json x.json`",
        "0123456789",
        "NVIDIA H200; Xeon, 16 cores",
        "torch 2.11.0",
    ):
        assert part in page
    # README: the most tokens, at the smallest top-k.
    (line,) = report.readme_figures(reports).splitlines()
    assert "131,072 tokens on one NVIDIA H200, SSA is 12.0 times as fast forward and 17.0 times backward" in line
    assert "5.0 and 3.5 times as fast as cuDNN" in line


def test_figures_of_the_pipeline_and_the_tests(tmp_path: Path) -> None:
    steps = [{"step": "image tokens", "seconds": 1.5, "peak_gib": 2.0}, {"step": "x", "seconds": 3, "peak_gib": 10.6}]
    write(tmp_path, "full_size", {"total": 87.4, "steps": steps})
    write(tmp_path, "test_gpu", {"counts": {"passed": 7, "failed": 0, "skipped": 1}})
    reports = report.read_reports(tmp_path)
    page = report.render_page(reports)
    assert "| all steps | 87.400 | 10.60 |" in page and "models: 7 passed, 0 failed, 1 skipped." in page
    lines = report.readme_figures(reports).splitlines()
    assert "takes 87 s and 11 GiB of GPU memory on one NVIDIA H200" in lines[0]
    assert "torch 2.11.0, triton 3.6.0): 7 passed, 0 failed, 1 skipped" in lines[1]


def test_reasons_of_skipped_tests(tmp_path: Path) -> None:
    reasons = {"needs two GPUs": 8, "needs triton": 6}
    write(tmp_path, "test_gpu", {"counts": {"passed": 7, "failed": 0, "skipped": 14}, "skipped_because": reasons})
    page = report.render_page(report.read_reports(tmp_path))
    assert "models: 7 passed, 0 failed, 14 skipped (8: needs two GPUs; 6: needs triton)." in page


def test_figure_of_the_fastest_recipe_of_known_quality(tmp_path: Path) -> None:
    write(tmp_path, "full_size", {"total": 11.0, "steps": []})
    names = ("exact", "few", "fast", "unknown")
    full = [{"recipe": name, "seconds": seconds} for name, seconds in zip(names, (11.5, 4.43, 6.0, 1.0))]
    write(tmp_path, "cache_recipes_full_size", {"rows": full})
    assert len(report.readme_figures(report.read_reports(tmp_path)).splitlines()) == 1
    small = [{"recipe": name, "seconds": 2.0, "f1": f1} for name, f1 in (("fast", 0.9), ("few", 0.984))]
    write(tmp_path, "cache_recipes", {"rows": [{"recipe": "exact", "seconds": 9.0}, *small]})
    lines = report.readme_figures(report.read_reports(tmp_path)).splitlines()
    assert "recipe [few](" in lines[1] and "takes 4.4 s on one NVIDIA H200" in lines[1] and "F1 of 0.98 " in lines[1]


@pytest.mark.parametrize("part", report.PROVENANCE)
def test_a_run_must_say_where_it_comes_from(tmp_path: Path, part: str) -> None:
    write(tmp_path, "ssa", {"attention": []}, {name: value for name, value in RUN.items() if name != part})
    with pytest.raises(ValueError, match=part):
        report.read_reports(tmp_path)


def test_a_file_without_a_section_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "other", {})
    with pytest.raises(ValueError, match=r"other\.json"):
        report.read_reports(tmp_path)


def test_recipes_and_the_least_memory(tmp_path: Path) -> None:
    rows = [
        {"recipe": "exact", "seconds": 23.0, "denoising_seconds": 21.5},
        {"recipe": "fast", "seconds": 8.0, "denoising_seconds": 6.5, "f1": 0.95, "chamfer": 0.0123},
    ]
    write(tmp_path, "cache_recipes", {"rows": rows, "other_seed": {"f1": 0.8, "chamfer": 0.03}})
    steps = [{"step": "dense: denoising", "seconds": 1.0, "peak_gib": 3.25}]
    total = {"steps": steps, "total": 20.0, "loading": 1.0, "settings": {"recipe": "low_memory"}}
    write(tmp_path, "full_size_low_memory", total)
    reports = report.read_reports(tmp_path)
    page, recipes = report.render_page(reports), report.render_part(reports, "recipes")
    assert "| exact | 23.00 | 21.50 | - | - |\n| fast | 8.00 | 6.50 | 0.950 | 0.0123 |\n" in recipes
    assert "| exact, another seed | - | - | 0.800 | 0.0300 |" in recipes
    assert "another seed" not in page and "cache_recipes.json" not in page and "cache_recipes.json" in recipes
    assert "With the settings for the least memory all steps take 20.000 s and 3.25 GiB." in page


def test_the_gain_of_the_selection(tmp_path: Path) -> None:
    f1 = {"one": 0.61, "selected": 0.733, "nearest": 0.75}
    summary = {"f1_0.05": f1, "f1_0.02": f1, "bodies": {"one": 12.25, "selected": 4.5, "nearest": 2.0}}
    write(tmp_path, "selection", {"summary": summary, "settings": {"seeds": 4}, "rows": [{}] * 7})
    part = report.render_part(report.read_reports(tmp_path), "selection")
    assert "4 seeds for each of 7 validation pictures" in part
    assert "0.610 for a single mesh, 0.733 for the selected one, and 0.750" in part
    assert "A single mesh has 12.2 bodies on average, the selected one 4.5." in part


def test_tables_of_the_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "claims.md"
    monkeypatch.setitem(report.PLACES, "claims", page)
    (tmp_path / "claims_volume.png").touch()
    own = {"seeds": 3, "validation_loss": 0.0312, "loss_spread": 0.021, "roughness": 0.05, "milliseconds": 41.0}
    training = {"rows": [{"model": "sparse", "parameters": 4_540_000}], "settings": {"minutes": 0.4}}
    figures = {"f1_0.01": 0.871, "f1_0.05": 0.97, "chamfer_l1": 0.0061, "normal_error": 11.25}
    write(tmp_path, "claims_formats", training | {"summary": {"sparse": own | figures}})
    rows = [{"model": "ssa", "parameters": 6_400_000}]
    summary = {"ssa": own | figures | {"loss_spread": None}}
    write(tmp_path, "claims_attentions", training | {"rows": rows, "summary": summary})
    steps = [
        {"model": "dense", "resolution": 256, "cell": 8, "tokens": 32_768, "source": "counted", "seconds": 1.5},
        {"model": "sparse, SSA", "resolution": 1024, "cell": 8, "tokens": 46_000, "source": "failed"},
    ]
    write(tmp_path, "claims_volume", {"rows": steps})
    reports = report.read_reports(tmp_path)
    part = report.render_part(reports, "claims")
    assert "0.4 minutes of each training on one NVIDIA H200." in part
    cells = "4.54 M | 3 | 41.0 | 0.0312 | 2.1% | 0.050"
    assert f"| one sparse format (SparseVAE) | {cells} | 0.871 | 0.0061 | 11.2 |" in part
    assert "| Spatial Sparse Attention | 6.40 M | 3 | 41.0 | 0.0312 | - | 0.050 | 0.871 | 0.970 | 11.2 |" in part
    assert "| dense | 256^3 | 8^3 | 32,768 | counted | 1.500 | - | - |" in part
    assert "| sparse, SSA | 1024^3 | 8^3 | 46,000 | failed | - | - | - |" in part
    assert part.count("`python benchmarks/x.py --json x.json` at commit 0123456789 on NVIDIA H200") == 3
    assert part.count("![") == 1 and "(claims_volume.png)" in part
    assert "claims_formats.json" not in report.render_page(reports)


def test_a_plan_needs_the_file_that_it_is_counted_from(tmp_path: Path) -> None:
    row = {"model": "vae", "layout": "one", "gpus": 1, "seconds": 0.5, "peak_gib": 1.0}
    two = {**row, "layout": "ddp", "gpus": 2, "communication": 0.1}
    write(tmp_path, "scaling_dit_keep", {"rows": [row, two]})
    assert report.render_part(report.read_reports(tmp_path), "plan") == "\n"
    write(tmp_path, "scaling", {"rows": [row, two]})
    part = report.render_part(report.read_reports(tmp_path), "plan")
    assert "A plan, not measured" in part and "| SparseVAE | 64 | DDP, plan |" in part
    assert "| SparseVAE | 1 | measured | 0.500 |" in part
    assert "Counted from [scaling.json](../benchmarks/results/scaling.json)." in part
    write(tmp_path, "plan", {})
    with pytest.raises(ValueError, match=r"plan\.json"):
        report.read_reports(tmp_path)


def test_models_of_one_run_are_told_apart(tmp_path: Path) -> None:
    """A table of a single model has no column for it."""
    row = {"layout": "ddp", "gpus": 2, "seconds": 0.5, "tokens_per_second": 9000.0, "peak_gib": 1.0}
    write(tmp_path, "scaling", {"rows": [{**row, "model": "vae"}, {**row, "model": "dit", "efficiency": 0.744}]})
    write(tmp_path, "scaling_dit_keep", {"rows": [{**row, "model": "dit"}]})
    part = report.render_part(report.read_reports(tmp_path), "steps")
    assert "| vae | 2 | ddp | 0.500 | 9,000 | 1.0 | - | - | - |" in part and "| dit | 2 | ddp | 0.500 |" in part
    assert "| 9,000 | 1.0 | - | 0.74 | - |" in part and "\n| 2 | ddp | 0.500 | 9,000 |" in part
    assert part.count("| model | GPUs | layout |") == part.count("\n| GPUs | layout |") == 1


def test_recipes_for_one_card(tmp_path: Path) -> None:
    """Tokens of a forward pass are those of the recipe's batch; what did not fit has a row without figures."""
    row = {"model": "dit_24gb", "seconds": 10.25, "tokens_per_second": 7_000.0, "peak_gib": 19.04, "limit_gib": 21.35}
    rows = [row, {"model": "dit_16gb", "error": "out of memory"}]
    write(tmp_path, "scaling_cards", {"rows": rows, "settings": {"tokens": 40_000}})
    part = report.render_part(report.read_reports(tmp_path), "cards")
    larger = "| `published/dit_sparse_1024_24gb` | 8 x 80,000 | 95,000 | 10.2 | 7,000 | 19.0 | 21.4 |"
    smaller = "| `published/dit_sparse_1024_16gb` | 16 x 40,000 | 80,000 | - | - | - | - |"
    assert f"{larger}\n{smaller}\n\n[scaling_cards.json]" in part


def test_evaluation_by_thresholds_and_sources() -> None:
    names = ("f1_0.001", "f1_0.05", "normal_consistency", "chamfer_l1", "bodies", "reference_bodies", "watertight")
    summary = {name: {"mean": 0.5, "median": 0.25} for name in names} | {"count": 3}
    rows = [{"source": source, "f1_0.05": value} for source, value in (("a", 0.1), ("b", 0.5), ("b", 0.7))]
    lines = report_tables.evaluation_table({"summary": summary, "rows": rows})
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| F1(0.05)", "| F1(0.001)"]
    assert "50% are watertight" in lines[-1] and "F1(0.05) by source" in lines[-1]
    assert lines[-1].endswith("b 0.600 (2), a 0.100 (1).")


def test_the_share_of_the_floor(tmp_path: Path) -> None:
    """783e12 operations take a second on an H200; steps of other tokens, models and GPUs have no share."""
    rows = [
        {"model": model, "layout": "one", "gpus": 1, "seconds": 2.5, "tokens_per_second": 1.0}
        for model in ("dit", "vae")
    ]
    steps = [{"model": "dit", "samples": 2, "tokens": 46_000, "forward": 1e12, "step": 783e12}]
    write(tmp_path, "step_floors", {"rows": steps})
    write(tmp_path, "scaling", {"rows": rows, "settings": {"tokens": 46_000}})
    other = {**RUN, "hardware": {"processor": "Xeon", "cores": 16}}
    for tokens, run in ((10_000, RUN), (46_000, other)):
        write(tmp_path, "scaling_dit_keep", {"rows": rows[:1], "settings": {"tokens": tokens}}, run)
        part = report.render_part(report.read_reports(tmp_path), "steps")
        assert "| dit | 1 | one | 2.500 | 1 | - | - | - | 40% |" in part and "| vae | 1 | one | 2.500 |" in part
        assert part.count("%") == 1 and part.count("| floor reached |") == 2
    assert "| dit | 2 x 46,000 | 1.0 | 783.0 | 1.000 | 3.132 | 5.932 |" in part


def test_a_refiner_is_compared_with_none() -> None:
    """Of the same meshes, in their order; without the other run, refined ones stand alone."""
    names = ("f1_0.01", "normal_consistency", "chamfer_l1", "bodies", "reference_bodies")

    def run(value: float, distances: tuple[float, float], second: str = "b") -> dict[str, Any]:
        rows = [{"id": name, "chamfer_l1": distance} for name, distance in zip(("a", second), distances)]
        return {"summary": {name: {"mean": value, "median": 9.0} for name in names}, "rows": rows}

    refined, before = run(0.75, (0.1, 0.3)), run(0.25, (0.2, 0.2))
    lines = report_tables.refiner_table(refined, before)
    assert lines[0] == "| mean | as decoded | refined |" and lines[2] == "| F1(0.01) | 0.250 | 0.750 |"
    assert lines[-1].startswith("1 of 2 meshes are nearer")
    assert report_tables.refiner_table(refined)[2] == "| F1(0.01) | 0.750 |"
    with pytest.raises(ValueError, match="must be those"):
        report_tables.refiner_table(refined, run(0.25, (0.2, 0.2), "c"))
