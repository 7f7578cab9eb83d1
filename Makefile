# `make demo` and `make test` do the whole set-up on a machine with Python 3.11 and make.
PYTHON ?= python3
# uv, pip, or auto: uv if it can be installed and would do what pip is configured to do.
INSTALLER ?= auto
# An index with PyTorch's builds in addition to PyPI, for example the one with its CPU builds.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test fakecuda deliver docs lint clean

demo: $(VENV)/demo
	dvc repro

# Two processes, since each needs a gigabyte or two: `make test JOBS=4` on a larger machine.
JOBS ?= 2
test: $(VENV)/ready
	python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# GPU paths without a GPU, by gcc and PyTorch's CUDA build, which is in .venv unless TORCH_INDEX chose
# another; else FAKECUDA is the interpreter of an environment that has it.
FAKECUDA ?= $(CURDIR)/$(BIN)/python
fakecuda: $(VENV)/ready
	DECANT_TEST_FAKECUDA='$(FAKECUDA)' python -m pytest -m fakecuda -rP tests/fakecuda

# Prepare a finished run for others: evaluate it, export it as Hugging Face folder and GGUF files
# that are checked on three paths, and write its page. All results go to INTO, so that those of
# `dvc repro` stay as they are: `make deliver RUN=t2`. ARGS go to each stage.
RUN ?= student
INTO ?= cache/delivery/$(RUN)
DELIVERY = $(ARGS) $(foreach stage,evaluate export report,--set 'paths.$(stage)=$(INTO)/$(stage)')
deliver:
	python stages/evaluate.py --run '$(RUN)' $(DELIVERY)
	python stages/export.py --run '$(RUN)' $(DELIVERY)
	python stages/report.py $(DELIVERY)

# The documentation as a site, in site/; a broken link or anchor fails.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 mkdocs build

lint: $(VENV)/ready docs
	ruff check .
	ruff format --check .
	mypy
	lint-imports

# Installed again whenever the requirements change; `ready` adds what tests and linters need.
$(VENV)/demo: EXTRA := demo
$(VENV)/ready: EXTRA := dev
$(VENV)/demo $(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Decant needs Python 3.11 or newer: make PYTHON=python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV)'
	@$(BIN)/python tools/install.py '$(EXTRA)' --installer '$(INSTALLER)' --torch-index '$(TORCH_INDEX)'
	@touch $@

clean:
	rm -rf $(VENV) site
