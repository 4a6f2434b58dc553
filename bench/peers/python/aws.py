"""AWS advanced Python wrapper over psycopg, with its fail-over plugin and the wrapper's dialect for plain PostgreSQL.

In that dialect the wrapper knows one host and no topology. It hands the host on as it is, so libpq's list of hosts stands
there: where the plugin connects again, libpq finds the server that takes writes."""

import threading

import psycopg
from aws_advanced_python_wrapper import AwsWrapperConnection
from aws_advanced_python_wrapper.errors import FailoverSuccessError, TransactionResolutionUnknownError

import load

servers = load.hosts()
options = load.credentials()


def connect():
    return AwsWrapperConnection.connect(
        psycopg.Connection.connect,
        host=",".join(host for host, _ in servers),
        port=",".join(port for _, port in servers),
        target_session_attrs="read-write",
        plugins="failover",
        wrapper_dialect="pg",
        wrapper_driver_dialect="psycopg",
        connect_timeout=3,
        **options,
    )


_own = threading.local()


def insert(sql, row):
    """One connection for each worker: the wrapper has no pool that keeps a session through a fail-over."""
    if getattr(_own, "connection", None) is None:
        _own.connection = connect()
    try:
        cursor = _own.connection.cursor()
        cursor.execute(sql, (row,))
        _own.connection.commit()
        cursor.close()
    except (FailoverSuccessError, TransactionResolutionUnknownError):
        # The connection leads to the new primary now; whether the row was written the caller has to find out.
        raise
    except Exception:
        try:
            _own.connection.rollback()
        except Exception:
            _own.connection = None
        raise


load.run(insert)
