//! The allocator's settings.
#![allow(unsafe_code, reason = "mallopt has no safe interface")]

/// Lets all threads allocate from one arena. Another one per thread costs a reservation of 64 MB, some pages and four system
/// calls, so that two threads that allocate at the same time need not wait; ours hardly ever do: the data path
/// allocates nothing, and a vCPU's thread next to nothing.
pub(super) fn one_arena() {
    // SAFETY: mallopt takes two numbers; this is called before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
