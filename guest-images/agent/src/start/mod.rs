//! What a libc would bring: the entry, memory functions that the compiler calls, the end by a panic.

mod sys;
