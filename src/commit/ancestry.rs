//! The ancestors of a timeline, read from PostgreSQL's history files. Pure.

use crate::topology::{BadReport, Lsn};

/// The ancestors of a server's timeline, with the position at which each of them ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ancestry(Vec<(u32, Lsn)>);

impl Ancestry {
    /// Reads a history file. Each line has an ancestor's number, the position at which the next timeline forked off,
    /// and the reason as free text (`writeTimeLineHistory` in `timeline.c`).
    pub(crate) fn parse(file: &str) -> Result<Self, BadReport> {
        let lines = file.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.map(ancestor).collect::<Result<_, _>>().map(Self)
    }

    /// Returns the position at which the history left this timeline, or `None` if the timeline is no ancestor.
    ///
    /// A standby that follows a newer timeline may be promoted before it has reached that timeline's fork. Its history
    /// then contains the newer timeline, with an end before its start. So this returns the smallest end of this
    /// timeline and of all that follow it.
    pub(crate) fn end_of(&self, timeline: u32) -> Option<Lsn> {
        let at = self.0.iter().position(|(ancestor, _)| *ancestor == timeline)?;
        self.0.iter().skip(at).map(|(_, end)| *end).min()
    }

    /// How many promotions led from this ancestor to the server's own timeline.
    pub(crate) fn promotions_since(&self, timeline: u32) -> u64 {
        self.0.iter().filter(|(ancestor, _)| *ancestor >= timeline).count() as u64
    }
}

fn ancestor(line: &str) -> Result<(u32, Lsn), BadReport> {
    let bad = || BadReport::new("a line of a timeline's history", line);
    let mut words = line.split_ascii_whitespace();
    let timeline = words.next().and_then(|word| word.parse().ok()).ok_or_else(bad)?;
    let end = words.next().ok_or_else(bad)?.parse()?;
    Ok((timeline, end))
}

#[cfg(test)]
impl FromIterator<(u32, Lsn)> for Ancestry {
    fn from_iter<I: IntoIterator<Item = (u32, Lsn)>>(ancestors: I) -> Self {
        Self(ancestors.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_file_is_read() {
        let file = "1\t0/3000158\tno recovery target specified\n\n2\t0/5000000\tat restore point \"3\t0/1\"\n";
        let ancestry = Ancestry::parse(file).unwrap();
        let end = |timeline| ancestry.end_of(timeline).map(|end| end.to_string());
        assert_eq!((end(1), end(2), end(3)), (Some("0/3000158".to_owned()), Some("0/5000000".to_owned()), None));
        assert_eq!((1..=3).map(|from| ancestry.promotions_since(from)).collect::<Vec<_>>(), [2, 1, 0]);
    }

    #[test]
    fn a_standby_that_was_promoted_before_the_fork_ends_all_timelines_there() {
        let ancestry = Ancestry::parse("1\t0/5000\t\n2\t0/4000\t\n3\t0/6000\t\n").unwrap();
        let end = |timeline| ancestry.end_of(timeline).map(|end| end.to_string());
        assert_eq!((end(1), end(2), end(3)), (Some("0/4000".into()), Some("0/4000".into()), Some("0/6000".into())));
    }

    #[test]
    fn the_first_timeline_has_no_ancestor() {
        for file in ["", "\n", "# a comment\n"] {
            assert_eq!(Ancestry::parse(file).unwrap(), Ancestry::default());
        }
    }

    #[test]
    fn nonsense_is_no_history() {
        for file in ["x", "1", "1\tnowhere", "-1\t0/1", "1\t0/1\n2"] {
            assert!(Ancestry::parse(file).is_err(), "{file:?}");
        }
    }
}
