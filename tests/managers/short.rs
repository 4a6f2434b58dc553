//! One round of the most important trials, for `make test-managers`. Each passes with a line that says so where its
//! manager is not installed.

use std::time::Instant;

use crate::trials::{self, Trial};

async fn round(trial: Trial) {
    if !trial.is_possible() {
        return;
    }
    let begun = Instant::now();
    let round = trial.round().await;
    println!("{}: {} in {:.1} s", trial.name, round.line(), begun.elapsed().as_secs_f64());
    assert!(round.broken.is_empty(), "{}\n{}\n{}", trial.name, round.line(), round.broken.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts ten servers and more: make test-managers"]
async fn patroni_a_leader_is_killed() {
    round(trials::kill()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts ten servers and more: make test-managers"]
async fn patroni_a_switchover() {
    round(trials::switchover()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts ten servers and more: make test-managers"]
async fn patroni_a_frozen_patroni_leaves_a_zombie() {
    round(trials::zombie()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts ten servers and more: make test-managers"]
async fn patroni_a_leader_is_cut_off() {
    round(trials::cut()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts ten servers and more: make test-managers"]
async fn patroni_a_leader_is_back_within_its_lease() {
    round(trials::lease()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts ten servers and more: make test-managers"]
async fn repmgr_an_old_primary_is_started_again() {
    round(trials::two_primaries()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts ten servers and more: make test-managers"]
async fn haproxy_a_zombie_at_the_only_address() {
    round(trials::proxied_zombie()).await;
}
