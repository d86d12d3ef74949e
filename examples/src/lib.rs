//! What the examples share: command lines that fail on one line, data files, progress bars, tables, plots.

pub mod chat_template;
pub mod conversation;
pub mod data;
pub mod device;
pub mod failure;
pub mod host_memory;
pub mod plot;
pub mod progress;
pub mod random_checkpoint;
pub mod random_model;
pub mod shape;
pub mod table;
pub mod text;
pub mod tune;
pub mod zeros;
