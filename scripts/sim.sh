#!/bin/sh
# Builds the simulation with the flags that it needs, in a profile of its own, and runs it, or its tests.
#   failover_sim     replaces the wall clock, and lets deliberate faults be planted
#   tokio_unstable   tokio's own choices follow a seed
set -eu
cd "$(dirname "$0")/.."
export RUSTFLAGS="${RUSTFLAGS:-} --cfg failover_sim --cfg tokio_unstable"
case "${1:-run}" in
    build) exec cargo build --quiet --profile sim --package failover-sim ;;
    run) exec cargo run --quiet --profile sim --package failover-sim ;;
    mutants) exec cargo run --quiet --profile sim --package failover-sim -- mutants ;;
    long) exec cargo run --quiet --profile sim --package failover-sim -- long ;;
    test) exec cargo test --quiet --profile sim --package failover-sim ;;
    reality)
        # All scripts are one test, which the test bed would end after five minutes.
        export TESTBED_LIMIT="${TESTBED_LIMIT:-$((60 + ${SCRIPTS:-10} * 30))}"
        exec cargo test --quiet --profile sim --package failover-sim -- --ignored --nocapture reality:: ;;
    *) echo "sim.sh: build, run, mutants, long, reality or test" >&2; exit 1 ;;
esac
