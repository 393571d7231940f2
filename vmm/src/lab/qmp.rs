//! As much of QMP as taking a snapshot needs: one command at a time, events skipped.

use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use super::error::{LabError, emulator};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A QMP connection, after the greeting.
#[derive(Debug)]
pub(super) struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Greets the emulator at the other end of `socket`.
    pub(super) fn new(socket: UnixStream) -> Result<Self, LabError> {
        socket.set_read_timeout(Some(PATIENCE)).map_err(emulator("prepare the emulator's monitor"))?;
        let mut qmp = Self { reader: BufReader::new(socket) };
        qmp.line().map_err(emulator("read the emulator's greeting"))?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Executes one command and returns its `return` value.
    pub(super) fn execute(&mut self, command: &'static str, arguments: &Value) -> Result<Value, LabError> {
        let answer = self.ask(command, arguments).map_err(emulator("talk to the emulator's monitor"))?;
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => Err(LabError::Qmp { command, answer: answer.to_string() }),
        }
    }

    /// Gives the emulator a descriptor, which it knows as `name` from now on.
    pub(super) fn give(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), LabError> {
        let doing = "give the emulator a descriptor";
        let request = format!("{}\n", json!({ "execute": "getfd", "arguments": { "fdname": name } }));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let bytes = [IoSlice::new(request.as_bytes())];
        sendmsg(self.reader.get_ref(), &bytes, &mut ancillary, SendFlags::empty())
            .map_err(emulator(doing))?;
        let answer = self.answer().map_err(emulator(doing))?;
        match answer.get("return") {
            Some(_) => Ok(()),
            None => Err(LabError::Qmp { command: "getfd", answer: answer.to_string() }),
        }
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> io::Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.reader.get_mut().write_all(format!("{request}\n").as_bytes())?;
        self.answer()
    }

    fn answer(&mut self) -> io::Result<Value> {
        loop {
            let answer = self.line()?;
            if answer.get("event").is_none() {
                return Ok(answer);
            }
        }
    }

    fn line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}
