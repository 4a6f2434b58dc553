#!/bin/sh
# Makes sure of what the benchmark would like to have: the peers of other languages, unless PEERS=rust, and nft(8), which
# drops the packets of a host that vanishes. What is missing is named in the report; nothing here fails the run.
set -u

here=$(cd "$(dirname "$0")" && pwd)

if ! command -v nft >/dev/null 2>&1 && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends nftables >/dev/null 2>&1 ||
        echo "nft(8) could not be installed: no host will vanish."
fi

if [ "${PEERS:-all}" != rust ]; then
    sh "$here/peers/setup.sh"
fi
exit 0
