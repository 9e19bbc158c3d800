# The two commands of the README, `make run` and `make test`, and those a contributor needs. Each one sets up what it
# needs by itself: a virtual environment in .venv with the versions of constraints.txt. Set-up happens once, and again
# when pyproject.toml or constraints.txt change. To choose the Python: make run PYTHON=python3.12
# To choose the build of torch: make run TORCH=cpu, or TORCH=index for the one of pip's own index (see below).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run twin test test-slow check format docs sample bench clean

# Tests start hundreds of processes. Where the environment forbids compiled files, each compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
PINS := pyproject.toml constraints.txt

# The first Python on the path that is new enough and can make virtual environments.
PYTHON ?=
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python)

# Which build of torch is installed. The public index has the CUDA build for Linux, which brings gigabytes of libraries
# that a machine without a GPU has no use for. So on Linux without an NVIDIA GPU the CPU build is taken, from PyTorch's
# own index; where that cannot be asked, what pip finds otherwise. TORCH=cpu and TORCH=index decide it by hand, the
# latter for a machine that sets up what machines with GPUs will run. A torch that is installed already stays.
TORCH ?= $(if $(filter Linux,$(shell uname -s)),auto,index)
CPU_INDEX := https://download.pytorch.org/whl/cpu

# A process for each processor, four at most: each takes a gigabyte, and tests of parallel training start more. A file's
# tests stay together, because they share what is made for them, and files are taken in order, the longest not last.
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.ready-run ## Train the tiny Z-code M3 model, translate, write runs/.../report.html
	$(BIN)/python -m moekit.recipes.zcode_m3 run $(ARGS)

twin: $(VENV)/.ready-run ## Train a sparse model and its dense twin on text that knows things, and compare them
	$(BIN)/python -m moekit run moe_lm --variant facts --twin $(ARGS)

test: $(VENV)/.ready-test ## Run every fast test
	$(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE) $(ARGS)

test-slow: $(VENV)/.ready-test ## Run the tests marked slow
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/.ready-test ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-test ## Let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.ready-docs ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# From a folder of its own, so that the commands on the page name nothing of this one; one thread, as results depend on it.
sample: $(VENV)/.ready-run ## Train the run of docs/sample-report.html and draw it anew
	@mkdir -p build/sample
	cd build/sample && PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 moekit run gshard --train.max_minutes 60 --overwrite
	cp build/sample/runs/gshard-tiny/report.html docs/sample-report.html

bench: $(VENV)/.ready-bench ## Time a training step beside Hugging Face transformers
	$(BIN)/python benchmarks/train_step.py $(ARGS)

clean: ## Remove the virtual environment, caches and build outputs; runs/ stays
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Set-up. A stamp is removed first and written last, so an interrupted set-up is simply done again. The build back end
# comes before the package, so that it is a pinned one too.
$(VENV)/.ready-run: EXTRAS :=
$(VENV)/.ready-test: EXTRAS := [test]
$(VENV)/.ready-docs: EXTRAS := [docs]
$(VENV)/.ready-bench: EXTRAS := [test,hub]

$(VENV)/.ready-%: $(PINS) | $(VENV)/.usable
	@echo "Installing moekit$(EXTRAS) into $(VENV), with the versions of constraints.txt (some minutes at first) ..."
	@rm -f $@
	@$(INSTALL) hatchling editables
	@case "$(TORCH)" in \
	  cpu|index) build=$(TORCH);; \
	  auto) if nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then build=index; else build=cpu; fi;; \
	  *) echo "TORCH must be cpu, index or auto: got $(TORCH)" >&2; exit 2;; \
	esac; \
	if [ $$build = cpu ] && ! $(INSTALL) --no-deps --retries 0 --timeout 10 --index-url $(CPU_INDEX) torch 2>/dev/null; then \
	  echo "No CPU build of torch from $(CPU_INDEX): taking the one that pip finds otherwise."; \
	fi
	@$(INSTALL) --no-build-isolation --editable ".$(EXTRAS)"
	@touch $@

# A folder left by an interrupted `venv`, or one whose Python has gone, is made anew; one that works is kept.
$(VENV)/.usable:
	@python=; for candidate in $(CANDIDATES); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "moekit needs Python 3.11 or newer, with the venv module. Looked for:" >&2; \
	  for candidate in $(CANDIDATES); do \
	    version=$$("$$candidate" --version 2>/dev/null) || version="not found"; \
	    echo "  $$candidate: $$version" >&2; \
	  done; \
	  echo "Install one (Debian, Ubuntu: apt install python3-venv) or name one: make PYTHON=path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	if [ ! -f $(VENV)/pyvenv.cfg ] || [ -e $(VENV)/.unfinished ] || ! $(PIP) --version >/dev/null 2>&1; then \
	  echo "Making $(VENV) with $$("$$python" --version) ..."; \
	  "$$python" -m venv --clear --without-pip $(VENV); \
	  touch $(VENV)/.unfinished; \
	  $(BIN)/python -m ensurepip --default-pip >/dev/null; \
	  rm $(VENV)/.unfinished; \
	fi
	@touch $@
