"""The names that users import, how diffusers finds them, and what importing the package costs."""

import subprocess
import sys

import diffusers
import pytest

import diffusers_sparse3d


def test_public_names():
    assert set(diffusers_sparse3d.__all__) >= {
        "SparseTensor",
        "SparseVAE",
        "SparseDiT",
        "DenseVAE",
        "DenseDiT",
        "SDFRefiner",
        "SDFSignRefiner",
        "SSAAttnProcessor",
        "SparseAttnProcessor",
        "WindowAttnProcessor",
        "Direct3DS2Pipeline",
    }
    for name in diffusers_sparse3d.__all__:
        assert getattr(diffusers_sparse3d, name).__name__ == name


@pytest.mark.parametrize(
    "name",
    ["SparseVAE", "SparseDiT", "DenseVAE", "DenseDiT", "SDFRefiner", "SDFSignRefiner", "Direct3DS2Pipeline"],
)
def test_registered_with_diffusers(name):
    assert getattr(diffusers, name) is getattr(diffusers_sparse3d, name)
    assert getattr(diffusers_sparse3d, name).__module__ == "diffusers_sparse3d"


def test_imports_without_the_optional_packages():
    code = """
import sys
optional = ("igl", "embreex", "pyvista", "skimage", "triton", "peft", "scipy")
for name in optional:
    sys.modules[name] = None
import diffusers_sparse3d, diffusers_sparse3d.cli
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)})


def test_import_leaves_geometry_libraries_alone():
    code = """
import sys
import diffusers_sparse3d
loaded = [name for name in ("igl", "pyvista", "skimage") if name in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)})
