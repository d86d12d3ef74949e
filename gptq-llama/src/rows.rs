use crate::LlamaError;

/// Token rows for calibration and evaluation. Each row is one sequence that begins at position 0 and sees no other row.
///
/// The rules by which texts become rows:
///
/// * Rows of token ids are taken as they stand; nothing is added, cut or joined unless asked for.
/// * Each text of a collection is tokenised by itself, with the special tokens that its tokeniser adds, and becomes one
///   row; with a length given, a longer row loses its end ([`truncate`](Self::truncate)). Rows of at most
///   [`SHORT`](Self::SHORT) tokens are dropped for calibration ([`drop_short`](Self::drop_short)).
/// * One long text is tokenised as a whole and cut into windows that do not overlap; an incomplete last window is
///   dropped unless it is the only one ([`windows`](Self::windows)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRows(Vec<Vec<u32>>);

impl TokenRows {
    /// Rows of at most this many tokens say little about a model.
    pub const SHORT: usize = 10;

    /// Errors: [`LlamaError::NoTokens`] if there are no rows or a row is empty.
    pub fn new(rows: Vec<Vec<u32>>) -> Result<Self, LlamaError> {
        if rows.is_empty() || rows.iter().any(Vec::is_empty) {
            return Err(LlamaError::NoTokens { what: "a row, or the list of rows," });
        }
        Ok(Self(rows))
    }

    /// One text's tokens, cut into windows of `len` tokens.
    ///
    /// Errors: [`LlamaError::NoTokens`] if there are no tokens or `len` is 0.
    pub fn windows(tokens: &[u32], len: usize) -> Result<Self, LlamaError> {
        if len == 0 {
            return Err(LlamaError::NoTokens { what: "a window" });
        }
        if tokens.len() < len {
            return Self::new(vec![tokens.to_vec()]);
        }
        Self::new(tokens.chunks_exact(len).map(<[u32]>::to_vec).collect())
    }

    /// Cuts every row to at most `len` tokens.
    ///
    /// Errors: [`LlamaError::NoTokens`] if `len` is 0.
    pub fn truncate(mut self, len: usize) -> Result<Self, LlamaError> {
        self.0.iter_mut().for_each(|row| row.truncate(len));
        Self::new(self.0)
    }

    /// Drops rows of at most [`SHORT`](Self::SHORT) tokens; says how many in a `tracing` warning.
    ///
    /// Errors: [`LlamaError::NoTokens`] if no row is left.
    pub fn drop_short(self) -> Result<Self, LlamaError> {
        let before = self.0.len();
        let rows: Vec<Vec<u32>> = self.0.into_iter().filter(|row| row.len() > Self::SHORT).collect();
        if rows.len() < before {
            tracing::warn!(dropped = before - rows.len(), shortest = Self::SHORT + 1, "short rows dropped");
        }
        Self::new(rows)
    }

    /// The first `count` rows.
    ///
    /// Errors: [`LlamaError::NoTokens`] if `count` is 0.
    pub fn take(mut self, count: usize) -> Result<Self, LlamaError> {
        self.0.truncate(count);
        Self::new(self.0)
    }

    /// The rows.
    pub fn rows(&self) -> &[Vec<u32>] {
        &self.0
    }

    /// Tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }

    /// Tokens of the longest row.
    pub fn longest(&self) -> usize {
        self.0.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Errors: [`LlamaError::Token`] if a token is not in a vocabulary of `vocab_size`.
    pub fn check_vocabulary(&self, vocab_size: usize) -> Result<(), LlamaError> {
        for row in &self.0 {
            if let Some(index) = row.iter().position(|&token| token as usize >= vocab_size) {
                return Err(LlamaError::Token { token: row[index], index, vocab_size });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_do_not_overlap() {
        let tokens: Vec<u32> = (0..10).collect();
        let rows = TokenRows::windows(&tokens, 4).unwrap();
        assert_eq!(rows.rows(), [vec![0, 1, 2, 3], vec![4, 5, 6, 7]]);
        assert_eq!(TokenRows::windows(&tokens, 11).unwrap().rows(), std::slice::from_ref(&tokens));
        assert_eq!(TokenRows::windows(&tokens, 10).unwrap().tokens(), 10);
    }

    #[test]
    fn rules_for_rows() {
        let rows = TokenRows::new(vec![vec![1; 10], vec![2; 11], vec![3; 30]]).unwrap();
        assert_eq!(rows.clone().drop_short().unwrap().rows().len(), 2);
        assert_eq!(rows.clone().truncate(20).unwrap().longest(), 20);
        assert_eq!(rows.clone().take(1).unwrap().tokens(), 10);
        assert!(rows.clone().truncate(8).unwrap().drop_short().is_err());
        let error = rows.check_vocabulary(3).unwrap_err();
        assert!(matches!(error, LlamaError::Token { token: 3, index: 0, vocab_size: 3 }));
    }

    #[test]
    fn nothing_is_refused() {
        assert!(matches!(TokenRows::new(vec![]), Err(LlamaError::NoTokens { .. })));
        assert!(matches!(TokenRows::new(vec![vec![]]), Err(LlamaError::NoTokens { .. })));
        assert!(matches!(TokenRows::windows(&[1], 0), Err(LlamaError::NoTokens { .. })));
        assert!(matches!(TokenRows::windows(&[], 5), Err(LlamaError::NoTokens { .. })));
    }
}
