//! The ring alone: what is short goes on, what is dropped is waited for.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
use vmm_sys_util::eventfd::EventFd;

use super::*;

type Mem = Arc<GuestMemoryMmap<()>>;

fn setting() -> Option<(Ring, EventFd, Mem)> {
    let eventfd = EventFd::new(0).unwrap();
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 22)]).unwrap());
    // A host without io_uring has nothing to test here.
    Ring::new(4, eventfd.as_raw_fd()).ok().map(|ring| (ring, eventfd, memory))
}

fn buffers(memory: &Mem, at: u64, len: usize) -> GuestBuffers {
    let slices = GuestMemory::get_slices(&**memory, GuestAddress(at), len, Permissions::ReadWrite).unwrap();
    GuestBuffers::new(memory, &slices.map(Result::unwrap).collect::<Vec<_>>()).unwrap()
}

fn read(file: std::fs::File, at: u64, buffers: GuestBuffers) -> Transfer {
    Transfer { access: Access::Read, file: Arc::new(file), at, buffers, durable: false }
}

/// What is done, once something is.
fn wait(ring: &mut Ring, eventfd: &EventFd, count: usize) -> Vec<(usize, Result<(), std::io::ErrorKind>)> {
    let mut finished = Vec::new();
    while finished.len() < count {
        eventfd.read().unwrap();
        ring.reap(&mut finished);
        assert!(!ring.submit());
    }
    finished.into_iter().map(|(number, result)| (number, result.map_err(|error| error.kind()))).collect()
}

#[test]
fn a_short_read_goes_on_until_the_end_of_the_file_and_fails_there() {
    let Some((mut ring, eventfd, memory)) = setting() else { return };
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[7; 1000], 0).unwrap();
    assert!(ring.push(2, read(file, 0, buffers(&memory, 0x1000, 1024))).is_ok());
    assert!(!ring.submit());
    assert_eq!(wait(&mut ring, &eventfd, 1), [(2, Err(std::io::ErrorKind::UnexpectedEof))]);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1000 + 999)).unwrap(), 7);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1000 + 1000)).unwrap(), 0);
}

#[test]
fn a_large_transfer_is_done_elsewhere_and_whole() {
    let Some((mut ring, eventfd, memory)) = setting() else { return };
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![9; 2 * LARGE], 0).unwrap();
    assert!(ring.push(0, read(file, 0, buffers(&memory, 0, 2 * LARGE))).is_ok());
    assert!(!ring.submit());
    assert_eq!(wait(&mut ring, &eventfd, 1), [(0, Ok(()))]);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(2 * LARGE as u64 - 1)).unwrap(), 9);
}

#[test]
fn a_number_that_is_taken_or_too_large_is_refused() {
    let Some((mut ring, _eventfd, memory)) = setting() else { return };
    let file = tempfile::tempfile().unwrap();
    let again = || read(file.try_clone().unwrap(), 0, buffers(&memory, 0, 512));
    assert!(ring.push(3, again()).is_ok());
    assert!(ring.push(3, again()).is_err());
    assert!(ring.push(4, again()).is_err());
}

#[test]
fn dropping_a_ring_waits_for_a_read_that_waits() {
    let Some((mut ring, _eventfd, memory)) = setting() else { return };
    let (reader, mut writer) = std::io::pipe().unwrap();
    let reader = std::fs::File::from(std::os::fd::OwnedFd::from(reader));
    assert!(ring.push(0, read(reader, 0, buffers(&memory, 0x2000, 5))).is_ok());
    assert!(!ring.submit());
    let writing = std::thread::spawn(move || std::io::Write::write_all(&mut writer, b"hello").unwrap());
    drop(ring);
    let mut bytes = [0; 5];
    memory.read_slice(&mut bytes, GuestAddress(0x2000)).unwrap();
    assert_eq!(&bytes, b"hello");
    writing.join().unwrap();
}
