//! A reference Llama.
