#!/bin/sh
# Installs the peers of other languages into target/bench, and says on one line for each what came of it:
#   psycopg-pool installed: psycopg 3.3.9, psycopg-pool 3.3.3
#   aws-jdbc missing: why
# The lines are kept in target/bench/peers, where the benchmark reads them.
# Needs python3, node with npm, and a JDK with the jars of Debian's libpostgresql-jdbc-java and libhikaricp-java; as root on
# Debian it installs what is missing of these. A peer that is missing fails nothing.
set -u

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
to=${BENCH_PEERS:-$root/target/bench}
jars=/usr/share/java
mkdir -p "$to"
log=$to/setup.log
: >"$log"

debian() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >>"$log" 2>&1 ||
        { apt-get update >>"$log" 2>&1 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >>"$log" 2>&1; }
}

why() {
    tail -n 1 "$log" | cut -c 1-200
}

version() {
    "$to/venv/bin/pip" show "$1" 2>>"$log" | sed -n 's/^Version: //p'
}

python() {
    command -v python3 >/dev/null || debian python3 python3-venv || { echo "psycopg-pool missing: no python3"; return 1; }
    [ -x "$to/venv/bin/pip" ] || python3 -m venv "$to/venv" >>"$log" 2>&1 || { echo "psycopg-pool missing: $(why)"; return 1; }
    "$to/venv/bin/pip" install -q "psycopg[binary,pool]>=3.2" >>"$log" 2>&1 || { echo "psycopg-pool missing: $(why)"; return 1; }
    echo "psycopg-pool installed: psycopg $(version psycopg), psycopg-pool $(version psycopg-pool)"
}

aws_python() {
    "$to/venv/bin/pip" install -q aws-advanced-python-wrapper >>"$log" 2>&1 || { echo "aws-python missing: $(why)"; return; }
    echo "aws-python installed: aws-advanced-python-wrapper $(version aws-advanced-python-wrapper)"
}

java_peer() {
    command -v javac >/dev/null || debian default-jdk-headless || { echo "hikaricp missing: no javac"; return; }
    for jar in postgresql HikariCP slf4j-api slf4j-nop; do
        [ -e "$jars/$jar.jar" ] || debian libpostgresql-jdbc-java libhikaricp-java libslf4j-java ||
            { echo "hikaricp missing: no $jars/$jar.jar"; return; }
    done
    javac -d "$to/java" -cp "$jars/postgresql.jar:$jars/HikariCP.jar" "$here/java/Load.java" >>"$log" 2>&1 ||
        { echo "hikaricp missing: $(why)"; return; }
    number() { basename "$(ls "$jars/$1"-[0-9]*.jar | head -n 1)" .jar | sed "s/^$1-//"; }
    echo "hikaricp installed: pgjdbc $(number postgresql), HikariCP $(number HikariCP), $(javac -version 2>&1)"
}

aws_java() {
    # Not among Debian's packages; published on Maven Central only. A jar put there by hand is taken.
    [ -e "$to/aws-advanced-jdbc-wrapper.jar" ] && { echo "aws-jdbc missing: no peer is written for it"; return; }
    echo "aws-jdbc missing: published on Maven Central only, which is not among Debian's packages"
}

node_peer() {
    command -v npm >/dev/null || debian nodejs npm || { echo "node-postgres missing: no npm"; return; }
    mkdir -p "$to/node" && cp "$here/node/load.js" "$to/node/"
    npm install --silent --no-audit --no-fund --prefix "$to/node" "pg@^8.20" >>"$log" 2>&1 ||
        { echo "node-postgres missing: $(why)"; return; }
    number=$(sed -n 's/.*"version": "\(.*\)".*/\1/p' "$to/node/node_modules/pg/package.json" | head -n 1)
    echo "node-postgres installed: pg $number, node $(node --version)"
}

{
    if python; then aws_python; else echo "aws-python missing: no psycopg"; fi
    java_peer
    aws_java
    node_peer
} | tee "$to/peers"
