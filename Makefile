# The manual. `make demo` and `make test` do all the set-up themselves; a second run re-uses what is there.
#   PYTHON=python3.12      another interpreter to make .venv with
#   TORCH='torch==2.9.*'   another torch requirement: anything that `pip install` takes
PYTHON ?= python3
TORCH ?= torch
PY := .venv/bin/python
export PYTHON TORCH

.PHONY: help setup setup-dev demo serve test test-all lint type format bench bench-core fuzz clean

help:           ## what can be done here
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup:          ## .venv with both distributions, the Rust core in release mode
	@sh scripts/setup.sh run

setup-dev:      ## setup, and what the tests and linters need
	@sh scripts/setup.sh dev

demo: setup     ## the whole product once: router, two workers, five conversations, a table
	@$(PY) -m bench.demo

serve: setup    ## the same router and workers, kept up
	@$(PY) -m bench.serve

test: setup-dev ## everything that proves the project, at most 15 minutes on 2 cores
	cargo test --quiet --workspace
	$(PY) -m pytest -m "not slow"

test-all: setup-dev ## test, and the slow drills
	cargo test --quiet --workspace --release
	$(PY) -m pytest

lint: setup-dev type ## formatting, lints, types; warnings are errors
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets --all-features -- -D warnings
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

type: setup-dev ## mypy, and the extensions' stubs against the extensions
	$(PY) -m mypy python workers tests bench scripts
	MYPYPATH=python $(PY) -m mypy.stubtest --mypy-config-file pyproject.toml warmroute._core
	MYPYPATH=workers $(PY) -m mypy.stubtest --mypy-config-file pyproject.toml warmroute_worker._native

format: setup-dev ## put everything in form
	cargo fmt --all
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: setup-dev ## the router against its peers (bench/README.md)
	$(PY) -m bench.bench_router

bench-core:     ## the routing core alone: what a decision costs, what reading costs
	cargo bench --quiet --package router_core

fuzz:           ## a minute of random input for each parser (a nightly toolchain and cargo-fuzz are needed)
	cd router_core && for target in prompt heads framing; do \
		cargo +nightly fuzz run $$target -- -max_total_time=60 -max_len=4096 || exit 1; done

clean:          ## remove what builds and runs made
	rm -rf .venv target .run
