# The manual. `make demo` and `make test` do all the set-up themselves; a second run re-uses what is there.
#   TORCH="torch==2.9.*"   another torch requirement (anything pip understands)
#   PYTHON=python3.12      another interpreter to make .venv with
PYTHON ?= python3
TORCH ?= torch
PY := .venv/bin/python
export PYTHON TORCH

.PHONY: help setup setup-dev demo serve test test-all lint type format bench clean

help:           ## what can be done here
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup:          ## .venv with both distributions, the Rust parts in release mode
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
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

type: setup-dev ## mypy, and the extension's stub against the extension
	.venv/bin/mypy python workers tests bench
	cd python && ../.venv/bin/python -m mypy.stubtest warmroute._core

format:         ## put everything in form
	cargo fmt --all
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: setup-dev ## the router against its peers (bench/README.md)
	$(PY) -m bench.bench_router

clean:          ## remove what builds made
	rm -rf .venv target .run
