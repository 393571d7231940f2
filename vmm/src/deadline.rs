//! Deadlines from limits that callers choose.

use std::time::{Duration, Instant};

/// When `limit` has passed from now on. A limit that the clock can't tell, such as [`Duration::MAX`], is a century.
pub(crate) fn after(limit: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    let now = Instant::now();
    now.checked_add(limit).unwrap_or(now + CENTURY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_limit_is_a_deadline_far_away() {
        assert!(after(Duration::MAX) > Instant::now() + Duration::from_secs(1_000_000_000));
        assert!(after(Duration::ZERO) <= Instant::now());
    }
}
