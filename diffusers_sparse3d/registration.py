"""Registration of the public classes with diffusers, without importing diffusers or the classes.

diffusers resolves class names that it reads from `model_index.json` and `config.json` by `getattr(diffusers, name)`.
`register_with_diffusers` gives the module `diffusers` a hook for attributes that it does not have (PEP 562), which
imports a class of this package when its name is first asked for. If diffusers is not imported yet, the hook is set as
soon as it is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def add_lazy_attributes(module: ModuleType, names: Sequence[str], load: Callable[[str], Any]) -> None:
    """Make `getattr(module, name)` return `load(name)` for `names`, except for those that the module has by then.

    The hook is kept in the namespace of the module, where Python looks for it before it asks a `__getattr__` of the
    module's class, such as that of diffusers' lazy modules. A hook that is there already is asked for all other names.
    """
    previous_hook = vars(module).get("__getattr__")

    def lazy_attribute(name: str) -> Any:
        if name in names:
            value = load(name)
            setattr(module, name, value)
            return value
        if previous_hook is not None:
            return previous_hook(name)
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    vars(module)["__getattr__"] = lazy_attribute


class ImportHook(MetaPathFinder):
    """Calls `function(module)` once, right after the module `name` has been imported.

    Args:
        name: full name of the module.
        function: takes the module as `sys.modules` has it after the import.
    """

    def __init__(self, name: str, function: Callable[[ModuleType], None]):
        self.name = name
        self.function = function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification that the other finders give, with a loader that calls the function at its end."""
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            # Not `module`: a lazy module replaces itself in `sys.modules`.
            self.function(sys.modules[fullname])

        # The loader was made for this specification alone. It keeps its class, by which others know what it can do.
        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def after_import(name: str, function: Callable[[ModuleType], None]) -> None:
    """Call `function(module)` for the module `name`: now if it is imported already, else as soon as it is."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, ImportHook(name, function))


def prefer_installed_pipelines(names: Sequence[str]) -> None:
    """Make diffusers load the pipelines `names` from this package, and not from the code in their folders.

    That code is for programs that do not import the package. Without this, diffusers would demand
    `trust_remote_code=True` from all others too.
    """

    def prefer(pipeline_utils: ModuleType) -> None:
        resolve = getattr(pipeline_utils, "_resolve_custom_pipeline_and_cls", None)
        if resolve is None:  # a version of diffusers that does not look into the folder
            return

        def resolve_installed(folder: Any, config: Any, custom_pipeline: str | None) -> Any:
            if custom_pipeline is None and config.get("_class_name") in names:
                return None, None
            return resolve(folder=folder, config=config, custom_pipeline=custom_pipeline)

        pipeline_utils._resolve_custom_pipeline_and_cls = resolve_installed  # type: ignore[attr-defined]

    after_import("diffusers.pipelines.pipeline_utils", prefer)


def register_with_diffusers(names: Sequence[str], package: str) -> None:
    """Make diffusers find the classes `names` of `package` under `getattr(diffusers, name)`.

    A class that diffusers has imported under one of the names is left alone. Nothing is imported by this call.
    """

    def register(diffusers: ModuleType) -> None:
        add_lazy_attributes(diffusers, names, lambda name: getattr(importlib.import_module(package), name))

    after_import("diffusers", register)
