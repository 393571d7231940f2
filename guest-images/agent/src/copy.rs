//! Trees of files, in and out: the agent's side of a copy.

use core::ffi::CStr;

use rustix::fs::{FileType, stat};
use rustix::io::Errno;

use crate::link::{Broken, Link, words};
use crate::text::Text;
use crate::tree::{Problem, Receiver, Sender, Trail};
use crate::wire::{Kind, Put};

/// Takes the tree that follows, and says so when it is complete.
pub(crate) fn put(link: &mut Link, request: &Put<'_>) -> Result<(), Broken> {
    let mut place = Text::<8192>::new();
    place.push(request.destination.to_bytes());
    let is_folder = stat(request.destination)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
    if is_folder && !request.name.is_empty() {
        place.push(b"/");
        place.push(request.name.to_bytes());
    }
    let mut receiver = Receiver::new(link, u64::MAX);
    let outcome = receiver.tree(place.as_c_str());
    let trail = receiver.trail;
    match outcome {
        Ok(()) => {
            link.say(Kind::Done, &[])?;
            link.drain()
        }
        Err(problem) => fail(link, problem, place.as_c_str(), &trail),
    }
}

/// Sends the tree at `path`.
pub(crate) fn get(link: &mut Link, path: &CStr) -> Result<(), Broken> {
    let mut sender = Sender::new(link);
    let outcome = sender.tree(path);
    let trail = sender.trail;
    match outcome {
        Ok(()) => link.drain(),
        Err(problem) => fail(link, problem, path, &trail),
    }
}

fn fail(link: &mut Link, problem: Problem<Broken>, root: &CStr, trail: &Trail) -> Result<(), Broken> {
    let (doing, errno): (&str, Option<Errno>) = match problem {
        Problem::Link(broken) => return Err(broken),
        Problem::System(doing, errno) => (doing, Some(errno)),
        Problem::Refused(_) => return Err(Broken::Nonsense),
        Problem::Unfit(why) => (why, None),
    };
    let slash: &[u8] = if trail.path().is_empty() { b"" } else { b"/" };
    // A sentence of its own stands behind the path, a verb in front of it.
    let text: Text<1000> = match errno {
        Some(_) => words(&[doing.as_bytes(), b" ", root.to_bytes(), slash, trail.path()]),
        None => words(&[root.to_bytes(), slash, trail.path(), b": ", doing.as_bytes()]),
    };
    link.fail(errno, text.as_bytes())
}
