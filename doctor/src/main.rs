//! Says what a pool would do with a connection string: asks every server behind it, side by side.
//!
//! `doctor ['postgres://user@name:5432/db'] [--dns 10.0.0.2:53] [--watch] [--json]`
//!
//! Without a connection string it reads `DATABASE_URL`, or else libpq's variables and `~/.pgpass`. A connection string
//! with `sslmode` needs TLS: `cargo install --path doctor --features rustls`.
//!
//! Exit code: 0 when a pool would use a primary, 1 when it would wait or fail, 2 when the command is wrong. With
//! `--watch` it is 0 when the reader of the output has gone; Ctrl-C ends the program by its signal.

mod arguments;
mod look;
mod table;
mod verdict;
mod watch;

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use tokio_postgres_failover::Pool;

use arguments::{Arguments, USAGE, Wrong};
use look::Look;

/// Time for everything, resolving included.
const LIMIT: Duration = Duration::from_secs(4);

// The pool has a thread of its own: whoever reads the output slowly does not hold up the pool.
#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() -> ExitCode {
    let read = Arguments::read(env::args_os().skip(1)).and_then(|arguments| {
        let (watch, json) = (arguments.watch, arguments.json);
        Ok((arguments.pool()?, watch, json))
    });
    let (pool, watch, json) = match read {
        Ok(read) => read,
        Err(Wrong::Help) => {
            let _ = writeln!(io::stdout(), "{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    if watch {
        watch::run(&pool, json).await;
        return ExitCode::SUCCESS;
    }
    let look = once(&pool).await;
    let text = if json { look.json().to_string() } else { look.lines().join("\n") };
    // A reader that has seen enough may have closed the pipe.
    let _ = writeln!(io::stdout(), "{text}");
    if look.good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn once(pool: &Pool) -> Look {
    let deadline = Instant::now() + LIMIT;
    let found = timeout_at(deadline, pool.connect()).await;
    // The first good answer decides; what the others say is of interest here.
    while !all_answered(pool) && Instant::now() < deadline {
        sleep(Duration::from_millis(20)).await;
    }
    Look::at(pool, found.ok().and_then(Result::err))
}

/// Returns whether DNS and every candidate have answered.
fn all_answered(pool: &Pool) -> bool {
    let candidates = pool.candidates();
    let resolved = !candidates.is_empty() || pool.dns_failure().is_some();
    resolved && candidates.iter().all(|candidate| candidate.answer.is_some())
}
