"""All commands and their arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..command_parser import CommandParser, integer, number
from ..version import __version__


CLEAN_UP_OPTIONS = {
    "remove_inner_parts": "remove parts of the surface inside of another",
    "remove_floaters": "remove parts smaller than 5 %% of the whole; `generate` does as the model says by default",
    "fill_holes": "close what the surface leaves open",
    "num_faces": "simplify to this many triangles",
}
DTYPES = ("float32", "float16", "bfloat16")
MESH_FORMATS = ("glb", "obj", "stl", "ply", "3mf")
MAX_RESOLUTION = 2048
# Commands of the scripts in `training/` and `conversion/`: a module of this package, whose `main` parses the arguments
# after the command and runs it, and a line of help.
LIBRARY_COMMANDS = {
    ("prepare",): ("training.preparation.command", "meshes to a training dataset"),
    ("train", "dense-vae"): ("training.dense_vae", "the VAE of the dense stage"),
    ("train", "sparse-vae"): ("training.sparse_vae", "the VAE of the sparse stage"),
    ("train", "dit"): ("training.dit", "the diffusion transformer of either stage"),
    ("train", "refiner"): ("training.refiner", "a refiner of decoded distances or signs"),
    ("train", "lora"): ("training.lora", "LoRA, or all weights, of a pipeline on a folder of meshes"),
    ("evaluate",): ("training.evaluation.command", "metrics of reconstructions or generated meshes on a dataset"),
    ("assemble",): ("training.assembly", "trained parts to a pipeline"),
    ("convert",): ("loaders.convert", "a published checkpoint to a pipeline"),
}


def seed_list(text: str) -> list[int]:
    """A `type` of arguments: seeds and spans of them with commas between, "0-3,7"."""
    parse = integer(0, 2**63 - 1)
    seeds: list[int] = []
    for part in text.split(","):
        first, separator, last = part.partition("-")
        low = parse(first)
        high = parse(last) if separator else low
        if not low <= high < low + 10_000:
            raise argparse.ArgumentTypeError(f"must be seeds like 0,1,2 or 0-3, got {text!r}")
        seeds += range(low, high + 1)
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"must not name a seed twice, got {text!r}")
    return seeds


def make_parser() -> CommandParser:
    """The parser of all commands; of those in `LIBRARY_COMMANDS` it knows the names alone."""
    parser = CommandParser(prog="diffusers-sparse3d", description="Sparse-volume 3D generation.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="let errors through with their traceback; in any place")
    commands = parser.add_subparsers(dest="command", required=True)

    model = CommandParser(add_help=False)
    model.add_argument("--model", help="folder or hub id of a pipeline; by default the repository's small one")
    device = CommandParser(add_help=False)
    device.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    loading = CommandParser(add_help=False)
    loading.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; default: %(default)s")
    loading.add_argument("--low-memory", action="store_true", help="offload models and work in tiles, slower")
    loading.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="LoRA weights of a file, a folder or a name on the Hub, and how much of them, 1 by default; several times"
        " for several",
    )
    loading.add_argument(
        "--background-remover",
        default="u2netp",
        metavar="NETWORK",
        help="network of rembg for photos without alpha or plain background; default: %(default)s",
    )

    _add_generate(commands, [model, device, loading, _mesh_options()])
    _add_latents(commands, [model, device], _mesh_options())

    _add_app(commands, [model, device, loading])

    command = commands.add_parser("view", help="turn a mesh in the browser")
    command.set_defaults(module="view", function="view")
    command.add_argument("mesh", type=Path, help="any mesh that trimesh loads")
    command.add_argument("-o", "--output", type=Path, help="page to write; by default one in a temporary folder")
    command.add_argument("--no-browser", action="store_true", help="write the page without opening it")

    command = commands.add_parser("print", help="a mesh for 3D printing, with a report")
    command.set_defaults(module="printing", function="print_mesh")
    command.add_argument("mesh", type=Path, help="any mesh that trimesh loads, y up")
    command.add_argument("-o", "--output", type=Path, help="file to write, .3mf or .stl; without it the report alone")
    command.add_argument("--size", type=number(0.001), default=100.0, help="longest side in mm; default: %(default)s")
    command.add_argument("--min-wall", type=number(0), default=0.8, help="in mm; default: %(default)s")

    command = commands.add_parser("info", parents=[model], help="versions, and a model's parts, sizes and licence")
    command.set_defaults(module="information", function="info")

    command = commands.add_parser("tune", parents=[model], help="make SSA faster on this GPU")
    command.set_defaults(module="information", function="tune")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the model; default: %(default)s")
    command.add_argument("--budget", type=number(0), default=20.0, help="seconds; default: %(default)s")

    train = commands.add_parser("train", help="train a model on a dataset").add_subparsers(dest="model", required=True)
    for words, (_, text) in LIBRARY_COMMANDS.items():
        (train if words[0] == "train" else commands).add_parser(words[-1], help=text, add_help=False)
    return parser


def _mesh_options() -> CommandParser:
    """Options of commands that write meshes."""
    options = CommandParser(add_help=False)
    options.add_argument(
        "--up-axis", choices=["y", "z"], default="y", help="of the file; z suits printing; default: %(default)s"
    )
    group = options.add_argument_group("clean-up of the mesh (needs the extra `mesh`)")
    for name, text in CLEAN_UP_OPTIONS.items():
        kind: dict[str, Any] = {"type": integer(4)} if name == "num_faces" else {"action": "store_true"}
        if name == "remove_floaters":
            kind = {"action": argparse.BooleanOptionalAction}
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **kind)
    return options


def _add_generate(commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("generate", parents=parents, help="pictures to meshes")
    command.set_defaults(module="generate", function="generate")
    command.add_argument("image", type=Path, nargs="+", help="picture of an object, or a folder of pictures; several")
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help=f"mesh to write: {', '.join(f'.{suffix}' for suffix in MESH_FORMATS)}; or a folder. With several results"
        " it holds {name}, which stands for the picture's name and the seed",
    )
    command.add_argument("--format", choices=MESH_FORMATS, default="glb", help="in a folder; default: %(default)s")
    command.add_argument("--preview", type=Path, help="picture to write: the image and the mesh from four sides")
    command.add_argument("--turntable", type=Path, help="animation to write: .gif, .webp or .mp4")
    seeds = command.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=integer(0, 2**63 - 1), default=0, help="default: %(default)s")
    seeds.add_argument("--seeds", type=seed_list, help="a mesh for each of several seeds: 0,1,2 or 0-3")
    command.add_argument(
        "--select", choices=["best"], help="of several seeds the mesh that fits the picture best, in place of all"
    )
    object_ = command.add_mutually_exclusive_group()
    object_.add_argument("--mask", type=Path, help="mask of the object, white on the object, for one picture")
    object_.add_argument("--keep-background", action="store_true", help="take the whole picture for the object")
    command.add_argument("--one-object", action="store_true", help="all pictures show the same object")
    command.add_argument(
        "--resolution",
        type=integer(2, MAX_RESOLUTION),
        help="samples per axis: of one of the model's sparse stages; by default of the last",
    )
    steps, scale = integer(1), number()
    command.add_argument("--steps", type=steps, help="denoising steps of the sparse stage")
    command.add_argument("--steps-1024", type=steps, help="denoising steps of the second sparse stage")
    command.add_argument("--dense-steps", type=steps, help="denoising steps of the dense stage")
    command.add_argument("--guidance-scale", type=scale, help="guidance scale of the sparse stage")
    command.add_argument("--guidance-scale-1024", type=scale, help="guidance scale of the second sparse stage")
    command.add_argument("--dense-guidance-scale", type=scale, help="guidance scale of the dense stage")
    command.add_argument("--level", type=number(0, 0.2), help="iso-level of the surface, from 0 to 0.2")
    command.add_argument(
        "--max-opening",
        type=number(0, 0.5),
        metavar="W",
        help="make solid what the surface encloses but for openings up to this width (the cube is 2 wide); 0: nothing",
    )


def _add_app(commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("app", parents=parents, help="photo to mesh in the browser (needs the extra `app`)")
    command.set_defaults(module="app", function="app")
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, 0.0.0.0 for all; default: %(default)s"
    )
    command.add_argument("--port", type=integer(1, 65535), help="default: the first free one from 7860")
    command.add_argument("--open", action="store_true", help="open the page in the browser")
    command.add_argument(
        "--max-upload", type=integer(1), default=20, metavar="MB", help="of a picture; default: %(default)s"
    )
    command.add_argument(
        "--max-waiting", type=integer(1), default=16, metavar="N", help="requests in the queue; default: %(default)s"
    )
    command.add_argument(
        "--time-limit", type=number(1), default=1800, metavar="S", help="of a generation; default: %(default)s"
    )


def _add_latents(
    commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser], mesh: argparse.ArgumentParser
) -> None:
    command = commands.add_parser("encode", parents=parents, help="mesh to sparse latents")
    command.set_defaults(module="latents", function="encode")
    command.add_argument("mesh", type=Path, help="any mesh that trimesh loads")
    command.add_argument("-o", "--output", type=Path, required=True, help="safetensors file to write")
    command.add_argument(
        "--resolution", type=integer(2, MAX_RESOLUTION), help="samples per axis; by default what the model is made for"
    )

    command = commands.add_parser("decode", parents=[*parents, mesh], help="sparse latents to mesh")
    command.set_defaults(module="latents", function="decode")
    command.add_argument("latents", type=Path, help="file written by `encode`")
    command.add_argument("-o", "--output", type=Path, required=True, help="mesh to write, as of `generate`")
    command.add_argument(
        "--level",
        type=number(0, 0.2),
        default=0.0,
        help="iso-level, from 0 to 0.2; default: %(default)s",
    )
    command.add_argument("--normalized", action="store_true", help="leave the mesh in the cube [-1, 1]^3")
