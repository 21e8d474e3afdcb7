"""Quick pictures of voxels for training logs, on PyTorch and PIL alone."""

import torch
from PIL import Image, ImageDraw
from torch import Tensor


# View -> the axis that points at the viewer, the axis that points right, and the axis that points up.
VIEWS = {"front": (2, 0, 1), "side": (0, 2, 1), "top": (1, 0, 2)}
LIGHT = (-0.4, 0.5, 0.77)
SURFACE_COLOR = (0.82, 0.86, 0.92)


def relief(
    coords: Tensor, resolution: int, depth: Tensor | None = None, view: str = "front", size: int = 192
) -> Tensor:
    """Draws voxels seen along an axis, shaded by the slope of the foremost ones.

    Args:
        coords: Integer coordinates of solid voxels, `[N, 3]`.
        resolution: Voxels per axis of the grid.
        depth: Distance of the surface in front of each voxel, `[N]`, in voxels; 0 if None.
        view: "front" (from +z), "side" (from +x) or "top" (from +y).
        size: Edge of the picture in pixels.

    Returns:
        `[3, size, size]` float32 in [0, 1] on the CPU, white where there is nothing.
    """
    towards, right, up = VIEWS[view]
    column = coords[:, right] if view != "side" else resolution - 1 - coords[:, right]
    row = resolution - 1 - coords[:, up] if view != "top" else coords[:, up]
    height = coords[:, towards].float() if depth is None else coords[:, towards] + depth.float()
    heights = torch.full((resolution * resolution,), -1.0, device=coords.device)
    heights = heights.scatter_reduce(0, row.long() * resolution + column.long(), height, "amax")
    heights = heights.view(1, 1, resolution, resolution)
    solid = (heights >= 0).float()

    # Slopes are taken between solid pixels alone, so that the silhouette is not shaded as a cliff.
    gradients = []
    for axis in (3, 2):
        difference = heights.roll(-1, axis) - heights.roll(1, axis)
        both = solid.roll(-1, axis) * solid.roll(1, axis)
        gradients.append(difference / 2 * both)
    slope_x, slope_down = (gradient.clamp(-4, 4) for gradient in gradients)
    normal = torch.cat([-slope_x, slope_down, torch.ones_like(slope_x)], dim=1)
    light = torch.tensor(LIGHT, device=coords.device).view(1, 3, 1, 1)
    shade = 0.35 + 0.65 * (normal * light).sum(1, keepdim=True).div(normal.norm(dim=1, keepdim=True)).clamp(0, 1)
    # Surfaces further back are a little darker.
    shade = shade * (0.75 + 0.25 * (heights / resolution).clamp(0, 1))
    color = shade * torch.tensor(SURFACE_COLOR, device=coords.device).view(1, 3, 1, 1)
    picture = color * solid + (1 - solid)
    mode = "nearest" if resolution < size else "area"
    return torch.nn.functional.interpolate(picture, size=(size, size), mode=mode)[0].cpu()


def sdf_reliefs(feats: Tensor, coords: Tensor, resolution: int, tau: float, views: tuple[str, ...]) -> list[Tensor]:
    """Draws the inside of a sparse SDF from views: `feats [N, 1]` (s / tau), `coords [N, 3]`, `tau` in model space."""
    inside = feats[:, 0] < 0
    depth = -feats[inside, 0].clamp(min=-1) * tau * (resolution - 1) / 2
    return [relief(coords[inside], resolution, depth, view) for view in views]


def occupancy_reliefs(occupancy: Tensor, views: tuple[str, ...]) -> list[Tensor]:
    """Draws an occupancy grid `[R, R, R]` bool from views."""
    return [relief(occupancy.nonzero(), occupancy.shape[0], None, view) for view in views]


def picture_grid(rows: list[list[Tensor]], titles: list[str]) -> Image.Image:
    """Joins pictures `[3, S, S]` in [0, 1] of one size in rows, with a title above each column."""
    height, width = rows[0][0].shape[1:]
    header, margin = 16, 2
    canvas = Image.new(
        "RGB", ((width + margin) * len(titles), header + (height + margin) * len(rows)), color=(255, 255, 255)
    )
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((column * (width + margin) + 4, 2), title, fill=(0, 0, 0))
        for row, pictures in enumerate(rows):
            pixels = (pictures[column].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
            tile = Image.frombytes("RGB", (width, height), pixels.cpu().numpy().tobytes())
            canvas.paste(tile, (column * (width + margin), header + row * (height + margin)))
    return canvas
