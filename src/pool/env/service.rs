//! Reads libpq's service file: sections of options, each under the name of a service.

use std::fs;
use std::path::Path;

use super::Surroundings;
use crate::error::BuildError;

/// The options of the service, from the user's file, or else from the system's.
pub(super) fn find(surroundings: &Surroundings<'_>, service: &str) -> Result<Vec<(String, String)>, BuildError> {
    let own = surroundings.path("PGSERVICEFILE").or_else(|| surroundings.at_home(".pg_service.conf"));
    let system = surroundings.path("PGSYSCONFDIR").map(|folder| folder.join("pg_service.conf"));
    for path in own.iter().chain(&system) {
        // As in libpq, one that cannot be looked at is none.
        if fs::metadata(path).is_err() {
            continue;
        }
        let text = fs::read_to_string(path).map_err(|error| unusable(path, &error.to_string()))?;
        if let Some(options) = read(&text, service).map_err(|problem| unusable(path, &problem))? {
            return Ok(options);
        }
    }
    let files: Vec<_> = own.iter().chain(&system).map(|path| path.display().to_string()).collect();
    let problem = format!("the service is not defined; looked in: {}", files.join(", "));
    Err(BuildError::invalid("PGSERVICE", problem))
}

fn unusable(path: &Path, problem: &str) -> BuildError {
    BuildError::invalid("PGSERVICEFILE", format!("{}: {problem}", path.display()))
}

/// The options in the section of this service. An error gives the number of the line and does not quote it, because it
/// may contain a password.
fn read(text: &str, service: &str) -> Result<Option<Vec<(String, String)>>, String> {
    let mut found = None;
    for (number, line) in text.lines().enumerate() {
        let (number, line) = (number + 1, line.trim());
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[') {
            if found.is_some() {
                break;
            }
            // As in libpq, what follows the bracket is ignored.
            if name.split(']').next() == Some(service) && name.contains(']') {
                found = Some(Vec::new());
            }
            continue;
        }
        let Some(options) = &mut found else { continue };
        if line.starts_with("ldap") {
            return Err(format!("line {number} asks an LDAP server, which is not honoured here"));
        }
        let Some((option, value)) = line.split_once('=') else {
            return Err(format!("line {number} is no `option=value`"));
        };
        if option == "service" || option == "servicefile" {
            return Err(format!("line {number} names another service, which libpq does not allow either"));
        }
        options.push((option.to_owned(), value.to_owned()));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# all\n\n[other]\nhost=x\nnonsense\n[ shop]\nhost=y\n  [shop] # ours\n host=a,b\nport=6432  \n\
                        password=p=q #r\nuser=\n#dbname=z\n[shop]\nhost=z\n";

    #[test]
    fn one_section_is_read() {
        let pairs = |service| read(FILE, service).unwrap();
        let expected = [("host", "a,b"), ("port", "6432"), ("password", "p=q #r"), ("user", "")];
        let expected = expected.map(|(option, value)| (option.to_owned(), value.to_owned()));
        assert_eq!(pairs("shop"), Some(expected.to_vec()));
        assert_eq!(pairs("missing"), None);
        assert!(read(FILE, "other").unwrap_err().contains("line 5"));
        for (text, said) in [("[a]\nldap://x", "LDAP"), ("[a]\nservice=b", "another service"), ("[a]\nhost", "line 2")]
        {
            assert!(read(text, "a").unwrap_err().contains(said), "{text}");
        }
    }
}
