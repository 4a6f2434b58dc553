//! What several targets hold their errors against.

use std::error::Error;

/// What a stranger sends gets into logs: neither at length, nor with a line break or an escape sequence in it.
pub fn short_and_in_one_line(error: &dyn Error) {
    let text = error.to_string();
    assert!(text.chars().count() < 1000, "an error of {} characters", text.chars().count());
    assert!(!text.contains(char::is_control), "a control character in {text:?}");
}
