use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

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
    from(&Surroundings { variable: Box::new(move |name| variables.get(name).map(OsString::from)) })
}

/// The password of the file, if it counts.
fn of_file(configuration: Configuration) -> Option<String> {
    assert_eq!(configuration.config.get_password(), None);
    configuration.password_file.map(Result::unwrap)
}

/// Why no pool can be built with the password of the file.
fn file_refused(variables: &[(&str, &str)]) -> String {
    read(variables).unwrap().password_file.unwrap().unwrap_err().to_string()
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
    let options = "-c work_mem=1MB -c timezone=Europe/Zurich -c datestyle=ISO,\\ DMY";
    assert_eq!(config.get_options(), Some(options));
}

/// The server reads what libpq sends for `PGTZ` after the options, and the last one counts.
#[test]
fn settings_of_the_session_override_its_options() {
    let options = |more: &[(&str, &str)]| {
        let configuration = read(&[&[("PGHOST", "a")], more].concat()).unwrap();
        configuration.config.get_options().map(ToOwned::to_owned)
    };
    let both = options(&[("PGOPTIONS", "-c timezone=UTC"), ("PGTZ", "Asia/Tokyo")]);
    assert_eq!(both.as_deref(), Some("-c timezone=UTC -c timezone=Asia/Tokyo"));
    let left = options(&[("PGOPTIONS", "-c timezone=UTC"), ("PGTZ", "Default")]);
    assert_eq!(left.as_deref(), Some("-c timezone=UTC"), "it asks for the server's own");
    assert_eq!(options(&[("PGGEQO", "DEFAULT")]), None);
}

#[test]
fn what_is_not_utf8_is_named() {
    for name in ["PGPASSWORD", "PGUSER", "PGSERVICE", "PGTZ"] {
        let latin = |asked: &str| match asked {
            "PGHOST" => Some(OsString::from("a")),
            _ => (asked == name).then(|| OsString::from_vec(b"s3cr3t\xe9".to_vec())),
        };
        let error = from(&Surroundings { variable: Box::new(latin) }).map(drop).unwrap_err().to_string();
        assert!(error.starts_with(name) && error.contains("UTF-8") && !error.contains("s3cr3t"), "{error}");
    }
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
    for (variable, value) in [
        ("PGSSLCERTMODE", "allow"),
        ("PGSSLMINPROTOCOLVERSION", "TLSv1.2"),
        ("PGKRBSRVNAME", "postgres"),
        ("PGMAXPROTOCOLVERSION", "latest"),
        ("PGGSSENCMODE", "prefer"),
    ] {
        read(&[("PGHOST", "a"), (variable, value)]).unwrap();
    }
    assert!(refused(&[("PGHOST", "a"), ("PGMINPROTOCOLVERSION", "3.2")]).starts_with("min_protocol_version"));
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

    // As in libpq, an option of the service hides its variable, even if it asks for nothing.
    let hiding = folder.write("hiding", "[shop]\nhost=s.internal\nuser=\ngssencmode=disable\n", 0o644);
    let variables = [("PGUSER", "app"), ("PGGSSENCMODE", "require")];
    let all = [&[("PGSERVICE", "shop"), ("PGSERVICEFILE", &*hiding)], &variables[..]].concat();
    assert_eq!(read(&all).unwrap().config.get_user(), None);
    let empty = folder.write("empty", "[shop]\nhost=\n", 0o644);
    assert!(refused(&[("PGSERVICE", "shop"), ("PGSERVICEFILE", &empty), ("PGHOST", "a")]).starts_with("PGHOST"));

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
        of_file(read(&all).unwrap())
    };
    assert_eq!(password(&[("PGHOST", "a.internal")]).as_deref(), Some("one"));
    let given = [("PGHOST", "a.internal"), ("PGUSER", "app"), ("HOME", &*home), ("PGPASSWORD", "given")];
    let given = read(&given).unwrap();
    assert_eq!((given.config.get_password(), given.password_file.is_some()), (Some(&b"given"[..]), false));
    assert_eq!(password(&[("PGHOST", "a.internal"), ("PGDATABASE", "shop")]), None);
    assert_eq!(password(&[("PGHOST", "/var/run/postgresql")]).as_deref(), Some("socket"));
    assert_eq!(password(&[("PGHOSTADDR", "10.0.0.1"), ("PGPORT", "7000")]).as_deref(), Some("address"));
    let other =
        [("PGHOST", "c.internal,d.internal"), ("PGUSER", "other"), ("PGDATABASE", "app"), ("PGPASSFILE", &file)];
    assert_eq!(of_file(read(&other).unwrap()).as_deref(), Some("three"), "one line fits both");

    let both = [("PGHOST", "a.internal,b.internal"), ("PGUSER", "app"), ("PGPASSFILE", &*file)];
    assert!(file_refused(&both).contains("different passwords"));
    let some = [("PGHOST", "a.internal,z.internal"), ("PGUSER", "app"), ("PGPASSFILE", &*file)];
    assert!(file_refused(&some).contains("none for some"));
    let latin = folder.0.join("latin").display().to_string();
    fs::write(&latin, b"*:*:*:*:s3cr3t\xe9\n").unwrap();
    fs::set_permissions(&latin, fs::Permissions::from_mode(0o600)).unwrap();
    let unreadable = file_refused(&[("PGHOST", "a.internal"), ("PGUSER", "app"), ("PGPASSFILE", &*latin)]);
    assert!(unreadable.contains(&latin) && !unreadable.contains("s3cr3t"), "{unreadable}");

    let open = folder.write("open", lines, 0o644);
    let ignored = [("PGHOST", "a.internal"), ("PGUSER", "app"), ("PGPASSFILE", &*open)];
    assert_eq!(of_file(read(&ignored).unwrap()), None, "others may read it");
    let none = [("PGHOST", "a.internal"), ("PGUSER", "app"), ("PGPASSFILE", "/nowhere/at/all")];
    assert_eq!(of_file(read(&none).unwrap()), None);
    // As for libpq, one that cannot be looked at is none. The home of a service may be another user's.
    let circle = folder.0.join("circle").display().to_string();
    let _ = fs::remove_file(&circle);
    std::os::unix::fs::symlink(&circle, &circle).unwrap();
    let unusable = [("PGHOST", "a.internal"), ("PGUSER", "app"), ("PGPASSFILE", &*circle)];
    assert_eq!(of_file(read(&unusable).unwrap()), None);
    let system = folder.write("pg_service.conf", "[shop]\nhost=s.internal\n", 0o644);
    let system = Path::new(&system).parent().unwrap().display().to_string();
    let service = [("PGSERVICE", "shop"), ("PGSERVICEFILE", &*circle), ("PGSYSCONFDIR", &*system)];
    assert_eq!(hosts(&read(&service).unwrap()), ["s.internal:5432"]);
    let by_os_user = [("PGHOST", "a.internal"), ("USER", "app"), ("PGDATABASE", "app"), ("PGPASSFILE", &*file)];
    assert_eq!(of_file(read(&by_os_user).unwrap()).as_deref(), Some("one"));
}

/// A program with a provider works on the machine of a developer who has a password file, and the provider is what an
/// unusable file is answered with.
#[tokio::test]
async fn a_provider_counts_more_than_a_password_file() {
    let folder = Folder::new("provider");
    let file = folder.write(".pgpass", "127.0.0.1:1:app:app:one\n127.0.0.1:2:app:app:two\n", 0o600);
    for ports in ["1", "1,2"] {
        let variables =
            [("PGHOST", "127.0.0.1,127.0.0.1"), ("PGPORT", ports), ("PGUSER", "app"), ("PGPASSFILE", &*file)];
        let builder = || PoolBuilder::new(read(&variables).unwrap()).unwrap();
        builder().password_provider(|| async { Ok("token") }).build().unwrap();
        assert_eq!(builder().build().is_ok(), ports == "1", "without one, the file counts");
    }
}
