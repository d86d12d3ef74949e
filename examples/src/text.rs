//! The tokeniser of a model folder.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::failure::Failure;

/// `tokenizer.json` of a model folder.
pub struct TextCodec {
    tokenizer: Tokenizer,
}

impl TextCodec {
    /// Reads `tokenizer.json` in `dir`.
    pub fn open(dir: &Path) -> Result<Self, Failure> {
        let path = dir.join("tokenizer.json");
        let tokenizer =
            Tokenizer::from_file(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self { tokenizer })
    }

    /// Token ids of a text, with the special tokens that the tokeniser adds.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Failure> {
        Ok(self.tokenizer.encode(text, true)?.get_ids().to_vec())
    }

    /// Token ids of a text that brings its own special tokens.
    pub fn encode_as_is(&self, text: &str) -> Result<Vec<u32>, Failure> {
        Ok(self.tokenizer.encode(text, false)?.get_ids().to_vec())
    }

    /// The id of a special token, if the tokeniser has it.
    pub fn special(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The text of token ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Failure> {
        self.tokenizer.decode(ids, true)
    }

    /// The text as it grows: hands each new piece to `write` as soon as its characters are complete.
    pub fn stream(&self, ids: &[u32], shown: &mut String) -> Result<String, Failure> {
        let text = self.decode(ids)?;
        // The last character of an incomplete UTF-8 sequence is shown as U+FFFD until its bytes are all there.
        let complete = text.trim_end_matches('\u{fffd}');
        let piece = complete.strip_prefix(shown.as_str()).unwrap_or("").to_owned();
        shown.push_str(&piece);
        Ok(piece)
    }
}
