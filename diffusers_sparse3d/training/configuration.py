"""Configuration of training: dataclasses that are filled from a YAML file and from the command line."""

import argparse
import inspect
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..checks import check_packages
from ..command_parser import CommandParser
from .phases import read_phases


@dataclass
class TrainingConfig:
    """Settings that all training commands share.

    Attributes:
        data: Folder of the dataset, as `prepare_data.py` writes it.
        output_dir: Folder that receives the models, checkpoints, `metrics.jsonl`, TensorBoard logs and pictures.
        data_options: Arguments of fsspec's file system, where `data` and caches are addresses, such as
            endpoint_url. Leave credentials to the environment: the configuration is written to `output_dir`.
        data_cache_dir: Local folder that keeps what was read of addresses; if not given, it is read anew every time.
        data_cache_gb: Largest size of that folder in GB; what was used longest ago is deleted first.
        seed: Seed of the initial weights, the order of the samples and all noise.
        batch_size: Samples per process and forward pass. Batches of sparse samples have so many in the mean: they are
            packed so that all have about the same number of tokens.
        max_tokens: Largest number of tokens (latents) of a sparse model in a batch, per process and forward pass.
            Where needed, batches have fewer samples than `batch_size`. A sample with more is an error.
        gradient_accumulation_steps: Forward passes per optimizer step; what the launcher says if not given.
        max_train_steps: Number of optimizer steps. This, `max_train_minutes` or `phases` must be given; training ends
            at the limit that is reached first.
        max_train_minutes: Wall-clock minutes in the training loop, including those of the runs that a resumed
            training continues.
        phases: Phases of the training of a sparse model, one after the other: a list of mappings, each with `steps`
            (optimizer steps), `resolutions` (a list; each is used for whole batches, every sample once at each) and,
            where they are not those of the whole configuration, `batch_size` and `max_tokens` (a number, or a mapping
            from each resolution to a number) and `learning_rate`. Training ends with the last phase.
        optimizer: "adamw", "adamw_8bit", whose moments have 8 bits (bitsandbytes), or "muon", which trains the
            matrices of repeated blocks with Muon (orthogonalised updates) and all other parameters with AdamW.
        learning_rate: Peak learning rate of AdamW.
        muon_learning_rate: Peak learning rate of Muon, in the units of AdamW's; `learning_rate` if not given.
        lr_scheduler: "constant", or "cosine", which falls to `lr_min_ratio` of the peak at the end of training. It
            follows the share of steps or of minutes that has passed, whichever is larger.
        lr_warmup_steps: Optimizer steps over which the learning rate rises linearly from zero.
        lr_min_ratio: Last learning rate of the cosine, as a share of the peak.
        adam_beta1: Decay rate of AdamW's first moment.
        adam_beta2: Decay rate of AdamW's second moment.
        adam_epsilon: Constant in the denominator of AdamW's update.
        weight_decay: Decoupled weight decay of both optimizers.
        max_grad_norm: Gradients are scaled down to this norm if theirs is larger.
        mixed_precision: "no", "bf16" or "fp16"; what the launcher says if not given.
        ema_decay: Decay of the exponential moving average of the weights, which is what is saved; 0 turns averaging
            off.
        more_ema_decays: Decays of further averages; the models that they make are saved in OUTPUT_DIR/averages/DECAY.
        gradient_checkpointing: Whether activations are computed again in the backward pass, to save memory.
        checkpointing_keeps_attention: Whether `gradient_checkpointing` of a sparse model keeps the results of
            attention, which is faster and takes more memory.
        logging_steps: Optimizer steps between two entries of `metrics.jsonl` and TensorBoard.
        validation_steps: Optimizer steps between validations (losses and pictures); if not given, there is one
            validation, at the end.
        num_validation_samples: Samples of the validation split that validation losses are averaged over; more than
            there are means some with several noise levels and views.
        num_pictures: Samples in a picture.
        checkpointing_steps: Optimizer steps between checkpoints; if not given, there is one, at the end.
        checkpoints_total_limit: Number of checkpoints that are kept; older ones are deleted. All are kept if null.
        resume_from_checkpoint: Folder of a checkpoint to continue from, or "latest" for the last one in `output_dir`,
            if there is one. A folder with the results of a training is refused without it.
        process_timeout_minutes: Minutes that processes wait for each other before training ends with an error.
        num_workers: Data-loading processes per training process.
        profile_steps: Number of steps, after the first 20 of a run, whose time by parts and kernels is written to
            OUTPUT_DIR/profile.txt, with a trace for chrome://tracing in profile.json.
        cpu: Whether to train on the CPU even if there is a GPU.
    """

    data: str
    output_dir: str
    data_options: dict[str, Any] = field(default_factory=dict)
    data_cache_dir: str | None = None
    data_cache_gb: float = 100.0
    seed: int = 0
    batch_size: int = 8
    max_tokens: int | None = None
    gradient_accumulation_steps: int | None = None
    max_train_steps: int | None = None
    max_train_minutes: float | None = None
    phases: list[dict[str, Any]] = field(default_factory=list)
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
    mixed_precision: str | None = None
    ema_decay: float = 0.999
    more_ema_decays: list[float] = field(default_factory=list)
    gradient_checkpointing: bool = False
    checkpointing_keeps_attention: bool = False
    logging_steps: int = 10
    validation_steps: int | None = None
    num_validation_samples: int = 32
    num_pictures: int = 4
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None
    process_timeout_minutes: float = 120.0
    num_workers: int = 4
    profile_steps: int = 0
    cpu: bool = False

    def __post_init__(self) -> None:
        if self.phases:
            steps = sum(phase.steps or 0 for phase in read_phases(self, []))
            if self.max_train_steps is not None and self.max_train_steps > steps:
                raise ValueError(
                    f"`max_train_steps` must be at most {steps}, those of `phases`, got {self.max_train_steps}"
                )
            self.max_train_steps = self.max_train_steps or steps
        if self.max_train_steps is None and self.max_train_minutes is None:
            raise ValueError("`max_train_steps`, `max_train_minutes` or `phases` must be given")
        check_choice("optimizer", self.optimizer, ("adamw", "adamw_8bit", "muon"))
        check_choice("lr_scheduler", self.lr_scheduler, ("constant", "cosine"))
        check_choice("mixed_precision", self.mixed_precision, (None, "no", "bf16", "fp16"))
        names = (
            "batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "num_validation_samples",
            "num_pictures",
        )
        for name in (*names, "validation_steps", "checkpointing_steps", "checkpoints_total_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if self.checkpointing_keeps_attention and not self.gradient_checkpointing:
            raise ValueError("`checkpointing_keeps_attention` needs `gradient_checkpointing`")
        if self.profile_steps < 0:
            raise ValueError(f"`profile_steps` must not be negative, got {self.profile_steps}")
        for decay in (self.ema_decay, *self.more_ema_decays):
            if not 0 <= decay < 1:
                raise ValueError(f"`ema_decay` and `more_ema_decays` must be in [0, 1), got {decay}")
        for name in ("process_timeout_minutes", "data_cache_gb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}")


@dataclass
class VAETrainingConfig(TrainingConfig):
    """Settings that the training of both VAEs shares.

    Attributes:
        model: Arguments of the model's class; with `pretrained`, those that are to be others.
        pretrained: Folder of a model to start from, instead of new weights.
        train_encoder: Whether the encoder is trained. Without it, latents and their normalisation stay those of
            `pretrained`: the decoder gets better, and transformers trained on the latents stay valid.
        kl_weight: Weight of the Kullback-Leibler divergence in the loss.
        latents_dir: Folder in which the latents of the training split are cached for the training of the transformer;
            OUTPUT_DIR/latents if not given.
        encode_batch_size: Samples per forward pass when the dataset is encoded at the end.
    """

    model: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    train_encoder: bool = True
    kl_weight: float = 1e-3
    latents_dir: str | None = None
    encode_batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train_encoder and self.pretrained is None:
            raise ValueError(
                "`train_encoder` must be true without `pretrained`: the encoder of a new VAE knows nothing"
            )


Config = TypeVar("Config", bound=TrainingConfig)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises a ValueError that names the argument unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}")


def check_optimizer_support(optimizer: str) -> None:
    """Raises an ImportError that says what to install if the package of an optimizer is missing."""
    if optimizer == "adamw_8bit":
        check_packages("`optimizer` 'adamw_8bit'", "bitsandbytes")


def check_training_support(optimizer: str) -> None:
    """Raises an ImportError that says what to install unless a training has what it takes, to its last step.

    Its logs are TensorBoard's, and when all steps are done matplotlib draws the curve of the loss.
    """
    check_packages("training", "tensorboard", "matplotlib")
    check_optimizer_support(optimizer)


@contextmanager
def loading(name: str, value: str) -> Iterator[None]:
    """Says in an error which setting the folder or the name on the Hub belongs to that could not be loaded.

    Raises:
        OSError: in the place of any that the block raises.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"`{name}` cannot be loaded from {value!r}: {error}") from error


def check_model_config(model_class: type, config: dict[str, Any], name: str = "model") -> None:
    """Raises a ValueError if `config` has a key that is not an argument of `model_class`."""
    known = set(inspect.signature(model_class).parameters)
    if unknown := sorted(set(config) - known):
        raise ValueError(
            f"`{name}` must have keys that {model_class.__name__} takes, {sorted(known)}, got the unknown {unknown}"
        )


def type_name(annotation: Any) -> str:
    """The annotated type of a field as it is written in Python: "int", "str | None", "list[int]"."""
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


def _convert(name: str, annotation: Any, value: Any) -> Any:
    """Returns a value read from YAML as the annotated type of a field.

    YAML reads `1e-4` as a string and the word `no` as False: both are converted.
    """
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
    raise ValueError(f"`{name}` must be {type_name(annotation)}, got {value!r}")


def build_config(config_class: type[Config], values: dict[str, Any]) -> Config:
    """Makes a configuration from values of fields, checking their names and types.

    Raises:
        ValueError: if a key is unknown or missing, or a value has the wrong type.
    """
    annotations = typing.get_type_hints(config_class)
    if unknown := sorted(set(values) - set(annotations)):
        raise ValueError(
            f"The configuration must have keys of {sorted(annotations)}, got the unknown {unknown}."
            " docs/training_configuration.md describes each"
        )
    if missing := [name for name in ("data", "output_dir") if name not in values]:
        raise ValueError(f"The configuration must have {missing}, got {sorted(values)}")
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
    """Reads a configuration from a YAML file and replaces some of its values.

    Args:
        config_class: Dataclass to fill.
        path: YAML file or the name of a shipped configuration, see `find_config`; None to use the overrides alone.
        overrides: Texts "key=value", with dots for nested keys ("model.num_layers=4"); values are written in YAML.

    Raises:
        ValueError: if there is no such file, it does not hold a mapping, an override has no "=", or the values do not
            fit, see `build_config`.
    """
    values = yaml.safe_load(find_config(path).read_text(encoding="utf-8")) if path is not None else {}
    if not isinstance(values, dict):
        raise ValueError(f"`config` {path} must hold a mapping of names to values, got {type(values).__name__}")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"`override` must have the form key=value, got {override!r}")
        *parents, name = key.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(
                    f"`override` must name nested keys of mappings, got {override!r}, where {parent} is none"
                )
        target[name] = yaml.safe_load(value)
    return build_config(config_class, values)


def parse_config(
    config_class: type[Config],
    description: str | None,
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
) -> Config:
    """Reads a configuration from the command line: `--config`, `--override` and options for the most used keys.

    Args:
        config_class: Dataclass to fill.
        description: Text that `--help` shows.
        arguments: Arguments of the command; those of the process if None.
        prog: Name of the command in its help and messages.

    Raises:
        ImportError: if a package is missing that the training needs, some of them when it is done.
    """
    parser = CommandParser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file, or the name of a shipped configuration: small/dit_dense")
    parser.add_argument(
        "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="replaces values of the file; dots for nested keys: model.num_layers=4",
    )  # fmt: skip
    shortcuts = ("data", "output_dir", "max_train_steps", "max_train_minutes", "resume_from_checkpoint", "seed")
    for name in shortcuts:
        parser.add_argument(f"--{name}", help=f"the same as --override {name}=...")
    args = parser.parse_args(arguments)
    overrides = args.override + [
        f"{name}={getattr(args, name)}" for name in shortcuts if getattr(args, name) is not None
    ]
    try:
        config = load_config(config_class, args.config, overrides)
    except ValueError as error:
        parser.error(str(error))
    check_training_support(config.optimizer)
    return config
