//! One battery of cases that every kernel of every device must pass.
