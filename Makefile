# `make demo` and `make test` do everything from a fresh clone; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLIENTS := .venv-clients/.installed
# The suites that need only Python, git and make.
SUITES := tests/unit tests/equivalence tests/contract tests/service tests/e2e
# Test processes side by side, each with whole files.
TEST_WORKERS ?= 2

# Of random faults: alone, and among the others of `make test-system`.
SOAK_SECONDS ?= 1800
SHORT_SOAK_SECONDS ?= 180

.PHONY: help install demo test test-system soak lint format protos clean

help:
	@echo "make demo         bundled tiny model, both tiers on this machine"
	@echo "make test         lint, then every suite that needs only Python, git and make"
	@echo "make test-system  the suites that need root and system packages, and the full equality product"
	@echo "make soak         random faults under load for SOAK_SECONDS (1800)"
	@echo "make lint         ruff, mypy, import-linter, freshness of the generated code"
	@echo "make format       ruff format and its safe fixes"
	@echo "make protos       regenerate moe_core/pb from proto/"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"epserve needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=python3.11, say")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/epserve demo

test: lint
	$(BIN)/python -m pytest $(SUITES) --numprocesses $(TEST_WORKERS) --dist loadfile

$(CLIENTS): tests/system/clients.txt tests/system/make_clients.sh $(INSTALLED)
	tests/system/make_clients.sh $(PYTHON)

test-system: $(INSTALLED) $(CLIENTS)
	$(BIN)/python -m pytest tests/system --soak $(SHORT_SOAK_SECONDS)

soak: $(INSTALLED)
	$(BIN)/python -m pytest tests/system/test_soak.py --soak $(SOAK_SECONDS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/regenerate_protos.py --check

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(INSTALLED)
	$(BIN)/python tools/regenerate_protos.py

clean:
	rm -rf $(VENV) .venv-clients build dist *.egg-info
