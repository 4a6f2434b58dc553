#!/bin/sh
# The library compiles, without a warning, with no feature, each one alone, and all. The features are those that cargo knows.
set -eu
cd "$(dirname "$0")/.."

# Those of the packages here, `"features":{"a":[…],…}`: no other package has one that the library lacks.
features=$(cargo metadata --no-deps --offline --format-version 1 |
    grep -o '"features":{[^}]*}' | grep -o '"[^":]*":\[' | tr -d '":[' | sort -u)
[ -n "$features" ] || { echo "features.sh: cargo metadata shows no feature" >&2; exit 1; }

check() {
    echo "features: $1"
    shift
    cargo clippy --quiet --package tokio-postgres-failover --lib "$@" -- -D warnings
}

check none --no-default-features
for feature in $features; do
    check "$feature" --no-default-features --features "$feature"
done
check all --all-features
