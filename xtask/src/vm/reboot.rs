//! Power loss: one half of the test in a machine that ends by it, the other half in the
//! next, on the same disk.

use std::fs::{self, File};

use anyhow::{Context as _, Result, bail};

use super::{Machine, test_program};
use crate::{cmd, test::Count};

/// What the first half says right before.
const LOST: &str = "power is lost now";
const BYTES: u64 = 256 << 20;

/// Whether the tests that are asked for are these. By default they are.
pub fn wanted(filter: &[String]) -> bool {
    filter.is_empty() || filter.iter().any(|name| name == "reboot")
}

/// Runs both halves.
pub fn test(count: &mut Count) -> Result<()> {
    let program = test_program("reboot")?;
    let disk = cmd::target().join("vm/disk.img");
    fs::create_dir_all(disk.parent().expect("it is in a directory"))?;
    let empty = || -> std::io::Result<()> {
        let _absent = fs::remove_file(&disk);
        File::create(&disk)?.set_len(BYTES)
    };
    empty().with_context(|| disk.display().to_string())?;

    let mut lost = false;
    let mut machine = Machine::new(&script(&program, "before_power_is_lost", true))?;
    machine.disk(&disk);
    let ended = machine.run(&mut |line| lost |= line.contains(LOST))?;
    match ended {
        None if lost => {}
        None => bail!("the machine ended before its power was to be lost"),
        Some(code) => bail!("power was not lost: the test ended with {code}"),
    }
    let mut machine = Machine::new(&script(&program, "after_power_is_back", false))?;
    machine.disk(&disk);
    match machine.run(&mut |line| count.line(line))? {
        Some(0) => Ok(()),
        Some(code) => bail!("after power was back the test ended with {code}"),
        None => bail!("the machine ended while the test ran"),
    }
}

/// One half, with the disk where it looks for it.
fn script(program: &str, test: &str, fresh: bool) -> Vec<String> {
    let make = if fresh {
        "mkfs.ext4 -q /dev/vda &&"
    } else {
        ""
    };
    let script = format!(
        "modprobe --all virtio_blk ext4 && {make} mkdir -p /disk && mount /dev/vda /disk && \
         POSTERN_DISK=/disk exec {program} --exact {test} --nocapture"
    );
    ["sh", "-c", &script].map(str::to_owned).to_vec()
}
