//! Reads the rows of an answer, within limits: a strange server may send what it likes.

use std::pin::pin;

use futures_util::TryStreamExt;
use tokio_postgres::{Client, Error, SimpleQueryMessage};

/// The most rows of one answer that are kept, the most that are counted, and the most bytes that are kept of each
/// value. No question of this crate has a longer answer.
const MOST_ROWS: usize = 64;
const MOST_COUNTED: usize = 10_000;
const LONGEST_VALUE: usize = 64 * 1024;

/// Returns the rows of the answer, within limits. A value that is not text becomes U+FFFD, not NULL, because NULL means
/// that the server withholds something.
pub(crate) async fn rows(client: &Client, sql: &str) -> Result<Vec<Vec<Option<String>>>, Error> {
    let mut messages = pin!(client.simple_query_raw(sql).await?);
    let mut rows = Vec::new();
    while let Some(message) = messages.try_next().await? {
        // Everything except rows is dropped as it arrives.
        let SimpleQueryMessage::Row(row) = message else {
            continue;
        };
        if rows.len() >= MOST_ROWS {
            // Further rows are counted up to a limit, but not kept.
            if rows.len() < MOST_COUNTED {
                rows.push(Vec::new());
            }
        } else {
            let value = |index| row.try_get(index).map_or_else(|_| Some('\u{FFFD}'.to_string()), text);
            rows.push((0..row.len().min(MOST_ROWS)).map(value).collect());
        }
    }
    Ok(rows)
}

/// Returns whether [`rows`] may have cut this value. A value that just fits counts as cut.
pub(crate) fn may_be_cut(value: &str) -> bool {
    value.len() + 4 > LONGEST_VALUE
}

fn text(value: Option<&str>) -> Option<String> {
    let shorten = |text: &str| {
        let end = (0..=LONGEST_VALUE.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
        text.get(..end.unwrap_or_default()).unwrap_or_default().to_owned()
    };
    value.map(shorten)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_cut_at_the_limit_even_within_a_character() {
        for (before, kept) in [(0, LONGEST_VALUE / 2 * 2), (1, (LONGEST_VALUE - 1) / 2 * 2 + 1)] {
            let value = "x".repeat(before) + &"ä".repeat(LONGEST_VALUE);
            assert_eq!(text(Some(&value)).map(|text| text.len()), Some(kept));
        }
        assert_eq!(text(Some("short")).as_deref(), Some("short"));
        assert_eq!(text(None), None);
    }
}
