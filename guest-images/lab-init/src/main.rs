//! PID 1 of the lab's outer machine.
//!
//! The outer machine is an emulated AMD-V host (see `docs/lab.md`). It boots once; this program builds its
//! root file system from the archive in the initramfs, loads KVM and the network modules, opens the
//! virtio-serial port to the supervisor, says `Ready` and blocks in a read. In that state the machine is
//! snapshotted. Every resume returns from that very read: the clock is set, the drivers of the disk and the
//! NIC are loaded only now (so that both may differ from run to run), files are unpacked, the command runs,
//! and its output and status go back over the port as frames (see [`wire`]).
//!
//! Nothing here outlives a run: the supervisor ends the emulator when it has read `Exit` or `Failed`.
//! Whatever goes wrong before `Ready` is printed to the console, whose tail the supervisor shows.

mod archive;
mod job;
mod link;
mod machine;
mod nic;
mod sys;
#[allow(dead_code, reason = "one file for both sides: each uses its half")]
mod wire;

use std::time::Duration;

use link::Link;
use wire::Kind;

fn main() {
    let mut link = match machine::prepare().and_then(|late| Ok((late, Link::open()?))) {
        Ok((late, link)) => Waiting { late, link },
        Err(error) => {
            eprintln!("lab-init: {error}");
            give_up();
        }
    };
    if let Err(error) = link.serve() {
        // The supervisor may be gone, in which case nobody is left to tell.
        let _ = link.link.send(Kind::Failed, error.to_string().as_bytes());
    }
    halt();
}

/// The machine as it stands in the snapshot.
struct Waiting {
    /// The drivers that are loaded after the resume.
    late: Vec<machine::Module>,
    link: Link,
}

impl Waiting {
    /// Says that the snapshot may be taken, and does the one job that follows it.
    fn serve(&mut self) -> Result<(), Error> {
        self.link.send(Kind::Ready, &[])?;
        let job = loop {
            match self.link.receive()? {
                (Kind::Start, payload) => break wire::Job::decode(&payload)?,
                (other, _) => eprintln!("lab-init: ignored a {other:?} frame before Start"),
            }
        };
        self.link.send(Kind::Hello, &[])?;
        machine::set_clock(job.now)?;
        machine::load(&self.late)?;
        nic::configure()?;
        archive::unpack_disk()?;
        machine::open_disks()?;
        job::run(&job, &mut self.link)
    }
}

/// What stops a job, in words for the supervisor's user.
type Error = Box<dyn std::error::Error>;

/// An error with what was being done.
trait Context<T> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: std::fmt::Display> Context<T> for Result<T, E> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|error| format!("cannot {}: {error}", doing()).into())
    }
}

/// Ends the machine, and the emulator with it, before it is of any use. The console has the reason.
fn give_up() -> ! {
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    halt()
}

/// PID 1 must not return: the kernel would panic and bury the message.
fn halt() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
