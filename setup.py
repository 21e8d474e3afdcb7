"""Installation of diffusers_sparse3d: pure Python, nothing is compiled."""

from pathlib import Path

from setuptools import find_packages, setup


setup(
    name="diffusers_sparse3d",
    version="0.1.0.dev0",
    description="Sparse-volume 3D generation (Direct3D-S2) for Hugging Face diffusers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["diffusers_sparse3d", "diffusers_sparse3d.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.36",
        "transformers>=4.48",
        "accelerate>=1.0",
        "safetensors>=0.4",
        "trimesh>=4.6",
        # Without it, trimesh computes the normals of a mesh in a Python loop: minutes for what it exports.
        "scipy>=1.11",
        "numpy>=1.26",
        "Pillow>=10.0",
    ],
    extras_require={
        "train": [
            "libigl>=2.5.1",
            "embreex>=4.4",
            "pyyaml>=6.0",
            "tensorboard>=2.15",
            "matplotlib>=3.8",
        ],
        "app": ["embreex>=4.4"],
        "mesh": ["libigl>=2.5.1", "pyvista>=0.44"],
        "dev": [
            "pytest>=8.0",
            "ruff>=0.9",
            "scikit-image>=0.22",
            "peft>=0.17",
            "pyvista>=0.44",
            # Its interpreter runs the kernels in the tests. PyTorch for GPUs brings the version that it needs.
            "triton>=3.2; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
    },
    entry_points={"console_scripts": ["diffusers-sparse3d=diffusers_sparse3d.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
