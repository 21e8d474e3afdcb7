"""Tests of the rasteriser: against the ray caster, the image processor and arithmetic, on pictures of a few pixels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from diffusers_sparse3d.geometry.render import MeshRenderer, Surface, load_surface
from diffusers_sparse3d.geometry.render.rasterizer import (
    Cameras,
    LightSettings,
    Materials,
    PackedSurfaces,
    Views,
    concatenate_views,
    random_views,
    rasterize_views,
)
from diffusers_sparse3d.geometry.render.rasterizer.depth_buffer import EMPTY, depth_buffer, nearness_of
from diffusers_sparse3d.geometry.render.rasterizer.materials import value_noise
from diffusers_sparse3d.geometry.render.rasterizer.projection import Screen, project
from diffusers_sparse3d.geometry.render.rasterizer.views import CHECKER, NOISE, ONE_COLOR, OWN_COLORS
from diffusers_sparse3d.pipelines.image_processor import Sparse3DImageProcessor


RED, GREEN, BLUE = (220, 30, 30, 255), (30, 200, 30, 255), (30, 30, 220, 255)
SIZE = 48


def views(*directions, **settings):
    """Views of own colours in plain light, of azimuth, elevation, focal length and, if given, roll."""
    count = len(directions)
    values = torch.tensor([[*direction, 0.0][:4] for direction in directions])

    def alike(*value):
        return torch.tensor(value).expand(count, *[len(value)] * (len(value) > 1)).clone()

    made = {
        "cameras": Cameras(*values.unbind(1)),
        "lights": LightSettings(
            key=alike(-35.0, 45.0), key_strength=alike(1.0), ambient=alike(0.5), shadow=alike(1.0),
            specular=alike(0.0), gloss=alike(20.0), exposure=alike(1.5),
        ),
        "materials": Materials(
            style=torch.full((count,), OWN_COLORS),
            color=torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]).repeat(count, 1, 1),
            tint=alike(1.0, 1.0, 1.0), frequency=alike(4.0), seed=torch.arange(count),
        ),
    }  # fmt: skip
    for name, part in made.items():
        known = {key: value for key, value in settings.items() if hasattr(part, key)}
        made[name] = replace(part, **known)
    return Views(**made)


def pictures(mesh, shown, size=SIZE, margin=1.08):
    """Pictures `[B, S, S, 4]` of one mesh."""
    surface = mesh if isinstance(mesh, Surface) else load_surface(mesh)
    packed = PackedSurfaces.pack([surface])
    made = rasterize_views(packed, torch.zeros(len(shown), dtype=torch.long), shown, size, margin)
    return made.permute(0, 2, 3, 1).numpy()


def colored_box(center, color, extents=(0.4, 0.4, 0.4)):
    box = trimesh.creation.box(extents, trimesh.transformations.translation_matrix(center))
    box.visual.vertex_colors = np.tile(color, (len(box.vertices), 1))
    return box


def torus():
    return trimesh.creation.torus(1, 0.4, major_sections=24, minor_sections=12)


def half_sphere():
    mesh = trimesh.creation.icosphere(subdivisions=2)
    mesh.update_faces(mesh.triangles_center[:, 1] < 0.2)
    return mesh


def table():
    parts = [colored_box((0, 0.5, 0), RED, (2, 0.1, 1.2))]
    parts += [
        colored_box((x, 0, z), color, (0.2, 1, 0.2)) for x, color in ((-0.9, GREEN), (0.9, BLUE)) for z in (-0.5, 0.5)
    ]
    return trimesh.util.concatenate(parts)


def box_of(alpha):
    rows, columns = (np.flatnonzero(alpha.any(axis=axis)) for axis in (1, 0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


@pytest.mark.parametrize("make", [torus, half_sphere, table])
def test_silhouettes_and_colors_are_those_of_the_ray_caster(make):
    directions = [(20.0, 10.0, 30.0), (-75.0, 55.0, 60.0), (160.0, -10.0, 240.0)]
    renderer = MeshRenderer(make())
    for picture, direction in zip(pictures(make(), views(*directions)), directions):
        expected = np.asarray(renderer.render(*direction, SIZE, crop=True))
        shown, other = picture[..., 3] > 127, expected[..., 3] > 127
        assert (shown & other).sum() / (shown | other).sum() >= 0.98
        assert np.abs(picture[..., 3].astype(int) - expected[..., 3]).mean() < 2
        # Whatever the light, the part that is seen is the same, but for pixels that two parts share.
        whole = (picture[..., 3] == 255) & (expected[..., 3] == 255)
        hues = [np.argmax(image[whole][:, :3], axis=1) for image in (picture, expected)]
        assert make is not table or (hues[0] == hues[1]).mean() > 0.96


def test_the_nearer_surface_is_seen_from_either_side():
    """Of two squares the nearer one; where a third one pierces them, each on its side of the line."""
    mesh = trimesh.util.concatenate(
        [colored_box((0, 0, 0.5), RED, (1, 1, 0.01)), colored_box((0, 0, -0.5), GREEN, (1, 1, 0.01))]
    )
    front, behind = pictures(mesh, views((0.0, 0.0, 50.0), (180.0, 0.0, 50.0)))
    assert [int(np.argmax(image[SIZE // 2, SIZE // 2, :3])) for image in (front, behind)] == [0, 1]
    level = colored_box((0, 0, 0), RED, (2, 2, 0.001))
    tilted = colored_box((0, 0, 0), BLUE, (2, 2, 0.001))
    tilted.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 4, [0, 1, 0]))
    (image,) = pictures(trimesh.util.concatenate([level, tilted]), views((0.0, 0.0, 200.0)))
    # Turned about y towards +x, the blue one is behind on the right.
    assert [int(np.argmax(image[SIZE // 2, column, :3])) for column in (SIZE // 2 - 5, SIZE // 2 + 5)] == [2, 0]


@pytest.mark.parametrize("make", [torus, table])
def test_framing_is_that_of_the_image_processor(make):
    """A picture whose margin is that of the processor goes through it unmoved."""
    processor = Sparse3DImageProcessor(56, 14)
    margin = 1 + 2 * processor.padding / processor.image_size
    for picture in pictures(make(), views((30.0, 20.0, 40.0), (-60.0, 45.0, 150.0)), 56, margin):
        _, mask = processor.preprocess(Image.fromarray(picture, "RGBA"))
        framed, own = mask[0, 0].numpy() > 0.5, picture[..., 3] > 0.04 * 255
        assert (framed & own).sum() / (framed | own).sum() > 0.94
        assert np.abs(np.subtract(box_of(framed), box_of(own))).max() <= 1


@pytest.mark.parametrize("size", [1, 7, 47, 64])
def test_the_longer_side_fills_any_size_but_for_the_margin(size):
    (picture,) = pictures(colored_box((3, 2, 1), RED, (1.5, 2, 0.5)), views((0.0, 0.0, 80.0)), size, margin=1.25)
    assert picture.shape == (size, size, 4)
    alpha = picture[..., 3] / 255
    assert alpha.sum(axis=0).max() == pytest.approx(size / 1.25, abs=0.6)
    np.testing.assert_array_equal(alpha, alpha[::-1])


def test_a_positive_roll_turns_the_picture_clockwise():
    mark = trimesh.util.concatenate([colored_box((0, 0.8, 0), RED), colored_box((0, -0.8, 0), GREEN)])
    (picture,) = pictures(mark, views((0.0, 0.0, 100.0, 90.0)))
    red = np.argwhere((picture[..., 3] > 127) & (picture[..., 0] > picture[..., 1]))
    assert red[:, 1].min() > SIZE / 2


def test_a_picture_depends_on_its_view_alone():
    packed = PackedSurfaces.pack([load_surface(mesh) for mesh in (torus(), table(), half_sphere())])
    shown = random_views(4, np.random.default_rng(3), (-180, 180))
    surface = torch.tensor([2, 0, 1, 0])
    together = rasterize_views(packed, surface, shown, SIZE)
    again = rasterize_views(packed, surface, random_views(4, np.random.default_rng(3), (-180, 180)), SIZE)
    assert torch.equal(together, again)
    assert not torch.equal(together, rasterize_views(packed, surface, random_views(4, np.random.default_rng(4)), SIZE))
    order = torch.tensor([3, 1, 0, 2])
    parts = concatenate_views([random_views(4, np.random.default_rng(3), (-180, 180)), shown])
    assert torch.equal(rasterize_views(packed, surface.repeat(2), parts, SIZE)[:4], together)
    alone = PackedSurfaces.pack([load_surface(torus())])
    picked = _rows(shown, order)
    assert torch.equal(rasterize_views(packed, surface[order], picked, SIZE), together[order])
    assert torch.equal(
        rasterize_views(alone, torch.zeros(2, dtype=torch.long), _rows(shown, torch.tensor([1, 3])), SIZE),
        together[[1, 3]],
    )


def _rows(shown, rows):
    parts = [type(part)(**{name: value[rows] for name, value in vars(part).items()}) for part in vars(shown).values()]
    return Views(*parts)


def test_triangles_without_area_are_not_seen():
    surface = load_surface(table())
    expected = pictures(surface, views((30.0, 30.0, 50.0)))
    point, line = np.full((3, 3), 0.9), np.array([[-0.9, 0, 0], [0, 0.2, 0], [0.9, 0.4, 0]])
    extra = np.stack([point, line]).astype(np.float32)
    added = {
        name: np.concatenate([getattr(surface, name), getattr(surface, name)[:2]])
        for name in ("normals", "colors", "uvs", "texture_index")
    }
    more = Surface(triangles=np.concatenate([surface.triangles, extra]), **added)
    more.triangles[-2:] *= 0.5
    np.testing.assert_array_equal(pictures(more, views((30.0, 30.0, 50.0))), expected)
    flat = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 0, 1]], [[0, 1, 2]], process=False)
    assert pictures(flat, views((0.0, 0.0, 50.0)))[..., 3].max() == 0
    assert pictures(flat, views((0.0, 40.0, 50.0)))[..., 3].max() == 255


def test_triangles_may_leave_the_screen():
    """One triangle covers a picture of 5 x 5 pixels and more, one lies beside it, one beside a second picture."""
    corners = torch.tensor([[[-9.0, -9], [25, -9], [-9, 25]], [[6, 0], [9, 0], [6, 3]], [[-3, 1], [-1, 1], [-1, 4]]])
    nearness = torch.tensor([[1.0, 18, 35], [50, 50, 50], [50, 50, 50]])
    screen = Screen(corners, nearness, torch.ones(3, 3), torch.tensor([0, 0, 1]), 2, 5)
    buffer = depth_buffer(screen, tile_size=4).view(2, 25)
    assert (buffer[1] == EMPTY).all() and (buffer[0] & 0xFFFFFFFF == 0).all()
    place = torch.arange(5) + 0.5
    expected = 1 + (place + 9) / 2 + (place[:, None] + 9)
    np.testing.assert_allclose(nearness_of(buffer[0]).view(5, 5), expected, rtol=1e-6)
    assert (nearness_of(buffer[1]) == 0).all()


def test_points_of_triangles_are_found_in_perspective():
    """The weights of a point, from where the camera sees it."""
    corners = torch.tensor([[-0.9, 0.1, 0.9], [0.8, -0.5, -0.9], [0.1, 0.7, 0.2]])
    weights = torch.tensor([0.2, 0.5, 0.3])
    point = (weights[:, None] * corners).sum(0)
    # A triangle about the point, so small that all of it is where the point is.
    tiny = point + 1e-4 * corners
    shown = views((30.0, 20.0, 25.0)).cameras
    screen, _ = project(
        torch.stack([corners, tiny]), torch.zeros(2, dtype=torch.long), torch.tensor([1.3]), shown, 64, 1.1
    )
    found = screen.barycentric(torch.tensor([0]), screen.corners[1].mean(0, keepdim=True))
    np.testing.assert_allclose(found[0], weights, atol=1e-3)


def test_no_views_make_no_pictures():
    assert pictures(torus(), random_views(0, np.random.default_rng(0))).shape == (0, SIZE, SIZE, 4)


def test_bad_input_is_refused():
    surface = load_surface(torus())
    packed, one = PackedSurfaces.pack([surface]), views((0.0, 0.0, 50.0))
    for index in ([1], [-1], [0, 0], []):
        with pytest.raises(ValueError, match="`surface` must hold one of 1 surfaces for each of 1 views"):
            rasterize_views(packed, torch.tensor(index, dtype=torch.long), one)
    with pytest.raises(ValueError, match="`size` must be"):
        rasterize_views(packed, torch.tensor([0]), one, 0)
    with pytest.raises(ValueError, match="`margin` must be"):
        rasterize_views(packed, torch.tensor([0]), one, margin=0.9)
    with pytest.raises(ValueError, match="`surfaces` must hold surfaces with triangles"):
        PackedSurfaces.pack([])
    surface.triangles[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="`surfaces` must have finite corners"):
        PackedSurfaces.pack([surface])
    with pytest.raises(ValueError, match="`focal_range` must be positive"):
        random_views(1, np.random.default_rng(0), focal_range=(0.0, 10.0))


def test_shadows_darken_what_the_light_does_not_reach():
    """A plate over a floor, light from above on the right: the shadow falls to the left of the plate."""
    scene = trimesh.util.concatenate(
        [
            colored_box((0, -0.5, 0), (200, 200, 200, 255), (2, 0.02, 2)),
            colored_box((0, 0, 0), (200, 200, 200, 255), (0.5, 0.02, 0.5)),
        ]
    )
    light = {"key": torch.tensor([[90.0, 45.0]]), "ambient": torch.tensor([0.0])}
    dark, bright = (
        pictures(scene, views((0.0, 60.0, 200.0), **light, shadow=torch.tensor([share])), 64)[0, ..., :3].mean(axis=2)
        for share in (1.0, 0.0)
    )
    rows, columns = np.nonzero(bright - dark > 40)
    assert len(rows) > 60 and columns.max() < 32
    unshaded = np.ones_like(dark, dtype=bool)
    unshaded[rows.min() - 2 : rows.max() + 3, columns.min() - 2 : columns.max() + 3] = False
    np.testing.assert_allclose(dark[unshaded], bright[unshaded], atol=1)


def test_light_comes_from_where_it_is_set():
    sphere = trimesh.creation.icosphere(subdivisions=3)
    for azimuth, brighter in ((60.0, slice(SIZE // 2, None)), (-60.0, slice(0, SIZE // 2))):
        (picture,) = pictures(sphere, views((40.0, 0.0, 100.0), key=torch.tensor([[azimuth, 10.0]])))
        grey = np.where(picture[..., 3] > 0, picture[..., 0], 0).astype(float)
        assert grey[:, brighter].sum() > 1.2 * (grey.sum() - grey[:, brighter].sum())
    # Turned inside out, it is shaded alike.
    inside_out = sphere.copy()
    inside_out.invert()
    np.testing.assert_array_equal(*(pictures(mesh, views((40.0, 0.0, 100.0))) for mesh in (sphere, inside_out)))


def textured_square(image):
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=float)
    visual = trimesh.visual.TextureVisuals(
        uv=corners[:, :2], material=trimesh.visual.material.SimpleMaterial(image=image)
    )
    return trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)


def test_textures_of_several_surfaces():
    """Red above green on the left, blue on the right; and a second surface with a texture of another size."""
    first, second = Image.new("RGB", (64, 32), BLUE[:3]), Image.new("RGB", (5, 7), GREEN[:3])
    first.paste(RED[:3], (0, 0, 32, 16))
    first.paste(GREEN[:3], (0, 16, 32, 32))
    packed = PackedSurfaces.pack(
        [load_surface(textured_square(second)), load_surface(textured_square(first)), load_surface(torus())]
    )
    front = views(*[(0.0, 0.0, 100.0)] * 2)
    green, mixed = rasterize_views(packed, torch.tensor([0, 1]), front, SIZE).permute(0, 2, 3, 1).numpy()
    places = [(12, 12), (36, 12), (12, 36), (36, 36)]
    assert [int(np.argmax(mixed[place][:3])) for place in places] == [0, 1, 2, 2]
    assert {int(np.argmax(green[place][:3])) for place in places} == {1}


def test_transparent_parts_of_a_texture_are_holes():
    texture = Image.new("RGBA", (8, 8), (*GREEN[:3], 0))
    texture.paste((*GREEN[:3], 255), (4, 0, 8, 8))
    front = views((0.0, 0.0, 100.0))
    (alone,) = pictures(trimesh.Scene([textured_square(texture)]), front)
    assert (alone[SIZE // 2, 12, 3], alone[SIZE // 2, 36, 3]) == (0, 255)
    wall = colored_box((0.5, 0.5, -1), RED, (1, 1, 0.1))
    (both,) = pictures(trimesh.Scene([textured_square(texture), wall]), front)
    assert [int(np.argmax(both[SIZE // 2, column, :3])) for column in (15, 33)] == [0, 1]


def test_materials():
    """One colour, a tint, a board with two colours and noise between them, as the styles say."""
    shown = views(*[(0.0, 0.0, 100.0)] * 5, tint=torch.tensor([[1.0, 1.0, 1.0]] * 4 + [[0.2, 1.0, 1.0]]))
    shown.materials.style[:] = torch.tensor([OWN_COLORS, ONE_COLOR, NOISE, CHECKER, OWN_COLORS])
    box = colored_box((0, 0, 0), (200, 200, 200, 255), (1, 1, 0.1))
    made = pictures(box, shown)[:, 6:-6, 6:-6, :3].astype(float)
    own, one, noise, checker, tinted = made
    assert np.ptp(one.reshape(-1, 3), axis=0).max() < 12 and (one[..., 0] > 2 * one[..., 2]).all()
    for mixed in (noise, checker):
        reddish = (mixed[..., 0] > mixed[..., 2]).mean()
        assert 0.2 < reddish < 0.8
    extreme = [(np.abs(image[..., 0] - image[..., 2]) > 80).mean() for image in (noise, checker)]
    assert extreme[0] < 0.6 < 0.7 < extreme[1]
    np.testing.assert_allclose(tinted[..., 1:], own[..., 1:], atol=1)
    assert (tinted[..., 0] < own[..., 0] - 40).all()


def test_noise_is_smooth_and_differs_by_seed():
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * 20 - 10
    seed = torch.full((500,), 7)
    values = value_noise(points, seed)
    assert 0 <= values.min() < 0.2 and 0.8 < values.max() <= 1 and abs(float(values.mean()) - 0.5) < 0.05
    assert (value_noise(points + 1e-3, seed) - values).abs().max() < 0.02
    assert (value_noise(points, seed + 1) - values).abs().mean() > 0.1
    lattice = points.round()
    # At a point of the lattice, neighbours have no weight.
    assert torch.equal(value_noise(lattice, seed), value_noise(lattice + 0.0, seed))
    np.testing.assert_allclose(value_noise(lattice + 1e-4, seed), value_noise(lattice, seed), atol=1e-5)


def test_random_views_are_in_their_ranges():
    shown = random_views(400, np.random.default_rng(0), (-90, 90), (-10, 60), (25, 250), own_colors=False)
    cameras = shown.cameras
    for values, (low, high) in (
        (cameras.azimuth, (-90, 90)), (cameras.elevation, (-10, 60)), (cameras.focal_mm.log(), np.log((25, 250))),
    ):  # fmt: skip
        assert low <= values.min() < low + 0.05 * (high - low) and high >= values.max() > high - 0.05 * (high - low)
        assert float(values.median()) == pytest.approx((low + high) / 2, abs=0.1 * (high - low))
    assert (cameras.roll == 0).float().mean() > 0.6 and 3 < cameras.roll.abs().max() <= 5
    assert set(shown.materials.style.tolist()) == {ONE_COLOR, NOISE, CHECKER}
    assert (random_views(400, np.random.default_rng(0)).materials.style == OWN_COLORS).float().mean() > 0.5
    assert shown.materials.color.min() >= 0 and shown.materials.color.max() <= 1
