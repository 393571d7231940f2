# Sourced by the scripts beside it: where the tree is, what is installed, and how to say so.
# shellcheck shell=bash

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(dirname "$here")

say() { printf '%s\n' "$*" >&2; }
step() { printf '\n== %s\n' "$*" >&2; }
die() {
    say "error: $*"
    exit 2
}

# need COMMAND PACKAGE [COMMAND PACKAGE …]: installs the Debian packages of the commands that are missing, as
# root or through sudo; where neither is possible it prints the line to run and ends with status 2.
need() {
    local missing=()
    while [ $# -ge 2 ]; do
        # Debian keeps administrators' commands where an ordinary user's PATH does not look.
        PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null || missing+=("$2")
        shift 2
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    local install=(apt-get install -y --no-install-recommends "${missing[@]}") sudo=()
    command -v apt-get >/dev/null || die "missing: ${missing[*]} (names of Debian packages); install them and start again"
    if [ "$(id -u)" -ne 0 ]; then
        if command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
            sudo=(sudo)
        else
            die "missing packages; run this as root and start again: apt-get update && ${install[*]}"
        fi
    fi
    say "installing: ${missing[*]}"
    "${sudo[@]}" apt-get update -q >&2 || say "warning: apt-get update failed; trying with the lists at hand"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive "${install[@]}" >&2 ||
        die "could not install; run this as root and start again: ${install[*]}"
}

need_rust() {
    if ! command -v cargo >/dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then
        PATH="$HOME/.cargo/bin:$PATH"
    fi
    command -v cargo >/dev/null ||
        die "Rust is missing: install rustup from https://rustup.rs (the toolchain in rust-toolchain.toml follows by itself) and start again"
    need cc gcc
}

# Builds the release binary and sets $pontoon to its path.
build_pontoon() {
    need_rust
    (cd "$top" && cargo build --release --locked -p vmm --bin pontoon) >&2
    pontoon=${CARGO_TARGET_DIR:-$top/target}/x86_64-unknown-linux-gnu/release/pontoon
    [ -x "$pontoon" ] || die "the build left no binary at $pontoon"
}

export PATH="$PATH:/usr/sbin:/sbin"
