-- The history function of tokio-postgres-failover. `Evidence::install` runs this file.
-- Run it once, as a superuser, in the database that the application connects to. Standbys get it by replication.
--
-- With it, `Guarantee::ExactlyOnce` settles a COMMIT without an answer after any number of crashes and failovers. Without
-- it, that is possible after one crash or failover. docs/exactly-once.md has the rules.
--
-- When a transaction begins, it leaves a mark in the write-ahead log: a logical message with the prefix `failover` and a
-- word that no other transaction has. `wal_history` finds out whether the log of this server contains that word at that
-- position, and returns the timelines of this server's history. It reads files of `pg_wal`, so it runs with its owner's
-- rights. It discloses nothing else: it compares a whole mark, and returns no byte of the log.

CREATE SCHEMA IF NOT EXISTS "failover";

-- `mark` is the end of the mark's record, `nonce` its word.
-- `seen`: 'marker', 'other' (something else is there, or the log does not reach so far), 'not yet' (that part of the log is
-- not on the disk yet) or 'recycled' (the file is gone). `history`: the history file of the current timeline.
CREATE OR REPLACE FUNCTION "failover"."wal_history"(
    mark pg_catalog.pg_lsn, nonce pg_catalog.text, OUT seen pg_catalog.text, OUT history pg_catalog.text)
    LANGUAGE plpgsql STRICT SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- The caller's session may read backslashes in strings in another way.
    SET standard_conforming_strings = on
AS $$
DECLARE
    page_size    constant bigint := to_number(current_setting('wal_block_size'), '9999999999');
    segment_size constant bigint := (SELECT to_number(setting, '9999999999') FROM pg_settings WHERE name = 'wal_segment_size');
    -- The second part of a file's name counts 4 GiB, the third the segments in them.
    segments     constant bigint := 4294967296 / segment_size;
    timeline     constant bigint := ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::bigint;
    -- A message's prefix ends with a zero byte.
    wanted       constant bytea := convert_to('failover', 'SQL_ASCII') || '\x00'::bytea || convert_to(nonce, 'SQL_ASCII');
    last_byte    constant bigint := (mark - '0/0'::pg_lsn) - 1;
    last_page    constant bigint := last_byte / page_size;
    -- The end of the log at the mark, of up to two pages, without the pages' headers.
    tail         bytea := '';
    part         bytea;
    page         bigint;
    segment      bigint;
    followed     bigint;
BEGIN
    IF nonce !~ '^[0-9a-f]{32}$' OR last_byte < 0 THEN
        RAISE EXCEPTION 'this is no mark of tokio-postgres-failover: "%" at %', left(nonce, 40), mark
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    history := '';
    IF timeline > 1 THEN
        history := pg_read_file('pg_wal/' || upper(lpad(to_hex(timeline), 8, '0')) || '.history', 0, 1000000);
    END IF;
    IF pg_current_wal_insert_lsn() < mark THEN
        seen := 'other';
        RETURN;
    ELSIF pg_current_wal_flush_lsn() < mark THEN
        seen := 'not yet';
        RETURN;
    END IF;

    -- The mark may begin on one page and end on the next.
    -- A loop over `a .. b` would count with an integer, which is too small for the pages of more than 16 TiB of log.
    FOR page IN SELECT generate_series(last_page, greatest(last_page - 1, 0), -1) LOOP
        segment := page * page_size / segment_size;
        part := NULL;
        -- A promotion copies the begun segment to its own timeline, so the newest timeline that had begun by the end of the
        -- segment has the true one. It may be gone, and an older one still be there: that is true up to where its timeline
        -- ended.
        FOR followed IN
            WITH ended AS (
                SELECT to_number(line[1], '9999999999')::bigint AS id, line[2]::pg_lsn AS at
                  FROM regexp_matches(history, '^\s*(\d+)\s+([0-9A-Fa-f]+/[0-9A-Fa-f]+)', 'gn') AS line
            ), begun AS (
                SELECT id, lag(at, 1, '0/0'::pg_lsn) OVER (ORDER BY id) AS at,
                       min(at) OVER (ORDER BY id ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) AS until
                  FROM (SELECT id, at FROM ended UNION ALL SELECT timeline, NULL) AS timelines
            )
            SELECT id FROM begun
             WHERE at - '0/0'::pg_lsn < (segment + 1) * segment_size
               AND coalesce(until - '0/0'::pg_lsn >= least((page + 1) * page_size, last_byte + 1), true)
             ORDER BY id DESC
        LOOP
            part := pg_read_binary_file(
                'pg_wal/' || upper(lpad(to_hex(followed), 8, '0') || lpad(to_hex(segment / segments), 8, '0')
                                   || lpad(to_hex(segment % segments), 8, '0')),
                page * page_size % segment_size, least(page_size, last_byte + 1 - page * page_size), true);
            EXIT WHEN part IS NOT NULL;
        END LOOP;
        -- Behind a switch to the next segment the rest of a segment is zero, the pages' headers too. This part of the log has
        -- been written, so the history went past here without any record.
        IF length(part) >= 24 AND ltrim(encode(part, 'hex'), '0') = '' THEN
            seen := 'other';
            RETURN;
        END IF;
        -- A page's header holds its own position (`xlp_pageaddr`), in the byte order of the machine. Where it does not,
        -- this is not the log as PostgreSQL writes it, and nothing can be said.
        IF part IS NULL OR length(part) < 24 OR NOT page * page_size IN (
            SELECT sum(get_byte(part, 8 + i) * 256::numeric ^ i) FROM generate_series(0, 7) i
             UNION ALL
            SELECT sum(get_byte(part, 15 - i) * 256::numeric ^ i) FROM generate_series(0, 7) i
        ) THEN
            seen := 'recycled';
            RETURN;
        END IF;
        -- The header of a segment's first page is longer (`SizeOfXLogLongPHD`).
        tail := substr(part, CASE WHEN page * page_size % segment_size = 0 THEN 41 ELSE 25 END) || tail;
        EXIT WHEN length(tail) >= length(wanted) + 7;
    END LOOP;
    -- A record is followed by up to seven bytes that align the next one.
    tail := substr(tail, greatest(length(tail) - length(wanted) - 6, 1));
    seen := CASE WHEN position(wanted IN tail) > 0 THEN 'marker' ELSE 'other' END;
END;
$$;

REVOKE ALL ON FUNCTION "failover"."wal_history"(pg_catalog.pg_lsn, pg_catalog.text) FROM PUBLIC;

-- What the application's role needs:
--   GRANT USAGE ON SCHEMA failover TO app;
--   GRANT EXECUTE ON FUNCTION failover.wal_history TO app;
