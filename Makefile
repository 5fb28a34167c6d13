# make demo: distil an LCM-LoRA from the shipped teacher and draw.  make test: run all tests.
# make notebooks: execute the notebooks again and keep what they show.
# PYTHON is 3.11 or newer; both make the virtual environment if there is none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint notebooks clean

$(VENV)/core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/test: $(VENV)/core
	$(PIP) -e '.[test]'
	touch $@

demo: $(VENV)/core
	$(BIN)/lcm-jax demo --out demo-out

test: $(VENV)/test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/test
	$(BIN)/ruff check .

notebooks: $(VENV)/test
	$(BIN)/python tools/run_notebooks.py notebooks/*.ipynb

clean:
	rm -rf $(VENV) demo-out runs
