# The command line and the web app in a container.
#
#     docker build -t diffusers-sparse3d .                                          # for the processor
#     docker build -t diffusers-sparse3d --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .   # for NVIDIA GPUs
#     docker run --rm -p 7860:7860 [--gpus all] diffusers-sparse3d                  # the app, on http://localhost:7860
#     docker run --rm -v "$PWD:/data" diffusers-sparse3d generate photo.jpg -o object.glb
FROM python:3.12-slim

# PyTorch from an index of its own, whose wheels differ by device; Triton compiles its launcher with a C compiler.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/diffusers-sparse3d
# What the packages depend on first: it is kept when only the code has changed.
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" torch
COPY pyproject.toml setup.py README.md LICENSE MANIFEST.in ./
COPY training/configs training/configs
COPY diffusers_sparse3d diffusers_sparse3d
RUN pip install --no-cache-dir -c constraints.txt -e ".[app,video]"
COPY checkpoints checkpoints
COPY examples examples

# Nothing is written but to /data and temporary folders.
RUN useradd --create-home user && mkdir /data && chown user /data
USER user
WORKDIR /data
EXPOSE 7860
ENTRYPOINT ["diffusers-sparse3d"]
CMD ["app", "--host", "0.0.0.0", "--port", "7860"]
