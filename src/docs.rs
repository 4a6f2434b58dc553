//! The pages of `docs/`. They are included here so that they are a part of the documentation and their examples are
//! tests.
//!
//! | to | read |
//! |---|---|
//! | write the first calls | [recipes] |
//! | move from deadpool-postgres or bb8, or keep it | [from_deadpool], [from_bb8] |
//! | set it up for your servers | [fly], [patroni], [cloudnativepg], [rds], [pgbouncer] |
//! | compare it with other pools | [comparison] |
//! | tune it, and see each retry | [tuning] |
//! | choose names, resolvers and ports | [dns] |
//! | encrypt, and check certificates | [tls] |
//! | watch it | [metrics], [logs] |
//! | use it behind a proxy | [proxies] |
//! | know what a pool costs its servers | [costs] |
//! | understand an error | [errors] |
//! | know what is promised, and why it is true | [exactly_once] |
//! | look up a failure, and the tests of it | [scenarios] |
//! | see what was measured | [figures] |
//! | know which PostgreSQL was tested, and what differs | [versions] |
//! | look up a word | [glossary] |
//!
//! Each page defines its links at its end, for readers of the files themselves. Here `docs/links.md` defines them
//! before the page, because the first one of two definitions counts. `tests/documents.rs` checks that no page is
//! missing.

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/comparison.md")]
pub mod comparison {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/recipes.md")]
pub mod recipes {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/from-deadpool.md")]
pub mod from_deadpool {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/from-bb8.md")]
pub mod from_bb8 {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/operators/fly.md")]
pub mod fly {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/operators/patroni.md")]
pub mod patroni {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/operators/cloudnativepg.md")]
pub mod cloudnativepg {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/operators/rds.md")]
pub mod rds {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/operators/pgbouncer.md")]
pub mod pgbouncer {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/errors.md")]
pub mod errors {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/exactly-once.md")]
pub mod exactly_once {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/scenarios.md")]
pub mod scenarios {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/figures.md")]
pub mod figures {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/costs.md")]
pub mod costs {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/glossary.md")]
pub mod glossary {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/tuning.md")]
pub mod tuning {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/dns.md")]
pub mod dns {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/tls.md")]
pub mod tls {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/logs.md")]
pub mod logs {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/metrics.md")]
pub mod metrics {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/proxies.md")]
pub mod proxies {}

#[doc = include_str!("docs/links.md")]
#[doc = include_str!("../docs/versions.md")]
pub mod versions {}
