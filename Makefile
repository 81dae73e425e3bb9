# On a fresh Debian machine, as root: `make demo` shows the main job, `make test` runs every test. Each sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := .cache/packages
CLUSTER := .cache/cluster-packages

.PHONY: demo test unit packets e2e conformance conformance-docs upstream lint bench protos lock clean

demo: $(READY) $(PACKAGES)
	$(BIN)/vcproxy demo $(ARGS)

# One session per kind, slowest last: unit tests in parallel, then everything that builds namespaces or control planes.
test: lint unit packets e2e

unit: $(READY) $(PACKAGES)
	$(BIN)/pytest -q -n 2 --dist loadfile tests/unit

packets: $(READY) $(PACKAGES)
	$(BIN)/pytest -q -n 2 --dist loadfile tests/packets

e2e: $(READY) $(PACKAGES) $(CLUSTER)
	e2e/tools/build
	$(BIN)/python -m e2e.cluster build
	$(BIN)/pytest -q e2e

# vcproxy beside the real kube-proxy, case by case; the documents about it are written anew.
conformance: $(READY) $(PACKAGES)
	@e2e/tools/build >/dev/null
	@$(BIN)/python -m e2e.conformance $(ARGS)

conformance-docs: $(READY)
	$(BIN)/python -m tests.conformance.report

# Kubernetes' own tests on a real cluster, with vcproxy and with kube-proxy; the document about it is written anew. 70 minutes.
upstream: $(READY) $(PACKAGES) $(CLUSTER)
	@$(BIN)/python -m e2e.cluster build
	@$(BIN)/python -m e2e.cluster test --write $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	tools/protos --check

bench: $(READY) $(PACKAGES)
	e2e/tools/build
	$(BIN)/python -m benchmarks $(ARGS)

protos: $(READY)
	tools/protos

# New pins: edit pyproject.toml, then this.
lock: $(READY)
	tools/lock

# The environment, from pinned and hashed requirements; made anew when a pin changes.
$(READY): requirements-dev.lock pyproject.toml tools/setup
	tools/setup venv $(PYTHON) $(VENV)
	@touch $@

# Distribution packages, installed only where missing.
$(PACKAGES): tools/setup
	tools/setup packages
	@mkdir -p $(dir $@) && touch $@

$(CLUSTER): tools/setup
	tools/setup packages cluster
	@mkdir -p $(dir $@) && touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
