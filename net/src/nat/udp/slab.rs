//! Slots for flows: a small number names a flow in an epoll event, and a generation tells a slot's flows apart, so that
//! a late event of a closed socket finds nothing.

use crate::nat::poller::{Owner, Token};

/// Bits of a generation that a [`Token`] carries.
const GENERATION: u32 = 0xff_ffff;

/// Flows by slot. Slots are used again, the lowest free one first to last freed first.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// The token of the slot that the next [`Self::insert`] fills.
    pub(crate) fn next_token(&self, owner: Owner) -> Token {
        let len = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        let slot = self.free.last().copied().unwrap_or(len);
        let generation = self.slots.get(slot as usize).map_or(0, |(generation, _)| *generation);
        Token { owner, slot, generation }
    }

    /// Puts a flow into the slot that [`Self::next_token`] named.
    pub(crate) fn insert(&mut self, value: T) -> u32 {
        if let Some(slot) = self.free.pop() {
            self.slots[slot as usize].1 = Some(value);
            return slot;
        }
        self.slots.push((0, Some(value)));
        u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
    }

    /// Takes the flow out; its events are stale from now on.
    pub(crate) fn remove(&mut self, slot: u32) -> Option<T> {
        let (generation, value) = self.slots.get_mut(slot as usize)?;
        let value = value.take()?;
        *generation = (*generation + 1) & GENERATION;
        self.free.push(slot);
        Some(value)
    }

    /// The token of a flow that is there.
    pub(crate) fn token(&self, slot: u32, owner: Owner) -> Token {
        let generation = self.slots.get(slot as usize).map_or(0, |(generation, _)| *generation);
        Token { owner, slot, generation }
    }

    /// The flow stays, but got another socket: events of the old one are stale.
    pub(crate) fn renew(&mut self, slot: u32) {
        if let Some((generation, _)) = self.slots.get_mut(slot as usize) {
            *generation = (*generation + 1) & GENERATION;
        }
    }

    pub(crate) fn get(&self, slot: u32) -> Option<&T> {
        self.slots.get(slot as usize)?.1.as_ref()
    }

    pub(crate) fn get_mut(&mut self, slot: u32) -> Option<&mut T> {
        self.slots.get_mut(slot as usize)?.1.as_mut()
    }

    /// The flow that an event is for, unless it is gone.
    pub(crate) fn by_token(&mut self, token: Token) -> Option<&mut T> {
        let (generation, value) = self.slots.get_mut(token.slot as usize)?;
        value.as_mut().filter(|_| *generation == token.generation)
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0u32..).zip(&self.slots).filter_map(|(slot, (_, value))| Some((slot, value.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_of_a_closed_flow_finds_nothing_in_its_slot() {
        let mut slab = Slab::default();
        let first = slab.next_token(Owner::Udp);
        let slot = slab.insert("a");
        assert_eq!((slot, slab.by_token(first)), (first.slot, Some(&mut "a")));
        assert_eq!(slab.remove(slot), Some("a"));
        let second = slab.next_token(Owner::Udp);
        assert_eq!(slab.insert("b"), slot);
        assert_eq!(slab.by_token(first), None);
        assert_eq!(slab.by_token(second), Some(&mut "b"));
        assert_eq!((slab.len(), slab.iter().count()), (1, 1));
        assert_eq!(slab.remove(7), None);
    }
}
