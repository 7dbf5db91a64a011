# `make demo` and `make test` need git, make and Python 3.10 to 3.13; nothing else.
#
#   PYTHON  the interpreter that makes the environment       (python3)
#   VENV    where the environment is                         (.venv)
#   TORCH   what pip is asked for, e.g. TORCH="torch==2.13.0" (whatever torch pip's settings give)
#
# To keep pip from downloading the CUDA build, let pip's own settings name an index or a folder with
# the CPU build (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS); a file in a find-links folder is preferred.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.tools

.PHONY: demo serve test check lint types install docs bench bench-answer clean

demo: $(STAMP)
	$(BIN)/cprec compare --model NextItNet --dataset ml-100k --controls recovered recovered-int8

# the served example, http://127.0.0.1:8000; trains and compresses its models once
serve: $(STAMP)
	$(BIN)/pip install --quiet --editable ".[serve]"
	test -d serving/compressed || $(BIN)/python -m examples.serve.prepare --out serving
	$(BIN)/python -m examples.serve serving/uncompressed serving/compressed

test: $(TOOLS) lint types
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: test

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TOOLS)
	$(BIN)/mypy

install: $(TOOLS)

# build/site/index.html, which needs no network
docs: $(STAMP)
	$(BIN)/pip install --quiet --editable ".[docs]"
	$(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python benchmarks/objectives.py

bench-answer: $(STAMP)
	$(BIN)/pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/answer.py

# torch first, from a local file where pip's settings offer one; then RecBole without its ray, which
# has no file for Python 3.12 and later; then the package with everything else RecBole needs.
$(STAMP): setup.py
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),)
	$(BIN)/python -c "import torch" 2>/dev/null \
	  || $(BIN)/pip install --quiet --no-index --no-deps torch 2>/dev/null \
	  || $(BIN)/pip install --quiet torch
else
	$(BIN)/pip install --quiet "$(TORCH)"
endif
	$(BIN)/pip install --quiet --no-deps recbole==1.2.1
	@echo "pip may say that recbole's ray is not installed: that is meant, see README.md, Install"
	$(BIN)/pip install --quiet --editable ".[fast]"
	touch $(STAMP)

# what tests, documents and the service need besides: a demo does not wait for it
$(TOOLS): $(STAMP)
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $(TOOLS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
