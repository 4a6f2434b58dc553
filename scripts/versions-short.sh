#!/bin/sh
# Runs the tests that depend most on the server's version, on these versions: versions-short.sh VERSION…
# A server that cannot be fetched is skipped, and the last lines say so. `versions.sh` runs everything, and skips nothing.
set -eu
cd "$(dirname "$0")/.."
tests=${TESTS:-settle:: failover:: transaction:: tls::}
failed=0
said=$(mktemp)
skipped=$(mktemp)
trap 'rm -f "$said" "$skipped"' EXIT
for version in "$@"; do
    if ! sh scripts/servers.sh "$version" >"$said" 2>&1; then
        echo "SKIPPED: nothing ran on PostgreSQL $version, which could not be made ready here: $(tail -1 "$said")" >>"$skipped"
        continue
    fi
    # shellcheck disable=SC2086 # a list of words
    PG_BIN=$PWD/target/pg/$version/bin bash scripts/test.sh --test it -- $tests || failed=1
done
cat "$skipped"
exit "$failed"
