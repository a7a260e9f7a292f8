# Everything runs in a virtual environment of the project's own; nothing but Python 3.11+ and make is needed.
# pip compiles every module it installs, most of them for nobody; here each is compiled, and kept, when first imported.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One process per processor, though no more than memory takes; one thread in each, so that they do not fight. The files
# go out in the order in which they are collected (the long ones are in the first folders), each to one process, which
# builds what its tests share once.
WORKERS := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test exhaustive check docs setup clean

demo: $(READY)  ## the main job on a real model; ends by saying where the report is
	$(BIN)/narrowcast optimize bundled:efficientnet-lite0 --data bundled:photos --max-drop 15% --minimise latency --out demo --force

test: $(READY)  ## the tests, on all processors; ends with the slowest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) --durations 15

exhaustive: $(READY)  ## every float32 there is, to FP16, BF16 and FP8: ten to fifteen minutes on one core
	$(BIN)/python -m pytest -m exhaustive

check: $(READY)  ## lint, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(READY)  ## the documentation, warnings as errors
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

setup: $(READY)

$(READY): pyproject.toml constraints/dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints/dev.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) docs/_build demo demo.work
