//! What a statement returns.

/// The rows of an answer, and its tag.
pub(crate) struct Done {
    pub(crate) columns: usize,
    pub(crate) rows: Vec<Vec<Option<String>>>,
    pub(crate) tag: &'static str,
}

impl Done {
    pub(crate) fn tag(tag: &'static str) -> Self {
        Self { columns: 0, rows: Vec::new(), tag }
    }

    pub(crate) fn row(values: Vec<Option<String>>) -> Self {
        Self { columns: values.len(), rows: vec![values], tag: "SELECT 1" }
    }

    pub(crate) fn nothing() -> Self {
        Self::tag("SELECT 0")
    }
}
