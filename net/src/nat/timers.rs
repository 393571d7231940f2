//! Deadlines of many flows behind one timerfd.
//!
//! One entry per key: `O(keys)` memory whatever the traffic. Deadlines that move later, as a retransmission timer
//! does with every acknowledgement, cost nothing: the entry stays where it is, fires early, and whoever owns
//! the key looks at its own deadline and puts it back ([`Timers::set`] after [`Timers::pop`]).

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::time::Instant;

/// A set of keys, each with the instant at which it wants to be looked at.
#[derive(Debug)]
pub(crate) struct Timers<K> {
    order: BTreeSet<(Instant, K)>,
    at: HashMap<K, Instant>,
}

impl<K> Default for Timers<K> {
    fn default() -> Self {
        Self { order: BTreeSet::new(), at: HashMap::new() }
    }
}

impl<K: Copy + Ord + Hash> Timers<K> {
    /// Makes sure that `key` is popped at `deadline` or before.
    pub(crate) fn set(&mut self, key: K, deadline: Instant) {
        if let Some(at) = self.at.get_mut(&key) {
            if *at <= deadline {
                return;
            }
            self.order.remove(&(*at, key));
            *at = deadline;
        } else {
            self.at.insert(key, deadline);
        }
        self.order.insert((deadline, key));
    }

    /// Forgets `key`.
    pub(crate) fn remove(&mut self, key: K) {
        if let Some(at) = self.at.remove(&key) {
            self.order.remove(&(at, key));
        }
    }

    /// The earliest deadline.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.order.first().map(|(at, _)| *at)
    }

    /// Takes out a key whose deadline has come.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<K> {
        let (at, key) = *self.order.first()?;
        if at > now {
            return None;
        }
        self.order.pop_first();
        self.at.remove(&key);
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn an_earlier_deadline_replaces_a_later_one_and_never_the_reverse() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut timers = Timers::default();
        timers.set('a', at(5));
        timers.set('b', at(3));
        timers.set('a', at(9));
        assert_eq!(timers.next(), Some(at(3)));
        timers.set('a', at(1));
        assert_eq!(timers.pop(at(0)), None);
        assert_eq!(timers.pop(at(3)), Some('a'));
        assert_eq!(timers.pop(at(3)), Some('b'));
        assert_eq!(timers.next(), None);
        timers.set('a', at(1));
        timers.remove('a');
        assert_eq!(timers.pop(at(9)), None);
    }
}
