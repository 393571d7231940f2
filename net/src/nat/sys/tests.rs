//! The kernel behaves as the module says it does, with `SO_PEEK_OFF` and without.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};

use super::*;

const TOKEN: Token = Token { owner: Owner::Tcp, slot: 7, generation: 3 };

/// A socket of the host, and the world's end of it.
fn pair(peek_off: bool) -> (SysHost, SockId, TcpStream) {
    let mut host = SysHost::new().unwrap();
    if !peek_off {
        host.without_peek_off();
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port());
    let sock = host.connect(to, TOKEN).unwrap();
    let (world, _) = listener.accept().unwrap();
    wait(&mut host, Events::WRITE);
    host.connected(sock).unwrap();
    (host, sock, world)
}

/// Waits for an event of the socket.
fn wait(host: &mut SysHost, event: Events) {
    let mut seen = Vec::new();
    loop {
        assert!(host.is_readable(10_000), "no {event:?} within ten seconds");
        host.poll(&mut seen);
        if seen.drain(..).any(|(token, events)| token == TOKEN && events.intersects(event)) {
            return;
        }
    }
}

/// Peeks into two pieces, behind the room for a header.
fn peek(host: &mut SysHost, sock: SockId, offset: u32, max: usize) -> Result<String, ErrorKind> {
    let (mut first, mut second) = ([b'#'; 5], [b'#'; 40]);
    let got = {
        let parts = [VolatileSlice::from(&mut first[..]), VolatileSlice::from(&mut second[..])];
        host.peek(sock, offset, &parts, 3, max).map_err(|error| error.kind())?
    };
    let all = [&first[..], &second].concat();
    assert_eq!(&all[..3], b"###");
    Ok(String::from_utf8(all[3..3 + got].to_vec()).unwrap())
}

fn peeks_and_discards(host: &mut SysHost, sock: SockId, mut world: impl Write) {
    world.write_all(b"hello world").unwrap();
    wait(host, Events::READ);
    assert_eq!(peek(host, sock, 0, 5).unwrap(), "hello");
    assert_eq!(peek(host, sock, 5, 100).unwrap(), " world");
    assert_eq!(peek(host, sock, 11, 100), Err(ErrorKind::WouldBlock));
    assert_eq!(peek(host, sock, 2, 3).unwrap(), "llo", "again, after a loss");
    host.discard(sock, 5);
    assert_eq!(peek(host, sock, 0, 100).unwrap(), " world");
    assert_eq!(peek(host, sock, 3, 100).unwrap(), "rld");
    host.discard(sock, 3);
    world.write_all(b"!").unwrap();
    wait(host, Events::READ);
    assert_eq!(peek(host, sock, 3, 100).unwrap(), "!", "the offset moved back with the discard");
    drop(world);
    wait(host, Events::READ_CLOSED);
    assert_eq!(peek(host, sock, 4, 100).unwrap(), "", "the end");
    assert_eq!(peek(host, sock, 0, 100).unwrap(), "rld!", "which does not hide what is in front of it");
}

#[test]
fn what_was_peeked_stays_until_it_is_discarded() {
    let (mut host, sock, world) = pair(true);
    assert!(host.peek_off, "this kernel is older than 6.9: the other path is the one that is used");
    peeks_and_discards(&mut host, sock, world);
}

#[test]
fn the_same_on_a_kernel_without_peek_offsets() {
    let (mut host, sock, world) = pair(false);
    peeks_and_discards(&mut host, sock, world);
}

#[test]
fn the_same_on_a_stream_of_this_process() {
    let mut host = SysHost::new().unwrap();
    let (ours, theirs) = host.stream_pair(TOKEN).unwrap();
    let fd = host.open[theirs.0 as usize].take().unwrap().fd;
    peeks_and_discards(&mut host, ours, std::os::unix::net::UnixStream::from(fd));
}

#[test]
fn a_world_that_does_not_read_fills_the_socket_and_its_event_comes_when_it_does() {
    let (mut host, sock, mut world) = pair(true);
    let mut bytes = vec![7u8; 60_000];
    let mut sent = 0;
    let before = host.send_space(sock);
    assert!(before.writable && before.free > 0 && before.free <= before.size);
    loop {
        let part = VolatileSlice::from(&mut bytes[..]);
        match host.send(sock, &mut [part].into_iter()) {
            Ok(n) => sent += n,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    let full = host.send_space(sock);
    assert!(!full.writable && full.free == 0);
    host.poll(&mut Vec::new());
    host.want_write(sock, TOKEN);
    let mut left = vec![0; sent];
    world.read_exact(&mut left).unwrap();
    wait(&mut host, Events::WRITE);
    assert!(host.send_space(sock).free > 0);
}

#[test]
fn the_announced_room_is_taken_to_the_last_byte() {
    let (mut host, sock, _world) = pair(true);
    let mut left = host.send_space(sock).free as usize;
    let mut bytes = vec![7u8; 1448];
    while left > 0 {
        let len = left.min(bytes.len());
        let part = VolatileSlice::from(&mut bytes[..len]);
        assert_eq!(host.send(sock, &mut [part].into_iter()).unwrap(), len, "{left} bytes before the end");
        left -= len;
    }
}

#[test]
fn a_reset_is_told_from_a_graceful_close() {
    for (how, expected) in [(Close::Reset, Err(ErrorKind::ConnectionReset)), (Close::Graceful, Ok(0))] {
        let (mut host, sock, mut world) = pair(true);
        host.close(sock, how);
        assert_eq!(world.read(&mut [0]).map_err(|error| error.kind()), expected);
        assert_eq!(host.open_sockets(), 0);
        assert_eq!(host.send(sock, &mut std::iter::empty()).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}

#[test]
fn a_refused_connect_says_so_in_the_end() {
    let mut host = SysHost::new().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let sock = host.connect(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), TOKEN).unwrap();
    wait(&mut host, Events::ERROR | Events::CLOSED);
    assert_eq!(host.connected(sock).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn the_timer_makes_the_descriptor_readable_once() {
    let mut host = SysHost::new().unwrap();
    let mut events = Vec::new();
    host.set_timer(Duration::ZERO);
    assert!(host.is_readable(10_000));
    host.poll(&mut events);
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].0.owner, Owner::Timer);
    assert!(!host.is_readable(0));
}
