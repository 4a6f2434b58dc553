//! Reads what went wrong with TLS from the line that [`explain`](super::explain) makes of an error, because the advice
//! to the user depends on it.
//!
//! It looks for known words in the text, because the connectors of all TLS libraries end in the same driver error, and
//! this module does not know their own error types. `tests/it/sessions/tls.rs` pins the words of rustls.

/// Why encryption, or the lack of it, kept a session from being opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TlsTrouble {
    Certificate(BadCertificate),
    /// The client requires TLS, and the server does not offer it.
    NotOffered,
    /// The client began with TLS, and the server offers TLS only to those who ask for it first.
    NotDirect,
    /// The server requires TLS, and the client did not use it.
    Wanted,
}

/// What is wrong with a server's certificate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum BadCertificate {
    Expired,
    NotYetValid,
    WrongName,
    UnknownAuthority,
    /// Anything else. For example, the certificate has an old version, is that of an authority, or is revoked.
    Unusable,
}

/// The driver's line about a server without TLS.
pub(crate) const NO_TLS: &str = "error performing TLS handshake: server does not support TLS";
/// This crate's line about a server that offers TLS, but hangs up on a client that begins with it.
pub(crate) const NO_DIRECT_TLS: &str =
    "error performing TLS handshake: the server hangs up on a client that does not ask for TLS first";

/// What the line says about TLS, if it says anything about it.
pub(crate) fn tls_trouble(line: &str) -> Option<TlsTrouble> {
    if line.starts_with("FATAL 28000") && (line.ends_with("no encryption") || line.ends_with("SSL off"))
        || line.contains("08P01: SSL required")
    {
        return Some(TlsTrouble::Wanted);
    }
    if line.starts_with(NO_TLS) {
        return Some(TlsTrouble::NotOffered);
    }
    if line.starts_with(NO_DIRECT_TLS) {
        return Some(TlsTrouble::NotDirect);
    }
    let told = line.strip_prefix("error performing TLS handshake: ")?;
    bad_certificate(&told.to_ascii_lowercase()).map(TlsTrouble::Certificate)
}

fn bad_certificate(told: &str) -> Option<BadCertificate> {
    // These are the words of rustls, OpenSSL and postgres-openssl.
    if !["invalid peer certificate", "certificate verify failed", "cert verification failed"]
        .iter()
        .any(|start| told.contains(start))
    {
        return None;
    }
    let says = |words: &[&str]| words.iter().any(|word| told.contains(word));
    Some(if says(&["certificate expired", "certificate: expired", "has expired"]) {
        BadCertificate::Expired
    } else if says(&["not valid yet", "notvalidyet", "not yet valid"]) {
        BadCertificate::NotYetValid
    } else if says(&["not valid for name", "notvalidforname", "hostname mismatch", "ip address mismatch"]) {
        BadCertificate::WrongName
    // If an authority was replaced by a new one with the same name, the library reports a bad signature.
    } else if says(&[
        "unknownissuer",
        "badsignature",
        "issuer certificate",
        "self-signed",
        "self signed",
        "first certif",
    ]) {
        BadCertificate::UnknownAuthority
    } else {
        BadCertificate::Unusable
    })
}

/// Writes the time of a certificate as a date. rustls writes it in seconds since 1970 and adds the present time. People
/// cannot read the former, and the latter would make every line of the log different.
pub(super) fn dated(text: &str) -> Option<String> {
    let (head, rest) = text.split_once(": verification time ")?;
    let (_, rest) = rest.split_once(" (UNIX), but certificate is ")?;
    let (limit, _) = rest.split_once(" (")?;
    let (words, seconds) = limit.rsplit_once(' ')?;
    Some(format!("{head}: {words} {}", utc(seconds.parse().ok()?)?))
}

fn utc(seconds: u64) -> Option<String> {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let (mut year, mut days) = (1970, seconds / 86_400);
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
        if year > 9999 {
            return None;
        }
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let minutes = seconds % 86_400 / 60;
    Some(format!("{year}-{:02}-{:02} {:02}:{:02} UTC", month + 1, days + 1, minutes / 60, minutes % 60))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_tls() {
        use BadCertificate::{Expired, NotYetValid, UnknownAuthority, Unusable, WrongName};
        for (told, bad) in [
            ("invalid peer certificate: certificate expired: not valid after 2020-01-01 00:00 UTC", Some(Expired)),
            ("invalid peer certificate: Expired", Some(Expired)),
            ("invalid peer certificate: certificate not valid yet: not valid before 2999-01-01", Some(NotYetValid)),
            ("invalid peer certificate: certificate not valid for name \"expired\"; certificate is", Some(WrongName)),
            ("invalid peer certificate: UnknownIssuer", Some(UnknownAuthority)),
            ("invalid peer certificate: BadSignature", Some(UnknownAuthority)),
            ("invalid peer certificate: Other(OtherError(CaUsedAsEndEntity))", Some(Unusable)),
            ("TLS handshake failed: cert verification failed - certificate has expired", Some(Expired)),
            ("error:0A000086:SSL routines::certificate verify failed: (hostname mismatch)", Some(WrongName)),
            (
                "TLS handshake failed: cert verification failed - unable to get local issuer certificate",
                Some(UnknownAuthority),
            ),
            ("received fatal alert: HandshakeFailure", None),
        ] {
            let line = format!("error performing TLS handshake: {told}");
            assert_eq!(tls_trouble(&line), bad.map(TlsTrouble::Certificate), "{line}");
            assert_eq!(tls_trouble(told), None, "a server may say what it likes: {told}");
        }
        let none = "error performing TLS handshake: server does not support TLS";
        assert_eq!(tls_trouble(none), Some(TlsTrouble::NotOffered));
        assert_eq!(tls_trouble(NO_DIRECT_TLS), Some(TlsTrouble::NotDirect));
        for line in [
            "FATAL 28000: no pg_hba.conf entry for host \"127.0.0.1\", user \"app\", database \"app\", no encryption",
            "FATAL 28000: pg_hba.conf rejects connection for host \"127.0.0.1\", database \"app\", SSL off",
            "FATAL 08P01: SSL required",
        ] {
            assert_eq!(tls_trouble(line), Some(TlsTrouble::Wanted), "{line}");
        }
        assert_eq!(tls_trouble("FATAL 28P01: password authentication failed for user \"app\""), None);
    }

    #[test]
    fn a_date_instead_of_seconds() {
        let text = "certificate expired: verification time 1732381000 (UNIX), but certificate is not valid after \
                    1709251199 (23129801 seconds ago)";
        assert_eq!(dated(text).unwrap(), "certificate expired: not valid after 2024-02-29 23:59 UTC");
        for (seconds, date) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (4_107_542_399, "2100-02-28 23:59 UTC"),
            (253_402_300_799, "9999-12-31 23:59 UTC"),
        ] {
            assert_eq!(utc(seconds).unwrap(), date);
        }
        assert_eq!(utc(u64::MAX), None);
        assert_eq!(dated("certificate expired"), None);
    }
}
