//! The primary is lost, moves or changes its role, and what DNS and the servers say meanwhile.

mod clusters;
mod demotion;
mod dns;
mod hostile;
mod lives;
mod outages;
mod pace;
mod resolve;
mod scenarios;
