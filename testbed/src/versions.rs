//! Which versions a test runs with, for records of it.

use std::path::Path;

use crate::patroni::python;
use crate::program::find;
use crate::server::{Server, try_run};

/// PostgreSQL's, like "15.18".
pub fn postgresql() -> String {
    let server = Server::installed();
    said(server, &server.programs().join("postgres"), &["--version"]).expect("postgres tells its version")
}

/// Patroni's and etcd's, if both are installed.
pub fn patroni() -> Option<String> {
    let server = Server::installed();
    let ask = "import patroni.version; print(patroni.version.__version__)";
    let patroni = said(server, python().ok()?, &["-c", ask])?;
    Some(format!("Patroni {patroni}, etcd {}", said(server, &find("etcd")?, &["--version"])?))
}

/// repmgr's, if it is installed.
pub fn repmgr() -> Option<String> {
    let server = Server::installed();
    Some(format!("repmgr {}", said(server, &server.programs().join("repmgr"), &["--version"])?))
}

/// HAProxy's, if it is installed.
pub fn haproxy() -> Option<String> {
    Some(format!("HAProxy {}", said(Server::installed(), &find("haproxy")?, &["-v"])?))
}

/// The first number in what a program says of itself.
fn said(server: &Server, program: &Path, arguments: &[&str]) -> Option<String> {
    number(&try_run(server.command(program, Path::new("/")).args(arguments)).ok()?)
}

fn number(text: &str) -> Option<String> {
    let word = text.split_whitespace().find(|word| word.starts_with(|first: char| first.is_ascii_digit()))?;
    Some(word.chars().take_while(|one| one.is_ascii_digit() || *one == '.').collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_found_in_what_programs_say() {
        let texts = [
            ("postgres (PostgreSQL) 13.16 (Debian 13.16-0+deb11u1)", "13.16"),
            ("HAProxy version 2.6.12-1+deb12u3 2025/10/03 - https://haproxy.org/", "2.6.12"),
            ("etcd Version: 3.4.23\nGit SHA: Not provided", "3.4.23"),
            ("repmgr 5.3.3", "5.3.3"),
            ("4.1.5\n", "4.1.5"),
        ];
        for (text, expected) in texts {
            assert_eq!(number(text).as_deref(), Some(expected), "{text}");
        }
        assert_eq!(number("none"), None);
    }
}
