# `make demo`: a photo to a mesh, on the CPU. `make test`: lint and tests. Both set themselves up in .venv.
# A smaller download on Linux: make demo TORCH_INDEX=<address of PyTorch's CPU wheels>
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PHOTO := examples/sofa.png

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/diffusers-sparse3d generate $(PHOTO) -o outputs/demo.glb --preview outputs/demo.png --seed 0

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first: with it there, nothing later asks for another build of it.
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) -e '.[app]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[app,train,dev]'
	touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info
