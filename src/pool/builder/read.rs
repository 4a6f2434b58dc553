//! What the fuzz targets look at.

use tokio_postgres::Config;

use super::super::config::{targets, template};
use super::PoolBuilder;
use crate::error::BuildError;

impl PoolBuilder {
    /// Returns what `build_manager` reads from the configuration, without a runtime: names, addresses and the sessions'
    /// template.
    pub(crate) fn read(&self, tls: bool) -> Result<(Vec<(String, u16)>, Vec<String>, Config), BuildError> {
        let targets = targets(&self.config, &self.ssl.hosts)?;
        let template = template(&self.config, &self.ssl.written, tls, self.options.settings.dead_after)?;
        let names = targets.names.iter().map(|name| (name.host.to_string(), name.port)).collect();
        let addresses = targets.addresses.iter().map(ToString::to_string).collect();
        Ok((names, addresses, template))
    }
}
