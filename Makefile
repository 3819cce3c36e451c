# The commands of every day. Python >= 3.11, make and git are enough; `make demo UV=uv` installs faster where uv is at hand.
PYTHON ?= python3
UV ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What runs, and what tests need beside it.
LOCKS := requirements.lock requirements-dev.lock

.PHONY: demo test test-long serve lock
.DEFAULT_GOAL := demo

# From an empty checkout to a trained, evaluated and registered network, with every service it needs.
demo: $(INSTALLED)
	$(BIN)/vrt demo

# compileall: hundreds of processes import these, and the environment may forbid them to keep what they compile.
test: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m compileall -q vrt pipelines
	$(BIN)/python -m pytest -m "not long" --numprocesses 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder

test-long: $(INSTALLED)
	$(BIN)/python -m pytest

# Serves the deployment, so that `prefect deployment run train/vrt` in another terminal trains.
serve: $(INSTALLED)
	$(BIN)/vrt services up
	$(BIN)/python -m pipelines

# --no-deps: the locks are complete, and resolving them again costs pip minutes. The second line adds what torch itself pins
# beyond them: the CUDA libraries where its wheel is the CUDA build, nothing for the CPU build.
$(INSTALLED): $(LOCKS) pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
ifeq ($(UV),)
	$(BIN)/python -m pip install --no-deps $(LOCKS:%=--requirement %)
	$(BIN)/python -m pip install --quiet $(LOCKS:%=--constraint %) --no-build-isolation --editable ".[dev]"
else
	$(UV) pip install --python $(BIN)/python $(LOCKS:%=--requirement %)
	$(UV) pip install --python $(BIN)/python --no-build-isolation --editable ".[dev]"
endif
	touch $@

# Resolve pyproject.toml anew for every platform, without torch's own pins (see above).
COMPILE = $(or $(UV),uv) pip compile --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --no-emit-find-links
WITHOUT_TORCHS_PINS = grep -v -E '^(nvidia-|cuda-|triton)'
lock:
	$(COMPILE) pyproject.toml | $(WITHOUT_TORCHS_PINS) > requirements.lock.new
	$(COMPILE) --extra dev --constraint requirements.lock.new pyproject.toml | $(WITHOUT_TORCHS_PINS) | grep -v -x -F -f requirements.lock.new > requirements-dev.lock.new
	mv requirements.lock.new requirements.lock
	mv requirements-dev.lock.new requirements-dev.lock
