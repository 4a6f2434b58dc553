# The commands of this project; the continuous integration calls the same ones.
.DEFAULT_GOAL := help
.PHONY: help setup demo picture test test-long soak lint

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: ## Install PostgreSQL's server programs, if they are missing
	@sh scripts/setup.sh

demo: setup ## Kill a primary under load: this pool beside a plain one (RUNS=20, DNS=moves|all|hosts)
	cargo run --release --quiet --example failover

picture: demo ## Renew the picture in the README from a run of the demo
	cp target/demo/failover.svg docs/failover.svg

test: setup ## Run every test against real servers
	cargo test --workspace --all-features

soak: setup ## Random faults under load, held against what is stored (MINUTES=5, FAILOVERS=100, SEED=...)
	cargo test --release --all-features --test soak

test-long: test ## All tests, and five minutes of the soak
	MINUTES=5 cargo test --release --all-features --test soak

lint: ## Formatting, clippy and documentation, warnings denied
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --all-features
