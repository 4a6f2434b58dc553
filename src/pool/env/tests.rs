use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

/// A folder for one test. Dropping this removes it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("failover-env-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str, mode: u32) -> String {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn read(variables: &[(&str, &str)]) -> Result<Configuration, BuildError> {
    let variables: HashMap<String, String> =
        variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    from(&Surroundings { variable: Box::new(move |name| variables.get(name).cloned()) })
}

fn refused(variables: &[(&str, &str)]) -> String {
    let error = read(variables).map(drop).unwrap_err().to_string();
    assert!(!error.contains("s3cr3t"), "{error}");
    error
}

fn hosts(configuration: &Configuration) -> Vec<String> {
    let targets = targets(&configuration.config, &configuration.ssl.hosts).unwrap();
    let names = targets.names.iter().map(|name| format!("{}:{}", name.host, name.port));
    names.chain(targets.addresses.iter().map(ToString::to_string)).collect()
}

#[test]
fn variables_are_options() {
    let configuration = read(&[
        ("PGHOST", "a.internal,b.internal"),
        ("PGPORT", "6432"),
        ("PGUSER", "it's me"),
        ("PGPASSWORD", "p\\ w'd = x"),
        ("PGDATABASE", "shop"),
        ("PGAPPNAME", "report"),
        ("PGOPTIONS", "-c work_mem=1MB"),
        ("PGTZ", "Europe/Zurich"),
        ("PGDATESTYLE", "ISO, DMY"),
        ("PGCONNECT_TIMEOUT", "3"),
        ("PGSSLMODE", "disable"),
        ("PGGSSENCMODE", "disable"),
        ("PGCLIENTENCODING", "UTF8"),
        ("PGTARGETSESSIONATTRS", "read-write"),
        ("PGHOSTADDR", ""),
    ])
    .unwrap();
    let config = &configuration.config;
    assert_eq!(hosts(&configuration), ["a.internal:6432", "b.internal:6432"]);
    assert_eq!((config.get_user(), config.get_dbname()), (Some("it's me"), Some("shop")));
    assert_eq!(config.get_password(), Some(&b"p\\ w'd = x"[..]));
    assert_eq!(config.get_application_name(), Some("report"));
    let options = "-c datestyle=ISO,\\ DMY -c timezone=Europe/Zurich -c work_mem=1MB";
    assert_eq!(config.get_options(), Some(options));
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    assert!(refused(&[("PGUSER", "app")]).starts_with("PGHOST"));
    for (variable, value, option) in [
        ("PGSSLCRL", "/x", "sslcrl"),
        ("PGGSSENCMODE", "require", "gssencmode"),
        ("PGREQUIREPEER", "postgres", "requirepeer"),
        ("PGTARGETSESSIONATTRS", "standby", "target_session_attrs"),
        ("PGCLIENTENCODING", "LATIN1", "client_encoding"),
    ] {
        let error = refused(&[("PGHOST", "a"), ("PGPASSWORD", "s3cr3t"), (variable, value)]);
        assert!(error.starts_with(option), "{error}");
    }
    let error = refused(&[("PGHOST", "a"), ("PGPORT", "many"), ("PGPASSWORD", "s3cr3t"), ("PGCONNECT_TIMEOUT", "x")]);
    assert!(!error.is_empty());
}

#[test]
fn a_service_counts_more_than_a_variable() {
    let folder = Folder::new("service");
    let file = folder.write("services", "[shop]\nhost=s.internal\nuser=shop\nkeepalives_count=2\n", 0o644);
    let all = [("PGSERVICE", "shop"), ("PGSERVICEFILE", &file), ("PGHOST", "a"), ("PGDATABASE", "d")];
    let configuration = read(&all).unwrap();
    assert_eq!(hosts(&configuration), ["s.internal:5432"]);
    assert_eq!((configuration.config.get_user(), configuration.config.get_dbname()), (Some("shop"), Some("d")));
    assert_eq!(configuration.config.get_keepalives_retries(), Some(2));

    // The system's file is asked when the user's has no such service.
    folder.write("pg_service.conf", "[report]\nhost=r.internal\n", 0o644);
    let folder_name = folder.0.display().to_string();
    let both = [("PGSERVICE", "report"), ("PGSERVICEFILE", &file), ("PGSYSCONFDIR", &folder_name)];
    assert_eq!(hosts(&read(&both).unwrap()), ["r.internal:5432"]);
    folder.write(".pg_service.conf", "[home]\nhost=h.internal\n", 0o644);
    assert_eq!(hosts(&read(&[("PGSERVICE", "home"), ("HOME", &folder_name)]).unwrap()), ["h.internal:5432"]);

    let missing = refused(&[("PGSERVICE", "nobody"), ("PGSERVICEFILE", &file)]);
    assert!(missing.starts_with("PGSERVICE") && missing.contains(&file), "{missing}");
    let broken = folder.write("broken", "[shop]\nhost=a\npassword s3cr3t\n", 0o644);
    assert!(refused(&[("PGSERVICE", "shop"), ("PGSERVICEFILE", &broken)]).contains("line 3"));
    let unknown = folder.write("unknown", "[shop]\nhost=a\npasswort=s3cr3t\n", 0o644);
    assert!(refused(&[("PGSERVICE", "shop"), ("PGSERVICEFILE", &unknown)]).contains("not known"));
}

#[test]
fn a_password_file_is_read_where_no_password_is_given() {
    let folder = Folder::new("passfile");
    let lines = "a.internal:5432:app:app:one\nb.internal:5432:app:app:two\n*:5432:app:other:three\n\
                 localhost:5432:app:app:socket\n10.0.0.1:7000:app:app:address\n";
    let file = folder.write(".pgpass", lines, 0o600);
    let home = folder.0.display().to_string();
    let password = |variables: &[(&str, &str)]| {
        let mut all = vec![("PGUSER", "app"), ("HOME", home.as_str())];
        all.extend(variables);
        read(&all).unwrap().config.get_password().map(|password| String::from_utf8_lossy(password).into_owned())
    };
    assert_eq!(password(&[("PGHOST", "a.internal")]).as_deref(), Some("one"));
    assert_eq!(password(&[("PGHOST", "a.internal"), ("PGPASSWORD", "given")]).as_deref(), Some("given"));
    assert_eq!(password(&[("PGHOST", "a.internal"), ("PGDATABASE", "shop")]), None);
    assert_eq!(password(&[("PGHOST", "/var/run/postgresql")]).as_deref(), Some("socket"));
    assert_eq!(password(&[("PGHOSTADDR", "10.0.0.1"), ("PGPORT", "7000")]).as_deref(), Some("address"));
    let other =
        [("PGHOST", "c.internal,d.internal"), ("PGUSER", "other"), ("PGDATABASE", "app"), ("PGPASSFILE", &file)];
    assert_eq!(read(&other).unwrap().config.get_password(), Some(&b"three"[..]), "one line fits both");

    let both = [("PGHOST", "a.internal,b.internal"), ("PGUSER", "app"), ("PGPASSFILE", &*file)];
    assert!(refused(&both).contains("different passwords"));
    let some = [("PGHOST", "a.internal,z.internal"), ("PGUSER", "app"), ("PGPASSFILE", &*file)];
    assert!(refused(&some).contains("none for some"));

    let open = folder.write("open", lines, 0o644);
    let ignored = [("PGHOST", "a.internal"), ("PGUSER", "app"), ("PGPASSFILE", &*open)];
    assert_eq!(read(&ignored).unwrap().config.get_password(), None, "others may read it");
    let none = [("PGHOST", "a.internal"), ("PGUSER", "app"), ("PGPASSFILE", "/nowhere/at/all")];
    assert_eq!(read(&none).unwrap().config.get_password(), None);
    // As for libpq, one that cannot be looked at is none. The home of a service may be another user's.
    let circle = folder.0.join("circle").display().to_string();
    let _ = fs::remove_file(&circle);
    std::os::unix::fs::symlink(&circle, &circle).unwrap();
    let unusable = [("PGHOST", "a.internal"), ("PGUSER", "app"), ("PGPASSFILE", &*circle)];
    assert_eq!(read(&unusable).unwrap().config.get_password(), None);
    let system = folder.write("pg_service.conf", "[shop]\nhost=s.internal\n", 0o644);
    let system = Path::new(&system).parent().unwrap().display().to_string();
    let service = [("PGSERVICE", "shop"), ("PGSERVICEFILE", &*circle), ("PGSYSCONFDIR", &*system)];
    assert_eq!(hosts(&read(&service).unwrap()), ["s.internal:5432"]);
    let by_os_user = [("PGHOST", "a.internal"), ("USER", "app"), ("PGDATABASE", "app"), ("PGPASSFILE", &*file)];
    assert_eq!(read(&by_os_user).unwrap().config.get_password(), Some(&b"one"[..]));
}
