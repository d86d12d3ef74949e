//! The choice of a zero convention on a command line.

use clap::ValueEnum;
use gptq_format::{ReadOptions, ZeroConvention};

/// How zero points are stored.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Zeros {
    /// Stored minus one
    V1,
    /// Stored minus one, borrowing across the fields of a word, as GPTQModel does
    V1WholeWord,
    /// Stored as they are
    V2,
}

impl Zeros {
    /// Options that read zero points in this way, or by evidence if there is no choice.
    pub fn read_options(choice: Option<Self>) -> ReadOptions {
        let options = ReadOptions::default();
        match choice {
            None => options,
            Some(Self::V1) => options.zero_convention(ZeroConvention::V1),
            Some(Self::V1WholeWord) => options.zero_convention(ZeroConvention::V1WholeWord),
            Some(Self::V2) => options.zero_convention(ZeroConvention::V2),
        }
    }
}
