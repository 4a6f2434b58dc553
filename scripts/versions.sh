#!/bin/sh
# Runs the tests against servers of these versions, which servers.sh fetches: versions.sh VERSION…
# SUITES="it exactly_once testbed soak" chooses among these, TESTS="settle:: tls::" among the tests of `it`.
# Prints a table at the end, and fails if a test failed or a server cannot be had. With RECORD=1, record.sh notes in tests/ran
# what passed, so nothing may be skipped.
set -eu
cd "$(dirname "$0")/.."
suites=${SUITES:-it exactly_once testbed soak}
tests=${TESTS:-}
if [ -n "${RECORD:-}" ]; then export CI=true; fi
[ $# -gt 0 ] || { echo "usage: sh scripts/versions.sh VERSION…, of 13 14 15 16 17 18" >&2; exit 1; }

# What is asked for is built before the first server runs, and its time is no version's.
# Without the package: with it, cargo would choose other features and build everything anew.
# shellcheck disable=SC2086 # lists of words, here and below
for suite in $suites; do
    case $suite in
        it | exactly_once | soak) cargo test --quiet --all-features --test "$suite" --no-run ;;
        testbed) cargo test --quiet --package testbed --no-run ;;
        *) echo "there is no suite $suite"; exit 1 ;;
    esac
done

# Not quietly: record.sh needs the names of the tests.
run() {
    case $1 in
        it) cargo test --all-features --test it -- $tests ;;
        exactly_once | soak) cargo test --all-features --test "$1" ;;
        testbed) cargo test --package testbed ;;
    esac
}

# "308 passed, 1 failed", of all the results in a log.
counted() {
    awk '/^test result:/ { passed += $4; failed += $6; found = 1 }
         END { if (found) printf "%d passed, %d failed, ", passed, failed }' "$1"
}

failed=0
table=target/pg/table
failures=target/pg/failures
sh scripts/servers.sh "$@" || failed=1
: >"$table"
: >"$failures"
for version in "$@"; do
    bin=$PWD/target/pg/$version/bin
    if [ ! -x "$bin/postgres" ]; then
        echo "| $version | not to be had: see above |" >>"$table"
        continue
    fi
    server=$("$bin/postgres" --version | awk '{ print $3 }')
    row="| $server |"
    for suite in $suites; do
        log=target/pg/$version-$suite.log
        began=$(date +%s)
        if PG_BIN=$bin run "$suite" >"$log" 2>&1; then ended=well; else ended=FAILED failed=1; fi
        took=$(($(date +%s) - began))
        said="$ended: $(counted "$log")$took s"
        echo "PostgreSQL $version, $suite: $said"
        row="$row $said |"
        if [ -n "${RECORD:-}" ]; then
            filter=
            if [ "$suite" = it ]; then filter=$tests; fi
            # shellcheck disable=SC2086 # a list of words
            if [ "$suite" = it ] || [ "$ended" = well ]; then sh scripts/record.sh "$server" "$suite" "$took" "$log" $filter; fi
        fi
        # The names that libtest lists at the end, or what a suite of our own said last.
        if [ "$ended" = FAILED ]; then
            names=$(sed -n '/^failures:$/,$ s/^    \([a-z0-9_:]*\)$/\1/p' "$log" | sort -u)
            printf 'PostgreSQL %s, %s (%s):\n' "$version" "$suite" "$log" >>"$failures"
            echo "${names:-$(tail -5 "$log")}" >>"$failures"
        fi
    done
    echo "$row" >>"$table"
done
echo
cat "$failures"
printf '| server |'
for suite in $suites; do printf ' %s |' "$suite"; done
echo
cat "$table"
exit "$failed"
