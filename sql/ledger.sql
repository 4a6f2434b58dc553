-- The ledger of tokio-postgres-failover. `Ledger::install` runs this file. The names are those of `Ledger::default`.
-- Run it as the owner of the database if the application may not create tables.
--
-- Each transaction with `Guarantee::Ledger` inserts one row at BEGIN. The row is committed with the transaction, or not at
-- all. To find out later whether the transaction was committed, the pool inserts a row with the same id. If that succeeds,
-- the transaction can never commit any more. If it conflicts, the transaction was committed.

SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('tokio-postgres-failover ledger'));

CREATE SCHEMA IF NOT EXISTS "failover";

CREATE TABLE IF NOT EXISTS "failover"."ledger" (
    id    pg_catalog.uuid        PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid(),
    -- The row may be pruned after this time, by the server's clock: BEGIN of the transaction plus `Ledger::keep`.
    until pg_catalog.timestamptz NOT NULL,
    -- True for a row that the pool inserted to find out the outcome, false for a transaction's own row.
    fence boolean                NOT NULL DEFAULT false
) USING heap;

-- For pruning. A BRIN index costs a writer almost nothing.
CREATE INDEX IF NOT EXISTS "ledger_until" ON "failover"."ledger" USING brin (until);

-- What the application's role needs:
--   GRANT USAGE ON SCHEMA failover TO app;
--   GRANT SELECT, INSERT, UPDATE, DELETE ON failover.ledger TO app;
