//! The end of the agent in charge.

use std::{io, sync::Arc};

use super::{FromElder, Line, NO_FDS, ToElder};
use crate::{
    audit::{Audit, Lost, Record},
    handover::{Elders, wire::Channel},
};

/// Takes what an elder says until it leaves, or this agent's log ends. `handing_over`:
/// whether this agent is no longer in charge.
pub fn serve(
    channel: &Arc<Channel>,
    pid: i32,
    audit: &Audit,
    elders: &Elders,
    handing_over: impl Fn() -> bool,
) -> io::Result<()> {
    channel.set_patience(None)?;
    elders.came(pid, channel);
    let (mut left, mut had) = (0, 0);
    let result = loop {
        let message = match channel.receive::<FromElder>() {
            Ok((message, _)) => message,
            Err(error) => break Err(error),
        };
        elders.expect(pid, message.keys);
        let all = message.lost + message.records.len() as u64;
        let taken = take(audit, message.lost, message.records, &mut left);
        had += taken;
        if taken == all {
            audit.adopted(left, message.left);
            left = message.left;
        }
        if let Err(error) = confirm(channel, had) {
            break Err(error);
        }
        if taken < all {
            // The next agent gets the rest.
            break Ok(());
        }
    };
    // One that goes on, goes on with the next agent.
    audit.adopted(left, 0);
    elders.left(pid);
    if left > 0 && !handing_over() {
        tracing::error!(
            left,
            "an agent that had handed over has not told of all connections"
        );
        audit.record(Record::gap(Lost::Connections, left, "handover"));
    }
    result
}

/// What became of a record.
enum Done {
    Appended,
    /// It stands in the log, or is counted as lost.
    Already,
    Not,
}

/// How many records were taken. `left`: connections that are counted for the elder.
fn take(audit: &Audit, lost: u64, records: Vec<Line>, left: &mut u64) -> u64 {
    if !audit.lost_before(lost) {
        return 0;
    }
    let mut taken = lost;
    let again: Vec<&str> = (records.iter().filter(|line| line.again))
        .map(|line| line.text.as_str())
        .collect();
    let stand = audit.stand(&again);
    if let Err(error) = &stand {
        tracing::error!(%error, "what a killed agent may have recorded is told as lost");
    }
    for Line { text, story, again } in records {
        let counted = story && *left > 0;
        let done = match &stand {
            Ok(stand) if again && stand.contains(&text) => Done::Already,
            Err(_) if again && audit.lost_before(1) => Done::Already,
            Err(_) if again => Done::Not,
            _ if audit.append(text, counted) => Done::Appended,
            _ => Done::Not,
        };
        match done {
            Done::Appended => {}
            Done::Already => audit.adopted(counted.into(), 0),
            Done::Not => break,
        }
        *left -= u64::from(counted);
        taken += 1;
    }
    taken
}

/// What is taken and not confirmed would be said to the next agent, too: as long as the
/// elder lives, it is told.
fn confirm(channel: &Channel, had: u64) -> io::Result<()> {
    loop {
        match channel.send(&ToElder::Had(had), &NO_FDS) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}
