//! End-to-end tests: whole machines on whole networks.
