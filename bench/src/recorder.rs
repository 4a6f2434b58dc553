//! Every answer that the workers of one peer got, in the order of its arrival.

use std::sync::{Mutex, MutexGuard};

use testbed::lock;

use crate::event::Event;

/// Shared by a peer's workers and whoever looks at them. Cheap enough to stand beside a write.
#[derive(Debug)]
pub struct Recorder {
    log: Mutex<Log>,
}

#[derive(Debug)]
struct Log {
    events: Vec<Event>,
    /// When each worker was acknowledged last.
    last_ok: Vec<u64>,
}

impl Recorder {
    /// For so many workers. An event of any other worker is kept, and counts for nobody.
    pub fn new(workers: usize) -> Self {
        Self { log: Mutex::new(Log { events: Vec::new(), last_ok: vec![0; workers] }) }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        lock(&self.log)
    }

    /// Adds an event.
    pub fn record(&self, event: Event) {
        let mut log = self.log();
        if event.outcome.is_ok()
            && let Some(last) = log.last_ok.get_mut(event.worker)
        {
            *last = event.micros.max(*last);
        }
        log.events.push(event);
    }

    /// How many workers were acknowledged after this moment.
    pub fn workers_ok_since(&self, micros: u64) -> usize {
        self.log().last_ok.iter().filter(|last| **last > micros).count()
    }

    /// How many events there are.
    pub fn len(&self) -> usize {
        self.log().events.len()
    }

    /// Whether nothing has happened yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A copy of all events.
    pub fn events(&self) -> Vec<Event> {
        self.log().events.clone()
    }
}
