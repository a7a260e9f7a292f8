# Everything runs in a virtual environment of the project's own; nothing but Python 3.11+ and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test exhaustive check docs setup clean

demo: $(READY)  ## the main job on a real model; ends by saying where the report is
	$(BIN)/narrowcast optimize bundled:efficientnet-lite0 --data bundled:photos --max-drop 15% --minimise latency --out demo --force

test: $(READY)  ## the tests
	$(BIN)/python -m pytest

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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints/dev.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) docs/_build demo demo.work
