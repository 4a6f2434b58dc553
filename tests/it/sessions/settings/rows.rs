//! The rows of the matrix: what a role, a connection string or a database sets, and what lies in the database.

/// A role's settings, and where it connects to.
pub(super) struct Row {
    pub(super) name: String,
    pub(super) role: String,
    pub(super) settings: Vec<(String, String)>,
    /// Of the connection string, from its `?` on.
    pub(super) options: &'static str,
    /// What the superuser runs in its database before.
    pub(super) setup: String,
    pub(super) database: &'static str,
    pub(super) encoding: Option<&'static str>,
}

impl Row {
    fn new(name: &str, settings: &[(&str, &str)]) -> Self {
        let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let (name, role) = (name.to_owned(), String::new());
        Self { name, role, settings, options: "", setup: String::new(), database: "app", encoding: None }
    }

    /// A time limit of the role's that a stall of the machine may exceed.
    pub(super) fn is_timed(&self) -> bool {
        self.settings.iter().any(|(name, _)| name.ends_with("_timeout"))
    }

    fn set(name: &str, value: &str) -> Self {
        Self::new(&format!("{name} = {value}"), &[(name, value)])
    }

    fn options(self, options: &'static str) -> Self {
        Self { options, ..self }
    }

    fn setup(self, setup: &str) -> Self {
        Self { setup: setup.to_owned(), ..self }
    }

    fn database(self, database: &'static str, encoding: Option<&'static str>) -> Self {
        Self { database, encoding, ..self }
    }
}

/// Everything of `pg_catalog` that can have a namesake has one in the schema `evil`, which fails when it is used.
pub(super) const SHADOWS: &str = r"
CREATE SCHEMA evil;
GRANT USAGE ON SCHEMA evil TO PUBLIC;
DO $do$
DECLARE it record;
BEGIN
    FOR it IN SELECT oid, proname FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND prokind = 'f' LOOP
        BEGIN
            EXECUTE format(
                $sql$ CREATE FUNCTION evil.%I(%s) RETURNS %s LANGUAGE plpgsql
                      AS 'BEGIN RAISE ''shadow of %s''; END' $sql$,
                it.proname, pg_get_function_arguments(it.oid), pg_get_function_result(it.oid), it.proname);
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    FOR it IN SELECT o.oprname, p.proname, o.oprleft::regtype AS l, o.oprright::regtype AS r, o.oprleft = 0 AS prefix
                FROM pg_operator o JOIN pg_proc p ON p.oid = o.oprcode
               WHERE o.oprnamespace = 'pg_catalog'::regnamespace LOOP
        BEGIN
            EXECUTE format('CREATE OPERATOR evil.%s (FUNCTION = evil.%I, %s RIGHTARG = %s)', it.oprname, it.proname,
                           CASE WHEN it.prefix THEN '' ELSE format('LEFTARG = %s,', it.l) END, it.r);
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    FOR it IN SELECT relname FROM pg_class
               WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind IN ('r', 'v') LOOP
        BEGIN
            EXECUTE format('CREATE TABLE evil.%I AS SELECT * FROM pg_catalog.%I WITH NO DATA', it.relname, it.relname);
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    FOR it IN SELECT typname FROM pg_type
               WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype = 'b' AND typelem = 0 LOOP
        BEGIN
            EXECUTE format('CREATE DOMAIN evil.%I AS pg_catalog.%I CHECK (false)', it.typname, it.typname);
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
END $do$;
DO $$ BEGIN
    ASSERT (SELECT count(*) FROM pg_proc WHERE pronamespace = 'evil'::regnamespace) > 2000;
    ASSERT (SELECT count(*) FROM pg_operator WHERE oprnamespace = 'evil'::regnamespace) > 600;
    ASSERT (SELECT count(*) FROM pg_class WHERE relnamespace = 'evil'::regnamespace AND relkind = 'r') > 100;
    ASSERT (SELECT count(*) FROM pg_type WHERE typnamespace = 'evil'::regnamespace AND typtype = 'd') > 40;
END $$;
GRANT ALL ON ALL TABLES IN SCHEMA evil TO PUBLIC;
";

/// Casts as those have who came from another database, and worse ones.
const CASTS: &str = "
CREATE FUNCTION public.fails(text) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RAISE ''a cast''; END';
CREATE FUNCTION public.fails_int(text) RETURNS integer LANGUAGE plpgsql AS 'BEGIN RAISE ''a cast''; END';
CREATE FUNCTION public.fails_bigint(text) RETURNS bigint LANGUAGE plpgsql AS 'BEGIN RAISE ''a cast''; END';
CREATE FUNCTION public.fails_interval(text) RETURNS interval LANGUAGE plpgsql AS 'BEGIN RAISE ''a cast''; END';
CREATE CAST (text AS boolean) WITH FUNCTION public.fails(text) AS IMPLICIT;
CREATE CAST (text AS integer) WITH FUNCTION public.fails_int(text) AS IMPLICIT;
CREATE CAST (text AS bigint) WITH FUNCTION public.fails_bigint(text) AS IMPLICIT;
CREATE CAST (text AS interval) WITH FUNCTION public.fails_interval(text) AS IMPLICIT;
CREATE CAST (integer AS text) WITH INOUT AS IMPLICIT;
CREATE CAST (bigint AS text) WITH INOUT AS IMPLICIT;
CREATE CAST (timestamptz AS text) WITH INOUT AS IMPLICIT;
CREATE CAST (xid8 AS text) WITH INOUT AS IMPLICIT;
CREATE CAST (pg_lsn AS text) WITH INOUT AS IMPLICIT;
";

/// Several at once, by the connection string.
const OPTIONS: &str = "?options=-c%20client_min_messages%3Derror%20-c%20datestyle%3Dgerman\
    %20-c%20extra_float_digits%3D-15\
    %20-c%20default_transaction_isolation%3Dserializable%20-c%20standard_conforming_strings%3Doff\
    %20-c%20timezone%3DAsia/Kathmandu%20-c%20synchronous_commit%3Doff%20-c%20search_path%3Devil,pg_catalog";

#[expect(clippy::too_many_lines, reason = "a table")]
pub(super) fn rows() -> Vec<Row> {
    let mut rows = vec![
        // The measure: nothing is set.
        Row::new("nothing", &[]),
        // What is sent beside answers.
        Row::set("client_min_messages", "error"),
        Row::set("client_min_messages", "debug5"),
        // How values are printed and read.
        Row::set("DateStyle", "SQL, DMY"),
        Row::set("IntervalStyle", "sql_standard"),
        Row::set("TimeZone", "Asia/Kathmandu"),
        Row::set("bytea_output", "escape"),
        Row::set("extra_float_digits", "-15"),
        Row::set("xmloption", "document"),
        Row::set("quote_all_identifiers", "on"),
        Row::set("client_encoding", "LATIN1"),
        Row::set("client_encoding", "SJIS"),
        Row::set("client_encoding", "GBK"),
        Row::set("client_encoding", "SQL_ASCII"),
        Row::new(
            "locale",
            &[("lc_messages", "C"), ("lc_monetary", "C.UTF-8"), ("lc_numeric", "C.UTF-8"), ("lc_time", "C.UTF-8")],
        ),
        // How statements are read.
        Row::new("old strings", &[("standard_conforming_strings", "off"), ("backslash_quote", "off")]),
        Row::set("escape_string_warning", "off"),
        Row::set("array_nulls", "off"),
        Row::set("transform_null_equals", "on"),
        Row::set("operator_precedence_warning", "on"),
        Row::set("search_path", "''"),
        Row::set("search_path", "evil, pg_catalog"),
        Row::set("search_path", "evil, public, pg_temp, pg_catalog"),
        Row::set("search_path", "nowhere"),
        Row::new("casts", &[]).database("casts", None).setup(CASTS),
        // How long they may take.
        Row::set("statement_timeout", "150ms"),
        Row::set("lock_timeout", "2s"),
        Row::set("idle_in_transaction_session_timeout", "1s"),
        Row::set("idle_session_timeout", "900ms"),
        Row::set("transaction_timeout", "1s"),
        // What their transactions are like.
        Row::set("default_transaction_isolation", "serializable"),
        Row::set("default_transaction_isolation", "repeatable read"),
        Row::set("default_transaction_isolation", "read uncommitted"),
        Row::set("default_transaction_deferrable", "on"),
        Row::new(
            "serializable and deferrable",
            &[("default_transaction_isolation", "serializable"), ("default_transaction_deferrable", "on")],
        ),
        Row::set("synchronous_commit", "off"),
        Row::set("synchronous_commit", "local"),
        Row::set("synchronous_commit", "remote_write"),
        Row::set("synchronous_commit", "remote_apply"),
        // Who they are run as, and what they may see.
        Row::set("role", "app"),
        Row::set("role", "stranger").setup("CREATE ROLE stranger; GRANT stranger TO {role}"),
        Row::set("row_security", "off"),
        Row::set("session_replication_role", "replica"),
        Row::set("track_activities", "off"),
        Row::set("track_counts", "off"),
        Row::set("event_triggers", "off"),
        Row::set("restrict_nonsystem_relation_kind", "view, foreign-table"),
        // How they are planned and carried out.
        Row::set("plan_cache_mode", "force_custom_plan"),
        Row::set("plan_cache_mode", "force_generic_plan"),
        Row::new(
            "jit",
            &[("jit", "on"), ("jit_above_cost", "0"), ("jit_inline_above_cost", "0"), ("jit_optimize_above_cost", "0")],
        ),
        Row::new(
            "no way to plan",
            &[
                ("enable_seqscan", "off"),
                ("enable_indexscan", "off"),
                ("enable_bitmapscan", "off"),
                ("enable_indexonlyscan", "off"),
                ("enable_nestloop", "off"),
                ("enable_hashjoin", "off"),
                ("enable_mergejoin", "off"),
                ("enable_sort", "off"),
                ("enable_tidscan", "off"),
                ("enable_material", "off"),
            ],
        ),
        Row::new(
            "parallel",
            &[
                ("force_parallel_mode", "regress"),
                ("debug_parallel_query", "regress"),
                ("parallel_setup_cost", "0"),
                ("parallel_tuple_cost", "0"),
                ("min_parallel_table_scan_size", "0"),
            ],
        ),
        Row::new(
            "little",
            &[
                ("work_mem", "64kB"),
                ("maintenance_work_mem", "1MB"),
                ("temp_buffers", "800kB"),
                ("max_stack_depth", "100kB"),
                ("temp_file_limit", "10MB"),
            ],
        ),
        // What is made where.
        Row::set("default_table_access_method", "other")
            .setup("CREATE ACCESS METHOD other TYPE TABLE HANDLER heap_tableam_handler"),
        Row::set("default_toast_compression", "pglz"),
        Row::set("check_function_bodies", "off"),
        // What is logged.
        Row::new(
            "logged",
            &[
                ("log_min_messages", "debug5"),
                ("log_statement", "all"),
                ("log_duration", "on"),
                ("log_error_verbosity", "verbose"),
            ],
        ),
        Row::new("terse", &[("log_error_verbosity", "terse"), ("log_min_messages", "panic")]),
        // By the connection string, and databases of other encodings.
        Row::new("options", &[]).options(OPTIONS),
        Row::new("LATIN1", &[]).database("latin", Some("LATIN1")),
        Row::new("SQL_ASCII", &[]).database("ascii", Some("SQL_ASCII")),
        Row::new("EUC_JP", &[]).database("japanese", Some("EUC_JP")),
    ];
    for (n, row) in rows.iter_mut().enumerate() {
        row.role = format!("r{n}");
    }
    rows
}
