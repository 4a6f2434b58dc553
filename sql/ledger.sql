-- The ledger of tokio-postgres-failover: what `Ledger::install` creates, under the names that `Ledger::default` has.
-- Run it as the owner of the database if the application may not create tables.
--
-- Each transaction with `Guarantee::Ledger` inserts one row, with BEGIN. The row is committed with the transaction, or not
-- at all. Whoever has to know later inserts a row of the same id: if that goes in, the transaction can never commit any
-- more, and if it conflicts, the transaction was committed.

SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('tokio-postgres-failover ledger'));

CREATE SCHEMA IF NOT EXISTS "failover";

CREATE TABLE IF NOT EXISTS "failover"."ledger" (
    id    pg_catalog.uuid        PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid(),
    -- By the server's clock; then it may be pruned. The transaction's BEGIN and `Ledger::keep`.
    until pg_catalog.timestamptz NOT NULL,
    -- A settler's row, not a transaction's.
    fence boolean                NOT NULL DEFAULT false
) USING heap;

-- For pruning. A BRIN index costs a writer next to nothing.
CREATE INDEX IF NOT EXISTS "ledger_until" ON "failover"."ledger" USING brin (until);

-- What the application's role needs:
--   GRANT USAGE ON SCHEMA failover TO app;
--   GRANT SELECT, INSERT, UPDATE, DELETE ON failover.ledger TO app;
