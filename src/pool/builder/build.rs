//! Checks the options together, and starts the pool that they describe.

use std::sync::Arc;

use deadpool::managed::{self, QueueMode};
use deadpool_postgres::ClientWrapper;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::super::config::{names, open_within, targets, template};
use super::super::dialer::Dialer;
use super::super::idle::{Idle, IdleTask};
use super::super::options::{checked, not_zero, resolver, seed_or_random, usable_size};
use super::super::security::{make_opener, plain_opener};
use super::super::shared::Shared;
use super::super::{Manager, Pool, Source};
use super::PoolBuilder;
use crate::cluster::{Cluster, Setup};
use crate::error::BuildError;
use crate::observe::Observer;
use crate::retry::FAR;
use crate::server::{Open, Passwords};

impl PoolBuilder {
    /// Creates the pool. Starts its tasks on the current tokio runtime, which must exist. Needs no server.
    pub fn build(self) -> Result<Pool, BuildError> {
        let max_size = self.max_size;
        usable_size(max_size)?;
        if self.idle.min > max_size {
            let problem = format!("{} is more than max_size, {max_size}; lower it, or raise max_size", self.idle.min);
            return Err(BuildError::invalid("min_idle", problem));
        }
        not_zero("idle_timeout", self.idle.timeout)?;
        let idle = Idle { timeout: self.idle.timeout.min(FAR), ..self.idle };
        let calls = self.options.calls.clone().state(&self.options.settings)?;
        let manager = Self { knows_checkouts: true, ..self }.build_manager()?;
        let dialer = Arc::clone(&manager.dialer);
        dialer.cluster.observer().sized(max_size, idle.min);
        let inner = managed::Pool::builder(manager).max_size(max_size).queue_mode(QueueMode::Lifo).build();
        // Building fails only for time-outs without a runtime, and no time-outs are set.
        let inner = inner.map_err(|error| BuildError::invalid("deadpool", error.to_string()))?;
        dialer.queue.serve(inner.weak(), max_size, self.idle.min);
        let keeper = IdleTask {
            idle,
            pool: inner.weak(),
            dialer: Arc::downgrade(&dialer),
            snapshots: dialer.cluster.snapshots(),
            end: dialer.cluster.scope().clone(),
        };
        tokio::spawn(keeper.run());
        Ok(Pool { shared: Arc::new(Shared { source: Source::Own(inner), dialer, calls }) })
    }

    /// Creates only the manager, for a deadpool pool built by hand. `max_size`, `checkout_timeout`, `min_idle`,
    /// `idle_timeout`, `sleep_after`, `guarantee` and the retry settings are not used. What must know when a connection
    /// is lent is refused: `before_acquire`, `after_release`, `reset_on_return`, `slow_checkout_after`, `leak_after`.
    pub fn build_manager(mut self) -> Result<Manager, BuildError> {
        let (written, default) = (&self.ssl.written, self.options.settings.probe_timeout);
        self.options.settings.probe_timeout = open_within(&self.config, written, self.probe_timeout, default)?;
        checked(&mut self.options.settings)?;
        let settings = &self.options.settings;
        not_zero("max_lifetime", self.max_lifetime)?;
        self.sleep_after.map_or(Ok(()), |after| not_zero("sleep_after", after))?;
        if self.gate == 0 {
            return Err(BuildError::invalid("connection_gate", "must be at least 1: nothing passes a closed gate"));
        }
        Self::usable_reports(&self.options.calls, self.knows_checkouts)?;
        let hooks = Self::usable_hooks(self.hooks, self.knows_checkouts)?;
        if let (None, Some(found)) = (&self.ask_password, self.password_file) {
            self.config.password(found?);
        }
        let targets = targets(&self.config, &self.ssl.hosts)?;
        let make_opener = make_opener(self.security, &self.ssl, &mut self.config, self.connector.as_ref())?;
        let template = template(&self.config, &self.ssl.written, make_opener.is_some(), settings.dead_after)?;
        if self.ask_password.is_some() && template.get_password().is_some() {
            let problem = "the connection string, or PGPASSWORD, holds a password too; remove one of them";
            return Err(BuildError::invalid("password_provider", problem));
        }
        // The provider must be able to fail more than once before connections are ended for silence.
        let shortest = settings.probe_timeout.min(settings.heartbeat_timeout).min(settings.dead_after / 3);
        let names = names(self.options.pool_name, &targets, &template);
        let passwords = self.ask_password.map(|ask| Passwords::new(ask, shortest));
        let open_timeout = settings.probe_timeout;
        let resolver = resolver(self.resolver, self.dns_servers, targets.names.is_empty())?;
        let seed = seed_or_random(self.options.seed);
        let opener = match make_opener {
            Some(make_opener) => make_opener(template),
            None => plain_opener(template, self.connector),
        };
        let opener: Arc<dyn Open<ClientWrapper>> = Arc::new(opener.with_passwords(passwords));
        let cluster = Cluster::start(Setup {
            settings: self.options.settings,
            names: targets.names,
            configured: targets.addresses,
            resolver,
            opener: Arc::clone(&opener),
            gate: self.gate.min(Semaphore::MAX_PERMITS),
            seed,
            observer: Arc::new(Observer::new(names)),
            sleep_after: self.sleep_after.filter(|_| self.knows_checkouts).map(|after| after.min(FAR)),
        });
        let max_lifetime = self.max_lifetime.min(FAR);
        let dialer = Dialer::new(cluster, opener, open_timeout, seed, Handle::current());
        Ok(Manager::new(Arc::new(dialer.with_ages(max_lifetime, self.test_idle_after).with_hooks(hooks))))
    }
}
