"""Parity of the refiners with the published modules, on patches of full size: `python -m tests.models.golden_refiner`.

One to two minutes for a patch on two cores, and up to 13 GB of memory: too much for every run of the tests. `--extent`
leaves away the positions beyond a coordinate, and with them the patches that only they need: 320 (refiner) and 512
(refiner_sign) leave 8 of the 27. Measured so, on a CPU in float32: refiner, 1,495 positions, relative error 3e-5,
largest error 5e-5; refiner_sign, 744 positions, every sign the same.
"""

import argparse

import torch
import torch.nn.functional as F

from diffusers_sparse3d.loaders.original_names import convert_state_dict
from diffusers_sparse3d.models.refiner_sdf import SDFRefiner, SDFSignRefiner
from tests.golden import load_golden, relative_error


# Model, resolution, radius and half-thickness of the spherical shell of the input.
CASES = {"refiner": (SDFRefiner, 512, 120, 4), "refiner_sign": (SDFSignRefiner, 1024, 240, 3)}


def load_model(case: str, with_weights: bool = True) -> SDFRefiner | SDFSignRefiner:
    """The model of a golden case."""
    golden = load_golden(case, with_weights)
    model_class = CASES[case][0]
    model = model_class(
        layers_per_block=golden.config["layers_per_block"],
        mid_layers=golden.config["layers_mid_block"],
        sample_size=golden.config["res"],
        patch_size=golden.config["patch_size"],
    )
    if with_weights:
        model.load_state_dict(convert_state_dict(model_class.__name__, golden.state_dict))
    return model.eval()


def shell_coords(resolution: int, radius: float, half_thickness: float) -> torch.Tensor:
    """Voxels `[N, 3]` of a spherical shell around the middle of the grid."""
    axis = torch.arange(resolution) - (resolution - 1) / 2
    layers = []
    for i in range(resolution):
        distance = (axis[i] ** 2 + axis[:, None] ** 2 + axis**2).sqrt() - radius
        layer = (distance.abs() < half_thickness).nonzero()
        layers.append(F.pad(layer, (1, 0), value=i))
    return torch.cat(layers)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=list(CASES), default="refiner")
    parser.add_argument(
        "--extent", type=int, help="exclusive upper bound of the positions to compare; all if not given"
    )
    parser.add_argument("--patch-batch-size", type=int, default=1)
    arguments = parser.parse_args()

    _, resolution, radius, half_thickness = CASES[arguments.case]
    tensors = load_golden(arguments.case, with_weights=False).tensors
    model = load_model(arguments.case)
    voxels = shell_coords(resolution, radius, half_thickness)
    inputs = [(((voxels - (resolution - 1) / 2).norm(dim=1) - radius) / 4)[:, None], F.pad(voxels, (1, 0)).int()]
    if arguments.case == "refiner":
        inputs.append(torch.sin((0.05 * voxels) @ tensors["w"]))
    positions, expected = tensors["positions"].int(), tensors["values"]
    if arguments.extent is not None:
        near = (positions < arguments.extent).all(dim=1)
        positions, expected = positions[near], expected[near]
    unique, inverse = positions.unique(dim=0, return_inverse=True)

    output = model.refine(
        *inputs,
        resolution=resolution,
        patch_batch_size=arguments.patch_batch_size,
        output_coords=F.pad(unique, (1, 0)),
        show_progress=True,
    )
    actual = output.sample[inverse, 0]
    in_band = ((positions - (resolution - 1) / 2).norm(dim=1) - radius).abs() < half_thickness
    for name, rows in (("in the band", in_band), ("elsewhere", ~in_band)):
        if not rows.any():
            continue
        print(
            f"{arguments.case}, {int(rows.sum())} positions {name}:"
            f" relative error {relative_error(actual[rows], expected[rows]):.1e},"
            f" largest error {(actual - expected)[rows].abs().max():.1e},"
            f" same sign {(actual.sign() == expected.sign())[rows].float().mean():.2%}"
        )


if __name__ == "__main__":
    main()
