#!/bin/sh
# Makes sure that PostgreSQL's server programs are here, and HAProxy and PgBouncer if they can be had; the test bed finds them by
# itself afterwards. Only the programs are wanted: no service is started.
set -eu

have_server() {
    for folder in "${PG_BIN:-}" /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql*/bin; do
        if [ -n "$folder" ] && [ -x "$folder/postgres" ] && [ -x "$folder/pg_basebackup" ]; then return 0; fi
    done
    command -v postgres >/dev/null 2>&1 && command -v pg_basebackup >/dev/null 2>&1
}

have() {
    for folder in /usr/sbin /usr/local/sbin /usr/local/bin /opt/homebrew/bin; do
        if [ -x "$folder/$1" ]; then return 0; fi
    done
    command -v "$1" >/dev/null 2>&1
}

missing_proxies() {
    for program in haproxy pgbouncer; do
        have "$program" || printf '%s ' "$program"
    done
}

as_root=""
if [ "$(id -u)" -ne 0 ]; then as_root="sudo"; fi

install_debian() {
    $as_root env DEBIAN_FRONTEND=noninteractive UCF_FORCE_CONFFOLD=1 \
        apt-get install -q -y --no-install-recommends -o Dpkg::Options::=--force-confold "$@"
}

install_server() {
    if command -v apt-get >/dev/null 2>&1; then
        # Debian's package would make and start a server of its own.
        if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
            $as_root mkdir -p /etc/postgresql-common
            echo "create_main_cluster = false" | $as_root tee /etc/postgresql-common/createcluster.conf >/dev/null
        fi
        $as_root apt-get update -q
        install_debian postgresql
    elif command -v dnf >/dev/null 2>&1; then
        $as_root dnf install -y postgresql-server
    elif command -v brew >/dev/null 2>&1; then
        brew install postgresql
    fi
}

POLICY=/usr/sbin/policy-rc.d

# In a subshell, which takes back what it forbade however it ends.
install_proxies_debian() (
    # Debian's packages would start what they install, now and at each boot.
    if [ ! -e "$POLICY" ]; then
        trap '$as_root rm -f "$POLICY"' EXIT
        trap 'exit 1' HUP INT TERM
        printf '#!/bin/sh\nexit 101\n' | $as_root tee "$POLICY" >/dev/null || return 1
        $as_root chmod 755 "$POLICY" || return 1
    fi
    $as_root apt-get update -q || return 1
    install_debian "$@" || return 1
    if command -v systemctl >/dev/null 2>&1; then
        $as_root systemctl disable --quiet "$@" || return 1
    fi
)

# The tests that need these say so and pass where they are missing, so nothing here fails, and nobody is asked for a password.
# shellcheck disable=SC2086 # a list of words
install_proxies() {
    if [ -n "$as_root" ]; then as_root="sudo -n"; fi
    if command -v apt-get >/dev/null 2>&1; then
        install_proxies_debian $1
    elif command -v dnf >/dev/null 2>&1; then
        $as_root dnf install -y $1
    elif command -v brew >/dev/null 2>&1; then
        brew install $1
    fi
}

if ! have_server; then install_server; fi
if ! have_server; then
    echo "PostgreSQL's server programs are missing: install PostgreSQL 13 or newer, or set PG_BIN to their folder." >&2
    exit 1
fi

missing=$(missing_proxies)
if [ -n "$missing" ]; then install_proxies "$missing" || true; fi
missing=$(missing_proxies)
if [ -n "$missing" ]; then
    echo "Not installed, so the tests that need it are skipped: $missing" >&2
fi
