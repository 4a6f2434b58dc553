//! How callers get connections and give them back.

#[cfg(feature = "bb8")]
mod bb8;
mod busy;
mod costs;
mod deadline;
mod fetches;
mod get;
mod hooks;
mod hygiene;
mod idle;
mod impatient;
mod kept;
mod limits;
mod loans;
mod quiet;
mod refused;
mod sizes;
mod wrap;
