"""The command line `diffusers-sparse3d`: pipelines and VAEs on files, training and its tools, conversion.

Nothing heavy is imported here, so that the help appears at once: each command imports what it needs.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__


if TYPE_CHECKING:
    import trimesh


DEFAULT_MODEL = Path("checkpoints") / "direct3d-s2-small"
CLEAN_UP_OPTIONS = {
    "remove_inner_parts": "remove parts of the surface inside of another",
    "remove_floaters": "remove parts smaller than 5 %% of the whole",
    "fill_holes": "close what the surface leaves open",
    "num_faces": "simplify to this many triangles",
}
DTYPES = ("float32", "float16", "bfloat16")
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


def default_model() -> str:
    """Folder of the small pipeline in the checkout that this package is installed from.

    Raises:
        ValueError: if the package does not lie in a checkout with the model.
    """
    path = Path(__file__).resolve().parents[1] / DEFAULT_MODEL
    if not (path / "model_index.json").exists():
        raise ValueError(
            "`--model` must be a folder or a hub id. Without it, the small model of the repository is taken, which is"
            f" not at {path}; it comes with a checkout installed by `pip install -e`."
        )
    return str(path)


def default_device() -> str:
    """Name of the device that commands run on unless told otherwise: a GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _export(mesh: trimesh.Trimesh, path: Path, up_axis: str) -> None:
    from .geometry.mesh import export_mesh

    if len(mesh.faces) == 0:
        raise ValueError("the model gave no surface; try another `--seed` or `--level`")
    print(f"{export_mesh(mesh, path, up_axis)}: {len(mesh.vertices):,} vertices, {len(mesh.faces):,} triangles")


def _clean_up_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in CLEAN_UP_OPTIONS}


def generate(args: argparse.Namespace) -> None:
    """Generates a mesh from an image and writes it."""
    import torch
    from diffusers import DiffusionPipeline

    from . import Direct3DS2Pipeline  # noqa: F401  (registers the pipeline with diffusers)
    from .geometry.mesh import EXPORT_SUFFIXES
    from .models.compatibility import dtype_argument
    from .pipelines.image_processor import load_images

    # Checked before the work is done, not after it.
    if args.output.suffix.lower() not in EXPORT_SUFFIXES:
        raise ValueError(f"`--output` must end in one of {', '.join(EXPORT_SUFFIXES)}, got {str(args.output)!r}")
    (image,) = load_images(args.image)
    pipe = DiffusionPipeline.from_pretrained(
        args.model or default_model(), use_safetensors=True, **dtype_argument(getattr(torch, args.dtype))
    )
    pipe.to(args.device or default_device())
    mesh = pipe(
        image,
        mask_image=args.mask,
        resolution=args.resolution,
        dense_num_inference_steps=args.dense_steps,
        num_inference_steps=args.steps,
        num_inference_steps_1024=args.steps_1024,
        dense_guidance_scale=args.dense_guidance_scale,
        guidance_scale=args.guidance_scale,
        guidance_scale_1024=args.guidance_scale_1024,
        level=args.level,
        **_clean_up_options(args),
        generator=torch.Generator().manual_seed(args.seed),
    ).meshes[0]
    _export(mesh, args.output, args.up_axis)
    if args.preview is not None:
        from .geometry.render import preview

        args.preview.parent.mkdir(parents=True, exist_ok=True)
        preview(mesh, image).save(args.preview)
        print(args.preview)


def encode(args: argparse.Namespace) -> None:
    """Encodes a mesh and writes its sparse latents, with the place and scale that the mesh had."""
    import torch
    from safetensors.torch import save_file

    from . import SparseVAE
    from .geometry.mesh import load_mesh, normalize_mesh
    from .geometry.sdf import mesh_to_sparse_sdf

    device = args.device or default_device()
    vae = SparseVAE.from_pretrained(args.model or default_model(), subfolder="vae").to(device)
    resolution = args.resolution or vae.config.sample_size * vae.spatial_compression_ratio
    mesh, center, scale = normalize_mesh(load_mesh(args.mesh))
    sdf = mesh_to_sparse_sdf(mesh, resolution, normalize=False).to(device)
    with torch.no_grad():
        encoded = vae.encode(sdf.feats, sdf.coords)
    tensors = {
        "latents": encoded.latent_dist.mode().cpu().contiguous(),
        "coords": encoded.coords.cpu().contiguous(),
        "center": torch.from_numpy(center),
        "scale": torch.tensor([scale], dtype=torch.float64),
        "resolution": torch.tensor([resolution]),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.output)
    rows, channels = tensors["latents"].shape
    print(f"{args.output}: {len(sdf.coords):,} voxels at {resolution}^3 as {rows:,} latents of {channels} channels")


def decode(args: argparse.Namespace) -> None:
    """Decodes the file of [`encode`] and writes the mesh, in its place and scale unless `--normalized`."""
    import torch
    from safetensors.torch import load_file

    from . import SparseVAE
    from .geometry.clean_up import MeshCleanUp
    from .geometry.marching_cubes import sparse_sdf_to_mesh

    clean_up = MeshCleanUp(**_clean_up_options(args))
    tensors = load_file(args.latents)
    missing = {"latents", "coords", "resolution", "center", "scale"} - set(tensors)
    if missing:
        raise ValueError(f"`{args.latents}` was not written by `encode`: it has no {', '.join(sorted(missing))}")
    device = args.device or default_device()
    vae = SparseVAE.from_pretrained(args.model or default_model(), subfolder="vae").to(device)
    with torch.no_grad():
        decoded = vae.decode(tensors["latents"].to(device), tensors["coords"].to(device))
    mesh = sparse_sdf_to_mesh(decoded.sample, decoded.coords, int(tensors["resolution"]), args.level)
    if not args.normalized:
        mesh.vertices = mesh.vertices / float(tensors["scale"]) + tensors["center"].numpy()
    _export(clean_up(mesh), args.output, args.up_axis)


def info(args: argparse.Namespace) -> None:
    """Prints the installed versions, the device and the components of a model."""
    import torch
    from diffusers import DiffusionPipeline

    from . import Direct3DS2Pipeline  # noqa: F401  (registers the pipeline with diffusers)

    print(f"{'python':24}{platform.python_version()}")
    print(f"{'diffusers_sparse3d':24}{__version__}")
    for package in ("torch", "diffusers", "transformers", "accelerate", "trimesh", "triton"):
        try:
            print(f"{package:24}{version(package)}")
        except PackageNotFoundError:
            print(f"{package:24}not installed")
    device = default_device()
    print(f"{'device':24}{torch.cuda.get_device_name() if device == 'cuda' else device}")

    model = args.model or default_model()
    pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
    print(f"{'model':24}{model}\n{'resolution':24}{' or '.join(map(str, pipe.resolutions))}")
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            parameters = sum(parameter.numel() for parameter in component.parameters())
            print(f"{name:24}{type(component).__name__}, {parameters:,} parameters, {component.dtype}")
        elif component is not None:
            print(f"{name:24}{type(component).__name__}")
    for name, value in pipe.parameters.items():
        print(f"{name:40}{value}")


def tune(args: argparse.Namespace) -> None:
    """Measures which tile shapes of the attention kernels are fastest on this GPU, for the heads of a model."""
    import torch

    from . import SparseDiT, tune_spatial_sparse_attention

    config = SparseDiT.load_config(args.model or default_model(), subfolder="transformer")
    if config["attention_type"] != "ssa":
        raise ValueError(f"`attention_type` of the model must be 'ssa', got {config['attention_type']!r}")
    report = tune_spatial_sparse_attention(
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"] or config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        dtype=getattr(torch, args.dtype),
        **{name: config[name] for name in ("compression_block_size", "selection_block_size", "topk", "window_size")},
        budget=args.budget,
    )
    print(report)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; of those in `LIBRARY_COMMANDS` it knows the names alone."""
    parser = argparse.ArgumentParser(prog="diffusers-sparse3d", description="Sparse-volume 3D generation.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", help="folder or hub id of a pipeline; by default the repository's small one")
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", help="default: cuda where there is a GPU, else cpu")

    mesh = argparse.ArgumentParser(add_help=False)
    mesh.add_argument(
        "--up-axis", choices=["y", "z"], default="y", help="of the file; z suits printing; default: %(default)s"
    )
    group = mesh.add_argument_group("clean-up of the mesh (needs the extra `mesh`)")
    for name, text in CLEAN_UP_OPTIONS.items():
        kind = {"type": int} if name == "num_faces" else {"action": "store_true"}
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **kind)

    command = commands.add_parser("generate", parents=[model, device, mesh], help="image to mesh")
    command.set_defaults(function=generate)
    command.add_argument("image", type=Path, help="RGBA picture, or one with a plain background")
    command.add_argument("-o", "--output", type=Path, required=True, help="mesh to write: .glb, .obj, .stl or .ply")
    command.add_argument("--preview", type=Path, help="picture to write: the image and the mesh from four sides")
    command.add_argument("--mask", type=Path, help="mask of the object, white on the object")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument(
        "--resolution", type=int, help="samples per axis: of one of the model's sparse stages; by default of the last"
    )
    command.add_argument("--steps", type=int, help="denoising steps of the sparse stage")
    command.add_argument("--steps-1024", type=int, help="denoising steps of the second sparse stage")
    command.add_argument("--dense-steps", type=int, help="denoising steps of the dense stage")
    command.add_argument("--guidance-scale", type=float, help="guidance scale of the sparse stage")
    command.add_argument("--guidance-scale-1024", type=float, help="guidance scale of the second sparse stage")
    command.add_argument("--dense-guidance-scale", type=float, help="guidance scale of the dense stage")
    command.add_argument("--level", type=float, help="iso-level of the surface, from 0 to 0.2")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")

    command = commands.add_parser("encode", parents=[model, device], help="mesh to sparse latents")
    command.set_defaults(function=encode)
    command.add_argument("mesh", type=Path, help="any mesh that trimesh loads")
    command.add_argument("-o", "--output", type=Path, required=True, help="safetensors file to write")
    command.add_argument("--resolution", type=int, help="samples per axis; by default what the model is made for")

    command = commands.add_parser("decode", parents=[model, device, mesh], help="sparse latents to mesh")
    command.set_defaults(function=decode)
    command.add_argument("latents", type=Path, help="file written by `encode`")
    command.add_argument("-o", "--output", type=Path, required=True, help="mesh to write: .glb, .obj, .stl or .ply")
    command.add_argument("--level", type=float, default=0.0, help="iso-level of the surface; default: %(default)s")
    command.add_argument("--normalized", action="store_true", help="leave the mesh in the cube [-1, 1]^3")

    command = commands.add_parser("info", parents=[model], help="versions and the components of a model")
    command.set_defaults(function=info)

    command = commands.add_parser("tune", parents=[model], help="make SSA faster on this GPU")
    command.set_defaults(function=tune)
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the model; default: %(default)s")
    command.add_argument("--budget", type=float, default=20.0, help="seconds; default: %(default)s")

    train = commands.add_parser("train", help="train a model on a dataset").add_subparsers(dest="model", required=True)
    for words, (_, text) in LIBRARY_COMMANDS.items():
        (train if words[0] == "train" else commands).add_parser(words[-1], help=text, add_help=False)
    return parser


def run_library_command(words: tuple[str, ...], arguments: Sequence[str]) -> None:
    """Runs a command of `LIBRARY_COMMANDS` with the arguments after its words."""
    module = import_module(f".{LIBRARY_COMMANDS[words][0]}", __package__)
    module.main(arguments, prog=" ".join(("diffusers-sparse3d", *words)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status, 1 for bad input or a missing package, whose message goes to stderr."""
    argv = sys.argv[1:] if argv is None else list(argv)
    words = next((words for words in LIBRARY_COMMANDS if tuple(argv[: len(words)]) == words), None)
    try:
        if words is not None:
            run_library_command(words, argv[len(words) :])
        else:
            args = make_parser().parse_args(argv)
            args.function(args)
    except (ValueError, OSError, ImportError) as error:
        if argv[0] == "train":  # it may fail deep inside of torch: the traceback is needed
            raise
        print(f"diffusers-sparse3d {argv[0]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
