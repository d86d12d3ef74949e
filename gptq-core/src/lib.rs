//! The GPTQ algorithm.
