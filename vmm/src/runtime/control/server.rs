//! The worker that serves the control socket on the machine's I/O thread.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use net::nat::NatHandle;
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};

use super::super::scrollback::Scrollback;
use super::CLIENTS_MAX;
use super::clients::{Client, Fate, Role};
use super::flows::Mailbox;
use super::protocol::{Lease, Request, Status};
use crate::machine::Remote;

/// Why nobody gets into the guest.
const NO_NAT: &str =
    "this machine is not behind a NAT of its own (--net nat), so it is reached by its address on the network";
/// Connections that are taken per turn.
const ACCEPTS: usize = 16;

/// A machine's console, for those who attach to it.
///
/// ```
/// use vmm::machine::Machine;
/// use vmm::runtime::Scrollback;
/// use vmm::runtime::control::{Console, Control};
///
/// # let folder = tempfile::tempdir()?;
/// let scrollback = Scrollback::new()?;
/// let (console, input) = Console::new(scrollback.clone())?;
/// let control = Control::bind(&folder.path().join("control.sock"))?.console(console);
/// let builder = Machine::builder()
///     .serial_output(scrollback.tee(std::io::sink()))
///     .serial_input(input)
///     .worker(move |remote| control.serve(remote));
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Console {
    scrollback: Scrollback,
    /// What is written here is typed to the guest.
    input: OwnedFd,
}

impl Console {
    /// A console whose output is in `scrollback`. The descriptor is for
    /// [`MachineBuilder::serial_input`](crate::machine::MachineBuilder::serial_input).
    ///
    /// # Errors
    /// When the host refuses a pipe.
    pub fn new(scrollback: Scrollback) -> io::Result<(Self, OwnedFd)> {
        let (guest, input) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok((Self { scrollback, input }, guest))
    }
}

/// Whether somebody has asked for the machine's end, by `stopping` or `power-button`.
///
/// ```no_run
/// # use vmm::machine::Machine;
/// use vmm::runtime::control::Control;
///
/// let control = Control::bind("control.sock".as_ref())?;
/// let asked = control.stop_asked();
/// # let builder = Machine::builder();
/// let reason = builder.worker(move |remote| control.serve(remote)).build()?.start()?.wait();
/// println!("{reason}{}", if asked.is_set() { ", as it was asked to" } else { "" });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct StopAsked(Arc<AtomicBool>);

impl StopAsked {
    /// Whether that was so by now.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The control socket of a machine that is yet to start.
///
/// ```no_run
/// use net::nat::NatConfig;
/// use vmm::machine::Machine;
/// use vmm::network::Network;
/// use vmm::runtime::control::{Client, Control};
///
/// let network = Network::nat(NatConfig::on_free_subnet()?)?;
/// let mut control = Control::bind("control.sock".as_ref())?;
/// if let Some(nat) = network.handle() {
///     control = control.nat(nat.clone())?;
/// }
/// let builder = Machine::builder().kernel("vmlinuz").nic(network.nic("vm1")?);
/// let machine = builder.worker(move |remote| control.serve(remote)).build()?.start()?;
/// // Another process:
/// Client::connect("control.sock".as_ref())?.power_button()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Control {
    listener: UnixListener,
    console: Option<Console>,
    nat: Option<(NatHandle, Mailbox)>,
    stop_asked: StopAsked,
}

impl Control {
    /// Listens at `path`, where nothing may be yet.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, console: None, nat: None, stop_asked: StopAsked::default() })
    }

    /// Tells, also when the machine has ended, whether its end was asked for.
    pub fn stop_asked(&self) -> StopAsked {
        self.stop_asked.clone()
    }

    /// Lets clients attach to the console.
    #[must_use]
    pub fn console(mut self, console: Console) -> Self {
        self.console = Some(console);
        self
    }

    /// Lets clients into the guest, and see its leases and connections.
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub fn nat(mut self, nat: NatHandle) -> io::Result<Self> {
        self.nat = Some((nat, Mailbox::new()?));
        Ok(self)
    }

    /// The worker, for [`MachineBuilder::worker`](crate::machine::MachineBuilder::worker).
    pub fn serve(self, remote: Remote) -> Box<dyn MutEventSubscriber + Send> {
        Box::new(Server {
            control: self,
            remote,
            clients: BTreeMap::new(),
            typist: None,
            waits_for_guest: false,
            deaf: false,
            started: Instant::now(),
            asked: 0,
        })
    }
}

/// What to do with a client after its request.
enum Then {
    Answer(Value),
    Attach { write: bool },
    Join { guest: Option<Ipv4Addr>, port: u16 },
    AskNetwork,
}

struct Server {
    control: Control,
    remote: Remote,
    clients: BTreeMap<RawFd, Client>,
    /// Who types.
    typist: Option<RawFd>,
    /// The guest has not taken all that was typed: the pipe's other end is polled.
    waits_for_guest: bool,
    /// The listener is not polled, since no connection could be taken.
    deaf: bool,
    started: Instant,
    /// Counts what clients do, to know who did nothing for longest.
    asked: u64,
}

impl Server {
    fn accept(&mut self, ops: &mut EventOps<'_>) {
        for _ in 0..ACCEPTS {
            let stream = match self.control.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::ECONNABORTED)) => continue,
                Err(e) => {
                    // Out of descriptors, or of memory: polling on would spin.
                    tracing::warn!(error = %e, "the control socket takes no clients until one leaves");
                    self.deaf = ops.remove(self.listening()).is_ok();
                    return;
                }
            };
            self.asked += 1;
            let mut client = Client::new(stream, self.asked);
            if client.stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.clients.len() >= CLIENTS_MAX && !self.make_room(ops) {
                client.answer = line(&refusal("this machine has as many attached consoles as it can serve"));
                client.give(None);
                continue;
            }
            if ops.add(Events::new(&client.fd(), client.polled)).is_ok() {
                self.clients.insert(client.fd(), client);
            }
        }
    }

    fn listening(&self) -> Events {
        Events::new(&self.control.listener, EventSet::IN)
    }

    /// Lets go of the client that has asked nothing for longest; false when all of them stream.
    fn make_room(&mut self, ops: &mut EventOps<'_>) -> bool {
        let asking = self.clients.values().filter(|client| matches!(client.role, Role::Asking { .. }));
        match asking.min_by_key(|client| client.last_asked).map(Client::fd) {
            Some(fd) => {
                self.dismiss(fd, ops);
                true
            }
            None => false,
        }
    }

    fn dismiss(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        if let Some(client) = self.clients.remove(&fd) {
            let _ = ops.remove(Events::new(&client.fd(), client.polled));
        }
        if self.typist == Some(fd) {
            self.typist = None;
            self.feed_guest(ops);
        }
        self.after_leaving(ops);
    }

    fn after_leaving(&mut self, ops: &mut EventOps<'_>) {
        self.watch_output();
        if self.deaf && ops.add(self.listening()).is_ok() {
            self.deaf = false;
        }
    }

    /// Wants to be woken by output exactly while somebody reads it.
    fn watch_output(&self) {
        if let Some(console) = &self.control.console {
            console.scrollback.watch(self.watchers() > 0);
        }
    }

    fn watchers(&self) -> usize {
        self.clients.values().filter(|client| matches!(client.role, Role::Watching { .. })).count()
    }

    /// Serves one client: takes what it says, gives it what there is.
    fn serve_client(&mut self, fd: RawFd, events: EventSet, ops: &mut EventOps<'_>) {
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) && !events.contains(EventSet::IN) {
            return self.dismiss(fd, ops);
        }
        let mut fate = Fate::Stays;
        if events.contains(EventSet::IN) {
            fate = self.hear(fd);
        }
        if self.clients.get(&fd).is_some_and(|client| matches!(client.role, Role::Joining { .. })) {
            return self.join(fd, ops);
        }
        if fate == Fate::Stays {
            fate = self.give(fd);
        }
        if fate == Fate::Stays && self.typist == Some(fd) {
            self.feed_guest(ops);
        }
        self.settle(fd, fate, ops);
    }

    /// Takes requests, or what is typed.
    fn hear(&mut self, fd: RawFd) -> Fate {
        loop {
            let Some(client) = self.clients.get_mut(&fd) else { return Fate::Leaves };
            match client.role {
                Role::Watching { .. } => return client.take_typed(),
                Role::Joining { .. } => return Fate::Stays,
                Role::Asking { .. } => {}
            }
            // One unread answer is all that a client may have.
            if !client.answer.is_empty() || client.leaving || client.waits {
                return Fate::Stays;
            }
            match client.next_line() {
                Ok(None) => return Fate::Stays,
                Ok(Some(request)) => self.answer(fd, &request),
                Err("gone") => return Fate::Leaves,
                Err(why) => {
                    client.answer = line(&refusal(why));
                    client.leaving = true;
                }
            }
            if self.give(fd) == Fate::Leaves {
                return Fate::Leaves;
            }
        }
    }

    fn answer(&mut self, fd: RawFd, request: &[u8]) {
        self.asked += 1;
        let then = match serde_json::from_slice::<Request>(request) {
            Ok(request) => self.obey(&request),
            Err(error) => Then::Answer(refusal(&format!("this is no request: {error}"))),
        };
        let now = self.asked;
        let writer = matches!(then, Then::Attach { write: true }) && self.typist.is_none();
        let Some(client) = self.clients.get_mut(&fd) else { return };
        client.last_asked = now;
        match (then, &self.control.console) {
            (Then::Answer(value), _) => client.answer = line(&value),
            (Then::Join { guest, port }, _) => {
                let early = matches!(&client.role, Role::Asking { line } if !line.is_empty());
                client.role = Role::Joining { guest, port, early };
            }
            (Then::AskNetwork, _) => match &self.control.nat {
                Some((nat, mailbox)) => {
                    client.waits = true;
                    mailbox.ask(nat, client.id);
                }
                None => client.answer = line(&refusal(NO_NAT)),
            },
            (Then::Attach { .. }, None) => {
                client.answer = line(&refusal("its console is the terminal where it was started"));
            }
            (Then::Attach { .. }, Some(console)) => {
                client.answer = line(&json!({ "ok": true, "writer": writer }));
                let rest = match &mut client.role {
                    Role::Asking { line } => std::mem::take(line),
                    Role::Watching { .. } | Role::Joining { .. } => Vec::new(),
                };
                let typed = if writer { rest } else { Vec::new() };
                client.role = Role::Watching { at: console.scrollback.start(), writer, typed, done: false };
                if writer {
                    self.typist = Some(fd);
                }
                self.watch_output();
            }
        }
    }

    fn obey(&self, request: &Request) -> Then {
        match request {
            Request::Status => Then::Answer(self.status()),
            Request::Kill => {
                self.remote.stop();
                Then::Answer(json!({ "ok": true }))
            }
            Request::Console { write } => Then::Attach { write: *write },
            Request::PowerButton => {
                self.control.stop_asked.0.store(true, Ordering::Relaxed);
                self.remote.power_button();
                Then::Answer(json!({ "ok": true }))
            }
            Request::Stopping => {
                self.control.stop_asked.0.store(true, Ordering::Relaxed);
                Then::Answer(json!({ "ok": true }))
            }
            Request::Connect { port, guest } => Then::Join { guest: *guest, port: *port },
            Request::Flows => Then::AskNetwork,
        }
    }

    fn status(&self) -> Value {
        let status = Status {
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            consoles: self.watchers(),
            leases: self.leases(),
            ..self.remote.counters().as_ref().map(Status::from).unwrap_or_default()
        };
        json!({ "ok": true, "status": status })
    }

    fn leases(&self) -> Vec<Lease> {
        let leases = self.control.nat.as_ref().map(|(nat, _)| nat.leases()).unwrap_or_default();
        leases.iter().map(Lease::from).collect()
    }

    /// Makes a client's connection one into the guest: it is the network's from then on.
    fn join(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let Some(client) = self.clients.remove(&fd) else { return };
        let _ = ops.remove(Events::new(&fd, client.polled));
        self.after_leaving(ops);
        let Role::Joining { guest, port, early } = client.role else { return };
        // Through this one the answer is given, once it is known; the network is served in a later turn, so that the
        // guest's first bytes come behind it.
        let Ok(teller) = client.stream.try_clone() else { return };
        let joined = match &self.control.nat {
            _ if early => Err("wait for the answer before anything else is sent".to_owned()),
            None => Err(NO_NAT.to_owned()),
            Some((nat, _)) => {
                nat.connect(guest, port, client.stream.into()).map_err(|error| error.to_string())
            }
        };
        let answer = joined.map_or_else(|why| refusal(&why), |()| json!({ "ok": true }));
        // A socket whose client has read every answer has room for this one.
        let _ = (&teller).write(&line(&answer));
    }

    /// Passes on what the network has answered.
    fn deliver(&mut self, ops: &mut EventOps<'_>) {
        let letters = self.control.nat.as_ref().map(|(_, mailbox)| mailbox.empty()).unwrap_or_default();
        for (whose, flows) in letters {
            let Some(client) = self.clients.values_mut().find(|client| client.id == whose) else { continue };
            client.waits = false;
            client.answer = line(&json!({ "ok": true, "flows": flows }));
            let fd = client.fd();
            // It may have asked for more meanwhile.
            let mut fate = self.give(fd);
            if fate == Fate::Stays {
                fate = self.hear(fd);
            }
            self.settle(fd, fate, ops);
        }
    }

    fn give(&mut self, fd: RawFd) -> Fate {
        let scrollback = self.control.console.as_ref().map(|console| &console.scrollback);
        self.clients.get_mut(&fd).map_or(Fate::Leaves, |client| client.give(scrollback))
    }

    /// Passes what the typist typed to the guest, as far as that takes it. The typist, if there is one, is to be settled
    /// afterwards.
    fn feed_guest(&mut self, ops: &mut EventOps<'_>) {
        let Some(console) = &self.control.console else { return };
        let mut waits = false;
        if let Some(client) = self.typist.and_then(|fd| self.clients.get_mut(&fd))
            && let Role::Watching { typed, done, .. } = &mut client.role
        {
            match rustix::io::write(&console.input, typed) {
                _ if typed.is_empty() => {}
                Ok(n) => drop(typed.drain(..n)),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(e) => {
                    tracing::info!(error = %e, "the guest takes no console input any more");
                    typed.clear();
                    *done = true;
                }
            }
            waits = !typed.is_empty();
        }
        if waits != self.waits_for_guest {
            let room = Events::new(&console.input, EventSet::OUT);
            let changed = if waits { ops.add(room) } else { ops.remove(room) };
            self.waits_for_guest = waits == changed.is_ok();
        }
    }

    /// Polls for what the client is to do next, or lets it go.
    fn settle(&mut self, fd: RawFd, fate: Fate, ops: &mut EventOps<'_>) {
        let Some(client) = self.clients.get_mut(&fd) else { return };
        let wanted = client.wanted();
        let mut stays = fate == Fate::Stays;
        if stays && wanted != client.polled {
            client.polled = wanted;
            stays = ops.modify(Events::new(&fd, wanted)).is_ok();
        }
        if !stays {
            self.dismiss(fd, ops);
        }
    }

    /// Gives new output to those who read it.
    fn spread_output(&mut self, ops: &mut EventOps<'_>) {
        if let Some(console) = &self.control.console {
            console.scrollback.clear_wake();
        }
        let watching = |client: &&Client| matches!(client.role, Role::Watching { .. });
        let fds: Vec<_> = self.clients.values().filter(watching).map(Client::fd).collect();
        for fd in fds {
            let fate = self.give(fd);
            self.settle(fd, fate, ops);
        }
    }
}

impl MutEventSubscriber for Server {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        let console = self.control.console.as_ref();
        if fd == self.control.listener.as_raw_fd() {
            self.accept(ops);
        } else if console.is_some_and(|console| fd == console.scrollback.wake_fd()) {
            self.spread_output(ops);
        } else if self.control.nat.as_ref().is_some_and(|(_, mailbox)| fd == mailbox.bell()) {
            self.deliver(ops);
        } else if console.is_some_and(|console| fd == console.input.as_raw_fd()) {
            self.feed_guest(ops);
            if let Some(typist) = self.typist {
                self.settle(typist, Fate::Stays, ops);
            }
        } else {
            self.serve_client(fd, events.event_set(), ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.started = Instant::now();
        let mut added = ops.add(self.listening());
        if let Some(console) = &self.control.console {
            added = added.and(ops.add(Events::new(&console.scrollback.wake_fd(), EventSet::IN)));
        }
        if let Some((_, mailbox)) = &self.control.nat {
            added = added.and(ops.add(Events::new(&mailbox.bell(), EventSet::IN)));
        }
        if let Err(error) = added {
            tracing::warn!(error = %io::Error::other(error), "the control socket is not served");
        }
    }
}

fn refusal(why: &str) -> Value {
    json!({ "ok": false, "error": why })
}

fn line(value: &Value) -> Vec<u8> {
    let mut line = Vec::new();
    let _ = writeln!(line, "{value}");
    line
}
