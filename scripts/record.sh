#!/bin/sh
# Notes in tests/ran which tests of docs/scenarios.md passed on a server: record.sh SERVER SUITE SECONDS LOG [FILTER…]
# SERVER is a whole version (18.6), SUITE what was run, and LOG what libtest said. A test that failed is taken off the
# list of this version; one that did not run stays as it is. `RENEW=1 cargo test --test scenarios_table` then renews the
# pages.
set -eu
cd "$(dirname "$0")/.."
server=$1 suite=$2 seconds=$3 log=$4
shift 4
filter=${*:-all}
major=${server%%.*}
tests=tests/ran/tests.txt
runs=tests/ran/runs.txt
mkdir -p tests/ran
touch "$tests" "$runs"
new=$(mktemp)
named=$(mktemp)
trap 'rm -f "$new" "$named"' EXIT

# Names that docs/scenarios.md has, and that are no file's.
grep -o '`[a-z0-9_:]*::[a-z0-9_]*`' docs/scenarios.md | tr -d '`' | sort -u >"$named"

# name version…: each line once, the versions in order.
awk -v major="$major" '
    FILENAME == ARGV[1] { named[$1]; next }
    FILENAME == ARGV[2] { for (i = 2; i <= NF; i++) ran[$1, $i] = 1; next }
    $1 == "test" && $3 == "..." && $4 == "ok" { ran[$2, major] = 1 }
    $1 == "test" && $3 == "..." && $4 == "FAILED" { ran[$2, major] = 0 }
    END {
        for (name in named) {
            line = name
            for (version = 13; version <= 18; version++) if (ran[name, version]) line = line " " version
            if (line != name) print line
        }
    }' "$named" "$tests" "$log" | LC_ALL=C sort >"$new"
cat "$new" >"$tests"

# The newest run of this suite with this filter on each major version.
counted=$(awk '/^test result:/ { passed += $4; failed += $6; found = 1 }
               END { if (found) printf "%d passed, %d failed", passed, failed; else print "passed" }' "$log")
commit=$(git rev-parse --short HEAD)
git diff --quiet HEAD -- src tests/it testkit testbed || commit="$commit and changes"
{
    awk -F ' \\| ' -v major="$major" -v suite="$suite" -v filter="$filter" \
        '{ split($1, version, "."); if (version[1] != major || $2 != suite || $3 != filter) print }' "$runs"
    echo "$server | $suite | $filter | $counted | $seconds s | $commit | $(date -u +%Y-%m-%d)"
} | LC_ALL=C sort >"$new"
cat "$new" >"$runs"
