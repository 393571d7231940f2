//! [`Ring`]: the device's side of a split virtqueue (virtio 1.3 §2.7), over `virtio_queue`'s walk of the chains.
//!
//! It adds what a NIC needs and `virtio_queue::Queue` does not have:
//! - used buffers become visible *together* ([`Ring::publish`]): a frame that spans several chains must not be
//!   half there when the driver looks (§5.1.6.4), and a batch costs one write of the index;
//! - a kick can be asked for "when anything is added to what I have seen" ([`Ring::arm`]), also while chains that
//!   were seen are left in place because they do not suffice yet;
//! - an end of a chain that is not its end — a loop, a descriptor outside the table, a table outside memory —
//!   is an error ([`Ring::collect`]), not a shorter chain.
//!
//! Every error means that the driver is broken and the device stops (see the parent module). Descriptors are read
//! once, so a guest that changes them meanwhile gets one of its two versions, checked.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions, VolatileSlice,
};

/// Most descriptors in a chain; a driver that needs more is refused. Linux uses at most 19 for a frame.
pub const MAX_DESCRIPTORS: usize = 256;

/// How a driver broke its queue.
///
/// ```
/// # use virtio_queue::{Queue, QueueT};
/// use devices::virtio::{Direction, QueueError, Ring};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// # let mut queue = Queue::new(16)?;
/// # queue.set_avail_ring_address(Some(0x1000), None);
/// # queue.set_used_ring_address(Some(0x2000), None);
/// # queue.set_ready(true);
/// # let mut ring = Ring::new(queue).expect("it is ready");
/// // Descriptor 0 goes on (flag 1) with descriptor 0, for ever.
/// memory.write_obj([0x3000_u64, 8 | 1 << 32], GuestAddress(0))?;
/// memory.write_obj([0_u16, 1, 0], GuestAddress(0x1000))?;
/// let chain = ring.pop(&memory)?.expect("the driver made it available");
/// let refused = Ring::collect(&memory, chain, Direction::Readable, &mut Vec::new());
/// assert!(matches!(refused, Err(QueueError::NoEnd { head: 0 })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The available index jumped by more than the queue holds.
    #[error("the available index leaves no sense: {0}")]
    AvailableIndex(virtio_queue::Error),
    /// A ring that can't be read or written, though it was checked.
    #[error("accessing the ring failed: {0}")]
    Ring(#[from] GuestMemoryError),
    /// A chain without a readable first descriptor.
    #[error("chain {head} has no descriptor")]
    NoDescriptor {
        /// Index of its first descriptor.
        head: u16,
    },
    /// A chain whose last descriptor announces another that does not exist: a loop, or an index or a table
    /// that is out of bounds.
    #[error("chain {head} has no end")]
    NoEnd {
        /// Index of its first descriptor.
        head: u16,
    },
    /// More than [`MAX_DESCRIPTORS`].
    #[error("chain {head} has more than {MAX_DESCRIPTORS} descriptors")]
    TooManyDescriptors {
        /// Index of its first descriptor.
        head: u16,
    },
    /// A descriptor that the device is to read where it must write, or the other way round.
    #[error("chain {head} has a descriptor of the wrong direction")]
    Direction {
        /// Index of its first descriptor.
        head: u16,
    },
    /// A chain that does not hold what it must.
    #[error("chain {head} has room for {bytes} bytes only")]
    TooSmall {
        /// Index of its first descriptor.
        head: u16,
        /// Bytes that it holds.
        bytes: usize,
    },
    /// A buffer outside guest memory.
    #[error("chain {head} has a buffer of {len} bytes at {addr:#x}, outside memory")]
    OutsideMemory {
        /// Index of its first descriptor.
        head: u16,
        /// Guest physical address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
}

/// Which half of a chain is wanted.
///
/// ```
/// # use virtio_queue::{Queue, QueueT};
/// use devices::virtio::{Direction, QueueError, Ring};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// # let mut queue = Queue::new(16)?;
/// # queue.set_avail_ring_address(Some(0x1000), None);
/// # queue.set_used_ring_address(Some(0x2000), None);
/// # queue.set_ready(true);
/// # let mut ring = Ring::new(queue).expect("it is ready");
/// // The driver sends 8 bytes where the device expects room for an answer.
/// memory.write_obj([0x3000_u64, 8], GuestAddress(0))?;
/// memory.write_obj([0_u16, 1, 0], GuestAddress(0x1000))?;
/// let chain = ring.pop(&memory)?.expect("the driver made it available");
/// let refused = Ring::collect(&memory, chain, Direction::Writable, &mut Vec::new());
/// assert!(matches!(refused, Err(QueueError::Direction { head: 0 })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The driver wrote it, the device reads.
    Readable,
    /// The device writes it.
    Writable,
}

const HEADER: u64 = 4;
const INDEX_OFFSET: u64 = 2;
const AVAIL_ELEMENT: u64 = 2;
const USED_ELEMENT: u64 = 8;

/// A virtqueue as its device sees it. See the module's documentation.
///
/// ```
/// # use virtio_queue::{Queue, QueueT};
/// use devices::virtio::{Direction, Ring};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// # let mut queue = Queue::new(16)?;
/// # queue.set_avail_ring_address(Some(0x1000), None);
/// # queue.set_used_ring_address(Some(0x2000), None);
/// # queue.set_ready(true);
/// // What a driver does: a buffer of 8 bytes at 0x3000, for the device to write (flag 2); the available index is 1.
/// memory.write_obj([0x3000_u64, 8 | 2 << 32], GuestAddress(0))?;
/// memory.write_obj([0_u16, 1, 0], GuestAddress(0x1000))?;
/// // What a device does.
/// let mut ring = Ring::new(queue).expect("the driver has set it up");
/// let chain = ring.pop(&memory)?.expect("a chain is available");
/// let (head, mut pieces) = (chain.head_index(), Vec::new());
/// assert_eq!(Ring::collect(&memory, chain, Direction::Writable, &mut pieces)?, 8);
/// pieces[0].copy_from(b"answered");
/// ring.add_used(&memory, head, 8)?;
/// ring.publish(&memory)?;
/// assert!(ring.needs_interrupt(&memory)?);
/// assert_eq!(&memory.read_obj::<[u8; 8]>(GuestAddress(0x3000))?, b"answered");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Ring {
    queue: Queue,
    /// Where the next used element goes; those from `published` on are not visible yet.
    next_used: Wrapping<u16>,
    published: Wrapping<u16>,
    /// The used index when the driver was last considered for an interrupt.
    signalled: Wrapping<u16>,
}

impl Ring {
    /// A ring for a queue that its driver has set up; `None` when it has not.
    pub fn new(queue: Queue) -> Option<Self> {
        queue.ready().then(|| {
            let used = Wrapping(queue.next_used());
            Self { queue, next_used: used, published: used, signalled: used }
        })
    }

    /// How many descriptors the driver gave the queue.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain, if there is one.
    ///
    /// # Errors
    /// When the available index makes no sense.
    pub fn pop<'m>(
        &mut self,
        mem: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, QueueError> {
        Ok(self.queue.iter(mem).map_err(QueueError::AvailableIndex)?.next())
    }

    /// Puts the last `n` popped chains back, to be popped again in the same order.
    pub fn unpop(&mut self, n: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(n));
    }

    /// Appends the buffers of `chain` to `pieces`, all of which must be of the given direction, and says how
    /// many bytes they hold. Buffers without a byte are left out.
    ///
    /// # Errors
    /// When the chain is broken; `pieces` then holds some of it.
    pub fn collect<'m>(
        mem: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
        direction: Direction,
        pieces: &mut Vec<VolatileSlice<'m>>,
    ) -> Result<usize, QueueError> {
        let mut bytes = 0;
        let head = walk(mem, chain, |found, piece| {
            if found != direction {
                return Err(());
            }
            bytes += piece.len();
            pieces.push(piece);
            Ok(())
        })?;
        head.map_or(Ok(bytes), |head| Err(QueueError::Direction { head }))
    }

    /// Splits `chain` into what the device reads and what it writes.
    ///
    /// # Errors
    /// When the chain is broken, or a readable descriptor follows a writable one (§2.7.4.2).
    pub fn collect_both<'m>(
        mem: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
        readable: &mut Vec<VolatileSlice<'m>>,
        writable: &mut Vec<VolatileSlice<'m>>,
    ) -> Result<(), QueueError> {
        let head = walk(mem, chain, |found, piece| {
            match found {
                Direction::Writable => writable.push(piece),
                Direction::Readable if writable.is_empty() => readable.push(piece),
                Direction::Readable => return Err(()),
            }
            Ok(())
        })?;
        head.map_or(Ok(()), |head| Err(QueueError::Direction { head }))
    }

    /// Returns a chain to the driver with `len` bytes written; visible after [`Self::publish`].
    ///
    /// # Errors
    /// When the ring can't be written, or `head` is no descriptor.
    pub fn add_used(&mut self, mem: &GuestMemoryMmap, head: u16, len: u32) -> Result<(), QueueError> {
        let slot = u64::from(self.next_used.0 % self.queue.size());
        let addr = self.queue.used_ring() + HEADER + slot * USED_ELEMENT;
        let element = u64::from(head) | u64::from(len) << 32;
        mem.write_obj(element.to_le(), GuestAddress(addr))?;
        self.next_used += 1;
        Ok(())
    }

    /// Makes all returned chains visible to the driver, at once.
    ///
    /// # Errors
    /// When the ring can't be written.
    pub fn publish(&mut self, mem: &GuestMemoryMmap) -> Result<(), QueueError> {
        if self.published != self.next_used {
            let addr = GuestAddress(self.queue.used_ring() + INDEX_OFFSET);
            mem.store(self.next_used.0.to_le(), addr, Ordering::Release)?;
            self.published = self.next_used;
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was published since the last call.
    ///
    /// # Errors
    /// When the ring can't be read.
    pub fn needs_interrupt(&mut self, mem: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let (old, new) = (self.signalled, self.published);
        if old == new {
            return Ok(false);
        }
        self.signalled = new;
        // The used index must be visible before we look at what the driver asked for.
        fence(Ordering::SeqCst);
        if self.queue.event_idx_enabled() {
            let at = HEADER + u64::from(self.queue.size()) * AVAIL_ELEMENT;
            let event: u16 = mem.load(GuestAddress(self.queue.avail_ring() + at), Ordering::Relaxed)?;
            let event = Wrapping(u16::from_le(event));
            return Ok(new - event - Wrapping(1) < new - old);
        }
        let flags: u16 = mem.load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// The driver's available index: how far it has come.
    ///
    /// # Errors
    /// When the ring can't be read.
    pub fn available(&self, mem: &GuestMemoryMmap) -> Result<u16, QueueError> {
        self.queue.avail_idx(mem, Ordering::Acquire).map(|idx| idx.0).map_err(QueueError::AvailableIndex)
    }

    /// The available index up to which chains have been popped.
    pub fn position(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Asks for a kick when the driver adds to what was there at available index `seen`. True when it already
    /// has: look again instead of waiting.
    ///
    /// # Errors
    /// When the ring can't be accessed.
    pub fn arm(&mut self, mem: &GuestMemoryMmap, seen: u16) -> Result<bool, QueueError> {
        if self.queue.event_idx_enabled() {
            let at = HEADER + u64::from(self.queue.size()) * USED_ELEMENT;
            mem.store(seen.to_le(), GuestAddress(self.queue.used_ring() + at), Ordering::Relaxed)?;
        } else {
            mem.store(0u16, GuestAddress(self.queue.used_ring()), Ordering::Relaxed)?;
        }
        // The driver adds and then looks at our wish; we wish and then look at what it added.
        fence(Ordering::SeqCst);
        Ok(self.available(mem)? != seen)
    }

    /// Asks for no kicks. A wish only: some may still come.
    ///
    /// # Errors
    /// When the ring can't be written.
    pub fn disarm(&mut self, mem: &GuestMemoryMmap) -> Result<(), QueueError> {
        // With EVENT_IDX a kick comes once per `arm`, so there is nothing to take back.
        if !self.queue.event_idx_enabled() {
            let flags = VRING_USED_F_NO_NOTIFY as u16;
            mem.store(flags.to_le(), GuestAddress(self.queue.used_ring()), Ordering::Relaxed)?;
        }
        Ok(())
    }
}

/// Calls `visit` for each piece of memory that `chain` describes, in order. When `visit` refuses one, the chain's
/// head is the answer.
fn walk<'m>(
    mem: &'m GuestMemoryMmap,
    mut chain: DescriptorChain<&'m GuestMemoryMmap>,
    mut visit: impl FnMut(Direction, VolatileSlice<'m>) -> Result<(), ()>,
) -> Result<Option<u16>, QueueError> {
    let head = chain.head_index();
    let mut descriptors = 0;
    let mut more = false;
    for descriptor in &mut chain {
        descriptors += 1;
        if descriptors > MAX_DESCRIPTORS {
            return Err(QueueError::TooManyDescriptors { head });
        }
        more = descriptor.has_next();
        let (addr, len) = (descriptor.addr(), descriptor.len());
        let (direction, access) = if descriptor.is_write_only() {
            (Direction::Writable, Permissions::Write)
        } else {
            (Direction::Readable, Permissions::Read)
        };
        if len == 0 {
            continue;
        }
        let outside = || QueueError::OutsideMemory { head, addr: addr.0, len };
        // One descriptor may cross from one memory region into the next.
        for piece in GuestMemory::get_slices(mem, addr, len as usize, access).map_err(|_| outside())? {
            if visit(direction, piece.map_err(|_| outside())?).is_err() {
                return Ok(Some(head));
            }
        }
    }
    match (descriptors, more) {
        (0, _) => Err(QueueError::NoDescriptor { head }),
        (_, true) => Err(QueueError::NoEnd { head }),
        (_, false) => Ok(None),
    }
}
