"""What every Python peer does: workers that insert rows, and one line for each answer. The peer brings `insert`."""

import os
import sys
import threading
import time

WORKERS = int(os.environ["BENCH_WORKERS"])
PREFIX = os.environ["BENCH_PREFIX"]
TABLE = os.environ["BENCH_TABLE"]
# Between rows, and after an error; in seconds.
PACE = int(os.environ.get("BENCH_PACE_MS") or 0) / 1000
PAUSE = 0.1
# A worker that hangs does not keep the process: it ends this long after its input did.
GRACE = 1.0

_output = threading.Lock()


def hosts():
    """The servers as (host, port): the name, where there is one, else all of them."""
    if os.environ.get("BENCH_NAME"):
        return [(os.environ["BENCH_NAME"], os.environ["BENCH_PORT"])]
    return [tuple(each.rsplit(":", 1)) for each in os.environ["BENCH_HOSTS"].split(",")]


def credentials():
    given = {"user": os.environ["BENCH_USER"], "dbname": os.environ["BENCH_DATABASE"]}
    if os.environ.get("BENCH_PASSWORD"):
        given["password"] = os.environ["BENCH_PASSWORD"]
    return given


def say(line):
    with _output:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _work(worker, insert, stop):
    counter = 0
    while not stop.is_set():
        row = f"{PREFIX}-{worker}-{counter}"
        try:
            insert(f"INSERT INTO {TABLE} (id) VALUES (%s)", row)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            say(f"err {time.time_ns() // 1000} {worker} {row} {text}")
            stop.wait(PAUSE)
            continue
        say(f"ok {time.time_ns() // 1000} {worker} {row}")
        counter += 1
        if PACE:
            stop.wait(PACE)


def run(insert):
    """Runs until the input is closed. `insert(sql, id)` returns when the row is committed."""
    stop = threading.Event()
    threads = [threading.Thread(target=_work, args=(it, insert, stop), daemon=True) for it in range(WORKERS)]
    say("ready")
    for thread in threads:
        thread.start()
    while sys.stdin.buffer.read(4096):
        pass
    stop.set()
    end = time.monotonic() + GRACE
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    sys.stdout.flush()
    os._exit(0)
