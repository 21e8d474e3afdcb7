"""Runtime of the operators: dispatch to kernels, launching, recording, registration with PyTorch, settings.

README.md in this folder explains how the parts work together.
"""

from .settings import RuntimeSettings, runtime_settings


__all__ = ["RuntimeSettings", "runtime_settings"]
