#!/bin/sh
# What the default build costs a user: crates, and the time of a first `cargo build`, beside that of deadpool-postgres alone.
# With the versions of Cargo.lock. For figures, on an idle machine; PROFILE=release for the other profile.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
unset CARGO_TARGET_DIR
profile=${PROFILE:-dev}

# What stands in this crate's Cargo.toml after `deadpool-postgres = `.
version=$(sed -n 's/^deadpool-postgres = "\(.*\)"$/\1/p' "$root/Cargo.toml")

measure() {
    name=$1 dependency=$2
    mkdir -p "$work/$name/src"
    cp "$root/Cargo.lock" "$work/$name/"
    printf '[package]\nname = "%s"\nversion = "0.0.0"\nedition = "2024"\n[dependencies]\n%s\n[workspace]\n' \
        "$name" "$dependency" > "$work/$name/Cargo.toml"
    echo 'fn main() {}' > "$work/$name/src/main.rs"
    cd "$work/$name"
    crates=$(cargo tree --quiet --edges normal --prefix none --format '{p}' | sed 's/ (.*//' | sort -u | wc -l)
    cargo fetch --quiet
    began=$(date +%s)
    # The processor's time, of all cores together, is the same on a busy machine.
    busy=$( (cargo build --quiet --offline --profile "$profile" && times) |
        awk 'END { split($1, u, /[ms]/); split($2, s, /[ms]/); printf "%d", u[1] * 60 + u[2] + s[1] * 60 + s[2] }')
    ended=$(date +%s)
    # Less the empty crate itself.
    printf '%-26s %4d crates  %4d s, %4d s of processor time  (%s, %s cores)\n' \
        "$3" $((crates - 1)) $((ended - began)) "$busy" "$profile" "$(nproc)"
}

measure plain "deadpool-postgres = \"$version\"" "deadpool-postgres"
measure failover "tokio-postgres-failover = { path = \"$root\" }" "tokio-postgres-failover"
