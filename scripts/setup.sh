#!/bin/sh
# Make .venv and install both distributions into it. Each step leaves a stamp, so that a second run costs nothing.
#   scripts/setup.sh run   what the product needs      scripts/setup.sh dev   and what tests and linters need
set -eu
cd "$(dirname "$0")/.."
want=${1:-run}
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch}
stamps=.venv/stamps

die() { echo "setup: $*" >&2; exit 1; }
say() { echo "setup: $*"; }

command -v "$PYTHON" >/dev/null 2>&1 || die "no '$PYTHON' found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3 ..."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$PYTHON" --version) is too old; warmroute needs Python 3.11 or newer: make PYTHON=python3.12 ..."
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || die "this Python has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"
command -v cargo >/dev/null 2>&1 || die "no cargo found; install a stable Rust toolchain (https://rustup.rs)"
command -v cc >/dev/null 2>&1 || die "no C linker found; install one (Debian, Ubuntu: apt install gcc)"

[ -x .venv/bin/python ] || { say "creating .venv with $("$PYTHON" --version)"; "$PYTHON" -m venv .venv; }
mkdir -p "$stamps"
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { .venv/bin/python -m pip "$@"; }

# A stamp holds a digest of what the step depends on; the step runs again when that changes.
fresh() { [ -f "$stamps/$1" ] && [ "$(cat "$stamps/$1")" = "$2" ]; }
digest() { cat "$@" | cksum | tr ' ' -; }

key="$TORCH"
if ! fresh torch "$key"; then
    if [ "$TORCH" = torch ] && .venv/bin/python -c 'import torch' 2>/dev/null; then
        say "torch is there already"
    else
        say "downloading torch: up to 3 GB with its CUDA libraries (another build: make TORCH='torch==...' ...)"
        # shellcheck disable=SC2086  # TORCH may hold several words
        pip install --progress-bar on $TORCH
    fi
    echo "$key" >"$stamps/torch"
fi

extras=demo
[ "$want" = dev ] && extras=dev
key=$(digest pyproject.toml workers/pyproject.toml Cargo.toml)
if ! fresh "packages-$extras" "$key"; then
    say "installing Python packages ($extras)"
    pip install -q "maturin>=1.9.4,<2" hatchling
    pip install -q --no-build-isolation -e ./workers
    .venv/bin/python scripts/requirements.py "$extras" >.venv/requirements.txt
    pip install -q -r .venv/requirements.txt
    echo "$key" >"$stamps/packages-$extras"
    rm -f "$stamps/core"
fi

key=$(find router_core Cargo.toml Cargo.lock pyproject.toml \( -name '*.rs' -o -name '*.toml' -o -name Cargo.lock \) -type f -not -path '*/target/*' | sort | xargs cksum | cksum | tr ' ' -)
if ! fresh core "$key" || [ -z "$(find python/warmroute -name '_core*.so' 2>/dev/null)" ]; then
    say "building the Rust core (release)"
    VIRTUAL_ENV="$PWD/.venv" .venv/bin/maturin develop --release --quiet
    echo "$key" >"$stamps/core"
fi
