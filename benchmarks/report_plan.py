"""A plan of training steps on more GPUs than were measured, counted from steps on one and two GPUs.

For n GPUs and a model of P parameters, with t1 seconds a step on one GPU, t2 on two and the share c of t2 in which
they communicate:

- `local_seconds`: max(t1, t2 (1 - c)), a step whose communication is hidden behind its computation. What a layout adds
  besides, as FSDP2's copies, stays in it.
- `wire_bytes`: what each GPU sends. DDP, a ring all-reduce of float32 gradients: 2 (n - 1) / n 4 P. FSDP2: (n - 1) / n
  (2 P + 2 P + 4 P), bfloat16 parameters gathered forward and backward and float32 gradients reduce-scattered. The two
  are the same number.
- `exposed_seconds`: nothing hidden. local + c t2 + wire / bandwidth, with the bandwidth of the slowest link on the
  way. c t2 is what two GPUs took, their waiting for each other included, as links are slower than their data sheets.
- samples a second: n times those of a GPU's batch over the seconds; efficiency: t1 over the seconds.
- memory: under DDP m2, that of two GPUs, whatever n. Under FSDP2 m2 - 16 P (1/2 - 1/n): 16 bytes of a parameter (its
  value, two moments of AdamW and the average, in float32) are spread over all GPUs; the rest belongs to the batch.

The scripts of this folder import it as their neighbour, as `python benchmarks/NAME.py` finds it.
"""

from __future__ import annotations

from typing import Any

from published import count_parameters, read_published
from report_tables import Report, figure, table


# Assumptions: GPUs of a host, and bytes a second that a GPU sends, over NVLink inside of a host (half of the 900 GB/s
# of both directions in the H200's data sheet) and over a card of 400 Gbit/s of its own between hosts.
GPUS_OF_A_HOST = 8
NVLINK, INFINIBAND = 450e9, 50e9
GPUS = (1, 8, 64)
LAYOUTS = {"ddp": "DDP", "fsdp": "FSDP2"}
NAMES = {"dit": "SparseDiT", "vae": "SparseVAE"}
# Of a parameter: what a layout keeps between steps and FSDP2 spreads over the GPUs.
STATE_BYTES = 4 + 8 + 4


def wire_bytes(layout: str, gpus: int, parameters: int) -> float:
    """Bytes that each GPU sends in a step."""
    passes = {"ddp": 2 * 4, "fsdp": 2 + 2 + 4}[layout]
    return passes * (gpus - 1) / gpus * parameters


def wire_seconds(layout: str, gpus: int, parameters: int) -> float:
    """Seconds of a step's communication by itself."""
    return wire_bytes(layout, gpus, parameters) / (NVLINK if gpus <= GPUS_OF_A_HOST else INFINIBAND)


def local_seconds(one: dict[str, Any], two: dict[str, Any]) -> float:
    """Seconds of a step whose communication is hidden, from the rows of one and two GPUs."""
    return max(one["seconds"], two["seconds"] * (1 - two["communication"]))


def exposed_seconds(layout: str, gpus: int, parameters: int, one: dict[str, Any], two: dict[str, Any]) -> float:
    """Seconds of a step of which no communication is hidden, from the rows of one and two GPUs."""
    waiting = two["communication"] * two["seconds"]
    return local_seconds(one, two) + waiting + wire_seconds(layout, gpus, parameters)


def memory_gib(layout: str, gpus: int, parameters: int, two: dict[str, Any]) -> float:
    """Peak memory of a GPU, from the row of two."""
    spread = STATE_BYTES * parameters * (1 / 2 - 1 / gpus) if layout == "fsdp" else 0.0
    return two["peak_gib"] - spread / 2**30


def plan_table(report: Report) -> list[str]:
    """The plan by model, number of GPUs and layout, from a report of `scaling.py` with rows of one and two GPUs."""
    found = (row for row in report["rows"] if row["gpus"] <= 2 and "seconds" in row)
    measured = {(row["model"], row["layout"]): row for row in found}
    rows, checks = [], []
    for model, layout in ((model, layout) for model in NAMES for layout in LAYOUTS):
        one, two = measured.get((model, "one")), measured.get((model, layout))
        if one is None or two is None:
            continue
        parameters, samples = count_parameters(model), read_published(model)["batch_size"]
        for gpus in GPUS:
            seconds, gib = [one["seconds"]], one["peak_gib"]
            if gpus > 1:
                seconds = [local_seconds(one, two), exposed_seconds(layout, gpus, parameters, one, two)]
                gib = memory_gib(layout, gpus, parameters, two)
            cells = (
                " to ".join(figure(value, 3) for value in seconds),
                " to ".join(figure(gpus * samples / value, 1) for value in reversed(seconds)),
                " to ".join(figure(one["seconds"] / value) for value in reversed(seconds)),
                figure(gib, 1),
            )
            title = f"{LAYOUTS[layout]}, plan" if gpus > 1 else "measured"
            rows.append((NAMES[model], str(gpus), title, *cells))
        counted = wire_seconds(layout, 2, parameters), two["communication"] * two["seconds"]
        gib = memory_gib(layout, 1, parameters, two)
        memory = (figure(gib, 1), figure(one["peak_gib"], 1)) if layout == "fsdp" else ("-", "-")
        checks.append((NAMES[model], LAYOUTS[layout], *(figure(1000 * value, 1) for value in counted), *memory))
    # The row of one GPU is that of both layouts.
    rows = list(dict.fromkeys(rows))
    columns = ("model", "GPUs", "layout", "s a step", "samples/s", "efficiency", "GiB a GPU")
    millions = ", ".join(f"{figure(count_parameters(model) / 1e6, 1)} million of {NAMES[model]}" for model in NAMES)
    names = ("model", "layout", "2 GPUs, counted ms on the wire", "measured", "1 GPU, counted GiB", "measured GiB")
    return [
        *table(columns, rows),
        "",
        f"Parameters: {millions}. Assumed: {NVLINK / 1e9:.0f} GB/s that a GPU sends inside of a host of"
        f" {GPUS_OF_A_HOST}, {INFINIBAND / 1e9:.0f} GB/s between hosts. The count takes no account of the loader, of"
        " batches of unequal size and of the network's latency.",
        "",
        "How far the same count is from what was measured: communication of two GPUs, whose kernels also wait for the"
        " other GPU, and the memory of one GPU counted from that of two.",
        "",
        *table(names, checks),
    ]
