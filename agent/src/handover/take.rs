//! The side of the agent that comes.

use postern_ebpf::{Dial, Endpoint};

use super::{
    FINISH, HandoverError, Own, PATIENCE, Purpose, Sockets, ToNew, ToOld, file, wire::Channel,
};
use crate::{audit::Key, kernel::AgentProcess};
use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::BorrowedFd,
    path::Path,
    time::{Duration, Instant},
};

const NO_FDS: [BorrowedFd<'static>; 0] = [];

/// A conversation with the agent in charge, which goes on as before.
pub struct Taking {
    channel: Channel,
    pub program: String,
    pub shape: String,
    /// The agent in charge, and agents before it.
    pub agents: Vec<AgentProcess>,
}

/// The agent that was in charge has stepped back, and waits.
pub struct Taken {
    channel: Channel,
    /// Its process, as this one sees it.
    pub pid: i32,
    pub agents: Vec<AgentProcess>,
    /// Its maps are others than ours.
    pub shape: String,
    pub sockets: Sockets,
    pub keys: Vec<Key>,
    pub lock: File,
    /// Connections that it is still to tell of.
    pub left: u64,
}

/// Goes to the agent in charge. `None`: there is none, or none that answers.
pub fn begin(door: &Path, own: &Own) -> Result<Option<Taking>, HandoverError> {
    talk(door, own, Purpose::Take)
}

/// As [`begin`], to remove what is pinned: nobody will be in charge.
pub fn remove(door: &Path, own: &Own) -> Result<Option<Taking>, HandoverError> {
    talk(door, own, Purpose::Remove)
}

fn talk(door: &Path, own: &Own, purpose: Purpose) -> Result<Option<Taking>, HandoverError> {
    let fail = |source| HandoverError::Path {
        path: door.to_owned(),
        source,
    };
    let Some(channel) = Channel::connect(door, PATIENCE).map_err(fail)? else {
        return Ok(None);
    };
    let pid = channel.peer()?;
    let answer =
        (channel.send(&own.hello(purpose), &NO_FDS)).and_then(|()| channel.receive::<ToNew>());
    match answer.inspect_err(|_| wait_for_end(pid))?.0 {
        ToNew::Welcome {
            program,
            shape,
            process,
            mut before,
        } => {
            before.push(process);
            Ok(Some(Taking {
                channel,
                program,
                shape,
                agents: before,
            }))
        }
        ToNew::Refused { why } => Err(HandoverError::Refused(why)),
        other => Err(HandoverError::Unexpected(format!("{other:?}"))),
    }
}

impl Taking {
    /// All is prepared: the agent in charge is to step back.
    pub fn commit(self) -> Result<Taken, HandoverError> {
        let pid = self.channel.peer()?;
        self.step_back().inspect_err(|error| {
            if let HandoverError::Io(_) = error {
                wait_for_end(pid);
            }
        })
    }

    fn step_back(self) -> Result<Taken, HandoverError> {
        let Self {
            channel,
            shape,
            agents,
            ..
        } = self;
        let pid = channel.peer()?;
        channel.send(&ToOld::Commit, &NO_FDS)?;
        channel.set_patience(Some(FINISH))?;
        let (mut sockets, mut keys) = (HashMap::new(), Vec::new());
        loop {
            let (message, fds) = channel.receive::<ToNew>()?;
            match message {
                ToNew::Sockets(bound) if bound.len() == fds.len() => {
                    sockets.extend(bound.into_iter().zip(fds));
                }
                ToNew::Keys(more) => keys.extend(more),
                ToNew::Yielded { left } => {
                    let lock = fds.into_iter().next();
                    let lock = lock.ok_or(HandoverError::Unexpected("no lock".into()))?;
                    return Ok(Taken {
                        channel,
                        pid,
                        agents,
                        shape,
                        sockets,
                        keys,
                        lock: file(lock),
                        left,
                    });
                }
                ToNew::Refused { why } => return Err(HandoverError::Refused(why)),
                other => return Err(HandoverError::Unexpected(format!("{other:?}"))),
            }
        }
    }
}

impl Taken {
    /// What was dialled by way of the old agent's maps and nobody has accepted yet.
    pub fn dials(&self) -> Result<Vec<(Endpoint, Dial)>, HandoverError> {
        self.channel.send(&ToOld::Dials, &NO_FDS)?;
        let mut all = Vec::new();
        loop {
            match self.channel.receive::<ToNew>()?.0 {
                ToNew::Dials { dials, more } => {
                    all.extend(dials.iter().map(super::Waiting::entry));
                    if !more {
                        return Ok(all);
                    }
                }
                ToNew::Refused { .. } => return Err(HandoverError::TooLate),
                other => return Err(HandoverError::Unexpected(format!("{other:?}"))),
            }
        }
    }

    /// This agent is in charge. [`HandoverError::TooLate`]: the other one did not wait.
    pub fn finish(self) -> Result<(), HandoverError> {
        let answer = (self.channel.send(&ToOld::Took, &NO_FDS))
            .and_then(|()| self.channel.receive::<ToNew>());
        match answer {
            Ok((ToNew::Farewell, _)) => Ok(()),
            Ok(_) => Err(HandoverError::TooLate),
            // It was killed meanwhile: somebody must be in charge.
            Err(error) if gone(&error) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// One that is being killed has its ports and locks for a moment still.
fn wait_for_end(pid: i32) {
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Behind the name, which may have any character: Z is dead, and has no file.
        let state = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.chars().next());
        if matches!(state, None | Some('Z' | 'X')) {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}
