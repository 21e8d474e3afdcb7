# `make demo`: a photo to a mesh, on the CPU. `make test`: lint, types and tests. Both set themselves up in .venv.
# A smaller download on Linux: make demo TORCH_INDEX=<address of PyTorch's CPU wheels>
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PHOTO := examples/sofa.png
# Processes that run the tests: a number, or "logical" for one a core.
WORKERS ?= logical
# The Python of `make test-gpu`. One of your own with PyTorch for the GPU is used as it is, without any set-up.
GPU_PYTHON ?= $(BIN)/python
# Processes of `make test-gpu`, which share the GPU.
GPU_WORKERS ?= 4
# The commit that results are recorded with; needed where the tree is not a git checkout.
COMMIT ?=

# How long `make fuzz` runs, and in how many processes `make mutants`.
FUZZ_SECONDS ?= 600
MUTANT_WORKERS ?= 2
# Further options, as `--json FILE --resume`.
MUTANT_OPTIONS ?=

.PHONY: demo app docs test fuzz mutants test-gpu lint format typecheck performance wheel clean

demo: $(VENV)/.installed
	$(BIN)/diffusers-sparse3d generate $(PHOTO) -o outputs/demo.glb --preview outputs/demo.png --seed 0

# The web app: a photo to a mesh in the browser.
app: $(VENV)/.installed
	$(PIP) -e '.[app]'
	$(BIN)/diffusers-sparse3d app

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# The property-based tests with new random examples, until time is up or one fails, which is printed with a reproducer.
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.properties.fuzz --seconds $(FUZZ_SECONDS)

# Single mistakes planted one after the other: which share do the tests notice?
mutants: $(VENV)/.installed-dev
	$(BIN)/python -m tests.mutants.run --workers $(MUTANT_WORKERS) $(MUTANT_OPTIONS)

# What runs natively on a GPU; device, commit, versions and counts go to benchmarks/results/test_gpu.json. Warnings of
# versions other than those in constraints.txt are shown, not errors.
test-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.installed-dev)
	$(GPU_PYTHON) -m pytest -p tests.gpu_report --gpu-report benchmarks/results/test_gpu.json \
		$(if $(COMMIT),--commit $(COMMIT)) -W default::DeprecationWarning -W default::FutureWarning \
		-n $(GPU_WORKERS) --dist worksteal tests/ops tests/models \
		$(wildcard tests/geometry/test_*_kernels.py tests/pipelines/test_*_kernels.py tests/training/test_*_kernels.py) \
		tests/training/test_two_gpus.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_triton_interfaces.py
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed-dev
	$(BIN)/mypy

# docs/performance.md, and the figures in README.md, from benchmarks/results/.
performance: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/report.py

# The documentation site, in build/site.
docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# torch first: with it there, nothing later asks for another build of it.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) -e '.[render]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[app,train,mesh,video,docs,ray,storage,dev]'
	touch $@

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
