"""What the page of the paper's claims shows of the result files of `benchmarks/claims/`: tables in Markdown.

The scripts of this folder import it as their neighbour, as `python benchmarks/NAME.py` finds it.
"""

from report_tables import Report, figure, table


FORMATS = {
    "sparse": "one sparse format (SparseVAE)",
    "mixed": "mixed: points in, distances out",
    "vector_set": "vector set",
}
ATTENTIONS = {
    "ssa": "Spatial Sparse Attention",
    "full": "full attention",
    "window": "windows",
    "nsa_1d": "sparse attention in one dimension",
}


def trainings_table(report: Report, names: dict[str, str], measures: dict[str, tuple[str, int]]) -> list[str]:
    """A row for each model: means over its seeds at the end of training, and the spread of the validation loss.

    Args:
        report: of a comparison at equal minutes, with a "summary".
        names: what to call each model.
        measures: title and digits of each measure of the summary.
    """
    parameters = {row["model"]: row["parameters"] for row in report["rows"]}
    rows = []
    for model, own in report["summary"].items():
        spread = "-" if own["loss_spread"] is None else f"{own['loss_spread']:.1%}"
        cells = [names[model], f"{parameters[model] / 1e6:.2f} M", str(own["seeds"]), figure(own["milliseconds"], 1)]
        cells += [figure(own["validation_loss"], 4), spread, figure(own["roughness"], 3)]
        rows.append([*cells, *(figure(own.get(name), digits) for name, (_, digits) in measures.items())])
    columns = ("", "parameters", "seeds", "ms a step", "validation loss", "spread of seeds", "roughness")
    minutes = f"{report['settings']['minutes']:g} minutes of each training on one {device_name(report)}."
    return [minutes, "", *table((*columns, *(title for title, _ in measures.values())), rows)]


def device_name(report: Report) -> str:
    """The GPU of a run, or its processor."""
    return report["hardware"].get("device", report["hardware"]["processor"])


def formats_table(report: Report) -> list[str]:
    """Autoencoders of one sparse format, of mixed formats, and of vector sets."""
    measures = {"f1_0.01": ("F1(0.01)", 3), "chamfer_l1": ("Chamfer, L1", 4), "normal_error": ("normal error, deg", 1)}
    return trainings_table(report, FORMATS, measures)


def attentions_table(report: Report) -> list[str]:
    """Attentions in the sparse stage."""
    measures = {"f1_0.01": ("F1(0.01)", 3), "f1_0.05": ("F1(0.05)", 3), "normal_error": ("normal error, deg", 1)}
    return trainings_table(report, ATTENTIONS, measures)


def volume_table(report: Report) -> list[str]:
    """Training steps in sparse cells and in dense volumes."""
    rows = [
        (
            row["model"],
            f"{row['resolution']}^3",
            f"{row['cell']}^3",
            f"{row['tokens']:,}",
            row["source"],
            figure(row.get("seconds"), 3),
            figure(row.get("gib"), 1),
            figure(row.get("gpus"), 1),
        )
        for row in report["rows"]
    ]
    columns = ("transformer", "samples", "samples of a cell", "tokens", "", "s a step", "GiB", "GPUs")
    return [f"One shape a step on one {device_name(report)}.", "", *table(columns, rows)]
