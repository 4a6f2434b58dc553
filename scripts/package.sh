#!/bin/sh
# Packs the crate and the test kit as for crates.io, unpacks them, and builds and tests what was packed, alone. It uses no
# network.
set -eu
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}/package-check
mkdir -p "$target"
target=$(cd "$target" && pwd)
# Beside no workspace: cargo would look for the package among its members.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

# A file that is not committed yet is packed, too.
cargo package --quiet --offline --allow-dirty --no-verify --target-dir "$target" \
    --package tokio-postgres-failover --package tokio-postgres-failover-testkit 2> "$work/log" ||
    { cat "$work/log" >&2; exit 1; }
# Tests that need the workspace stay here, and cargo names each of them.
grep -v '^warning: ignoring \(test\|example\) ' "$work/log" >&2 || true

check() {
    package=$1
    shift
    # With the present time: by the packed one, cargo would take what an earlier run has built for what was packed now.
    tar -xmzf "$target/package/$package.crate" -C "$work"
    bytes=$(wc -c < "$target/package/$package.crate")
    echo "package.sh: $package, $bytes bytes, $(find "$work/$package" -type f | wc -l) files"
    (cd "$work/$package" && CARGO_TARGET_DIR="$target" && export CARGO_TARGET_DIR &&
        cargo build --offline --locked && cargo test --offline --locked "$@")
}

version() {
    sed -n 's/^version = "\(.*\)"$/\1/p' "$1" | head -n 1
}

check "tokio-postgres-failover-$(version Cargo.toml)" --all-features
check "tokio-postgres-failover-testkit-$(version testkit/Cargo.toml)"
