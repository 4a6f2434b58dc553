//! The options that `PoolBuilder` and `WrapBuilder` share, and the checks of option values.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};
use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::sleep;

use super::checkout_reports::CheckoutLimits;
use super::closing::Closing;
use super::lacking::Lacking;
use super::pruning::PruneAt;
use super::shared::CallState;
use super::signing::SignatureCache;
use crate::commit::Guarantee;
use crate::error::BuildError;
use crate::resolve::{HickoryResolver, Resolve};
use crate::retry::{FAR, RetryBudget, RetryPolicy};
use crate::topology::Settings;

/// What both kinds of pool can be configured with.
#[derive(Clone, Default)]
pub(super) struct Options {
    pub(super) calls: CallOptions,
    pub(super) settings: Settings,
    pub(super) pool_name: Option<String>,
    pub(super) seed: Option<u64>,
}

/// Makes the setters of a builder that has [`Options`]. Each builder documents its setters itself. The last rule makes
/// a setter, and the others say which option each one sets. `tests/public_api.rs` reads these rules.
macro_rules! setters {
    ($($(#[$about:meta])* $setter:ident;)+) => { $(setters! { @$setter $(#[$about])* })+ };
    (@checkout_timeout $($about:tt)*) => {
        setters! { @set $($about)* checkout_timeout(timeout: Duration) calls.checkout_timeout = timeout }
    };
    (@retry $($about:tt)*) => { setters! { @set $($about)* retry(policy: RetryPolicy) calls.retry = policy } };
    (@retry_budget $($about:tt)*) => {
        setters! { @set $($about)* retry_budget(budget: RetryBudget) calls.budget = budget }
    };
    (@guarantee $($about:tt)*) => {
        setters! { @set $($about)* guarantee(guarantee: Guarantee) calls.guarantee = guarantee }
    };
    (@begin_with_first_statement $($about:tt)*) => {
        setters! {
            @set $($about)* begin_with_first_statement(together: bool) calls.begin_with_first_statement = together
        }
    };
    (@slow_checkout_after $($about:tt)*) => {
        setters! { @set $($about)* slow_checkout_after(wait: Duration) calls.slow_checkout_after = Some(wait) }
    };
    (@leak_after $($about:tt)*) => {
        setters! { @set $($about)* leak_after(checked_out_for: Duration) calls.leak_after = Some(checked_out_for) }
    };
    (@heartbeat_interval $($about:tt)*) => {
        setters! { @set $($about)* heartbeat_interval(interval: Duration) settings.heartbeat = interval }
    };
    (@heartbeat_timeout $($about:tt)*) => {
        setters! { @set $($about)* heartbeat_timeout(timeout: Duration) settings.heartbeat_timeout = timeout }
    };
    (@patrol_interval $($about:tt)*) => {
        setters! { @set $($about)* patrol_interval(interval: Duration) settings.patrol = interval }
    };
    (@dead_after $($about:tt)*) => {
        setters! { @set $($about)* dead_after(silence: Duration) settings.dead_after = silence }
    };
    (@system_identifier $($about:tt)*) => {
        setters! {
            @set $($about)* system_identifier(system_identifier: u64)
                settings.system_identifier = Some(system_identifier)
        }
    };
    (@accept_new_cluster_after $($about:tt)*) => {
        setters! {
            @set $($about)* accept_new_cluster_after(silence: Duration)
                settings.accept_new_cluster_after = Some(silence)
        }
    };
    (@pool_name $($about:tt)*) => {
        setters! { @set $($about)* pool_name(name: impl Into<String>) pool_name = Some(name.into()) }
    };
    (@seed $($about:tt)*) => { setters! { @set $($about)* seed(seed: u64) seed = Some(seed) } };
    (@set $(#[$about:meta])* $setter:ident($value:ident: $type:ty) $($option:ident).+ = $set:expr) => {
        $(#[$about])*
        pub fn $setter(mut self, $value: $type) -> Self {
            self.options.$($option).+ = $set;
            self
        }
    };
}
pub(super) use setters;

/// The options of `get` and `transaction`. They are the same for an own and for a wrapped pool.
#[derive(Clone)]
pub(super) struct CallOptions {
    pub(super) checkout_timeout: Duration,
    pub(super) retry: RetryPolicy,
    pub(super) budget: RetryBudget,
    pub(super) guarantee: Guarantee,
    pub(super) begin_with_first_statement: bool,
    pub(super) slow_checkout_after: Option<Duration>,
    pub(super) leak_after: Option<Duration>,
}

impl Default for CallOptions {
    fn default() -> Self {
        Self {
            checkout_timeout: Duration::from_secs(30),
            retry: RetryPolicy::default(),
            budget: RetryBudget::default(),
            guarantee: Guarantee::default(),
            begin_with_first_statement: true,
            slow_checkout_after: None,
            leak_after: None,
        }
    }
}

impl CallOptions {
    /// Checks the options, and makes from them what the calls of the pool have in common.
    pub(super) fn state(self, settings: &Settings) -> Result<CallState, BuildError> {
        let Self { begin_with_first_statement, slow_checkout_after, leak_after, .. } = self;
        let Self { checkout_timeout, retry, budget, guarantee, .. } = self;
        not_zero("checkout_timeout", checkout_timeout)?;
        slow_checkout_after.map_or(Ok(()), |limit| not_zero("slow_checkout_after", limit))?;
        leak_after.map_or(Ok(()), |limit| not_zero("leak_after", limit))?;
        retry.validate().map_err(|problem| BuildError::invalid("retry", problem))?;
        Ok(CallState {
            checkout_timeout: checkout_timeout.min(FAR),
            heartbeat: settings.heartbeat.min(FAR),
            retry,
            budget,
            guarantee,
            begin_with_first_statement,
            searching: AtomicUsize::new(0),
            lacking: Lacking::default(),
            signatures: SignatureCache::default(),
            prune_at: PruneAt::default(),
            closing: Closing::default(),
            reports: CheckoutLimits::new(slow_checkout_after, leak_after.map(|limit| limit.min(FAR))),
            resizing: std::sync::Mutex::default(),
        })
    }
}

/// Checks the settings and the runtime. Shortens every time that is longer than [`FAR`].
pub(super) fn checked(settings: &mut Settings) -> Result<(), BuildError> {
    Handle::try_current().map_err(|_| BuildError::NoRuntime)?;
    has_drivers()?;
    for (option, duration) in [
        ("heartbeat_interval", &mut settings.heartbeat),
        ("heartbeat_timeout", &mut settings.heartbeat_timeout),
        ("patrol_interval", &mut settings.patrol),
        ("poll_interval", &mut settings.poll.0),
        ("poll_interval", &mut settings.poll.1),
        ("probe_timeout", &mut settings.probe_timeout),
        ("dead_after", &mut settings.dead_after),
    ] {
        not_zero(option, *duration)?;
        *duration = FAR.min(*duration);
    }
    if let Some(silence) = &mut settings.accept_new_cluster_after {
        not_zero("accept_new_cluster_after", *silence)?;
        *silence = FAR.min(*silence);
        if settings.system_identifier.is_some() {
            let problem = "contradicts `system_identifier`, which names the only cluster; remove one of them";
            return Err(BuildError::invalid("accept_new_cluster_after", problem));
        }
    }
    if settings.poll.0 > settings.poll.1 {
        return Err(BuildError::invalid("poll_interval", "the shortest pause is longer than the longest"));
    }
    Ok(())
}

/// Fails on a runtime that was built without timers or without sockets, because tokio would panic there later. A
/// runtime cannot be asked for these, so this tries both.
fn has_drivers() -> Result<(), BuildError> {
    if catch_unwind(|| drop(sleep(Duration::ZERO))).is_err() {
        return Err(BuildError::Runtime { lacks: "enable_time" });
    }
    // The simulation opens no socket, and has no driver for them.
    #[cfg(all(unix, not(failover_sim)))]
    if catch_unwind(|| drop(tokio::net::UnixStream::pair())).is_err() {
        return Err(BuildError::Runtime { lacks: "enable_io" });
    }
    Ok(())
}

/// The most connections that PostgreSQL can be configured for.
const MOST_CONNECTIONS: usize = 262_143;

pub(super) fn usable_size(max_size: usize) -> Result<(), BuildError> {
    match max_size {
        0 => Err(BuildError::invalid("max_size", "must be at least 1: a pool of none hands out nothing")),
        1..=MOST_CONNECTIONS => Ok(()),
        _ => {
            let problem = format!(
                "{max_size} is more than any server takes ({MOST_CONNECTIONS}); choose what the server's \
                 max_connections leaves for this pool"
            );
            Err(BuildError::invalid("max_size", problem))
        }
    }
}

pub(super) fn seed_or_random(seed: Option<u64>) -> u64 {
    seed.unwrap_or_else(|| RandomState::new().hash_one(0))
}

pub(super) fn not_zero(option: &'static str, duration: Duration) -> Result<(), BuildError> {
    if duration.is_zero() {
        return Err(BuildError::invalid(option, "must be longer than zero"));
    }
    Ok(())
}

/// Chooses the resolver: the user's own, or else DNS with these name servers, or else DNS with the system's. `unused`:
/// the configuration has no name, so no resolver is needed.
pub(super) fn resolver(
    own: Option<Arc<dyn Resolve>>,
    servers: Option<Vec<SocketAddr>>,
    unused: bool,
) -> Result<Arc<dyn Resolve>, BuildError> {
    match (own, servers) {
        (None, Some(servers)) if servers.is_empty() => {
            let problem = "give at least one, or do not call it, to ask those of the system";
            return Err(BuildError::invalid("dns_servers", problem));
        }
        (Some(own), _) => return Ok(own),
        (None, Some(servers)) => return Ok(Arc::new(HickoryResolver::with_name_servers(servers))),
        (None, None) => {}
    }
    if unused {
        return Ok(Arc::new(crate::resolve::FixedResolver::new(Vec::<(String, Vec<IpAddr>)>::new())));
    }
    HickoryResolver::system().map(|resolver| Arc::new(resolver) as _).map_err(BuildError::Resolver)
}
