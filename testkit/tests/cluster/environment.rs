//! What the machine has, and lacks.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use tokio_postgres_failover_testkit::{Cluster, Error};

use crate::again;

#[test]
fn missing_programs_are_named() {
    let output = again("environment::no_cluster").env("PG_BIN", "/nowhere").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        said.contains("(postgres, initdb, pg_basebackup) in PG_BIN=/nowhere; install them (Debian and Ubuntu: apt-get")
    );
}

#[test]
#[ignore = "run by missing_programs_are_named"]
fn no_cluster() {
    let error = Cluster::start().wait().unwrap_err();
    assert!(matches!(&error, Error::NoPostgres { .. }));
    println!("{error}");
}

/// The servers run as another user than root, who must get at their files.
#[test]
fn a_folder_of_roots_alone_is_named() {
    let folder = std::env::temp_dir().join(format!("testkit-closed-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    let root = fs::metadata(&folder).unwrap().uid() == 0;
    let output = again("environment::what_a_cluster_says").env("TMPDIR", &folder).output().unwrap();
    fs::remove_dir_all(&folder).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let named = said.contains(&format!("cannot pass through {}; set TMPDIR", folder.display()));
    assert!(output.status.success() && named == root, "{said}{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
#[ignore = "run by a_folder_of_roots_alone_is_named"]
fn what_a_cluster_says() {
    println!("{:?}", Cluster::builder().standbys(0).start().wait().map(drop).map_err(|error| error.to_string()));
}

#[test]
fn a_setting_that_no_server_takes_is_told_at_once() {
    let error = Cluster::builder().setting("max_connections", "many").start().wait().unwrap_err().to_string();
    assert!(error.starts_with("starting a cluster failed: Node(0) does not start:\n"), "{error}");
    assert!(error.contains("invalid value for parameter \"max_connections\": \"many\""), "{error}");
    let error = Cluster::builder().standbys(5).start().wait().unwrap_err().to_string();
    assert_eq!(error, "standbys: a cluster has at most 4, and not 5");
}

/// Root lends its rights to nobody, as a runner of tests would have none.
#[test]
fn a_user_without_rights_has_clusters_too() {
    const NOBODY: u32 = 65_534;
    let folder = std::env::temp_dir().join(format!("testkit-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.join("cluster");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mut command = Command::new(&program);
    command.args(["--exact", "environment::a_cluster", "--ignored", "--nocapture"]).current_dir("/");
    let output = match command.uid(NOBODY).gid(NOBODY).output() {
        // These tests run without rights, all of them.
        Err(_) => again("environment::a_cluster").output().unwrap(),
        Ok(output) => output,
    };
    fs::remove_dir_all(&folder).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("failed over"), "{said}");
}

#[test]
#[ignore = "run by a_user_without_rights_has_clusters_too"]
fn a_cluster() {
    let cluster = Cluster::builder().standbys(1).start().wait().unwrap();
    cluster.fail_over().wait().unwrap();
    println!("failed over");
}
