//! What the demo prints: a live line while it runs, and the table at the end.

use std::io::{IsTerminal, Write, stdout};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use testbed::Spread;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tokio_postgres_failover::Pool;
use tokio_postgres_failover::view::State;

use crate::WRITERS;
use crate::figures::{change, milliseconds, spreads};
use crate::load::Progress;
use crate::scenario::Run;

pub(crate) struct Screen {
    terminal: bool,
    /// Several runs are told in one line each.
    many: bool,
}

/// Stops the live line when it goes out of scope.
pub(crate) struct Live(Option<JoinHandle<()>>);

impl Drop for Live {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl Screen {
    pub(crate) fn new(runs: usize) -> Self {
        Self { terminal: stdout().is_terminal(), many: runs > 1 }
    }

    pub(crate) fn say(&self, text: &str) {
        // On a terminal a live line may stand where this goes.
        let clear = if self.terminal { "\r\x1b[2K" } else { "" };
        println!("{clear}{text}");
    }

    pub(crate) fn event(&self, start: Instant, what: &str) {
        if !self.many {
            self.say(&format!("{:5.2} s  {what}", start.elapsed().as_secs_f64()));
        }
    }

    /// Shows what both sides do until the result is dropped: one line that renews itself, or a line a second.
    pub(crate) fn follow(&self, start: Instant, pool: Pool, progress: [Arc<Progress>; 2]) -> Live {
        if self.many && !self.terminal {
            return Live(None);
        }
        let terminal = self.terminal;
        let ticks = if terminal { 5 } else { 1 };
        Live(Some(tokio::spawn(async move {
            let mut tick = interval(Duration::from_secs(1) / ticks);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut before = [0, 0];
            tick.tick().await;
            loop {
                tick.tick().await;
                let now = progress.each_ref().map(|side| side.acknowledged.load(Ordering::Relaxed));
                let per_second = |side: usize| (now[side] - before[side]) * u64::from(ticks);
                let errors = progress.each_ref().map(|side| side.errors.load(Ordering::Relaxed));
                let line = format!(
                    "{:5.2} s  this pool {:4}/s, {} errors, {} | plain {:4}/s, {} errors",
                    start.elapsed().as_secs_f64(),
                    per_second(0),
                    errors[0],
                    state(&pool),
                    per_second(1),
                    errors[1]
                );
                before = now;
                if terminal {
                    print!("\r\x1b[2K{line}");
                    // A terminal that is gone needs no line.
                    let _ = stdout().flush();
                } else {
                    println!("{line}");
                }
            }
        })))
    }

    /// One line for one of many runs.
    pub(crate) fn summary(&self, number: usize, run: &Run) {
        let (pool, plain) = (&run.pool.figures, &run.plain.figures);
        let ms = |duration: Option<Duration>| {
            let unit = if duration.is_some() { " ms" } else { "" };
            shown(duration.map(milliseconds)) + unit
        };
        self.say(&format!(
            "run {number:2}: this pool {} errors, first write after {}, all after {} | plain {} errors, {}, {}",
            pool.errors,
            ms(pool.first_success),
            ms(pool.all_writers),
            plain.errors,
            ms(plain.first_success),
            ms(plain.all_writers)
        ));
    }

    pub(crate) fn table(&self, runs: &[Run]) {
        let (pool, plain) = (spreads(runs, |run| &run.pool), spreads(runs, |run| &run.plain));
        self.say("");
        if self.many {
            println!("Median of {} runs, with the smallest and the largest figure:", runs.len());
        }
        let width = if self.many { 26 } else { 12 };
        println!("{:<58}{:>width$}{:>width$}", "", "this pool", "plain");
        for ((name, ours), (_, theirs)) in pool.iter().zip(&plain) {
            println!("{:<58}{:>width$}{:>width$}", label(name), self.cell(name, *ours), self.cell(name, *theirs));
        }
        for (name, spread) in change(runs) {
            println!("{:<58}{:>width$}", label(name), self.cell(name, spread));
        }
    }

    fn cell(&self, name: &str, spread: Spread) -> String {
        let unit = if name.ends_with("_ms") && spread.median.is_some() { " ms" } else { "" };
        let median = shown(spread.median);
        if self.many {
            format!("{median} ({} – {}){unit}", shown(spread.min), shown(spread.max))
        } else {
            format!("{median}{unit}")
        }
    }
}

fn label(name: &str) -> String {
    match name {
        "acknowledged" => "acknowledged writes".to_owned(),
        "errors" => "errors that reached the caller".to_owned(),
        "duplicates" => "rows stored twice".to_owned(),
        "lost" => "acknowledged and lost".to_owned(),
        "longest_gap_ms" => "longest gap of any writer".to_owned(),
        "first_success_ms" => "first write after the new primary accepted writes".to_owned(),
        "all_writers_ms" => format!("all {WRITERS} writers after the new primary accepted writes"),
        "first_success_after_dns_ms" => "first write after DNS named the new primary".to_owned(),
        "promotion_ms" => "the promotion itself, up to the first accepted write".to_owned(),
        "verified_ms" => "this pool's proof of the new primary, after that write".to_owned(),
        other => other.to_owned(),
    }
}

fn shown(value: Option<f64>) -> String {
    match value {
        Some(value) if value.fract() == 0.0 || value >= 100.0 => format!("{value:.0}"),
        Some(value) => format!("{value:.1}"),
        None => "never".to_owned(),
    }
}

fn state(pool: &Pool) -> String {
    match pool.status().view.state {
        State::Primary { endpoint, .. } => format!("primary {}", endpoint.address),
        State::Searching { .. } => "searching".to_owned(),
        _ => "closed".to_owned(),
    }
}
