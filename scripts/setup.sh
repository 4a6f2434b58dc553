#!/bin/sh
# Makes sure that PostgreSQL's server programs are here; the test bed finds them by itself afterwards.
set -eu

have_server() {
    for folder in "${PG_BIN:-}" /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql*/bin; do
        if [ -n "$folder" ] && [ -x "$folder/postgres" ] && [ -x "$folder/pg_rewind" ]; then return 0; fi
    done
    command -v postgres >/dev/null 2>&1 && command -v pg_rewind >/dev/null 2>&1
}

if have_server; then exit 0; fi

as_root=""
if [ "$(id -u)" -ne 0 ]; then as_root="sudo"; fi

if command -v apt-get >/dev/null 2>&1; then
    # Debian's package would make and start a server of its own; only the programs are wanted.
    if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
        $as_root mkdir -p /etc/postgresql-common
        echo "create_main_cluster = false" | $as_root tee /etc/postgresql-common/createcluster.conf >/dev/null
    fi
    $as_root apt-get update -q
    $as_root env DEBIAN_FRONTEND=noninteractive UCF_FORCE_CONFFOLD=1 \
        apt-get install -q -y --no-install-recommends -o Dpkg::Options::=--force-confold postgresql
elif command -v dnf >/dev/null 2>&1; then
    $as_root dnf install -y postgresql-server
elif command -v brew >/dev/null 2>&1; then
    brew install postgresql
fi

if ! have_server; then
    echo "PostgreSQL's server programs are missing: install PostgreSQL 14 or newer, or set PG_BIN to their folder." >&2
    exit 1
fi
