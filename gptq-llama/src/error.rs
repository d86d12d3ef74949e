use std::path::PathBuf;

use gptq_kernels::KernelError;

use crate::{
    config::ConfigError,
    lora::LoraError,
    quantize::{BudgetError, OutputError, RuleError, TrialError},
};

/// What can go wrong in loading, quantising or running a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LlamaError {
    /// `config.json` cannot be used.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: ConfigError,
    },
    /// The checkpoint cannot be read or written.
    #[error(transparent)]
    Format(#[from] gptq_format::FormatError),
    /// Settings that no checkpoint can hold.
    #[error("quantize_config.json: {source}")]
    QuantizeConfig {
        /// Why not.
        source: gptq_format::ConfigError,
    },
    /// Codes do not make a packed layer.
    #[error("{tensor}: {source}")]
    Pack {
        /// The layer.
        tensor: String,
        /// Why not.
        source: gptq_format::PackError,
    },
    /// A kernel refused a layer.
    #[error("{tensor}: {source}")]
    Layer {
        /// The layer.
        tensor: String,
        /// Why.
        source: KernelError,
    },
    /// No kernel computes a layer in float32.
    #[error("{tensor}: no kernel computes it in float32")]
    NoFloat32Kernel {
        /// The layer.
        tensor: String,
    },
    /// A device operation failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The weights do not fit in the device's memory.
    #[error(
        "the weights need about {} MB of the device's memory, {} MB are free: {layers_that_fit} of {layers} decoder layers \
         fit{}",
        needed / 1_000_000,
        free / 1_000_000,
        in_4_bits.map_or_else(String::new, |bytes| format!("; in 4 bits it would be {} MB", bytes / 1_000_000))
    )]
    ModelMemory {
        /// Bytes of all weights, about.
        needed: usize,
        /// Bytes that were free before loading.
        free: usize,
        /// Decoder layers.
        layers: usize,
        /// Those that fit beside embedding and output projection.
        layers_that_fit: usize,
        /// Bytes of all weights with the decoder layers quantised to 4 bits, if they are not and that would fit.
        in_4_bits: Option<usize>,
    },
    /// Keys and values do not fit in the device's memory.
    #[error(
        "no memory for keys and values of {tokens} tokens, {bytes_per_token} bytes each: with {} MB free {fits} tokens fit{}",
        free / 1_000_000,
        match sequences {
            0 | 1 => String::new(),
            _ => format!(
                ", {} in each of {sequences} sequences, or {} sequences of {length}",
                fits / sequences,
                fits / length.max(&1)
            ),
        }
    )]
    CacheMemory {
        /// Tokens of all sequences, in whole pages.
        tokens: usize,
        /// Bytes of the keys and values of one token.
        bytes_per_token: usize,
        /// Bytes that were free.
        free: usize,
        /// Tokens of all sequences that fit.
        fits: usize,
        /// Sequences in the cache.
        sequences: usize,
        /// Tokens of the sequence that was to grow.
        length: usize,
    },
    /// The device's memory is too small for a step of that many tokens.
    #[error("no memory for a step of {rows} tokens: feed them in steps of up to {fits}")]
    StepMemory {
        /// Tokens of the step.
        rows: usize,
        /// Tokens of a step that fits; 0 if none does.
        fits: usize,
    },
    /// A layer could not be quantised.
    #[error("{module}: {source}")]
    Quantize {
        /// The layer.
        module: String,
        /// Why not.
        source: gptq_core::GptqError,
    },
    /// A layer could not be quantised, for a reason of the device.
    #[error("{module}: {source}")]
    Solver {
        /// The layer.
        module: String,
        /// Why not.
        source: gptq_kernels::quantize::QuantizeError,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{tensor} has shape {got:?}, the configuration needs {expected:?}")]
    TensorShape {
        /// The tensor.
        tensor: String,
        /// Shape by the configuration.
        expected: Vec<usize>,
        /// Shape in the file.
        got: Vec<usize>,
    },
    /// A tensor that the configuration asks for is not in the checkpoint.
    #[error("{tensor} is missing")]
    MissingTensor {
        /// The tensor.
        tensor: String,
    },
    /// A tensor holds something else than floats.
    #[error("{tensor} has dtype {dtype}, which is no weight's")]
    TensorType {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
    },
    /// A weight that does not fit the type in which the checkpoint holds it.
    #[error("{tensor} has values that {dtype} cannot hold")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The checkpoint's type.
        dtype: String,
    },
    /// The model to be quantised is quantised.
    #[error("{tensor} is quantised already")]
    AlreadyQuantized {
        /// The layer.
        tensor: String,
    },
    /// A rule of `dynamic` asks for what no module can have.
    #[error("dynamic rule {rule:?}: {reason}")]
    DynamicRule {
        /// The rule's pattern.
        rule: String,
        /// Why not.
        reason: RuleError,
    },
    /// A rule of `dynamic` changes nothing: it is misspelt, or stands behind others.
    #[error(
        "dynamic rule {rule:?} {}",
        if *matches == 0 { "matches no module".to_owned() } else {
            format!("decides no module: earlier rules match all {matches} that it matches")
        }
    )]
    UnusedRule {
        /// The rule's pattern.
        rule: String,
        /// Modules that it matches.
        matches: usize,
    },
    /// The output layer cannot be quantised by itself.
    #[error(
        "the output layer is the embedding matrix (tie_word_embeddings): quantised, it would be a second matrix, which \
         other tools replace by the embedding when they load the model"
    )]
    TiedOutputLayer,
    /// Rules take every module out.
    #[error("the rules of `dynamic` leave no module to quantise")]
    NothingToQuantize,
    /// A run cannot start, go on or be written down.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Recipes cannot be tried.
    #[error(transparent)]
    Trial(#[from] TrialError),
    /// Bits cannot be distributed.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// An adapter cannot be merged.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// A token is not in the vocabulary.
    #[error("token {token} at position {index}: the vocabulary has {vocab_size} entries")]
    Token {
        /// The token.
        token: u32,
        /// Where it is among the tokens given.
        index: usize,
        /// Entries of the vocabulary.
        vocab_size: usize,
    },
    /// More tokens than the cache was made for.
    #[error("{needed} tokens in a sequence, the cache was made for {limit}")]
    ContextLength {
        /// Tokens in the sequence after this step.
        needed: usize,
        /// Tokens that the cache can hold.
        limit: usize,
    },
    /// A sequence that is not in this cache.
    #[error("sequence {index} is not in this cache")]
    UnknownSequence {
        /// Its number.
        index: usize,
    },
    /// A sequence is to go on with a token that the last step that drew has not drawn for it.
    #[error("no token has been drawn for sequence {index} since it was last changed")]
    NothingDrawn {
        /// Its number.
        index: usize,
    },
    /// A sequence stands twice in one step.
    #[error("sequence {index} stands twice in one step")]
    RepeatedSequence {
        /// Its number.
        index: usize,
    },
    /// No tokens where some are needed.
    #[error("{what} has no tokens")]
    NoTokens {
        /// What is empty.
        what: &'static str,
    },
    /// A row too short to predict anything.
    #[error("row {row} has {tokens} tokens, a prediction needs two")]
    ShortRow {
        /// Which row.
        row: usize,
        /// Its length.
        tokens: usize,
    },
    /// The model computed NaN or infinity.
    #[error("the logits of position {position} are not finite")]
    NonFiniteLogits {
        /// The position in its sequence.
        position: usize,
    },
    /// A sampling parameter out of range.
    #[error("{name} is {value}: {expected}")]
    Sampling {
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// A finished layer was not expected.
    #[error("{tensor} is not among the layers of the model that is written")]
    UnknownLayer {
        /// The layer.
        tensor: String,
    },
    /// Somebody cancelled the run.
    #[error("cancelled")]
    Cancelled,
}
