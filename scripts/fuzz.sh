#!/bin/sh
# Runs each fuzz target for so many seconds: fuzz.sh SECONDS TARGET…
set -eu
cd "$(dirname "$0")/../fuzz"

missing() {
    echo "fuzz: skipped, $1 is missing; install it with: $2"
    exit 0
}

cargo +nightly --version >/dev/null 2>&1 || missing "the nightly toolchain" "rustup toolchain install nightly"
cargo +nightly fuzz --version >/dev/null 2>&1 || missing "cargo-fuzz" "cargo install cargo-fuzz"

seconds=$1
shift
for target in "$@"; do
    mkdir -p "corpus/$target"
    dictionary=""
    if [ -f "$target.dict" ]; then dictionary="-dict=$target.dict"; fi
    echo "fuzz: $target, $seconds s"
    cargo +nightly fuzz run "$target" "corpus/$target" "seeds/$target" -- \
        -max_total_time="$seconds" -timeout=10 -print_final_stats=1 -verbosity=0 $dictionary
done
