"""What the pages of figures show of each result file: tables and sentences in Markdown.

The scripts of this folder import it as their neighbour, as `python benchmarks/NAME.py` finds it.
"""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from floors import RATES
from published import CARDS, RECIPES, read_published


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
    """SSA beside dense attention; then a block and the whole SparseDiT, if the run had them."""
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
    return [*table(columns, rows), *(["", *block_table(report)] if "model" in report else [])]


def block_table(report: Report) -> list[str]:
    """A block and the whole SparseDiT."""
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
    return table(columns, rows)


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


# Steps that take a smaller share of the whole are one row.
SMALL_SHARE = 0.01
ESTIMATED_GPUS = ("A100 80GB", "RTX 4090")


def pipeline_table(report: Report) -> list[str]:
    """A row a step: what it took, its floor on the GPU that ran it, and what the same share would take on others."""
    gpu = report["hardware"].get("device", "")
    rows = []
    small = [row for row in report["steps"] if row["seconds"] < SMALL_SHARE * report["total"]]
    for row in report["steps"]:
        if row in small:
            continue
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
    no_floor = ["-"] * (len(columns) - 3)
    if small:
        peak = max((row["peak_gib"] for row in small if row["peak_gib"] is not None), default=None)
        seconds = sum(row["seconds"] for row in small)
        rows.append((f"{len(small)} short steps", figure(seconds, 3), figure(peak), *no_floor))
    total = (*pipeline_total(report), *no_floor)
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
    rows = list(report["rows"])
    if "other_seed" in report:
        rows.append({"recipe": "exact, another seed", **report["other_seed"]})
    columns = {"seconds": 2, "denoising_seconds": 2, "f1": 3, "chamfer": 4}
    lines = ((row["recipe"], *(figure(row.get(name), digits) for name, digits in columns.items())) for row in rows)
    return table(("recipe", "call, s", "denoising, s", "F1", "Chamfer"), lines)


def offloading_table(report: Report) -> list[str]:
    """Time, memory and difference of the result, by where the weights are kept; that from float32 where known."""
    names = ["difference"] + ["from_float32"] * any("from_float32" in row for row in report["rows"])
    rows = []
    for row in report["rows"]:
        if "error" in row:
            rows.append((row["weights"], *"-" * (2 + len(names)), row["error"].replace("|", "\\|")))
        else:
            peaks = " / ".join(figure(peak) for peak in row["peak_gib"]) or "-"
            seconds = (figure(row[name], 1) for name in ("loading", "seconds"))
            rows.append((row["weights"], *seconds, peaks, *(f"{row[name]:.1e}" for name in names)))
    columns = ("weights", "loading, s", "call, s", "peak GiB of each GPU", *names)
    note = ["", "From float32: the difference from the same weights and noise in float32."] if len(names) > 1 else []
    return [*table((name.replace("_", " ") for name in columns), rows), *note]


def context_parallel_table(report: Report) -> list[str]:
    """Calls on one GPU beside those over several, how far the results are apart, and how far rounding takes them."""
    gpus = report["gpus"]
    rounded = all("rounding" in row for row in report["rows"])
    rows = (
        (
            f"{row['samples']} x {row['tokens']:,}",
            *(figure(row[way]["milliseconds"], 1) for way in ("one", "several")),
            figure(row["one"]["milliseconds"] / row["several"]["milliseconds"]),
            *(figure(row[way]["gib"]) for way in ("one", "several")),
            f"{row['difference']:.1e}",
            *([f"{row['rounding']:.1e}"] if rounded else []),
        )
        for row in report["rows"]
    )
    columns = ("samples x tokens", "one GPU, ms", f"{gpus} GPUs, ms", "times as fast")
    columns = (*columns, "one GPU, GiB", f"{gpus} GPUs, GiB a GPU", "largest difference")
    return table((*columns, "by the last bit of the latents") if rounded else columns, rows)


def quantization_table(report: Report) -> list[str]:
    """Memory, time and quality of each scheme, and what another seed changes; errors, if there is one."""
    columns = {"mib": 1, "peak_gib": 2, "seconds": 2, "f1": 3, "chamfer": 4}
    rows = [*report["rows"], {"scheme": "none, another seed", **report.get("other_seed", {})}]
    errors = any("error" in row for row in rows)
    lines = (
        [row["scheme"], *(figure(row.get(name), digits) for name, digits in columns.items())]
        + [row.get("error", "").replace("|", "\\|")] * errors
        for row in rows
    )
    return table(("scheme", "transformers, MiB", "peak GiB", "call, s", "F1", "Chamfer") + ("error",) * errors, lines)


def scaling_table(report: Report, floors: Report | None = None) -> list[str]:
    """Time, memory and efficiency of a training step on each number of GPUs; with the model, if there are several.

    Args:
        report: of `scaling.py`.
        floors: of `step_floors.py`, for the share of the floor that each step reaches.
    """
    columns = {"seconds": 3, "tokens_per_second": 0, "peak_gib": 1, "communication": 3, "efficiency": 2}
    about = ["model"] * (len({row.get("model") for row in report["rows"]}) > 1) + ["gpus", "layout"]
    rates = RATES.get(report["hardware"].get("device", ""))
    steps = {} if floors is None else {(row["model"], row["tokens"]): row["step"] for row in floors["rows"]}
    rows = []
    for row in report["rows"]:
        operations = steps.get((row.get("model"), report.get("settings", {}).get("tokens")))
        reached = "-"
        if rates is not None and operations is not None and "seconds" in row:
            reached = f"{operations / rates.operations / row['seconds']:.0%}"
        cells = (figure(row.get(name), digits) for name, digits in columns.items())
        rows.append((*(str(row[name]) for name in about), *cells, reached))
    names = ("GPUs" if name == "gpus" else name for name in about)
    titles = ("s a step", "tokens/s", "GiB a GPU", "communication", "efficiency", "floor reached")
    return table((*names, *titles), rows)


def cards_table(report: Report) -> list[str]:
    """Time and memory of a training step of the recipes for one card, beside the memory that they may take.

    Args:
        report: of `scaling.py`.
    """
    rows = []
    for row in report["rows"]:
        settings = read_published(row["model"])
        tokens = settings["batch_size"] * report["settings"]["tokens"]
        rows.append(
            (
                f"`published/{Path(CARDS[RECIPES[row['model']]]).stem}`",
                f"{settings['gradient_accumulation_steps']} x {tokens:,}",
                f"{settings['max_tokens']:,}",
                figure(row.get("seconds"), 1),
                figure(row.get("tokens_per_second"), 0),
                figure(row.get("peak_gib"), 1),
                figure(row.get("limit_gib"), 1),
            )
        )
    titles = ("recipe", "forward passes x tokens", "`max_tokens`", "s a step", "tokens/s", "peak GiB", "limit, GiB")
    return table(titles, rows)


def first_call_table(report: Report) -> list[str]:
    """Seconds of new processes, with triton's cache and without."""
    names = ("imports", "loading", "first call", "second call")
    rows = ((row["kernels"], row["cache"], *(figure(row[name], 1) for name in names)) for row in report["rows"])
    return table(("kernels are compiled", "triton's cache", *(f"{name}, s" for name in names)), rows)


def first_step_table(report: Report) -> list[str]:
    """Seconds until new processes have trained a step, with triton's cache and without."""
    # What is not recorded changes further steps alone.
    runs = [row for row in report["rows"] if "nothing recorded" not in row["kernels"]]
    rows = [(row["kernels"], row["cache"], figure(row["imports"], 1), figure(row["first step"], 1)) for row in runs]
    return table(("kernels are compiled", "triton's cache", "imports, s", "until the first step is done, s"), rows)


def optimizers_table(report: Report) -> list[str]:
    """Steps a second and the time of the optimizer alone, with each optimizer."""
    names = {"adamw": "AdamW", "muon": "`optimizer: muon`", "torch's muon": "`torch.optim.Muon`, and AdamW"}
    rows = [
        (
            names[row["optimizer"]],
            figure(row["steps_per_second"], 1),
            figure(1e3 * row["optimizer_seconds"], 1),
            figure(row["losses"][-1], 3),
        )
        for row in report["rows"]
    ]
    return table(("optimizer", "steps/s", "ms of the optimizer alone", "loss of the last step"), rows)


def step_floors_table(report: Report) -> list[str]:
    """Operations of a training step of each model and the least time of them on the GPUs of which it is known."""
    rows = (
        (
            row["model"],
            f"{row['samples']} x {row['tokens']:,}",
            figure(row["forward"] / 1e12, 1),
            figure(row["step"] / 1e12, 1),
            *(figure(row["step"] / RATES[gpu].operations, 3) for gpu in RATES),
        )
        for row in report["rows"]
    )
    columns = ("model", "samples x tokens", "forward, 10^12 operations", "step, 10^12 operations")
    return table((*columns, *(f"floor on {gpu}, s" for gpu in RATES)), rows)


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


def evaluation_table(report: Report) -> list[str]:
    """Means and medians over the meshes of a split."""
    found = report["summary"]
    rows = [
        (title, *(figure(found[name][which], digits) for which in ("mean", "median")))
        for name, title, digits in measures(found)
    ]
    watertight = f"Of {found['count']} meshes, {found['watertight']['mean']:.0%} are watertight."
    return [
        *table(("", "mean", "median"), rows),
        "",
        f"{watertight} {sources_sentence(report['rows'], measures(found)[0][0])}",
    ]


def measures(summary: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Name, title and digits of what a summary of meshes has, the F1 of the largest distance first."""
    thresholds = sorted((name for name in summary if name.startswith("f1_")), key=lambda name: -float(name[3:]))
    return [
        *((name, f"F1({name[3:]})", 3) for name in thresholds),
        ("normal_consistency", "normal consistency", 3),
        ("chamfer_l1", "Chamfer distance (L1)", 4),
        ("bodies", "bodies", 1),
        ("reference_bodies", "bodies of the truth", 1),
    ]


def refiner_table(refined: Report, unrefined: Report | None = None) -> list[str]:
    """Means over meshes as they are decoded, if that was measured, and refined; and for how many it is an advantage.

    Raises:
        ValueError: if the two runs are not of the same meshes.
    """
    found = refined["summary"]
    if unrefined is None:
        rows = [(title, figure(found[name]["mean"], digits)) for name, title, digits in measures(found)]
        return table(("", "refined, mean"), rows)
    ids = [row["id"] for row in refined["rows"]]
    if ids != [row["id"] for row in unrefined["rows"]]:
        raise ValueError("The refined meshes must be those that were measured without a refiner")
    before = unrefined["summary"]
    rows = [
        (title, *(figure(summary[name]["mean"], digits) for summary in (before, found)))
        for name, title, digits in measures(found)
    ]
    pairs = [(row["chamfer_l1"], old["chamfer_l1"]) for row, old in zip(refined["rows"], unrefined["rows"])]
    nearer = sum(new < old for new, old in pairs)
    return [
        *table(("mean", "as decoded", "refined"), rows),
        "",
        f"{nearer} of {len(pairs)} meshes are nearer to the truth than without (Chamfer distance).",
    ]


def no_table(report: Report) -> list[str]:
    """Nothing, of a file whose figures stand in the table of another."""
    return []


def sources_sentence(rows: list[dict[str, Any]], measure: str) -> str:
    """The mean of a measure over the meshes of each source, the largest source first."""
    sources: dict[str, list[float]] = {}
    for row in rows:
        sources.setdefault(row["source"], []).append(row[measure])
    ordered = sorted(sources.items(), key=lambda item: -len(item[1]))
    parts = [f"{source} {figure(mean(values), 3)} ({len(values)})" for source, values in ordered]
    return f"Mean F1({measure[3:]}) by source, with the number of meshes: {', '.join(parts)}."


def selection_sentence(report: Report) -> list[str]:
    """What the best of several meshes gains over a single one."""
    found, settings = report["summary"], report["settings"]
    f1 = {which: figure(value, 3) for which, value in found["f1_0.05"].items()}
    bodies = {which: figure(value, 1) for which, value in found["bodies"].items()}
    return [
        f"With the small pipeline and {settings['seeds']} seeds for each of {len(report['rows'])} validation pictures,"
        f" the mean F1(0.05) is {f1['one']} for a single mesh, {f1['selected']} for the selected one, and"
        f" {f1['nearest']} for the one nearest to the truth. A single mesh has {bodies['one']} bodies on average, the"
        f" selected one {bodies['selected']}."
    ]


def tests_sentence(report: Report) -> list[str]:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in report["counts"].items())
    # Skipped tests are counted last. Older files do not say why.
    reasons = "; ".join(f"{count}: {reason}" for reason, count in report.get("skipped_because", {}).items())
    return [f"Native tests of operators and models: {counts}{f' ({reasons})' if reasons else ''}."]


def mutants_sentence(report: Report) -> list[str]:
    tried, caught = report["tried"], report["caught"]
    return [f"The tests notice {caught} of the {tried} mistakes that were planted, {caught / tried:.1%}."]


def soak_sentence(report: Report) -> list[str]:
    parts = []
    for row in report["rows"]:
        part = f"{row['count']:,} {row['what']}"
        if "late_mib" in row:
            part += (
                f" added {row['late_mib'] - row['early_mib']:+.1f} MiB after the first tenth, to {row['late_mib']:.0f}"
            )
        parts.append(part)
    return [f"Long runs at tiny sizes: {'; '.join(parts)}. No file and no thread was left."]
