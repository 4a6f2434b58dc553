//! The parts of a server's report, and how the pool finds out which of them the server withholds from the pool's role.
//!
//! A managed service, a proxy or a careful administrator may revoke functions and views of the catalogue. The pool then
//! asks for each part alone to find out which ones are refused, and repeats the question without those. The question
//! stays one message and one transaction, because parts that are read separately may come from two servers, or from
//! before and after a promotion.

use std::fmt;

use super::{
    BadReport, CHECKPOINTED, EVIDENCE, FENCE, IN_RECOVERY, Question, REPLAYED, SESSION, STARTED_AT, STATS_RESET,
    ServerReport, TIMELINE, UNLIMITED, WRITTEN,
};

/// One part of a server's report, which the server may withhold from the role that asks.
///
/// ```
/// use tokio_postgres_failover::view::Part;
///
/// assert_eq!(Part::Identity.to_string(), "the system identifier");
/// assert_eq!(Part::Identity.grant(), "GRANT EXECUTE ON FUNCTION pg_control_system() TO …");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum Part {
    /// Whether a new session would be read-only. Without it, only a new session shows a fence by `ALTER DATABASE`, so
    /// each patrol opens one.
    Fence,
    /// The system identifier. Without it, the pool cannot distinguish another cluster from its own, and the write-ahead
    /// log does not settle commits in doubt.
    Identity,
    /// The start time. Without it, a server is recognised by its address alone, and the write-ahead log does not settle
    /// commits in doubt.
    StartTime,
    /// The timeline. Without it, the pool cannot distinguish an old primary that comes back writable from the new one,
    /// and the write-ahead log does not settle commits in doubt.
    Timeline,
    /// The end of the write-ahead log. The pool compares two servers on one timeline by it.
    Position,
    /// Where replay ended. Without it, only the sessions that the crash of one backend ends show that crash.
    Replay,
    /// When the statistics were reset. Without it, fewer commits in doubt are settled.
    Statistics,
    /// The timeline of the last checkpoint. Without it, fewer commits in doubt are settled.
    Checkpoint,
    /// Which evidence can settle a commit in doubt. Without it, the weakest kind is assumed.
    Evidence,
}

impl Part {
    const EACH: [Self; 9] = [
        Self::Fence,
        Self::Identity,
        Self::StartTime,
        Self::Timeline,
        Self::Position,
        Self::Replay,
        Self::Statistics,
        Self::Checkpoint,
        Self::Evidence,
    ];

    /// The grant that lets a role read this part. `…` stands for the role.
    #[must_use]
    pub fn grant(self) -> &'static str {
        match self {
            Self::Fence => "GRANT SELECT ON pg_db_role_setting, pg_database, pg_roles TO …",
            Self::Identity => "GRANT EXECUTE ON FUNCTION pg_control_system() TO …",
            Self::StartTime => "GRANT EXECUTE ON FUNCTION pg_postmaster_start_time() TO …",
            Self::Timeline => "GRANT EXECUTE ON FUNCTION pg_walfile_name(pg_lsn), pg_current_wal_insert_lsn() TO …",
            Self::Position => "GRANT EXECUTE ON FUNCTION pg_current_wal_insert_lsn(), pg_last_wal_replay_lsn() TO …",
            Self::Replay => "GRANT EXECUTE ON FUNCTION pg_last_wal_replay_lsn() TO …",
            Self::Statistics => "GRANT SELECT ON pg_stat_bgwriter TO …",
            Self::Checkpoint => "GRANT EXECUTE ON FUNCTION pg_control_checkpoint(), pg_control_init() TO …",
            Self::Evidence => "GRANT SELECT ON pg_proc, pg_namespace, pg_roles TO …",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fence => "the settings of new sessions",
            Self::Identity => "the system identifier",
            Self::StartTime => "the start time",
            Self::Timeline => "the timeline",
            Self::Position => "the end of the write-ahead log",
            Self::Replay => "the end of the last replay",
            Self::Statistics => "the reset of the statistics",
            Self::Checkpoint => "the last checkpoint",
            Self::Evidence => "what settles a commit in doubt",
        })
    }
}

/// The [`Part`]s that a server withholds from the pool's role. `Display` prints them, separated by commas.
///
/// ```
/// use tokio_postgres_failover::view::{Part, Parts};
///
/// let parts = Parts::from_iter([Part::Timeline, Part::Identity]);
/// assert!(parts.contains(Part::Timeline) && !parts.is_empty());
/// assert_eq!(parts.to_string(), "the system identifier, the timeline");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Parts(u32);

impl Parts {
    /// Returns whether the set contains this part.
    #[must_use]
    pub fn contains(self, part: Part) -> bool {
        self.0 & (1 << part as u32) != 0
    }

    /// Returns whether the server withholds nothing.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Iterates over the parts.
    pub fn iter(self) -> impl Iterator<Item = Part> {
        Part::EACH.into_iter().filter(move |part| self.contains(*part))
    }

    pub(in crate::topology) fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    pub(in crate::topology) fn within(self, others: Self) -> Self {
        Self(self.0 & others.0)
    }

    pub(in crate::topology) fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }
}

impl FromIterator<Part> for Parts {
    fn from_iter<I: IntoIterator<Item = Part>>(parts: I) -> Self {
        parts.into_iter().fold(Self::default(), |all, part| Self(all.0 | 1 << part as u32))
    }
}

impl fmt::Display for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, part) in self.iter().enumerate() {
            write!(f, "{}{part}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// An element of the question that a server may refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Told(Part),
    /// `pg_is_in_recovery()`. If refused, the setting `in_hot_standby` replaces it, from PostgreSQL 14 on.
    Recovery,
    /// `current_setting()`. If refused, `SHOW` replaces it, which needs no privilege.
    Settings,
    InHotStandby,
    /// Which session this is. Without it, the session of lost work may keep its locks.
    Session,
    /// `SET LOCAL jit`, which servers that only imitate PostgreSQL do not know.
    Jit,
    /// [`UNLIMITED`].
    Limit,
}

impl Piece {
    fn bit(self) -> u32 {
        1 << match self {
            Self::Told(part) => part as u32,
            Self::Session => 11,
            Self::Limit => 16,
            Self::Recovery => 12,
            Self::Settings => 13,
            Self::InHotStandby => 14,
            Self::Jit => 15,
        }
    }

    /// Returns SQL that asks for this piece alone. It has no guard for recovery: a standby that answers "recovery is in
    /// progress" does not refuse the piece.
    pub(crate) fn alone(self) -> String {
        let asked = match self {
            Self::Told(Part::Fence) => format!("SELECT {FENCE}"),
            Self::Told(Part::Identity) => "SELECT system_identifier FROM pg_control_system()".to_owned(),
            Self::Told(Part::StartTime) => format!("SELECT {STARTED_AT}"),
            Self::Told(Part::Timeline) => format!("SELECT {TIMELINE}"),
            Self::Told(Part::Position) => format!("SELECT {REPLAYED}, {WRITTEN}"),
            Self::Told(Part::Replay) => format!("SELECT {REPLAYED}"),
            Self::Told(Part::Statistics) => format!("SELECT {STATS_RESET}"),
            Self::Told(Part::Checkpoint) => format!("SELECT {CHECKPOINTED}"),
            Self::Told(Part::Evidence) => format!("SELECT {EVIDENCE}"),
            Self::Recovery => format!("SELECT {IN_RECOVERY}"),
            Self::Settings => "SELECT current_setting('transaction_read_only')".to_owned(),
            Self::InHotStandby => "SHOW in_hot_standby".to_owned(),
            Self::Session => format!("SELECT {SESSION}"),
            Self::Jit => "SET LOCAL jit = off".to_owned(),
            Self::Limit => UNLIMITED.to_owned(),
        };
        format!("{} {asked}", undisturbed(Refused(Self::Jit.bit())))
    }
}

/// The pieces that a server refuses to this role.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Refused(u32);

impl Refused {
    /// All pieces except `SHOW in_hot_standby`. The question then consists of `SHOW` alone.
    pub(crate) const ALL: Self = Self(u32::MAX ^ 1 << 14);

    pub(crate) fn of(pieces: impl IntoIterator<Item = Piece>) -> Self {
        Self(pieces.into_iter().fold(0, |all, piece| all | piece.bit()))
    }

    pub(crate) fn holds(self, piece: Piece) -> bool {
        self.0 & piece.bit() != 0
    }

    pub(crate) fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    fn parts(self) -> Parts {
        Parts(self.0).within(Part::EACH.into_iter().collect())
    }
}

impl Question {
    /// The parts that the question asks for.
    pub(in crate::topology) fn parts(self) -> Parts {
        let part = |part: &Part| match part {
            Part::Identity | Part::StartTime | Part::Replay => true,
            Part::Timeline | Part::Position | Part::Statistics | Part::Checkpoint => self != Self::Identity,
            Part::Fence | Part::Evidence => self == Self::Again,
        };
        Part::EACH.into_iter().filter(part).collect()
    }

    /// The pieces of the question that a server may refuse.
    pub(crate) fn pieces(self) -> impl Iterator<Item = Piece> {
        let others = [Piece::Recovery, Piece::Settings, Piece::InHotStandby, Piece::Jit, Piece::Limit];
        let session = (self != Self::Again).then_some(Piece::Session);
        self.parts().iter().map(Piece::Told).chain(others).chain(session)
    }

    /// Reads the answer to [`Question::sql`].
    pub(crate) fn read(self, refused: Refused, rows: &[Vec<Option<String>>]) -> Result<ServerReport, BadReport> {
        let shown = Shown::instead_of(refused);
        let Some((row, before)) = rows.split_last().filter(|(_, before)| before.len() == shown.count()) else {
            return Err(BadReport::new("one row", &format!("{} rows", rows.len())));
        };
        let mut row: Vec<Option<&str>> = row.iter().map(Option::as_deref).collect();
        let mut values = before.iter().map(|row| row.first().and_then(Option::as_deref));
        let mut tells = |column: usize, told: bool| {
            if let Some(value) = row.get_mut(column).filter(|_| told) {
                *value = values.next().flatten();
            }
        };
        tells(0, shown.in_recovery);
        tells(1, shown.settings);
        tells(2, shown.settings);
        // Before PostgreSQL 14 no setting shows recovery. But a new transaction is read-only either by default or
        // because of recovery.
        if refused.holds(Piece::Recovery)
            && !shown.in_recovery
            && let [in_recovery, Some(read_only), Some(default), ..] = &mut row[..]
        {
            *in_recovery = Some(if *read_only == "on" && *default == "off" { "on" } else { "off" });
        }
        let report = ServerReport::parse(&row)?;
        Ok(ServerReport { withheld: refused.parts().within(self.parts()), ..report })
    }
}

/// The values that `SHOW` reads before the question proper, in the same transaction.
#[derive(Clone, Copy, Debug)]
struct Shown {
    in_recovery: bool,
    settings: bool,
}

impl Shown {
    fn instead_of(refused: Refused) -> Self {
        let in_recovery = refused.holds(Piece::Recovery) && !refused.holds(Piece::InHotStandby);
        Self { in_recovery, settings: refused.holds(Piece::Settings) }
    }

    fn count(self) -> usize {
        usize::from(self.in_recovery) + 2 * usize::from(self.settings)
    }
}

/// Precedes a question: [`UNDISTURBED`](super::UNDISTURBED) and [`UNLIMITED`], then the values that `SHOW` reads.
pub(in crate::topology) fn preface(refused: Refused) -> String {
    let shown = Shown::instead_of(refused);
    let mut sql = undisturbed(refused);
    if !refused.holds(Piece::Limit) {
        sql.push(' ');
        sql.push_str(UNLIMITED);
    }
    if shown.in_recovery {
        sql.push_str(" SHOW in_hot_standby;");
    }
    if shown.settings {
        sql.push_str(" SHOW transaction_read_only; SHOW default_transaction_read_only;");
    }
    sql
}

/// [`UNDISTURBED`](super::UNDISTURBED) without its refused statements.
fn undisturbed(refused: Refused) -> String {
    if refused.holds(Piece::Jit) {
        return super::UNDISTURBED.replace(" SET LOCAL jit = off;", "");
    }
    super::UNDISTURBED.to_owned()
}

/// Returns the SQL condition for recovery. It guards the columns that are an error during recovery.
pub(in crate::topology) fn in_recovery(refused: Refused) -> &'static str {
    match (refused.holds(Piece::Recovery), refused.holds(Piece::Settings)) {
        (false, _) => IN_RECOVERY,
        // This is also true on a fenced primary. The pool refuses such a server, so its other columns do not matter.
        (true, false) => "current_setting('transaction_read_only') = 'on'",
        (true, true) => "(SELECT setting FROM pg_settings WHERE name = 'transaction_read_only') = 'on'",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Role;

    const QUESTIONS: [Question; 3] = [Question::Candidate, Question::Again, Question::Identity];

    fn refused(pieces: &[Piece]) -> Refused {
        Refused::of(pieces.iter().copied())
    }

    fn rows(shown: &[&str], columns: [Option<&str>; 3]) -> Vec<Vec<Option<String>>> {
        let mut row: Vec<Option<String>> = columns.iter().map(|value| value.map(str::to_owned)).collect();
        row.resize(13, None);
        shown.iter().map(|value| vec![Some((*value).to_owned())]).chain([row]).collect()
    }

    #[test]
    fn where_nothing_is_refused_one_row_is_asked_for_and_read() {
        for question in QUESTIONS {
            let sql = question.sql(Refused::default());
            assert!(!sql.contains("SHOW") && sql.ends_with("FROM pg_control_system()"), "{sql}");
            let read = question.read(Refused::default(), &rows(&[], [Some("f"), Some("off"), Some("off")])).unwrap();
            assert_eq!((read.role(), read.withheld), (Role::Primary, Parts::default()));
            for bad in [vec![], rows(&["off"], [Some("f"), Some("off"), Some("off")])] {
                assert!(question.read(Refused::default(), &bad).is_err(), "{bad:?}");
            }
        }
    }

    #[test]
    fn each_piece_that_is_refused_is_not_asked_for_and_the_others_are() {
        let names = |piece| match piece {
            Piece::Told(Part::Fence) => "pg_db_role_setting",
            Piece::Told(Part::Identity) => "pg_control_system",
            Piece::Told(Part::StartTime) => "pg_postmaster_start_time",
            Piece::Told(Part::Timeline) => "pg_walfile_name",
            Piece::Told(Part::Statistics) => "pg_stat_bgwriter",
            Piece::Told(Part::Checkpoint) => "pg_control_checkpoint",
            Piece::Told(Part::Evidence) => "pg_ls_waldir",
            Piece::Told(Part::Position) => "THEN pg_last_wal_replay_lsn",
            Piece::Told(Part::Replay) => "ELSE pg_last_wal_replay_lsn",
            Piece::Recovery => "pg_is_in_recovery",
            Piece::Settings => "current_setting('default_transaction_read_only')",
            Piece::Jit => "jit",
            Piece::Limit => "transaction_timeout",
            Piece::InHotStandby => "in_hot_standby",
            Piece::Session => "pg_stat_get_activity",
        };
        for question in QUESTIONS {
            for piece in question.pieces().filter(|piece| *piece != Piece::InHotStandby) {
                let sql = question.sql(refused(&[piece]));
                for other in question.pieces().filter(|piece| *piece != Piece::InHotStandby) {
                    assert_eq!(sql.contains(names(other)), other != piece, "{question:?} without {piece:?}: {sql}");
                }
            }
            assert!(!question.sql(Refused::ALL).contains('('), "no function at all");
        }
    }

    #[test]
    fn show_tells_the_role_where_no_function_may() {
        let (recovery, settings, old) = (Piece::Recovery, Piece::Settings, Piece::InHotStandby);
        for (pieces, shown, columns, role) in [
            (&[recovery][..], &["on"][..], [None, Some("on"), Some("off")], Role::Standby),
            (&[recovery], &["off"], [None, Some("off"), Some("off")], Role::Primary),
            (&[recovery], &["off"], [None, Some("on"), Some("on")], Role::Fenced),
            (&[settings], &["on", "off"], [Some("t"), None, None], Role::Standby),
            (&[settings], &["off", "off"], [Some("f"), None, None], Role::Primary),
            (&[settings], &["on", "on"], [Some("f"), None, None], Role::Fenced),
            (&[recovery, settings], &["on", "on", "off"], [None; 3], Role::Standby),
            (&[recovery, settings], &["off", "off", "off"], [None; 3], Role::Primary),
            // PostgreSQL 13 has no `in_hot_standby`.
            (&[recovery, old], &[], [None, Some("on"), Some("off")], Role::Standby),
            (&[recovery, old], &[], [None, Some("on"), Some("on")], Role::Fenced),
            (&[recovery, old], &[], [None, Some("off"), Some("off")], Role::Primary),
            (&[recovery, settings, old], &["off", "off"], [None; 3], Role::Primary),
        ] {
            for question in QUESTIONS {
                let refused = refused(pieces);
                assert_eq!(question.sql(refused).matches("SHOW").count(), shown.len(), "{pieces:?}");
                let read = question.read(refused, &rows(shown, columns)).unwrap();
                assert_eq!((read.role(), read.withheld), (role, Parts::default()), "{pieces:?} {shown:?}");
            }
        }
        // An incomplete answer counts as none.
        let nothing = rows(&[], [None; 3]);
        assert!(Question::Again.read(refused(&[recovery, settings, old]), &nothing).is_err());
        assert!(Question::Again.read(refused(&[recovery, old]), &nothing).is_err());
    }

    #[test]
    fn what_is_kept_back_is_what_was_asked_for_and_refused() {
        let all = refused(&Question::Again.pieces().filter(|it| matches!(it, Piece::Told(_))).collect::<Vec<_>>());
        for (question, count) in [(Question::Candidate, 7), (Question::Again, 9), (Question::Identity, 3)] {
            let read = question.read(all, &rows(&[], [Some("f"), Some("off"), Some("off")])).unwrap();
            assert_eq!(read.withheld.iter().count(), count, "{question:?}: {}", read.withheld);
            assert!(read.withheld.iter().all(|part| part.grant().starts_with("GRANT ")));
        }
    }
}
