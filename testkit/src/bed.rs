//! What the kit is built of, for this project's own test bed: it panics where the kit returns errors, and it can do
//! more. Nothing here is part of the public API.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a test bed that cannot do what it was told ends the test, and says why"
)]
#![allow(clippy::must_use_candidate, reason = "getters of a test bed")]
#![allow(clippy::doc_markdown, reason = "PostgreSQL is a name")]
#![allow(clippy::should_implement_trait, reason = "frames are no iterator: more of them come with more bytes")]
#![allow(missing_docs, reason = "no part of the public API")]

pub mod block;
pub mod certificate;
pub mod cluster;
pub mod cutter;
pub mod dns;
pub mod frames;
pub mod limit;
pub mod path;
pub mod port;
pub mod process;
pub mod server;
pub mod site;
pub mod sync;
pub mod wait;
