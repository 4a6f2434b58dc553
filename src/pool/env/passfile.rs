//! Reads libpq's password file. Each line is `host:port:database:user:password`, and `*` matches everything.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use tokio_postgres::config::Host;

use crate::error::BuildError;
use crate::pool::hosts::Target;

/// The usual folders of sockets. As in libpq, their lines name the host `localhost`.
#[cfg(unix)]
const SOCKETS: [&str; 3] = ["/tmp", "/var/run/postgresql", "/run/postgresql"];

/// Reads the file. `None`: there is none, it cannot be looked at, or others may read it. libpq ignores it then, too.
pub(super) fn read(path: &Path) -> Result<Option<String>, BuildError> {
    let unusable = |error: std::io::Error| BuildError::invalid("passfile", format!("{}: {error}", path.display()));
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => {
            // Often nobody needs it: the home of a service may be another user's.
            if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) {
                tracing::warn!("the password file {} cannot be looked at and is ignored: {error}", path.display());
            }
            return Ok(None);
        }
    };
    if !metadata.is_file() {
        tracing::warn!("the password file {} is no plain file and is ignored", path.display());
        return Ok(None);
    }
    #[cfg(unix)]
    if std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o077 != 0 {
        tracing::warn!("the password file {} may be read by others and is ignored; chmod 0600 it", path.display());
        return Ok(None);
    }
    fs::read_to_string(path).map(Some).map_err(unusable)
}

/// The name of the host in the file.
pub(super) fn name_of(target: &Target) -> String {
    match (&target.host, target.address) {
        (Some(Host::Tcp(name)), _) if !name.is_empty() => name.clone(),
        #[cfg(unix)]
        (Some(Host::Unix(folder)), None) => {
            let folder = folder.display().to_string();
            if SOCKETS.contains(&folder.as_str()) { "localhost".to_owned() } else { folder }
        }
        (_, Some(address)) => address.to_string(),
        _ => "localhost".to_owned(),
    }
}

/// The password of the first line that matches.
pub(super) fn password(lines: &str, host: &str, port: u16, database: &str, user: &str) -> Option<String> {
    let wanted = [host, &port.to_string(), database, user];
    let fits = |line: &str| {
        let mut rest = line;
        for wanted in wanted {
            let (field, after) = field(rest)?;
            if field != "*" && unescaped(field) != wanted {
                return None;
            }
            rest = after;
        }
        // As in libpq, the password ends at the next colon that is not escaped.
        Some(unescaped(field(rest).map_or(rest, |(password, _)| password)))
    };
    lines.lines().filter(|line| !line.starts_with('#')).find_map(fits)
}

/// Splits at the first colon that has no backslash before it.
fn field(text: &str) -> Option<(&str, &str)> {
    let mut escaped = false;
    let end = text.find(|c| {
        let ends = c == ':' && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    })?;
    Some((&text[..end], &text[end + 1..]))
}

/// Removes the backslash before each literal character. As in libpq, one at the end is literal itself.
fn unescaped(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut escaped = false;
    for c in text.chars() {
        escaped = c == '\\' && !escaped;
        if !escaped {
            plain.push(c);
        }
    }
    if escaped {
        plain.push('\\');
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_fits_counts() {
        let file = "# host:port:database:user:password\n\nnonsense\na:5432:shop:app\na:5432:shop:app:one\n\
                    a:*:shop:app:two\n*:*:*:report:th\\:r\\\\ee:x\n\\:\\:1:5432:*:app:six\nb:5432:sh\\:op:app:colon\n\
                    c:5432:shop:app:\nd:5432:shop:app:se\\:cret:rest\ne:5432:shop:app:end\\\n";
        let found = |host: &str, port, database: &str, user: &str| password(file, host, port, database, user);
        assert_eq!(found("a", 5432, "shop", "app").as_deref(), Some("one"));
        assert_eq!(found("a", 6432, "shop", "app").as_deref(), Some("two"));
        assert_eq!(found("z", 1, "any", "report").as_deref(), Some("th:r\\ee"));
        assert_eq!(found("::1", 5432, "any", "app").as_deref(), Some("six"));
        assert_eq!(found("b", 5432, "sh:op", "app").as_deref(), Some("colon"));
        assert_eq!(found("c", 5432, "shop", "app").as_deref(), Some(""));
        assert_eq!(found("d", 5432, "shop", "app").as_deref(), Some("se:cret"), "what follows is no part of it");
        assert_eq!(found("e", 5432, "shop", "app").as_deref(), Some("end\\"));
        assert_eq!(found("a", 5432, "other", "app"), None);
        assert_eq!(found("*", 5432, "shop", "app"), None, "a host is no pattern");
    }
}
