use std::path::PathBuf;

/// The project's folder, or `GPTQ_ROOT` on a machine that has only what `.ci/gpu-bundle` brings.
pub(crate) fn root() -> PathBuf {
    std::env::var_os("GPTQ_ROOT")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".."), PathBuf::from)
}
