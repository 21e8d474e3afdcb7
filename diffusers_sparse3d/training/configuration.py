"""Configuration of the training scripts: dataclasses, filled from a YAML file and from the command line."""

import argparse
import inspect
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml


@dataclass
class TrainingConfig:
    """What all training scripts have in common.

    Attributes:
        data: folder written by `prepare_data.py`.
        output_dir: receives the models, checkpoints, `metrics.jsonl`, TensorBoard logs and pictures.
        seed: of the initial weights, the order of the samples and all noise.
        batch_size: samples per process and forward pass.
        gradient_accumulation_steps: forward passes per optimizer step.
        max_train_steps: optimizer steps. This or `max_train_minutes` is needed; the first to be reached counts.
        max_train_minutes: wall-clock time of the training loop, what earlier runs of a resumed training took included.
        optimizer: "adamw", or "muon": Muon, which orthogonalises the updates, for the matrices of repeated blocks, and
            AdamW for everything else.
        learning_rate: peak of the schedule.
        muon_learning_rate: the same for Muon, in units of AdamW's; `learning_rate` if not given.
        lr_scheduler: "constant" or "cosine". The cosine falls to `lr_min_ratio` of the peak at the end of training: it
            follows the share of steps or of time, whichever is further.
        lr_warmup_steps: steps of linear warmup.
        lr_min_ratio: see `lr_scheduler`.
        adam_beta1, adam_beta2, adam_epsilon, weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        mixed_precision: "no", "bf16" or "fp16".
        ema_decay: of the averaged weights, which are what is saved; 0 turns averaging off.
        gradient_checkpointing: recompute activations in the backward pass.
        logging_steps: steps between entries of `metrics.jsonl` and TensorBoard.
        validation_steps: steps between validation losses and pictures; None for the end only.
        num_validation_batches: batches of the validation split that a validation loss is computed on.
        num_pictures: samples in a picture.
        checkpointing_steps: steps between checkpoints; None for the end only.
        checkpoints_total_limit: the oldest checkpoints beyond this number are deleted.
        resume_from_checkpoint: folder of a checkpoint, or "latest": the last one in `output_dir`, if there is one.
        num_workers: data loading processes per training process.
        cpu: train on the CPU even if there is a GPU.
    """

    data: str
    output_dir: str
    seed: int = 0
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_train_steps: int | None = None
    max_train_minutes: float | None = None
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    muon_learning_rate: float | None = None
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    lr_min_ratio: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    ema_decay: float = 0.999
    gradient_checkpointing: bool = False
    logging_steps: int = 10
    validation_steps: int | None = None
    num_validation_batches: int = 4
    num_pictures: int = 4
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None
    num_workers: int = 4
    cpu: bool = False

    def __post_init__(self) -> None:
        if self.max_train_steps is None and self.max_train_minutes is None:
            raise ValueError("Set `max_train_steps` or `max_train_minutes`")
        check_choice("optimizer", self.optimizer, ("adamw", "muon"))
        check_choice("lr_scheduler", self.lr_scheduler, ("constant", "cosine"))
        check_choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        for name in ("batch_size", "gradient_accumulation_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, not {getattr(self, name)}")


@dataclass
class VAETrainingConfig(TrainingConfig):
    """What both VAE scripts have in common.

    Attributes:
        model: configuration of the model.
        pretrained: folder of a model to start from, instead of new weights.
        kl_weight: weight of the Kullback-Leibler divergence.
        latents_dir: where the latents of the data are cached for `train_dit.py`; OUTPUT_DIR/latents if not given.
        encode_batch_size: samples per forward pass when the data are encoded at the end.
    """

    model: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    kl_weight: float = 1e-3
    latents_dir: str | None = None
    encode_batch_size: int = 16


Config = TypeVar("Config", bound=TrainingConfig)


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raises a ValueError that names the argument unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, not {value!r}")


def check_model_config(model_class: type, config: dict[str, Any], name: str = "model") -> None:
    """Raises a ValueError if `config` has a key that `model_class` does not take."""
    known = set(inspect.signature(model_class.__init__).parameters) - {"self"}
    if unknown := sorted(set(config) - known):
        raise ValueError(f"`{name}` has unknown keys {unknown}; {model_class.__name__} takes {sorted(known)}")


def _convert(name: str, annotation: Any, value: Any) -> Any:
    """`value` as the annotated type. (YAML reads 1e-4 as a string, and the word no as False.)"""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None and type(None) in options:
        return None
    expected = typing.get_origin(options[0]) or options[0]
    if expected is str and value is False:
        return "no"
    if expected is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, expected) and not (expected is int and isinstance(value, bool)):
        return value
    raise ValueError(f"`{name}` must be {annotation}, not {value!r}")


def build_config(config_class: type[Config], values: dict[str, Any]) -> Config:
    """Checks names and types of `values`.

    Raises:
        ValueError: for unknown and missing keys, and values of a wrong type.
    """
    annotations = typing.get_type_hints(config_class)
    if unknown := sorted(set(values) - set(annotations)):
        raise ValueError(f"Unknown configuration keys {unknown}; known are {sorted(annotations)}")
    if missing := [name for name in ("data", "output_dir") if name not in values]:
        raise ValueError(f"The configuration lacks {missing}")
    return config_class(**{name: _convert(name, annotations[name], value) for name, value in values.items()})


def shipped_configs() -> Path:
    """The folder of the configurations that come with the package.

    An installed wheel has it inside of the package; in a checkout it is `training/configs`, the one copy in git.
    """
    packaged = Path(__file__).with_name("configs")
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "training" / "configs"


def find_config(path: str | Path) -> Path:
    """The configuration file at `path`, or else the shipped one of that name.

    Args:
        path: a file, or the name of a shipped configuration: "small/dit_dense", with or without ".yaml", with or
            without the folder "training/configs" that it has in a checkout.

    Raises:
        ValueError: if there is neither.
    """
    path = Path(path)
    if path.is_file():
        return path
    folder = shipped_configs()
    names = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.glob("*/*.yaml"))
    name = path.with_suffix("").as_posix().removeprefix("training/configs/")
    if name not in names:
        raise ValueError(f"`config` must be a file or one of {names}, got {str(path)!r}")
    return folder / f"{name}.yaml"


def load_config(config_class: type[Config], path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file.

    Args:
        config_class: dataclass to fill.
        path: YAML file or the name of a shipped configuration, see `find_config`; None for overrides alone.
        overrides: "key=value", with dots for nested keys ("model.num_layers=4"); values are YAML.

    Raises:
        ValueError: see `build_config`; also for overrides without "=".
    """
    values = yaml.safe_load(find_config(path).read_text(encoding="utf-8")) if path is not None else {}
    if not isinstance(values, dict):
        raise ValueError(f"`config` {path} must hold a mapping of names to values")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"`override` {override!r} must have the form key=value")
        *parents, name = key.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"`override` {override!r}: {parent!r} holds no further keys")
        target[name] = yaml.safe_load(value)
    return build_config(config_class, values)


def parse_config(
    config_class: type[Config],
    description: str | None,
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
) -> Config:
    """The configuration from the command line: `--config FILE`, `--override key=value ...`, and the usual options."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file, or the name of a shipped configuration: small/dit_dense")
    parser.add_argument(
        "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="replaces values of the file; dots for nested keys: model.num_layers=4",
    )  # fmt: skip
    shortcuts = ("data", "output_dir", "max_train_steps", "max_train_minutes", "resume_from_checkpoint", "seed")
    documented = {known.name for known in fields(config_class)}
    for name in shortcuts:
        if name in documented:
            parser.add_argument(f"--{name}", help=f"the same as --override {name}=...")
    args = parser.parse_args(arguments)
    overrides = args.override + [
        f"{name}={getattr(args, name)}" for name in shortcuts if getattr(args, name) is not None
    ]
    try:
        return load_config(config_class, args.config, overrides)
    except ValueError as error:
        parser.error(str(error))
