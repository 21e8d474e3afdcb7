"""Tests of pictures: camera geometry, light, materials and errors. Small pictures are compared with arithmetic."""

import itertools
import sys

import numpy as np
import pytest
import trimesh
from PIL import Image

from diffusers_sparse3d.geometry.render import MeshRenderer, corner_normals, preview, render_mesh_views, side_by_side
from diffusers_sparse3d.geometry.render.lights import Lights


RED, GREEN, BLUE = (220, 30, 30, 255), (30, 200, 30, 255), (30, 30, 220, 255)
FRONT = (0.0, 0.0, 50.0)


def pixels(image):
    return np.asarray(image, dtype=np.float64)


def hue(image, row, column):
    return "rgb"[np.argmax(pixels(image)[row, column, :3])]


def colored_box(center, color, size=0.4):
    box = trimesh.creation.box((size,) * 3, trimesh.transformations.translation_matrix(center))
    box.visual.vertex_colors = np.tile(color, (len(box.vertices), 1))
    return box


def test_azimuth_and_elevation():
    """Azimuth 0 looks from +z, 90 from +x; positive elevation from +y."""
    scene = trimesh.Scene([colored_box((1, 0, 0), RED), colored_box((0, 1, 0), GREEN), colored_box((0, 0, 1), BLUE)])
    scene.add_geometry([colored_box(center, (90, 90, 90, 255)) for center in ((-1, 0, 0), (0, -1, 0), (0, 0, -1))])
    front, right, top = render_mesh_views(scene, [FRONT, (90, 0, 50), (0, 89.9, 50)], 64, key_light=(0, 60))
    assert [hue(image, 32, 32) for image in (front, right, top)] == ["b", "r", "g"]
    # In the front view +x is on the right and +y above.
    column = np.flatnonzero(pixels(front)[32, :, 3])[-3]
    assert hue(front, 32, column) == "r"
    assert hue(front, np.flatnonzero(pixels(front)[:, 32, 3])[2], 32) == "g"


def test_bounding_sphere_fills_the_picture():
    (image,) = render_mesh_views(trimesh.creation.icosphere(subdivisions=4), [(20, 30, 35)], 128, margin=1.25)
    coverage = pixels(image)[..., 3].mean() / 255
    assert coverage == pytest.approx(np.pi / 4 / 1.25**2, rel=0.01)


@pytest.mark.parametrize("focal_mm", [30.0, 100.0])
def test_perspective_follows_the_focal_length(focal_mm):
    """The picture of a sphere of radius r at depth z is 2 r / sqrt(z^2 - r^2) high; one sphere is near and one far."""
    near, far = (trimesh.creation.icosphere(subdivisions=4, radius=0.2) for _ in range(2))
    near.apply_translation((-0.75, 0, 0.75))
    far.apply_translation((0.75, 0, -0.75))
    (image,) = render_mesh_views(trimesh.Scene([near, far]), [(0, 0, focal_mm)], 256)
    heights = pixels(image)[..., 3].sum(axis=0) / 255
    # The bounding sphere that fills the picture goes through the far ends of the two.
    distance = (0.75 * 2**0.5 + 0.2) * np.hypot(1, focal_mm / 18)
    expected = np.sqrt(((distance + 0.75) ** 2 - 0.2**2) / ((distance - 0.75) ** 2 - 0.2**2))
    assert heights[:128].max() / heights[128:].max() == pytest.approx(expected, rel=0.03)


def test_crop_frames_the_object():
    tall = trimesh.creation.box((0.2, 2, 0.2))
    (image,) = render_mesh_views(tall, [(10, 20, 50)], 100, crop=True, margin=1.1)
    left, top, right, bottom = image.getchannel("A").getbbox()
    assert bottom - top == pytest.approx(100 / 1.1, abs=1.5)
    assert top == pytest.approx(100 - bottom, abs=1.5)
    assert left == pytest.approx(100 - right, abs=1.5)


def test_placement_and_scale_of_the_mesh_do_not_matter():
    mesh = trimesh.creation.torus(1, 0.4, major_sections=16, minor_sections=8)
    moved = mesh.copy()
    moved.apply_scale(7.0)
    moved.apply_translation((5, -3, 2))
    (first,), (second,) = (render_mesh_views(item, [(30, 30, 50)], 48) for item in (mesh, moved))
    assert np.abs(pixels(first) - pixels(second)).mean() < 1


def test_up_axis():
    tall = trimesh.creation.box((1, 2, 3))
    for up_axis, (width, height) in {"x": (2, 1), "y": (1, 2), "z": (1, 3)}.items():
        (image,) = render_mesh_views(tall, [(0, 0, 2000)], 64, up_axis=up_axis)
        left, top, right, bottom = image.getchannel("A").getbbox()
        assert (right - left) / (bottom - top) == pytest.approx(width / height, rel=0.08)


def textured_square(image, **material):
    vertices = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=float)
    visual = trimesh.visual.TextureVisuals(
        uv=vertices[:, :2], material=trimesh.visual.material.SimpleMaterial(image=image, **material)
    )
    return trimesh.Trimesh(vertices, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)


def test_textures_from_a_file(tmp_path):
    """The OBJ has a texture with red above green on the left, and blue on the right."""
    texture = Image.new("RGB", (64, 64), BLUE[:3])
    texture.paste(RED[:3], (0, 0, 32, 32))
    texture.paste(GREEN[:3], (0, 32, 32, 64))
    texture.save(tmp_path / "texture.png")
    (tmp_path / "square.mtl").write_text("newmtl m\nKd 0.8 0.8 0.8\nmap_Kd texture.png\n")
    (tmp_path / "square.obj").write_text(
        "mtllib square.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
        "usemtl m\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\n"
    )
    (image,) = render_mesh_views(tmp_path / "square.obj", [FRONT], 64, crop=True)
    assert [hue(image, *position) for position in ((16, 16), (48, 16), (16, 48), (48, 48))] == ["r", "g", "b", "b"]


@pytest.mark.parametrize(("opacity", "shown"), [(1.0, 1.0), (0.6, 0.6), (0.1, 0.35)])
def test_opacity_of_a_material(tmp_path, opacity, shown):
    """The opacity `d` of an OBJ material is applied, but not below 0.35."""
    (tmp_path / "square.mtl").write_text(f"newmtl m\nKd 0.8 0.1 0.1\nd {opacity}\n")
    (tmp_path / "square.obj").write_text(
        "mtllib square.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nusemtl m\nf 1 2 3\nf 1 3 4\n"
    )
    (image,) = render_mesh_views(tmp_path / "square.obj", [FRONT], 32, crop=True)
    assert pixels(image)[16, 20, 3] == pytest.approx(255 * shown, abs=1)
    plain = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    (expected,) = render_mesh_views(plain, [FRONT], 32, crop=True, base_color=(0.8, 0.1, 0.1))
    np.testing.assert_allclose(pixels(image)[16, 20, :3], pixels(expected)[16, 20, :3], atol=2)


def test_transparency_shows_what_is_behind():
    texture = Image.new("RGBA", (8, 8), (*GREEN[:3], 0))
    texture.paste((*GREEN[:3], 128), (4, 0, 8, 8))
    scene = trimesh.Scene([textured_square(texture)])
    (alone,) = render_mesh_views(scene, [FRONT], 64, crop=True)
    assert pixels(alone)[32, 12, 3] == 0
    assert pixels(alone)[32, 52, 3] == pytest.approx(128, abs=2)
    wall = colored_box((0.5, 0.5, -2), RED, size=1.0)
    wall.apply_scale((1, 1, 0.1))
    scene.add_geometry(wall)
    (both,) = render_mesh_views(scene, [FRONT], 64, crop=True)
    assert pixels(both)[32, 20, 3] == pixels(both)[32, 44, 3] == 255
    assert pixels(both)[32, 44, 1] > pixels(both)[32, 20, 1] + 30


def test_base_color_is_for_what_has_none():
    grey, red, box = (
        pixels(render_mesh_views(mesh, [FRONT], 32, **options)[0])[16, 16]
        for mesh, options in (
            (trimesh.creation.box(), {}),
            (trimesh.creation.box(), {"base_color": (0.8, 0.1, 0.1)}),
            (colored_box((0, 0, 0), BLUE), {"base_color": (0.8, 0.1, 0.1)}),
        )
    )
    assert np.ptp(grey[:3]) < 8 and grey[0] > 100
    assert red[0] > 2 * red[1]
    assert box[2] > 2 * box[0]


def test_light_comes_from_above():
    (image,) = render_mesh_views(trimesh.creation.icosphere(subdivisions=4), [FRONT], 64)
    brightness = pixels(image)[..., 0]
    assert brightness[14, 32] > brightness[32, 32] > brightness[54, 32] > 20


def test_ambient_light_of_walls_floors_and_hidden_points():
    renderer = MeshRenderer(trimesh.creation.box())
    sky = Lights.around(0.0, (-35.0, 45.0), 256).sky.reshape(1, -1, 3)
    np.testing.assert_allclose(np.linalg.norm(sky, axis=2), 1, atol=1e-6)
    np.testing.assert_allclose(sky.mean(axis=1), 0, atol=1e-3)
    # The points are high above the box, and in its middle, where it blocks all light.
    for height, dimmed in ((50.0, 1.0), (0.0, 0.15)):
        for normal, light in (((1, 0, 0), 0.7), ((0, 0, -1), 0.7), ((0, 1, 0), 0.9), ((0, -1, 0), 0.5)):
            point, up = np.array([[0, height, 0]], np.float32), np.array([normal], np.float32)
            assert renderer._sky(point, up, sky)[0] == pytest.approx(dimmed * light, abs=0.01)


def shown(linear: float) -> float:
    """The pixel value of linear light: film response, then gamma."""
    return 255 * (1 - np.exp(-1.5 * linear)) ** (1 / 2.2)


def test_brightness_of_a_floor_by_hand():
    floor = trimesh.creation.box((2, 0.1, 2))
    (image,) = render_mesh_views(floor, [(0, 90, 200)], 32, key_light=(0, 90), sky_rays=64, base_color=(0.5, 0.5, 0.5))
    # Ambient light 0.9, the main light from above, the light from the side at 0.2 radians, and a highlight.
    key, fill, highlight = 1 / np.hypot(1, 0.06), 0.12 * np.sin(0.2), 0.12 * np.cos(np.arctan(0.06) / 2) ** 40
    linear = 0.5**2.2 * (0.45 * 0.9 + key + fill) + highlight
    np.testing.assert_allclose(pixels(image)[16, 16, :3], shown(linear), atol=2)


def test_brightness_of_a_wall_by_hand():
    wall = trimesh.creation.box((2, 2, 0.1))
    (image,) = render_mesh_views(wall, [FRONT], 32, key_light=(0, -90), sky_rays=64, base_color=(0.5, 0.5, 0.5))
    # The main light comes from below. Its directions differ a little, so that some of it grazes the wall.
    key = np.maximum(Lights.around(0.0, (0, -90), 1).key[:, 2], 0).mean()
    linear = 0.5**2.2 * (0.45 * 0.7 + key + 0.12 * np.cos(0.2))
    np.testing.assert_allclose(pixels(image)[16, 16, :3], shown(linear), atol=2)


@pytest.mark.parametrize(("angle", "is_smooth"), [(35, True), (45, False), (80, False), (-35, True)])
def test_corner_normals_are_smooth_below_forty_degrees(angle, is_smooth):
    bend = np.radians(angle)
    ridge, left = [[0, 0, -1], [0, 0, 1]], [-1, 0, 0]
    right = [np.cos(bend), np.sin(bend), 0]
    triangles = np.array([[*ridge, left], [*ridge[::-1], right]], dtype=float)
    normals = corner_normals(triangles)
    own = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    expected = np.abs(own.sum(axis=0)) / np.linalg.norm(own.sum(axis=0)) if is_smooth else np.abs(own[1])
    np.testing.assert_allclose(np.abs(normals[1, :2]), np.tile(expected, (2, 1)), atol=1e-6)
    # The corner that only one face has keeps the normal of that face.
    np.testing.assert_allclose(np.abs(normals[1, 2]), np.abs(own[1]), atol=1e-6)


def test_main_light_casts_shadows():
    # A wall stands on a floor. Light from the left puts the floor on its right in shadow, light from the right does
    # not.
    floor = trimesh.creation.box((4, 0.1, 2))
    wall = trimesh.creation.box((0.1, 1, 2)).apply_translation((0, 0.5, 0))
    scene = trimesh.Scene([floor, wall])
    from_left, from_right = (
        pixels(render_mesh_views(scene, [(0, 60, 200)], 64, key_light=(azimuth, 45))[0]) for azimuth in (-90, 90)
    )
    assert from_left[34, 42, 3] == from_right[34, 42, 3] == 255
    assert from_left[34, 42, 0] < 0.8 * from_right[34, 42, 0]
    np.testing.assert_allclose(from_left[34, 42, :3], from_right[34, 21, :3], atol=4)


def test_ground_shadow_is_soft_and_near_the_object():
    ball = trimesh.creation.icosphere(subdivisions=3)
    without, below = (
        pixels(render_mesh_views(ball, [(0, 30, 50)], 64, ground_shadow=shadow, margin=1.5)[0])
        for shadow in (False, True)
    )
    covered = without[..., 3] == 255
    np.testing.assert_array_equal(below[covered], without[covered])
    opacity = np.where(without[..., 3] == 0, below[..., 3], 0)
    # The shadow is dark near the foot of the ball, and absent at the border of the picture and above the ball.
    assert opacity[48:60, 20:44].max() > 60 and opacity.max() < 200
    assert opacity[:16].max() == opacity[0].max() == opacity[:, 0].max() == 0
    assert below[opacity > 60, :3].max() < 40


def test_corner_normals():
    sphere = trimesh.creation.icosphere(subdivisions=3)
    corners = sphere.vertices[sphere.faces]
    # Inconsistent winding must not matter.
    corners[::2] = corners[::2, ::-1]
    cosine = np.abs((corner_normals(corners) * corners).sum(-1))
    assert cosine.min() > 0.999
    box = trimesh.creation.box()
    flat = corner_normals(box.vertices[box.faces])
    np.testing.assert_allclose(flat, np.repeat(box.face_normals[:, None], 3, axis=1), atol=1e-6)


def test_corner_normals_of_smooth_and_folded_parts():
    """Against all pairs of faces at a corner, on a cylinder, whose rims are folded, and with faces turned around."""
    cylinder = trimesh.creation.cylinder(1, 2, sections=12).subdivide()
    corners = cylinder.vertices[cylinder.faces].astype(np.float32)
    corners[::5] = corners[::5, ::-1]
    own = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    cosine = own @ own.T / np.linalg.norm(own, axis=1)[:, None] / np.linalg.norm(own, axis=1)
    weight = np.sign(cosine) * (np.abs(cosine) > np.cos(np.radians(40)))
    touches = (np.linalg.norm(corners[:, :, None, None] - corners[None, None], axis=-1) < 1e-4).any(-1)
    expected = np.einsum("fcg,fg,gd->fcd", touches.astype(float), weight, own)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(corner_normals(corners), expected, atol=1e-5)
    # Both ways of corners occur: with all faces of their position, and without some.
    everything = np.einsum("fcg,fg->fc", touches.astype(float), np.abs(weight)) == touches.sum(-1)
    assert 0.2 < everything.mean() < 0.8


def test_preview_is_a_row():
    mesh = trimesh.creation.torus(1, 0.4, major_sections=16, minor_sections=8)
    without, beside = preview(mesh, size=32), preview(mesh, Image.new("RGB", (10, 20), RED[:3]), size=32)
    assert without.size == (128, 32) and beside.size == (160, 32)
    assert without.mode == beside.mode == "RGB"
    np.testing.assert_array_equal(pixels(beside)[:, 32:], pixels(without))
    assert pixels(beside)[16, 16].tolist() == list(RED[:3])
    assert pixels(beside)[16, 2].tolist() == [255, 255, 255]
    # Each of the four pictures shows the mesh on white.
    for column in range(4):
        part = pixels(without)[:, 32 * column : 32 * (column + 1)]
        assert part[0].min() > 250 and part.min() < 200


def test_bad_input():
    with pytest.raises(ValueError, match="`mesh` has no triangles"):
        render_mesh_views(trimesh.Trimesh(), [FRONT])
    with pytest.raises(ValueError, match="no triangle with a positive area"):
        render_mesh_views(trimesh.Trimesh(np.eye(3)[[0, 0, 1]], [[0, 1, 2]], process=False), [FRONT])


def test_missing_dependency_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "embreex", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers_sparse3d\[render\]'"):
        render_mesh_views(trimesh.creation.box(), [FRONT])


def test_threads_give_the_pictures_of_one_thread_in_the_order_of_the_views():
    mesh = trimesh.creation.box((1.0, 0.5, 0.25))
    views = [(azimuth, 20.0, 50.0) for azimuth in (0.0, 40.0, 80.0, 120.0, 160.0)]
    alone, together = (
        [np.asarray(view) for view in render_mesh_views(mesh, views, 48, ground_shadow=True, num_threads=threads)]
        for threads in (1, 3)
    )
    assert all((first == second).all() for first, second in zip(alone, together))
    assert all((first != second).any() for first, second in itertools.pairwise(alone))


def test_normal_maps_show_directions():
    """On a sphere the colour is the position: red to the right, green up, blue towards the viewer, without light."""
    picture = render_mesh_views(trimesh.creation.icosphere(4), [(30.0, 20.0, 60.0)], 65, style="normals")[0]
    color = np.asarray(picture, dtype=float)
    # The ray of each pixel, and where it meets the sphere, in the axes of the camera.
    half, radius = 1.08 * 36 / (2 * 60), 0.95
    eye = np.array([0, 0, radius * np.hypot(1, 2 * 60 / 36)])
    for row, column in ((32, 32), (20, 40), (45, 18), (32, 56)):
        ray = np.array([(column - 32) / 32.5 * half, (32 - row) / 32.5 * half, -1.0])
        ray /= np.linalg.norm(ray)
        along = -eye @ ray
        point = eye + (along - np.sqrt(along**2 - eye @ eye + radius**2)) * ray
        np.testing.assert_allclose(color[row, column, :3] / 255 * 2 - 1, point / radius, atol=0.04)


def test_wireframes_have_lines_of_a_pixel_between_triangles():
    box = trimesh.creation.box()
    shaded, lines = (
        np.asarray(render_mesh_views(box, [(0.0, 0.0, 60.0)], 64, style=style)[0].convert("L"), dtype=float)
        for style in ("shaded", "wireframe")
    )
    dark = lines < shaded - 20
    # The front is a square of two triangles, with one diagonal: a pixel wide, and oblique.
    inside = dark[14:50, 14:50]
    assert all(1 <= count <= 3 for count in inside.sum(axis=1))
    assert (np.diff(inside.argmax(axis=1)) == -1).all()


def test_unknown_style():
    with pytest.raises(ValueError, match="`style`"):
        render_mesh_views(trimesh.creation.box(), [(0.0, 0.0, 60.0)], 16, style="clay")


def test_side_by_side():
    meshes = [trimesh.creation.box(), trimesh.creation.icosphere(1), trimesh.creation.cylinder(1, 2)]
    sheet = np.asarray(side_by_side(meshes, ["a", "b", "c"], Image.new("RGB", (9, 3), "red"), size=48, columns=3))
    assert sheet.shape == (2 * (48 + 28), 3 * 48, 3)
    # The photo is in the middle of the first place, the last two places are empty, each label has dark pixels.
    assert sheet[24, 24].tolist() == [255, 0, 0] and sheet[4, 24].tolist() == [255] * 3
    assert (sheet[76:, 48:] == 255).all() and (sheet[48:76, 48:96] < 128).any() and (sheet[124:, :48] < 128).any()
    with pytest.raises(ValueError, match="`labels`"):
        side_by_side(meshes, ["a"])
    with pytest.raises(ValueError, match="`meshes`"):
        side_by_side([])
