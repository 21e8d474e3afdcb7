"""The names that users import, how diffusers finds them, and what importing the package costs."""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import diffusers
import pytest

import diffusers_sparse3d
from diffusers_sparse3d.registration import ImportHook, add_lazy_attributes


ROOT = Path(__file__).parents[1]
REGISTERED = ["SparseVAE", "SparseDiT", "DenseVAE", "DenseDiT", "SDFRefiner", "SDFSignRefiner", "Direct3DS2Pipeline"]


def run_python(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


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
    assert set(diffusers_sparse3d.__all__) <= set(dir(diffusers_sparse3d))
    with pytest.raises(AttributeError, match="no attribute 'SparseDit'"):
        _ = diffusers_sparse3d.SparseDit


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_with_diffusers(name):
    public_class = getattr(diffusers_sparse3d, name)
    assert getattr(diffusers, name) is public_class
    # `save_pretrained` writes this module as the library of a component.
    assert public_class.__module__ == "diffusers_sparse3d"
    assert pickle.loads(pickle.dumps(public_class)) is public_class


def test_diffusers_keeps_its_own_attributes():
    assert diffusers.AutoencoderKL.__name__ == "AutoencoderKL"
    with pytest.raises(AttributeError, match="NoSuchClass"):
        _ = diffusers.NoSuchClass


def test_import_before_diffusers():
    """The package alone imports neither torch nor diffusers; diffusers, imported later, finds the classes."""
    run_python(f"""
import sys
import diffusers_sparse3d
loaded = [name for name in ("torch", "numpy", "diffusers", "transformers", "trimesh") if name in sys.modules]
assert not loaded, loaded
import importlib.util
assert importlib.util.find_spec("diffusers").name == "diffusers"  # as transformers and accelerate ask

from diffusers import DiffusionPipeline
assert "diffusers_sparse3d.models" not in sys.modules
pipe = DiffusionPipeline.from_pretrained({str(ROOT / "checkpoints" / "direct3d-s2-small")!r})
assert type(pipe) is diffusers_sparse3d.Direct3DS2Pipeline
assert type(pipe.transformer) is diffusers_sparse3d.SparseDiT
assert pipe.config["transformer"] == ("diffusers_sparse3d", "SparseDiT")
loaded = [name for name in ("igl", "pyvista", "skimage") if name in sys.modules]
assert not loaded, loaded
""")


def test_import_hook(tmp_path, monkeypatch):
    """The function gets the module that an import leaves in `sys.modules`, once; asking for the specification alone
    does not count as an import."""
    code = "import sys, types\nsys.modules[__name__] = types.ModuleType('replacement')\n"
    (tmp_path / "hooked_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    names = []
    hook = ImportHook("hooked_module", lambda module: names.append(module.__name__))
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    assert importlib.util.find_spec("hooked_module") is not None
    assert names == []
    for _ in range(2):
        importlib.import_module("hooked_module")
        del sys.modules["hooked_module"]
    assert names == ["replacement"]


def test_lazy_attributes():
    class LazyModule(ModuleType):
        def __getattr__(self, name):
            if name == "own":
                return "own"
            raise AttributeError(name)

    module, loaded = LazyModule("lazy"), []
    module.present = "present"
    for names in (("first", "present"), ("second",)):
        add_lazy_attributes(module, names, lambda name: loaded.append(name) or name.upper())
    assert loaded == []
    assert (module.first, module.second, module.own, module.present) == ("FIRST", "SECOND", "own", "present")
    assert module.first == "FIRST"
    assert loaded == ["first", "second"]
    assert not hasattr(module, "third")


def test_imports_without_the_optional_packages():
    run_python(f"""
import sys
for name in ("igl", "embreex", "pyvista", "skimage", "triton", "peft", "scipy"):
    sys.modules[name] = None
import diffusers_sparse3d, diffusers_sparse3d.cli
for name in {diffusers_sparse3d.__all__}:
    getattr(diffusers_sparse3d, name)
""")
