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

    /// A query without a row.
    pub(crate) fn nothing(columns: usize) -> Self {
        Self { columns, ..Self::tag("SELECT 0") }
    }

    /// Whether the server describes rows first, even if there are none.
    pub(crate) fn has_rows(&self) -> bool {
        !self.rows.is_empty() || self.tag.starts_with("SELECT")
    }
}
