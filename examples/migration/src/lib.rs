//! A shop, written for deadpool-postgres in the usual way ([`before`]), and the same shop with this pool ([`after`]).
//!
//! docs/from-deadpool.md shows the difference between the two files. `tests/migration/` compares it with them, counts
//! the errors that the compiler reports on the way, and lets both shops fail over under load.

pub mod after;
pub mod before;

/// The migrations of the database, by refinery.
mod embedded {
    refinery::embed_migrations!("migrations");
}

/// The shop on the way, which `tests/migration/` writes and compiles.
#[cfg(halfway)]
#[allow(missing_docs, reason = "only the compiler reads it")]
pub mod halfway {
    include!(env!("HALFWAY"));
}
