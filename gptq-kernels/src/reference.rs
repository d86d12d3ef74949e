//! The float64 reference that every kernel is measured against.
