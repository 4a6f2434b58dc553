# The commands of this project; the continuous integration calls the same ones.
.DEFAULT_GOAL := help
.PHONY: help setup setup-managers demo web picture bench bench-report bench-docs test test-long test-versions test-versions-short soak exactly-once managers test-managers model fuzz lint features api size package sim sim-mutants sim-long sim-reality

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## Install the server programs that the tests need, if they are missing
	@sh scripts/setup.sh

demo: setup ## A primary fails under load in three ways: this pool beside a plain one (FAULT=kill|freeze|demotion, RUNS=20, DNS=moves|all|hosts)
	cargo run --release --quiet --example failover

web: setup-managers ## Three Patroni nodes, etcd and a web service here, with failovers at the keyboard, and a page that shows them (PORT=8080, SYNCHRONOUS=1)
	@cargo run --quiet --example patroni

picture: demo ## Renew the picture in the README from a run of the demo
	cp target/demo/failover.svg docs/failover.svg
	RENEW=1 cargo test --quiet --test documents picture

bench: setup ## This pool beside others (PEERS=rust QUICK=1 CASES=recovery,growth,floor,quiet,fleet FAILURES=kill,... ROUNDS=7 SEED=1)
	@sh bench/setup.sh
	@cargo run --release --quiet --package failover-bench --bin failover-bench

bench-report: ## The benchmark's report anew, from the results in target/bench
	@cargo run --release --quiet --package failover-bench --bin failover-bench -- report

bench-docs: ## Renew BENCHMARKS.md and docs/bench from the results in target/bench
	@cargo run --release --quiet --package failover-bench --bin failover-bench -- docs
	RENEW=1 cargo test --quiet --test documents picture

test: setup ## Run every test against real servers, and a minute of the simulation
	@bash scripts/test.sh
	@SEEDS=1000000 LIMIT=60 sh scripts/sim.sh run

soak: setup ## Random faults under load, held against what is stored (MINUTES=5, FAILOVERS=100, SEED=...)
	cargo test --release --all-features --test soak

exactly-once: setup ## Cut COMMITs and kill primaries; nothing may be lost, doubled or untrue (CUTS=1000 FAILOVERS=200 ASYNC=100 LEASES=3 SEED=..., and in each round PROMOTIONS=2 ARCHIVE=1 HISTORY=1)
	CUTS=$${CUTS:-1000} FAILOVERS=$${FAILOVERS:-200} ASYNC=$${ASYNC:-100} cargo test --release --all-features --test exactly_once

managers: setup-managers ## Patroni with etcd, repmgr and HAProxy, for real: each trial under load, and the table of all (ROUNDS=3, TRIAL=zombie, RECORD=1)
	ROUNDS=$${ROUNDS:-1} cargo test --release --all-features --test managers -- --ignored --exact --nocapture table::table

model: ## The rule of settling against random histories of a modelled cluster (HISTORIES=1000000)
	HISTORIES=$${HISTORIES:-1000000} cargo test --release --all-features --lib a_search_finds_naive_rules -- --nocapture

test-managers: setup-managers ## One round of the most important trials with Patroni, etcd and repmgr; the web service with Patroni
	@bash scripts/test.sh --test managers -- --ignored short::
	cargo build --all-features --example patroni
	cargo test --all-features --test failover -- --ignored patroni::

setup-managers:
	@sh scripts/setup.sh managers

test-long: test ## All tests, what the compiler says of a migration, five minutes of the soak, and a tenth of the proof
	cargo test --package failover-migration -- --ignored
	MINUTES=5 cargo test --release --all-features --test soak
	CUTS=200 FAILOVERS=20 ASYNC=10 cargo test --release --all-features --test exactly_once

VERSIONS ?= 13 14 16 17 18

test-versions: setup ## Every test against other PostgreSQL servers, which it fetches (VERSIONS="13 14 16 17 18" SUITES="it testbed" TESTS="settle:: tls::", RECORD=1)
	@sh scripts/versions.sh $(VERSIONS)

test-versions-short: setup ## Settling, failovers, transactions and TLS on the oldest and the newest server
	@SUITES=it TESTS="settle:: failover:: transaction:: tls::" sh scripts/versions.sh 13 18

SECONDS ?= 600
TARGETS ?= lsn wal_file_name probe_answer connection_string password

fuzz: ## Fuzz what is parsed, one target after the other (SECONDS=600 each, TARGETS="lsn password")
	@sh scripts/fuzz.sh $(SECONDS) $(TARGETS)

lint: features ## Formatting, clippy and documentation, warnings denied; each feature alone
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --all-features

features: ## The library without features, with each alone, and with all
	@sh scripts/features.sh

api: ## Renew the lists of the public API, docs/public-api.txt and testkit/public-api.txt
	RENEW=1 cargo test --quiet --test public_api listed
	@git --no-pager diff --stat -- docs/public-api.txt testkit/public-api.txt

size: ## Crates and compile time of the default build, beside deadpool-postgres
	@sh scripts/size.sh

package: ## Packs the crate and the test kit as for crates.io, and builds and tests what was packed
	@sh scripts/package.sh

sim: ## The whole crate in a deterministic simulation (SEEDS=1000 FIRST=1 LIMIT=60 seconds, or one story: SEED=42 TRACE=1)
	@sh scripts/sim.sh run

sim-mutants: ## Plants deliberate faults in the crate; the simulation must find each (ONLY=words LIMIT=seconds for each)
	@sh scripts/sim.sh mutants

sim-long: ## Failovers on every core until there were enough, in parts; stop it at any time, and start it again (FAILOVERS=1000000 JOBS=2 FIRST=1)
	@sh scripts/sim.sh long

sim-reality: setup ## The same random scripts on the simulated and on real servers; the answers are compared (SCRIPTS=50 FIRST=1)
	@SCRIPTS=$${SCRIPTS:-50} sh scripts/sim.sh reality
