//! What a server reports about itself: the SQL of the question, and how its answer is read.

mod parts;

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

pub(crate) use self::parts::Refused;
pub use self::parts::{Part, Parts};
use self::parts::{Piece, in_recovery, preface};

/// The questions that the pool asks a server. Each asks only for what is used, because a new session has an empty
/// catalogue cache, which makes each function, operator and view in a question expensive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    /// Which server is this? The pool asks this on a session that was opened for it, so the session's own settings are
    /// those of a new session.
    Candidate,
    /// The same question on an older session. It also asks for [`EVIDENCE`], and for [`FENCE`], because an older
    /// session does not show the settings of new ones.
    Again,
    /// Does this new session reach the known primary, and has that not restarted or crashed since it was verified?
    Identity,
}

impl Question {
    /// Returns SQL that reads a server's role and identity in one round trip, without the `refused` parts. On an
    /// unmodified server, an ordinary role may call every function in it. The timeline is the first eight digits of the
    /// current WAL file's name, because `pg_control_checkpoint()` still shows the old timeline for a while after a
    /// promotion.
    pub(crate) fn sql(self, refused: Refused) -> String {
        let (preface, recovering) = (preface(refused), in_recovery(refused));
        let told = |piece: Piece, sql: &str| if refused.holds(piece) { "NULL".to_owned() } else { sql.to_owned() };
        let asked = self.parts();
        let part =
            |part: Part, sql: &str| if asked.contains(part) { told(Piece::Told(part), sql) } else { "NULL".into() };
        let settings = ["transaction_read_only", "default_transaction_read_only"];
        let [read_only, default] = settings.map(|name| told(Piece::Settings, &format!("current_setting('{name}')")));
        let unless_recovering = |sql: &str| format!("CASE WHEN {recovering} THEN NULL ELSE {sql} END");
        let columns = [
            told(Piece::Recovery, IN_RECOVERY),
            read_only,
            default,
            part(Part::Fence, FENCE),
            part(Part::Identity, "system_identifier"),
            part(Part::StartTime, STARTED_AT),
            part(Part::Timeline, &unless_recovering(TIMELINE)),
            part(Part::Position, &format!("CASE WHEN {recovering} THEN {REPLAYED} ELSE {WRITTEN} END")),
            part(Part::Replay, &unless_recovering(REPLAYED)),
            part(Part::Statistics, STATS_RESET),
            part(Part::Checkpoint, &unless_recovering(CHECKPOINTED)),
            part(Part::Evidence, EVIDENCE),
            if self == Self::Again { "NULL".into() } else { told(Piece::Session, SESSION) },
        ];
        let from = if refused.holds(Piece::Told(Part::Identity)) { "" } else { "FROM pg_control_system()" };
        format!("{preface} SELECT {} {from}", columns.join(", "))
    }
}

/// Precedes a question in the same message, so that no setting of the role, the database, the connection string or the
/// session changes the question. The statements of one message are one transaction, so the effect ends with the
/// question. Names always mean PostgreSQL's own objects, even if others have the same names. A standby answers even if
/// `default_transaction_isolation` is `serializable`, which a standby does not support. No `statement_timeout` cancels
/// the question, because the pool has time limits of its own. JIT is off, because compiling takes longer than
/// answering. [`UNLIMITED`] completes it.
pub(crate) const UNDISTURBED: &str = "\
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED; \
    SET LOCAL search_path = pg_catalog, pg_temp; \
    SET LOCAL statement_timeout = 0; \
    SET LOCAL jit = off;";

/// Switches `transaction_timeout` off for the present transaction; it would end the session. The setting exists from
/// PostgreSQL 17 on. On an older server, `SET` would be an error, and this statement does nothing. It returns no row.
/// Its names are qualified, because settlers send it under the user's `search_path`. A server may refuse it, and it is
/// needed only before what may take long. So questions that end in a moment do without it.
pub(crate) const UNLIMITED: &str = "\
    SELECT WHERE CASE WHEN pg_catalog.current_setting('transaction_timeout', true) OPERATOR(pg_catalog.<>) '0' \
                      THEN pg_catalog.set_config('transaction_timeout', '0', true) IS NULL END;";

pub(super) const IN_RECOVERY: &str = "pg_is_in_recovery()";
pub(super) const WRITTEN: &str = "pg_current_wal_insert_lsn()";
pub(super) const REPLAYED: &str = "pg_last_wal_replay_lsn()";
/// The first eight digits of this name are the timeline.
pub(crate) const TIMELINE: &str = "pg_walfile_name(pg_current_wal_insert_lsn())";

/// The value of `default_transaction_read_only` that `ALTER DATABASE` and `ALTER ROLE … SET` give to a new session. The
/// most specific setting wins, as in `process_settings` (`postinit.c`). The text is returned as the administrator wrote
/// it. It is not cast to a boolean, because the database may define a cast from text of its own.
pub(super) const FENCE: &str = "\
    (SELECT split_part(c, '=', 2) \
       FROM pg_db_role_setting s, unnest(s.setconfig) c \
      WHERE starts_with(c, 'default_transaction_read_only=') \
        AND s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database())) \
        AND s.setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = session_user)) \
      ORDER BY s.setrole <> 0 DESC, s.setdatabase <> 0 DESC LIMIT 1)";

/// When the server was started; [`microseconds`] reads it. Up to PostgreSQL 13, `extract` returns a floating-point
/// number, whose digits depend on `extra_float_digits`. The cast to numeric always keeps fifteen digits, so every
/// session reads the same value. The names are qualified, because a mark runs this SQL under the user's `search_path`.
pub(crate) const STARTED_AT: &str =
    "pg_catalog.round(extract(epoch FROM pg_catalog.pg_postmaster_start_time())::numeric, 6)";

/// When the server's statistics were reset; [`microseconds`] reads it. Before PostgreSQL 15 the value does not show
/// crashes, and reading it costs a file access, so the older versions are not asked.
pub(crate) const STATS_RESET: &str = "\
    CASE WHEN pg_catalog.current_setting('server_version_num') OPERATOR(pg_catalog.>=) '150000' \
         THEN (SELECT extract(epoch FROM stats_reset)::numeric FROM pg_catalog.pg_stat_bgwriter) END";

/// The timeline of the last checkpoint. After a promotion, this is an older timeline until the first checkpoint of the
/// new one is complete (`CreateEndOfRecoveryRecord` in `xlog.c`). A server that recovers from a crash completes a
/// checkpoint before it accepts work (`PerformRecoveryXLogAction`). So an older timeline proves that the server
/// followed it, was promoted from it, and has not crashed since. On a standby the value proves nothing.
pub(crate) const CHECKPOINTED: &str = "(SELECT timeline_id FROM pg_control_checkpoint())";

/// What this role can read about the history of the server's WAL: see [`Evidence`]. The function is looked up in the
/// catalogue, because calling a missing or forbidden function is an error. A superuser must own it, because any role
/// that may create schemas could create one of this name. From PostgreSQL 17 on, the file names prove nothing. That
/// version is recognised by a function that it introduced, because a role that may not ask for the version may still
/// read the catalogue.
pub(crate) const EVIDENCE: &str = "\
    CASE WHEN EXISTS (SELECT FROM pg_proc p, pg_namespace n, pg_roles r \
                       WHERE n.nspname = 'failover' AND p.proname = 'wal_history' AND p.pronamespace = n.oid \
                         AND p.pronargs = 2 AND p.prosecdef AND p.proowner = r.oid AND r.rolsuper \
                         AND has_schema_privilege(n.oid, 'usage') AND has_function_privilege(p.oid, 'execute')) \
         THEN 'function' \
         WHEN has_function_privilege('pg_ls_waldir()', 'execute') \
              AND NOT EXISTS (SELECT FROM pg_proc WHERE proname = 'pg_get_wal_summarizer_state') \
         THEN 'files' \
         ELSE 'none' END";

/// The server process of this session, and when it was started: [`ServerSession::parse`] reads it.
pub(super) const SESSION: &str = "\
    (SELECT pid || ' ' || round(extract(epoch FROM backend_start)::numeric, 6) \
       FROM pg_stat_get_activity(pg_backend_pid()))";

/// A wait on a standby for its promotion. The statement runs on the server, so the pool sees the promotion as soon as
/// it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PromotionWait {
    /// The wait ends after this time in any case.
    pub(crate) lasts: Duration,
    /// The pause between two checks.
    pub(crate) step: Duration,
}

/// Returns SQL that runs until the server is no longer a standby, or until the promotion wait is over. Its rows do not
/// matter.
pub(crate) fn wait_for_promotion(promotion_wait: PromotionWait) -> String {
    let step = promotion_wait.step.max(Duration::from_millis(1));
    let steps = promotion_wait.lasts.as_micros().div_ceil(step.as_micros());
    format!(
        "{UNDISTURBED} {UNLIMITED} \
         SELECT FROM generate_series(1, {steps}) \
          WHERE CASE WHEN pg_is_in_recovery() THEN pg_sleep({:.3}) IS NULL ELSE true END LIMIT 1",
        step.as_secs_f64()
    )
}

/// A position in the write-ahead log, as PostgreSQL prints it: `16/B374D848`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(u64);

impl Lsn {
    /// The position in bytes.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for Lsn {
    type Err = BadReport;

    fn from_str(text: &str) -> Result<Self, BadReport> {
        let bad = || BadReport::new("an LSN", text);
        let (high, low) = text.split_once('/').ok_or_else(bad)?;
        let half = |digits: &str| {
            let plain = digits.len() <= 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            // `from_str_radix` rejects an empty half.
            plain.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
        };
        let (high, low) = (half(high).ok_or_else(bad)?, half(low).ok_or_else(bad)?);
        Ok(Self(u64::from(high) << 32 | u64::from(low)))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// A session, as its server knows it. No other session of any server has the same two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ServerSession {
    pub(crate) pid: i32,
    /// When the process was started, in microseconds since 1970.
    pub(crate) started_at: i64,
}

impl ServerSession {
    /// Reads a column of [`SESSION`].
    fn parse(text: &str) -> Option<Self> {
        let (pid, started_at) = text.split_once(' ')?;
        Some(Self { pid: pid.parse().ok()?, started_at: microseconds(started_at, "a start time").ok()? })
    }

    /// The session that has answered the question with this row, if it says so.
    pub(crate) fn of(rows: &[Vec<Option<String>>]) -> Option<Self> {
        Self::parse(rows.last()?.get(12)?.as_deref()?)
    }

    /// When the process was started, as SQL prints it in seconds with six decimals.
    pub(crate) fn epoch(self) -> String {
        let (sign, micros) = (if self.started_at < 0 { "-" } else { "" }, self.started_at.unsigned_abs());
        format!("{sign}{}.{:06}", micros / 1_000_000, micros % 1_000_000)
    }
}

/// An answer to the probe that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a server's answer makes no sense: expected {expected}, got `{got}`")]
pub struct BadReport {
    expected: &'static str,
    got: String,
}

impl BadReport {
    pub(crate) fn new(expected: &'static str, got: &str) -> Self {
        // Limits the length, and escapes line breaks and escape sequences, because this text of an unknown server goes
        // into logs.
        Self { expected, got: got.chars().take(64).flat_map(char::escape_debug).collect() }
    }
}

/// What a server lets the pool read about the history of its write-ahead log. The pool settles a commit in doubt by it.
///
/// The kinds are listed from the weakest to the strongest, and each proves what the weaker ones prove.
/// docs/exactly-once.md explains what each kind settles.
///
/// ```
/// use tokio_postgres_failover::view::Evidence;
///
/// assert!(Evidence::Function > Evidence::Files && Evidence::Files > Evidence::Checkpoint);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Evidence {
    /// What every role may read: the position at which replay ended, and the timeline of the last checkpoint. This
    /// settles a commit after one crash. After one promotion, it settles a commit only if the pool asks before the new
    /// primary's first checkpoint is complete, or if the cluster had never failed over before.
    Checkpoint,
    /// `pg_ls_waldir()`, which members of `pg_monitor` may call: the names of the files in `pg_wal` show that a
    /// timeline was followed. Up to PostgreSQL 16, this settles a commit after one crash or promotion. From PostgreSQL
    /// 17 on the names prove nothing, because `pg_rewind` may keep a file of a timeline that it leaves.
    Files,
    /// `failover.wal_history` of `sql/history.sql`, which a superuser creates once: it shows the ancestors of the
    /// timeline, and whether the transaction's mark is in the WAL. This settles a commit after any number of crashes
    /// and promotions.
    Function,
}

/// What a server is to this pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Role {
    /// Not in recovery, and new transactions may write.
    Primary,
    /// In recovery.
    Standby,
    /// Not in recovery, but new transactions are read-only by default: fenced.
    Fenced,
    /// Not in recovery any more, but the transaction that asked began in it: the server has just been promoted.
    Promoting,
}

/// What a server reported about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct ServerReport {
    /// `pg_is_in_recovery()`: the server is a standby, or recovers from a crash.
    pub in_recovery: bool,
    /// `transaction_read_only` in the session that asked.
    pub read_only: bool,
    /// `default_transaction_read_only` in the session that asked.
    pub default_read_only: bool,
    /// Whether a new session would get `default_transaction_read_only = on` by `ALTER DATABASE` or `ALTER ROLE`.
    pub(crate) fence_pending: bool,
    /// The system identifier, equal on all servers of one cluster. `None` if the role may not read it.
    pub system_identifier: Option<u64>,
    /// When the server was started, in microseconds since 1970.
    pub(crate) started_at: Option<i64>,
    /// The timeline that a primary writes, which grows with each promotion. `None` on a standby.
    pub timeline: Option<u32>,
    /// A primary's end of WAL, or a standby's end of replay.
    pub wal: Option<Lsn>,
    /// Where a primary's last replay ended. The crash of one backend ends every session; it changes this position, but
    /// not the start time. `None` after a clean start, and on a standby.
    pub(crate) replayed: Option<Lsn>,
    /// When the server's statistics were reset, in microseconds since 1970. They are reset by hand or by a crash, not
    /// by a clean restart. Only PostgreSQL 15 and newer report it.
    pub(crate) stats_reset: Option<i64>,
    /// The timeline of a primary's last checkpoint, which is older than [`timeline`](Self::timeline) for a while after
    /// a promotion. `None` on a standby.
    pub checkpointed: Option<u32>,
    /// What settles a commit in doubt on this server. `None` until an older session was asked, and if the
    /// answer was withheld.
    pub evidence: Option<Evidence>,
    /// The parts that the server withholds from this role now. A field of such a part may still have the value that the
    /// server reported earlier.
    pub withheld: Parts,
}

impl ServerReport {
    /// What the server is to this pool.
    #[must_use]
    pub fn role(&self) -> Role {
        match self {
            Self { in_recovery: true, .. } => Role::Standby,
            Self { default_read_only: true, .. } => Role::Fenced,
            Self { read_only: true, .. } => Role::Promoting,
            _ => Role::Primary,
        }
    }

    /// When the server was started, by its own clock. `None` if it withholds that.
    #[must_use]
    pub fn started_at(&self) -> Option<SystemTime> {
        let started_at = self.started_at?;
        let distance = Duration::from_micros(started_at.unsigned_abs());
        if started_at < 0 {
            SystemTime::UNIX_EPOCH.checked_sub(distance)
        } else {
            SystemTime::UNIX_EPOCH.checked_add(distance)
        }
    }

    /// Returns whether the report identifies the server and its life: it contains the system identifier, the start time
    /// and the timeline, and does not withhold the end of the last replay.
    pub(crate) fn is_identified(&self) -> bool {
        let shows_replay = self.replayed.is_some() || !self.withheld.contains(Part::Replay);
        self.system_identifier.is_some() && self.started_at.is_some() && self.timeline.is_some() && shows_replay
    }

    /// Reads the timeline from the name of a WAL file.
    pub(crate) fn timeline_of(wal_file: &str) -> Result<u32, BadReport> {
        let bad = || BadReport::new("the name of a WAL file", wal_file);
        if wal_file.len() != 24 || !wal_file.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let digits = wal_file.get(..8).ok_or_else(bad)?;
        u32::from_str_radix(digits, 16).ok().filter(|timeline| *timeline > 0).ok_or_else(bad)
    }

    /// Reads the answer to a [`Question`]. The first three columns must be there; others that are missing stay unknown.
    pub(crate) fn parse(row: &[Option<&str>]) -> Result<Self, BadReport> {
        let column = |index: usize| row.get(index).copied().flatten();
        let flag = |index: usize| {
            let text = column(index).unwrap_or("NULL");
            boolean(text).ok_or_else(|| BadReport::new("on or off", text))
        };
        let in_recovery = flag(0)?;
        Ok(Self {
            in_recovery,
            read_only: flag(1)?,
            default_read_only: flag(2)?,
            fence_pending: column(3).map(setting).transpose()?.unwrap_or(false),
            system_identifier: column(4).map(system_identifier).transpose()?,
            started_at: column(5).map(|text| microseconds(text, "a start time")).transpose()?,
            timeline: column(6).map(Self::timeline_of).transpose()?,
            wal: column(7).map(str::parse).transpose()?,
            replayed: column(8).map(str::parse).transpose()?,
            stats_reset: column(9).map(|text| microseconds(text, "a time")).transpose()?,
            // No server is accepted or refused by these two columns, so a value in an unknown form counts as unknown.
            checkpointed: column(10).and_then(|text| text.parse().ok()),
            evidence: column(11).and_then(|text| evidence(text).ok()),
            withheld: Parts::default(),
        })
    }
}

/// Reads a column of [`EVIDENCE`].
pub(crate) fn evidence(text: &str) -> Result<Evidence, BadReport> {
    match text {
        "function" => Ok(Evidence::Function),
        "files" => Ok(Evidence::Files),
        "none" => Ok(Evidence::Checkpoint),
        _ => Err(BadReport::new("a kind of evidence", text)),
    }
}

fn boolean(text: &str) -> Option<bool> {
    match text {
        "t" | "on" => Some(true),
        "f" | "off" => Some(false),
        _ => None,
    }
}

/// Reads a boolean setting in any form that an administrator may write: `parse_bool_with_len` in `bool.c`.
fn setting(text: &str) -> Result<bool, BadReport> {
    let written = text.to_ascii_lowercase();
    let shortens = |word: &str, at_least: usize| written.len() >= at_least && word.starts_with(&written);
    if shortens("true", 1) || shortens("yes", 1) || shortens("on", 2) || written == "1" {
        Ok(true)
    } else if shortens("false", 1) || shortens("no", 1) || shortens("off", 2) || written == "0" {
        Ok(false)
    } else {
        Err(BadReport::new("on or off", text))
    }
}

fn number<T: FromStr>(text: &str, expected: &'static str) -> Result<T, BadReport> {
    text.parse().map_err(|_| BadReport::new(expected, text))
}

/// Converts seconds since 1970 with up to six decimals, as `extract(epoch FROM …)` prints them, to microseconds.
pub(crate) fn microseconds(text: &str, expected: &'static str) -> Result<i64, BadReport> {
    let bad = || BadReport::new(expected, text);
    // The time is negative if the clock was wrong when the server was started.
    let (sign, magnitude) = text.strip_prefix('-').map_or((1, text), |magnitude| (-1, magnitude));
    let (seconds, decimals) = magnitude.split_once('.').unwrap_or((magnitude, "0"));
    let plain = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !plain(seconds) || !plain(decimals) || decimals.len() > 6 {
        return Err(bad());
    }
    let seconds: i64 = number(seconds, expected)?;
    let rest: i64 = number(&format!("{decimals:0<6}"), expected)?;
    let micros = seconds.checked_mul(1_000_000).and_then(|whole| whole.checked_add(rest)).ok_or_else(bad)?;
    Ok(sign * micros)
}

/// PostgreSQL stores 64 unsigned bits and prints them as a signed bigint.
fn system_identifier(text: &str) -> Result<u64, BadReport> {
    number::<i64>(text, "a system identifier").map(i64::cast_unsigned)
}

#[cfg(test)]
mod tests;
