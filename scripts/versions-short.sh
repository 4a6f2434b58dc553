#!/bin/sh
# Runs the tests that depend most on the server's version, on these versions: versions-short.sh VERSION…
# A server that cannot be fetched is skipped, and the last lines say so. `versions.sh` runs everything, and skips nothing.
set -eu
cd "$(dirname "$0")/.."
tests=${TESTS:-settle:: failover:: transaction:: tls::}
skipped=""
for version in "$@"; do
    if sh scripts/servers.sh "$version"; then
        # shellcheck disable=SC2086 # a list of words
        PG_BIN=$PWD/target/pg/$version/bin bash scripts/test.sh --test it -- $tests
    else
        skipped="$skipped $version"
    fi
done
for version in $skipped; do echo "SKIPPED: PostgreSQL $version cannot be fetched here, so nothing ran on it."; done
