//! Database errors within the errors of an application, and errors in one line.

use std::sync::Arc;
use std::{fmt, io};

use tokio_postgres::Config;

use super::super::*;
use super::script::{Outer, Report, report};

/// An error that is its own cause.
#[derive(Debug)]
struct Loop;

impl fmt::Display for Loop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("again")
    }
}

impl StdError for Loop {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(self)
    }
}

#[test]
fn a_database_error_at_any_depth() {
    let deadlock = || report(Report::server("ERROR", "40P01", "deadlock", "DeadLockReport"));
    let nested = |depth| {
        let mut error: Box<dyn StdError + Send + Sync> = Box::new(deadlock());
        for _ in 0..depth {
            error = Box::new(Outer(error));
        }
        Outer(error)
    };
    assert_eq!(classify_chain(&deadlock()), Some(Verdict::Conflict));
    assert_eq!(classify_chain(&nested(0)), Some(Verdict::Conflict));
    assert_eq!(classify_chain(&nested(14)), Some(Verdict::Conflict));
    assert_eq!(classify_chain(&nested(15)), None);
    // The server's report, without the driver's error around it.
    let said = deadlock().as_db_error().unwrap().clone();
    assert_eq!(classify_chain(&Outer(Box::new(said.clone()))), Some(Verdict::Conflict));
    assert_eq!(report_in_chain(&Outer(Box::new(said.clone()))), Some(&said));
    // Wrappers whose `source` leaves out what they hold.
    assert_eq!(classify_chain(&io::Error::other(deadlock())), Some(Verdict::Conflict));
    assert_eq!(classify_chain(&Arc::new(deadlock())), Some(Verdict::Conflict));
    assert_eq!(classify_chain(&Box::new(deadlock())), Some(Verdict::Conflict));
    assert_eq!(classify_chain(&Loop), None);
    assert_eq!(classify_chain(&fmt::Error), None);
}

#[test]
fn explained_in_one_line() {
    let error = report(Report::server("FATAL", "57P01", "terminating\nconnection", "x"));
    assert_eq!(explain(&error), "FATAL 57P01: terminating connection");
    // It is shown on terminals, which obey such characters.
    let error = report(Report::server("FATAL", "28000", "no\u{1b}[2J\u{9b}31m\u{7}entry", "x"));
    assert_eq!(explain(&error), "FATAL 28000: no [2J 31m entry");
    // The password's second half, taken for an option.
    let misread = "host=a password=top secret".parse::<Config>().unwrap_err();
    assert!(!explain(&misread).contains("secret"), "{}", explain(&misread));
}
