//! The flow table: flows in slots, found by their addresses.
//!
//! A slot's number is what the epoll and the timers know a flow by; its generation tells the event of a flow that is
//! gone from one of the flow that has the slot now.

use std::collections::HashMap;
use std::net::SocketAddrV4;

use super::flow::Flow;
use crate::nat::poller::{Owner, Token};

/// Names a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) guest: SocketAddrV4,
    pub(super) world: SocketAddrV4,
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    flow: Option<Flow>,
}

/// The flows.
#[derive(Debug, Default)]
pub(super) struct Table {
    by_key: HashMap<Key, u32>,
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn find(&self, key: &Key) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    pub(super) fn get(&mut self, slot: u32) -> Option<&mut Flow> {
        self.slots.get_mut(slot as usize)?.flow.as_mut()
    }

    /// The flow that an event is about, if it is still there.
    pub(super) fn by_token(&mut self, token: Token) -> Option<&mut Flow> {
        let slot = self.slots.get_mut(token.slot as usize)?;
        slot.flow.as_mut().filter(|_| slot.generation == token.generation)
    }

    /// The token that the next flow will have.
    pub(super) fn next_token(&self) -> Token {
        let slot = self.free.last().copied().unwrap_or(u32::try_from(self.slots.len()).unwrap_or(u32::MAX));
        let generation = self.slots.get(slot as usize).map_or(0, |s| s.generation);
        Token { owner: Owner::Tcp, slot, generation }
    }

    /// Puts a flow into the slot of [`Self::next_token`].
    pub(super) fn insert(&mut self, flow: Flow) -> u32 {
        let slot = self.next_token().slot;
        self.by_key.insert(flow.key, slot);
        match self.free.pop() {
            Some(_) => self.slots[slot as usize].flow = Some(flow),
            None => self.slots.push(Slot { generation: 0, flow: Some(flow) }),
        }
        slot
    }

    pub(super) fn remove(&mut self, slot: u32) -> Option<Flow> {
        let entry = self.slots.get_mut(slot as usize)?;
        let flow = entry.flow.take()?;
        entry.generation = (entry.generation + 1) & 0xff_ffff;
        self.by_key.remove(&flow.key);
        self.free.push(slot);
        Some(flow)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Flow> {
        self.slots.iter().filter_map(|slot| slot.flow.as_ref())
    }
}
