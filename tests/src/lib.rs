//! End-to-end tests: whole machines on whole networks, and checks over the whole tree.
//!
//! The tests are in `tests/tests/`; this library holds what they share.
