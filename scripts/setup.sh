#!/bin/sh
# Makes sure that PostgreSQL's server programs are here, and HAProxy, PgBouncer and psycopg if they can be had. With the
# word `managers`: etcd, Patroni and repmgr, too. The test bed finds them by itself afterwards. Only the programs are
# wanted: no service is started.
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
install_quiet_debian() (
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
        for service in haproxy pgbouncer etcd repmgrd; do
            $as_root systemctl disable --quiet "$service" 2>/dev/null || true
        done
    fi
)

# The tests that need these say so and pass where they are missing, so nothing here fails, and nobody is asked for a password.
# shellcheck disable=SC2086 # a list of words
install_optional() {
    if [ -n "$as_root" ]; then as_root="sudo -n"; fi
    if command -v apt-get >/dev/null 2>&1; then
        install_quiet_debian $1
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

# Patroni gets a folder of its own, made with the system's Python: another one may lie where the servers' user cannot run it.
VENV="$(dirname "$0")/../target/patroni"
PYTHON=/usr/bin/python3
if [ ! -x "$PYTHON" ]; then PYTHON=python3; fi

# The sidecar's test takes the first of these that has it.
have_psycopg() {
    for python in "$VENV/bin/python3" python3 /usr/bin/python3; do
        if "$python" -c 'import psycopg' 2>/dev/null; then return 0; fi
    done
    return 1
}

# pip puts a program there when all that it needs is there.
have_patroni() { [ -x "$VENV/bin/patroni" ] && "$VENV/bin/python3" -c '' 2>/dev/null; }

have_venv() { "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; }

# In the background, beside apt-get. What it says is of interest only if it fails.
install_patroni() {
    log=$(mktemp)
    if ! { { [ -x "$VENV/bin/pip" ] || "$PYTHON" -m venv "$VENV"; } && timeout 90 "$VENV/bin/pip" install --quiet --disable-pip-version-check --retries 1 \
        --timeout 10 'patroni[etcd3,psycopg3]' 'psycopg[binary]'; } >"$log" 2>&1; then tail -n 1 "$log" >&2; fi
    rm -f "$log"
}

# The one that the test bed takes.
server_folder() {
    if [ -n "${PG_BIN:-}" ]; then echo "$PG_BIN"; return; fi
    for folder in /usr/lib/postgresql/*/bin; do
        if [ -x "$folder/postgres" ]; then echo "$folder"; fi
    done | sort -V | tail -n 1
}

have_repmgr() { [ -x "$(server_folder)/repmgrd" ]; }

missing_managers() {
    have etcd || printf 'etcd '
    have_patroni || printf 'patroni '
    have_repmgr || printf 'repmgr '
}

# Debian's names: the package of repmgr is for one version of PostgreSQL.
manager_packages() {
    have etcd || printf 'etcd-server '
    have_venv || printf 'python3-venv '
    have_repmgr || printf 'postgresql-%s-repmgr ' "$("$(server_folder)/postgres" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')"
}

install_managers() {
    patroni=""
    if ! have_patroni && have_venv; then
        install_patroni &
        patroni=$!
    fi
    if command -v apt-get >/dev/null 2>&1; then
        if [ -n "$as_root" ]; then as_root="sudo -n"; fi
        packages=$(manager_packages)
        # All at once, or else each that can be had.
        # shellcheck disable=SC2086 # a list of words
        if [ -n "$packages" ] && ! install_quiet_debian $packages; then
            for package in $packages; do install_quiet_debian "$package" || true; done
        fi
    fi
    if [ -n "$patroni" ]; then wait "$patroni"; elif ! have_patroni; then install_patroni; fi
}

missing=$(missing_proxies)
if [ -n "$missing" ]; then install_optional "$missing" || true; fi
if ! have_psycopg; then install_optional python3-psycopg || true; fi
missing=""
if [ "${1:-}" = managers ]; then
    missing=$(missing_managers)
    if [ -n "$missing" ]; then install_managers || true; fi
    missing=$(missing_managers)
fi
have_psycopg || missing="psycopg $missing"
missing="$(missing_proxies)$missing"
if [ -n "$missing" ]; then
    echo "Not installed, so the tests that need it are skipped: $missing" >&2
fi
