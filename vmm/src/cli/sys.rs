//! What is set for the whole process before it has a second thread.
#![allow(unsafe_code, reason = "mallopt and the environment have no safe interface")]

/// Lets all threads allocate from one arena. Another one per thread costs a reservation of 64 MB, some pages and four system
/// calls, so that two threads that allocate at the same time need not wait; ours hardly ever do: the data path
/// allocates nothing, and a vCPU's thread next to nothing.
pub(super) fn one_arena() {
    // SAFETY: mallopt takes two numbers; this is called before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Keeps errors from capturing backtraces, which nobody prints: the unwinder of a static program whose tables were left out ends it by
/// SIGABRT, so that with RUST_BACKTRACE=1 no error would ever be told. To be called while there is one thread.
pub(super) fn no_backtraces() {
    // SAFETY: the process has this thread alone, so nobody reads the environment meanwhile.
    unsafe { std::env::set_var("RUST_LIB_BACKTRACE", "0") };
}
