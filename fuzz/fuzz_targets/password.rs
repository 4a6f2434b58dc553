//! A password in a connection string, escaped or not, is in no text that a pool would show: neither in the error, nor
//! in the builder, nor in a host's name, which gets into logs and questions to the DNS.
#![no_main]

use std::error::Error;
use std::fmt::Write;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tokio_postgres_failover::Pool;
use tokio_postgres_failover::fuzzing::configuration;

/// What each part of the password begins with; nothing else in the input does.
const MARK: &str = "s3cr3t";

/// What stands between two parts: whatever means something in a URL or in `key=value`.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Between {
    At,
    Slash,
    Question,
    Hash,
    Percent,
    Colon,
    And,
    Equals,
    Comma,
    Quote,
    Backslash,
    Space,
    Open,
    Close,
    EncodedSlash,
    EncodedAt,
    BrokenUtf8,
    NewLine,
    Umlaut,
    Other(char),
}

impl Between {
    fn push(self, text: &mut String) {
        match self {
            Self::At => text.push('@'),
            Self::Slash => text.push('/'),
            Self::Question => text.push('?'),
            Self::Hash => text.push('#'),
            Self::Percent => text.push('%'),
            Self::Colon => text.push(':'),
            Self::And => text.push('&'),
            Self::Equals => text.push('='),
            Self::Comma => text.push(','),
            Self::Quote => text.push('\''),
            Self::Backslash => text.push('\\'),
            Self::Space => text.push(' '),
            Self::Open => text.push('['),
            Self::Close => text.push(']'),
            Self::EncodedSlash => text.push_str("%2F"),
            Self::EncodedAt => text.push_str("%40"),
            Self::BrokenUtf8 => text.push_str("%FF"),
            Self::NewLine => text.push('\n'),
            Self::Umlaut => text.push('ä'),
            Self::Other(character) => text.push(character),
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Form {
    Url,
    /// As a parameter of a URL.
    Parameter,
    /// The same, of a URL that names no user.
    ParameterAlone,
    Plain,
    Quoted,
    /// After an option whose value is missing, as a variable that is not set leaves it.
    AfterNothing(Setting),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Setting {
    User,
    Dbname,
    Host,
    Port,
    Options,
    ApplicationName,
    Sslmode,
}

impl Setting {
    fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Dbname => "dbname",
            Self::Host => "host",
            Self::Port => "port",
            Self::Options => "options",
            Self::ApplicationName => "application_name",
            Self::Sslmode => "sslmode",
        }
    }
}

/// What the rest of the string holds.
#[derive(Arbitrary, Debug)]
enum Tail {
    Good,
    BadPort,
    UnknownOption,
    ReadOnly,
    NoHost,
    Two,
}

#[derive(Arbitrary, Debug)]
struct Input {
    form: Form,
    /// Written as it has to be; else as somebody writes it who does not know.
    escaped: bool,
    between: Vec<Between>,
    tail: Tail,
}

impl Input {
    fn password(&self) -> String {
        let mut password = MARK.to_owned();
        for between in self.between.iter().take(12) {
            between.push(&mut password);
            password.push_str(MARK);
        }
        password
    }

    fn text(&self) -> String {
        let password = self.written();
        let (host, options) = match self.tail {
            Tail::Good => ("my-pg.internal", ""),
            Tail::BadPort => ("my-pg.internal:notaport", ""),
            Tail::UnknownOption => ("my-pg.internal", "nonsense=1"),
            Tail::ReadOnly => ("my-pg.internal:5433", "target_session_attrs=read-only"),
            Tail::NoHost => ("", ""),
            Tail::Two => ("one.internal,127.0.0.1:5433", ""),
        };
        match self.form {
            Form::Url => format!("postgres://app:{password}@{host}/app?{options}"),
            Form::Parameter => format!("postgres://app@{host}/app?password={password}&{options}"),
            Form::ParameterAlone => format!("postgres://{host}/app?password={password}&{options}"),
            Form::AfterNothing(setting) => {
                format!("hostaddr=127.0.0.1 {}= password={password} {options}", setting.name())
            }
            Form::Plain => format!("host={host} password={password} user=app {options}"),
            Form::Quoted => format!("host={host} password='{password}' user=app {options}"),
        }
    }

    fn written(&self) -> String {
        let password = self.password();
        if !self.escaped {
            return password;
        }
        let mut written = String::new();
        match self.form {
            Form::Url | Form::Parameter | Form::ParameterAlone => {
                for byte in password.bytes() {
                    match byte {
                        b'a'..=b'z' | b'0'..=b'9' => written.push(char::from(byte)),
                        _ => write!(written, "%{byte:02X}").unwrap(),
                    }
                }
            }
            Form::Plain | Form::Quoted | Form::AfterNothing(_) => {
                for character in password.chars() {
                    if !character.is_ascii_alphanumeric() {
                        written.push('\\');
                    }
                    written.push(character);
                }
            }
        }
        written
    }
}

fn holds_no_secret(what: &str, text: &str) {
    assert!(!text.contains(MARK), "{what} holds the password: {text}");
}

fuzz_target!(|input: Input| {
    let text = input.text();
    let made = configuration(&text, false);
    match &made {
        Ok(made) => {
            // Leaves the password itself out; everything else in it gets into logs, or to the server and into its
            // errors.
            holds_no_secret("what a pool is made of", &format!("{made:?}"));
        }
        Err(error) => {
            let mut link: Option<&dyn Error> = Some(error);
            while let Some(error) = link {
                holds_no_secret("an error", &format!("{error} {error:?} {error:#?}"));
                link = error.source();
            }
        }
    }
    if let Ok(builder) = Pool::builder(&text) {
        holds_no_secret("a builder", &format!("{builder:?}"));
    }
    if input.escaped
        && let Ok(made) = made
    {
        let expected = input.password();
        assert_eq!(
            made.template.get_password(),
            Some(expected.as_bytes()),
            "an escaped password is read as it is: {text}"
        );
    }
});
