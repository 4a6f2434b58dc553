//! `cargo run --release -p failover-bench --bin quiet`: what a call costs while nothing happens. `ROUNDS`, `SECONDS`,
//! `TASKS`, `WORK`, `SUBJECTS` and `COMMIT_DELAY` change the run; see `failover_bench::quiet::Options`.

use failover_bench::quiet::{Failure, Options, run, tables};

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let options = Options::from_environment()?;
    let measured = run(&options, |now| eprintln!("{now}")).await?;
    println!(
        "{} rounds of {:?} each, synchronous standby, fsync on, commit_delay {} us; ratios to the slice of \
         deadpool-fast in the same round: median (min - max)",
        options.rounds, options.slice, options.commit_delay
    );
    println!("{}", tables(&measured));
    Ok(())
}
