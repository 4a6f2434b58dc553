"""psycopg 3 with psycopg_pool: all hosts, read-write, each connection checked when it is handed out, as its docs advise."""

from psycopg.conninfo import make_conninfo
from psycopg_pool import ConnectionPool

import load

servers = load.hosts()
conninfo = make_conninfo(
    host=",".join(host for host, _ in servers),
    port=",".join(port for _, port in servers),
    target_session_attrs="read-write",
    # Bounds each host's turn; libpq has no limit of its own, psycopg gives it 130 s.
    connect_timeout=3,
    **load.credentials(),
)
pool = ConnectionPool(
    conninfo,
    min_size=load.WORKERS,
    max_size=load.WORKERS,
    check=ConnectionPool.check_connection,
    open=True,
)
pool.wait()


def insert(sql, row):
    with pool.connection() as connection:
        connection.execute(sql, [row])


load.run(insert)
