//! A pool that finds its configuration where `psql` finds it. The variables are a process's, so each case runs in a
//! child.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use testbed::{Cluster, Node};
use tokio::process::Command;
use tokio_postgres_failover::Pool;

const ANSWER: &str = "the child answers: ";
const SQL: &str = "SELECT current_user || ' ' || current_database() || ' ' || current_setting('timezone')";

/// What the child does; nothing where it is no child.
#[tokio::test]
async fn the_child() {
    if env::var_os("FAILOVER_CHILD").is_none() {
        return;
    }
    let pool = Pool::from_env().unwrap().build().unwrap();
    let said: String = pool.get().await.unwrap().query_one(SQL, &[]).await.unwrap().get(0);
    println!("{ANSWER}{said}");
}

/// A program with these variables, and none of this process's.
fn program(program: impl AsRef<OsStr>, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(program);
    for (name, _) in env::vars().filter(|(name, _)| name.starts_with("PG")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).env("HOME", "/nowhere").envs(variables.iter().copied());
    command
}

async fn child(variables: &[(&str, &str)]) -> String {
    let mut command = program(env::current_exe().unwrap(), variables);
    command.args(["--exact", "sessions::environment::the_child", "--nocapture"]).env("FAILOVER_CHILD", "1");
    let output = command.output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    let answer = text.lines().find_map(|line| line.split_once(ANSWER)).unwrap_or_else(|| panic!("{text}\n{errors}")).1;
    answer.to_owned()
}

#[tokio::test]
async fn a_pool_finds_its_configuration_where_psql_does() {
    let cluster = Cluster::builder().nodes(1).password("a: sec\\ret").start().await;
    let address = cluster.socket_addr(Node(0));
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    let folder = env::temp_dir().join(format!("failover-environment-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let passwords = folder.join("passwords");
    fs::write(&passwords, format!("{host}:*:app:app:a\\: sec\\\\ret\n")).unwrap();
    fs::set_permissions(&passwords, fs::Permissions::from_mode(0o600)).unwrap();
    let services = folder.join("services");
    fs::write(&services, format!("[shop]\nhost={host}\nport={port}\nuser=app\ndbname=app\n")).unwrap();
    let (passwords, services) = (passwords.display().to_string(), services.display().to_string());

    let server = [("PGHOST", &*host), ("PGPORT", &*port), ("PGUSER", "app"), ("PGDATABASE", "app"), ("PGTZ", "UTC")];
    let with_password = [&server[..], &[("PGPASSWORD", "a: sec\\ret")]].concat();
    assert_eq!(child(&with_password).await, "app app UTC");
    let with_file = [&server[..], &[("PGPASSFILE", &*passwords)]].concat();
    assert_eq!(child(&with_file).await, "app app UTC");
    let service =
        [("PGSERVICE", "shop"), ("PGSERVICEFILE", &*services), ("PGPASSFILE", &*passwords), ("PGTZ", "Asia/Tokyo")];
    assert_eq!(child(&service).await, "app app Asia/Tokyo");
    let both = [&service[..], &[("PGOPTIONS", "-c timezone=Europe/Zurich")]].concat();
    assert_eq!(child(&both).await, "app app Asia/Tokyo", "as with libpq, PGTZ overrides PGOPTIONS");
    fs::remove_dir_all(&folder).unwrap();
}

/// What `psql` makes of the same variables and files is what counts.
#[tokio::test]
async fn a_pool_agrees_with_psql() {
    if Command::new("psql").arg("--version").output().await.is_err() {
        println!("skipped: there is no psql");
        return;
    }
    let cluster = Cluster::builder().nodes(1).password("se:cret\\").start().await;
    let address = cluster.socket_addr(Node(0));
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    let folder = env::temp_dir().join(format!("failover-psql-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let passwords = folder.join("passwords");
    let service = format!("[shop]\nhost={host}\nport={port}\nuser=app\ndbname=app\ngssencmode=disable\n");
    fs::write(folder.join("services"), service).unwrap();
    let (file, services) = (passwords.display().to_string(), folder.join("services").display().to_string());
    let server = [("PGSERVICE", "shop"), ("PGSERVICEFILE", &*services), ("PGPASSFILE", &*file)];
    // The second line ends with the password's own backslash.
    for line in ["*:*:*:app:se\\:cret\\\\:rest", "*:*:*:app:se\\:cret\\"] {
        fs::write(&passwords, format!("{line}\n")).unwrap();
        fs::set_permissions(&passwords, fs::Permissions::from_mode(0o600)).unwrap();
        for more in [
            &[("PGOPTIONS", "-c timezone=Europe/Zurich"), ("PGTZ", "Asia/Tokyo")][..],
            &[("PGOPTIONS", "-c timezone=Europe/Zurich"), ("PGTZ", "default")],
            &[("PGSSLCERTMODE", "allow"), ("PGTZ", "UTC")],
            &[("PGGSSENCMODE", "require"), ("PGUSER", "nobody"), ("PGTZ", "UTC")],
        ] {
            let variables = [&server[..], more].concat();
            let output = program("psql", &variables).args(["-XAtwc", SQL]).output().await.unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert_eq!(child(&variables).await, said.trim_end(), "{line} {more:?} {output:?}");
        }
    }
    fs::remove_dir_all(&folder).unwrap();
}
