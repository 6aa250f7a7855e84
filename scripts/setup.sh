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
have() { command -v "$1" >/dev/null 2>&1; }

# -- tools: each missing one is named in one line, with what to do

have "$PYTHON" || die "no '$PYTHON' found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3 ..."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$PYTHON" --version) is too old; warmroute needs Python 3.11 or newer: make PYTHON=python3.12 ..."
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$PYTHON has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"
have cargo || die "no cargo found; install a stable Rust toolchain (https://rustup.rs)"
have cc || die "no C linker 'cc' found; install one (Debian, Ubuntu: apt install gcc)"
rust_wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
rust_found=$(cargo --version | cut -d' ' -f2)
[ "$(printf '%s\n%s\n' "$rust_wanted" "$rust_found" | sort -V | head -n 1)" = "$rust_wanted" ] ||
    die "Rust $rust_found is too old; warmroute needs $rust_wanted or newer: rustup update stable"
if [ "$want" = dev ]; then
    cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 ||
        die "no rustfmt or clippy found; install them: rustup component add rustfmt clippy"
fi

# -- the environment

if ! .venv/bin/python -c '' 2>/dev/null; then
    say "creating .venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear .venv
fi
mkdir -p "$stamps"
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { .venv/bin/python -m pip "$@" || die "pip failed (see above); 'make' again goes on from here"; }

# A stamp holds a digest of what the step depends on; the step runs again when that changes.
fresh() { [ -f "$stamps/$1" ] && [ "$(cat "$stamps/$1")" = "$2" ]; }
digest() { cat "$@" | cksum | tr ' ' -; }

if ! fresh torch "$TORCH"; then
    if [ "$TORCH" = torch ] && .venv/bin/python -c 'import torch' 2>/dev/null; then
        say "torch is there already"
    else
        say "downloading torch: about 3 GB with the CUDA libraries it brings, 6 GB on disk"
        say "(without CUDA 200 MB: make TORCH='torch --index-url https://download.pytorch.org/whl/cpu' ...)"
        # shellcheck disable=SC2086  # TORCH may hold several words
        pip install $TORCH
    fi
    echo "$TORCH" >"$stamps/torch"
fi

extras=demo
[ "$want" = dev ] && extras=dev
key=$(digest pyproject.toml workers/pyproject.toml Cargo.toml)
if ! fresh packages-dev "$key" && ! fresh "packages-$extras" "$key"; then
    say "installing Python packages ($extras)"
    pip install -q "maturin>=1.9.4,<2"
    .venv/bin/python scripts/requirements.py "$extras" >.venv/requirements.txt
    pip install -q -r .venv/requirements.txt
    echo "$key" >"$stamps/packages-$extras"
    rm -f "$stamps/core" "$stamps/native"
fi

# $1: a stamp; $2: the distribution's folder; $3: what must be there afterwards; then the folders of its crates
build() {
    stamp=$1 folder=$2 product=$3
    shift 3
    sources=$(find "$@" Cargo.toml Cargo.lock "$folder/pyproject.toml" -type f \
        \( -name '*.rs' -o -name '*.toml' -o -name Cargo.lock \) -not -path '*/target/*' | sort)
    # shellcheck disable=SC2086  # one word per file: no path here holds a space
    key=$(digest $sources)
    # shellcheck disable=SC2086  # a pattern
    if ! fresh "$stamp" "$key" || ! ls $product >/dev/null 2>&1; then
        say "building $1 (release; about a minute on 2 cores)"
        (cd "$folder" && PIP_QUIET=1 VIRTUAL_ENV="$root/.venv" "$root/.venv/bin/maturin" develop --release --quiet) ||
            die "building $1 failed (see above)"
        echo "$key" >"$stamps/$stamp"
    fi
}
root=$PWD
build core . 'python/warmroute/_core*.so' router_core
build native workers 'workers/warmroute_worker/_native*.so' workers/native workers/rank_comm workers/cpu_kernels
