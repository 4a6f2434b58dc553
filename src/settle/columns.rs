//! The columns of the answers to this module's statements. Each statement has an enum of its columns. The statement's
//! list and those who read its rows both use this enum, so that they cannot disagree about the position of a column.

use tokio_postgres::{Client, Error};

use crate::server::rows;
use crate::topology::{BadReport, microseconds};

/// A row in the driver's simple protocol.
pub(crate) type Row = Vec<Option<String>>;

/// The columns of a statement's answer, in the order in which the statement asks for them.
pub(super) trait Column: Copy + 'static {
    const ALL: &'static [Self];

    fn index(self) -> usize;
}

/// Declares the enum of a statement's columns.
macro_rules! columns {
    ($(#[$about:meta])* $visibility:vis enum $name:ident { $($(#[$note:meta])* $column:ident),+ $(,)? }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $visibility enum $name { $($(#[$note])* $column),+ }

        impl Column for $name {
            const ALL: &'static [Self] = &[$(Self::$column),+];

            fn index(self) -> usize {
                self as usize
            }
        }
    };
}
pub(super) use columns;

/// Returns a statement's list of columns. `sql` returns the expression for a column.
pub(super) fn list<'a, C: Column>(sql: impl Fn(C) -> &'a str) -> String {
    let mut list = String::with_capacity(512);
    for column in C::ALL {
        if !list.is_empty() {
            list.push_str(", ");
        }
        list.push_str(sql(*column));
    }
    list
}

/// Returns the only row of the answer. If there is none, or more than one, it returns a row without columns.
pub(crate) async fn only_row(client: &Client, sql: &str) -> Result<Row, Error> {
    let mut rows = rows(client, sql).await?;
    Ok(if rows.len() == 1 { rows.pop().unwrap_or_default() } else { Row::new() })
}

/// Returns the only column of the only row.
pub(super) async fn only_value(client: &Client, sql: &str) -> Result<Option<String>, Error> {
    Ok(only_row(client, sql).await?.into_iter().next().flatten())
}

/// Returns whether the row has this column, even if the column is NULL.
pub(super) fn has(row: &Row, column: impl Column) -> bool {
    column.index() < row.len()
}

/// Returns `None` if the column is NULL or missing.
pub(super) fn text(row: &Row, column: impl Column) -> Option<&str> {
    row.get(column.index())?.as_deref()
}

pub(super) fn field<T: std::str::FromStr>(
    row: &Row,
    column: impl Column,
    expected: &'static str,
) -> Result<T, BadReport> {
    let text = text(row, column).unwrap_or("NULL");
    text.parse().map_err(|_| BadReport::new(expected, text))
}

pub(super) fn time(row: &Row, column: impl Column) -> Result<i64, BadReport> {
    microseconds(text(row, column).unwrap_or("NULL"), "a time")
}

pub(super) fn optional<T: std::str::FromStr<Err = BadReport>>(
    row: &Row,
    column: impl Column,
) -> Result<Option<T>, BadReport> {
    text(row, column).map(str::parse).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    columns! {
        enum Pair { Left, Right }
    }

    #[test]
    fn the_list_and_the_readers_agree() {
        let sql = list(|column| match column {
            Pair::Right => "2",
            Pair::Left => "1",
        });
        assert_eq!(sql, "1, 2");
        let row: Row = sql.split(", ").map(|it| Some(it.to_owned())).collect();
        assert_eq!((text(&row, Pair::Left), text(&row, Pair::Right)), (Some("1"), Some("2")));
        assert_eq!(field::<u8>(&row, Pair::Right, "a number").unwrap(), 2);
    }

    #[test]
    fn a_missing_column_is_told_from_one_that_is_null() {
        let row: Row = vec![None];
        assert_eq!((has(&row, Pair::Left), has(&row, Pair::Right)), (true, false));
        assert_eq!((text(&row, Pair::Left), text(&row, Pair::Right)), (None, None));
    }
}
