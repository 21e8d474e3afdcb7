"""
Seconds until a new process has trained its first step, and those of a further step, with a small transformer.

    python benchmarks/first_step.py --json benchmarks/results/first_step.json

The model, precision and optimizer are those of `training/configs/small/dit_sparse.yaml`; the data are cells of a
torus, each sample with another number of them, so that no step has the shapes of another. Processes run one after the
other: with an empty cache of triton's kernels and with the one that the process before has filled; and each of both as
shipped, where kernels are compiled ahead, many at a time, and with `DIFFUSERS_SPARSE3D_RUNTIME=no-compile-ahead`,
where a step waits for each. The last one repeats no recorded calls (`no-recording`). A step is the median of those
after the first ten.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from new_process import add_worker_option, seconds_of
from result_files import describe_run, parse_arguments, write_report


CONFIG = Path(__file__).parents[1] / "training/configs/small/dit_sparse.yaml"
# Name, settings of the runtime, and the state of triton's cache.
RUNS = (
    ("compiled ahead", "", "empty"),
    ("compiled ahead", "", "filled"),
    ("one by one", "no-compile-ahead", "empty"),
    ("one by one", "no-compile-ahead", "filled"),
    ("compiled ahead, nothing recorded", "no-recording", "filled"),
)
WARMUP_STEPS = 10
TINY = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "cross_attention_dim": 32}


def work(args: argparse.Namespace) -> None:
    """What a process does; prints its seconds as JSON."""
    start = time.perf_counter()
    import torch
    import yaml
    from transformers import Dinov2Config, Dinov2Model

    import scaling
    from diffusers_sparse3d import SparseDiT, SparseVAE
    from diffusers_sparse3d.training.balancing import make_schedule
    from diffusers_sparse3d.training.batches import pack
    from diffusers_sparse3d.training.configuration import build_config
    from diffusers_sparse3d.training.distributed import make_accelerator
    from diffusers_sparse3d.training.dit import DiTConfig, DiTTask
    from diffusers_sparse3d.training.phases import read_phases

    imported = time.perf_counter()
    values = yaml.safe_load(CONFIG.read_text())
    values["model"] |= {"sample_size": 128, **(TINY if args.tiny else {})}
    values |= {"data": "", "vae": "stands in", "image_encoder": "one layer", "face_camera": False, "num_workers": 2}
    values |= {"batch_size": args.batch_size, "max_train_steps": WARMUP_STEPS + args.steps, "max_train_minutes": None}
    values |= {"lr_warmup_steps": 0, "checkpointing_steps": 10**6, "logging_steps": 10**6}
    if args.device == "cpu":
        values |= {"cpu": True, "mixed_precision": "no"}
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(DiTConfig, {**values, "output_dir": folder})
        accelerator = make_accelerator(config)
        torch.manual_seed(0)
        width, channels = config.model["cross_attention_dim"], config.model["in_channels"]
        encoder = Dinov2Config(
            hidden_size=width, num_hidden_layers=1, num_attention_heads=width // 16, image_size=224, patch_size=14
        )
        vae = SparseVAE(**scaling.TINY["vae"], latent_channels=channels)
        task = DiTTask(SparseDiT(**config.model), Dinov2Model(encoder).requires_grad_(False), vae, config)
        data = scaling.Torus("dit", args.tokens, 0.7, 8 * config.batch_size, 224, channels)
        counts = (accelerator.num_processes, accelerator.gradient_accumulation_steps)
        names = [str(row) for row in range(len(data))]
        schedule = make_schedule(read_phases(config, [1024]), data.sizes, names, 0, *counts)
        trainer = scaling.TimedTrainer(config, accelerator, task, data, pack, schedule)
        trainer.train()
    ends = trainer.ends
    seconds = {"imports": imported - start, "first step": ends[0] - start}
    # The last one is profiled.
    later = [after - before for before, after in zip(ends[WARMUP_STEPS:-2], ends[WARMUP_STEPS + 1 : -1])]
    print(json.dumps({**seconds, "a further step": statistics.median(later)}))


def run(args: argparse.Namespace, cache: str, settings: str) -> dict[str, float]:
    """The seconds of a new process.

    Args:
        args: of the command.
        cache: folder of triton's cache.
        settings: of the runtime.
    """
    arguments = ["--device", args.device, *["--tiny"] * args.tiny]
    for name in ("batch_size", "tokens", "steps"):
        arguments += [f"--{name}", str(getattr(args, name))]
    return seconds_of(__file__, arguments, cache, settings)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=20, help="samples of a step; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=2600, help="of a sample, in the mean; default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="that are timed; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    add_worker_option(parser)
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.worker:
        work(args)
        return {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, settings, state in RUNS:
            # An empty cache for those with and without compilation ahead.
            cache = Path(folder, "one by one" if "no-compile-ahead" in settings else "ahead")
            rows.append({"kernels": name, "cache": state, **run(args, str(cache), settings)})
            print(json.dumps(rows[-1]), flush=True)
            write_report(args.json, report := {**describe_run(args), "rows": rows})
    return report


if __name__ == "__main__":
    main(parse_args())
