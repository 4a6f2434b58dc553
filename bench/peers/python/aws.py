"""AWS advanced Python wrapper over psycopg, with its fail-over plugin and the wrapper's dialect for plain PostgreSQL.

`aws.py check` connects once, says on one line what became of it, and ends."""

import sys
import threading

import psycopg
from aws_advanced_python_wrapper import AwsWrapperConnection

import load

host, port = load.hosts()[0]
options = load.credentials()


def connect():
    return AwsWrapperConnection.connect(
        psycopg.Connection.connect,
        host=host,
        port=port,
        plugins="failover",
        wrapper_dialect="pg",
        wrapper_driver_dialect="psycopg",
        connect_timeout=3,
        **options,
    )


if sys.argv[1:] == ["check"]:
    connection = connect()
    print("connected:", connection.execute("SELECT 1").fetchone())
    connection.close()
    sys.exit(0)

_own = threading.local()


def insert(sql, row):
    """One connection for each worker: the wrapper has no pool that keeps a session through a fail-over."""
    connection = getattr(_own, "connection", None)
    if connection is None or connection.is_closed:
        connection = _own.connection = connect()
    try:
        cursor = connection.cursor()
        cursor.execute(sql, (row,))
        connection.commit()
        cursor.close()
    except Exception:
        # The plug-in has led the connection to the new writer, or it is of no use any more.
        try:
            connection.rollback()
        except Exception:
            _own.connection = None
        raise


load.run(insert)
