//! Passwords and tokens: text that is never printed and is wiped when dropped.

use std::fmt;

use zeroize::Zeroizing;

/// Text that must not reach a log, a metric, an error or a page.
///
/// There is no `Display`, and `Debug` shows only that something is there. [`Secret::expose`] is the one way to the text; search for it
/// to see every place where a secret leaves its wrapper.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Wraps `text`.
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text itself, for the one header or form field that carries it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is no text at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

#[cfg(test)]
mod tests {
    use zeroize::ZeroizeOnDrop;

    use super::Secret;

    #[test]
    fn is_wiped_when_dropped() {
        // That memory was wiped cannot be read without `unsafe`; that its type does so is checked when this is compiled.
        fn wiped(_: &impl ZeroizeOnDrop) {}
        wiped(&Secret::new("hunter2".into()).0);
    }

    #[test]
    fn debug_shows_nothing() {
        let shown = format!("{:?}", Secret::new("hunter2".into()));
        assert_eq!(shown, "Secret(***)");
    }
}
