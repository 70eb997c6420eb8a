# make demo: install into .venv and run the main job end to end on a small generated world
# make test: install into .venv and run the test suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
EXTRAS ?= test,wandb,trl

.PHONY: demo test lint types check install slow clean

demo: install
	$(BIN)/python -m po.sandbox demo

# One process for each core.
test: install
	$(BIN)/python -m pytest -n auto --dist worksteal

slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

install: $(VENV)/.installed

# Without an NVIDIA GPU the CPU build of torch is installed first, so that nothing pulls the CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/pip install -q -c constraints.txt "torch==$(TORCH)"; \
	else \
	  $(BIN)/pip install -q -c constraints.txt "torch==$(TORCH)+cpu" 2>/dev/null || \
	  $(BIN)/pip install -q -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)+cpu"; \
	fi
	$(BIN)/pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) .sandbox runs
