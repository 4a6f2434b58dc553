//! Where Patroni is: in the folder that `scripts/setup.sh` makes, or as the system's package.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::etcd::Etcd;
use crate::server::{Server, try_run};

/// Looks for what Patroni needs, and loads none of it: that takes a second.
const LOOK: &str = "\
from importlib.util import find_spec
[find_spec(name) or exit('no module ' + name) for name in ('patroni', 'etcd', 'dns', 'yaml', 'psutil')]";

/// The Python that has Patroni, or why there is none. Looked for once.
pub(crate) fn python() -> Result<&'static Path, &'static str> {
    static PYTHON: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    PYTHON.get_or_init(find).as_deref().map_err(String::as_str)
}

fn find() -> Result<PathBuf, String> {
    if !Etcd::is_installed() {
        return Err("there is no etcd".to_owned());
    }
    let server = Server::installed();
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target").join("patroni/bin/python3");
    let told = env::var_os("PATRONI_VENV").map(|venv| Path::new(&venv).join("bin/python3"));
    let mut why = String::new();
    for python in told.into_iter().chain([ours, PathBuf::from("/usr/bin/python3")]) {
        // As the servers' user: an installation below somebody's home is none for it.
        match try_run(server.command(&python, Path::new("/")).args(["-c", LOOK])) {
            Ok(_) => return Ok(python),
            Err(error) => why = format!("{}: {}", python.display(), error.lines().last().unwrap_or_default()),
        }
    }
    Err(why)
}
