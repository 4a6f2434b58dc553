//! What sessions need and what surrounds them: settings, rights, passwords, TLS, LISTEN.

mod connector;
mod dial;
mod environment;
mod listen;
mod options;
mod revoked;
mod rotation;
mod settings;
#[cfg(feature = "rustls")]
mod tls;
pub(crate) mod versions;
