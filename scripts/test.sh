#!/usr/bin/env bash
# Runs every test, or those that cargo's words after the script choose: test.sh --test it -- settle::
# The tests play failovers in real time, and a shared machine may stall in the middle of one: so a test that failed runs
# once more by itself. If it passes then, it is told as FLAKY, which is a fault of the test. If it fails again, or more
# than MOST failed, or a program of tests did not come to its end, the run has failed.
set -euo pipefail
cd "$(dirname "$0")/.."
MOST=3
# The tests wait for timers and servers most of the time: three at once keep two cores busy, and take a third less time.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-3}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
cargo test --all-features --no-fail-fast "$@" 2>&1 | tee "$log" && exit 0

mapfile -t failed < <(sed -n 's/^test \(.*\) \.\.\. FAILED.*/\1/p' "$log")
mapfile -t targets < <(sed -n 's/^    `\(-.*\)`$/\1/p' "$log")
# A program that was ended in the middle has no result, and tests of it did not run.
counted=$(awk '/^test result: FAILED/ { programs += 1; tests += $6 } END { print programs + 0, tests + 0 }' "$log")
if [ "$counted" != "${#targets[@]} ${#failed[@]}" ] || [ "${#failed[@]}" -eq 0 ] || [ "${#failed[@]}" -gt "$MOST" ]; then
    exit 1
fi

# Documentation is no matter of time.
case "${targets[*]}" in *--doc*) exit 1 ;; esac

case " $* " in *" --ignored "*) ignored=--ignored ;; *) ignored= ;; esac
echo "test.sh: once more, by themselves: ${failed[*]}"
# The programs that were built. For one of them alone, cargo would choose other features and build everything anew.
programs='
    /^ +Running .*\(.*\)$/ { sub(/^.*\(/, ""); sub(/\)$/, ""); program = $0 }
    /^error: test failed, to rerun pass `-p / { split($0, words, " "); print words[8], program }'
mapfile -t programs < <(awk "$programs" "$log")
for line in "${programs[@]}"; do
    package=${line%% *} program=$(realpath "${line#* }")
    folder=$(cargo pkgid --offline -p "$package" | sed 's|^path+file://||; s|#.*||')
    (cd "$folder" && CARGO_MANIFEST_DIR=$folder "$program" $ignored --exact "${failed[@]}") 2>&1
done
printf 'test.sh: FLAKY, passed when it ran by itself: %s\n' "${failed[@]}"
