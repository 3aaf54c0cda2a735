//! Reads where fields lie in this kernel's structures from its own type
//! information (`/sys/kernel/btf/vmlinux`, Documentation/bpf/btf.rst).

use std::{collections::HashMap, io, path::Path};

use postern_ebpf::Offsets;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;

/// Kinds of types, and how many bytes follow the 12 of each record.
mod kind {
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const FORWARD: u32 = 7;
    pub const TYPEDEF: u32 = 8;
    pub const FUNCTION: u32 = 12;

    pub fn extra(kind: u32, vlen: usize) -> Option<usize> {
        Some(match kind {
            1 | 14 | 17 => 4,
            2 | 7..=12 | 16 | 18 => 0,
            3 => 12,
            STRUCT | UNION | 15 | 19 => 12 * vlen,
            6 | 13 => 8 * vlen,
            _ => return None,
        })
    }
}

pub struct Btf {
    data: Vec<u8>,
    /// Byte offset of each type record; ids start at 1.
    types: Vec<usize>,
    strings: usize,
}

impl Btf {
    pub fn of_kernel() -> io::Result<Self> {
        Self::read(Path::new(VMLINUX))
    }

    fn read(path: &Path) -> io::Result<Self> {
        let data = std::fs::read(path)?;
        Self::parse(data)
            .ok_or_else(|| io::Error::other(format!("{}: not BTF as documented", path.display())))
    }

    fn parse(data: Vec<u8>) -> Option<Self> {
        if u16::from_le_bytes(data.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header = word(&data, 4)? as usize;
        let types_at = header + word(&data, 8)? as usize;
        let types_end = types_at + word(&data, 12)? as usize;
        let strings = header + word(&data, 16)? as usize;
        let mut types = vec![0];
        let mut at = types_at;
        while at < types_end {
            types.push(at);
            let info = word(&data, at + 4)?;
            at += 12 + kind::extra(info >> 24 & 0x1f, (info & 0xffff) as usize)?;
        }
        Some(Self {
            data,
            types,
            strings,
        })
    }

    fn name(&self, offset: u32) -> &[u8] {
        let from = &self.data[(self.strings + offset as usize).min(self.data.len())..];
        from.split(|b| *b == 0).next().unwrap_or_default()
    }

    /// The structures of these names, by name.
    fn structs<'a>(&self, names: &[&'a str]) -> HashMap<&'a str, usize> {
        let mut found = HashMap::new();
        for at in self.types.iter().skip(1) {
            if self.kind(*at) == Some(kind::STRUCT)
                && let Some(name) = word(&self.data, *at)
                && name != 0
                && let Some(wanted) = names.iter().find(|n| n.as_bytes() == self.name(name))
            {
                found.entry(*wanted).or_insert(*at);
            }
        }
        found
    }

    /// The same types with nothing but the names of these, where they are functions or
    /// types of their own: as BTF, and a small part of what all of it takes to read.
    pub fn only(&self, names: &[&str]) -> Vec<u8> {
        let mut strings = vec![0u8];
        let mut types: Vec<u8> = Vec::with_capacity(12 * self.types.len());
        for at in self.types.iter().skip(1) {
            let mut record = [0, kind::FORWARD << 24, 0];
            if let Some(kind @ (kind::FUNCTION | kind::TYPEDEF)) = self.kind(*at)
                && let Some(name) = word(&self.data, *at).map(|offset| self.name(offset))
                && names.iter().any(|wanted| wanted.as_bytes() == name)
            {
                record[..2].copy_from_slice(&[strings.len() as u32, kind << 24]);
                strings.extend(name);
                strings.push(0);
            }
            types.extend(record.map(u32::to_ne_bytes).as_flattened());
        }
        let length = types.len() as u32;
        // Magic number, version and flags; the header's length, and where both parts lie.
        let mut all = MAGIC.to_ne_bytes().to_vec();
        all.extend([1, 0]);
        let lengths = [24, 0, length, length, strings.len() as u32];
        all.extend(lengths.map(u32::to_ne_bytes).as_flattened());
        all.extend(types);
        all.extend(strings);
        all
    }

    fn kind(&self, at: usize) -> Option<u32> {
        Some(word(&self.data, at + 4)? >> 24 & 0x1f)
    }

    /// Byte offset of a member, looking into unnamed structures and unions, and
    /// through `__sk_common`, which C names as if it were one.
    fn member(&self, at: usize, wanted: &str) -> Option<u32> {
        let info = word(&self.data, at + 4)?;
        let bitfields = info >> 31 == 1;
        for index in 0..(info & 0xffff) as usize {
            let member = at + 12 + 12 * index;
            let name = self.name(word(&self.data, member)?);
            let type_id = word(&self.data, member + 4)? as usize;
            let bits = word(&self.data, member + 8)?;
            let offset = if bitfields { bits & 0x00ff_ffff } else { bits } / 8;
            if name == wanted.as_bytes() {
                return Some(offset);
            }
            if name.is_empty() || name == b"__sk_common" {
                let inner = *self.types.get(type_id)?;
                if matches!(self.kind(inner), Some(kind::STRUCT | kind::UNION))
                    && let Some(below) = self.member(inner, wanted)
                {
                    return Some(offset + below);
                }
            }
        }
        None
    }
}

/// The offsets that the observers need; `Err` names what is missing.
pub fn offsets(btf: &Btf) -> Result<Offsets, String> {
    let structs = btf.structs(&[
        "sock",
        "inet_sock",
        "tcp_sock",
        "packet_sock",
        "socket",
        "msghdr",
        "net",
        "sock_cgroup_data",
        "cgroup",
        "cgroup_subsys_state",
        "kernfs_node",
        "task_struct",
        "signal_struct",
        "mm_struct",
        "nsproxy",
        "linux_binprm",
    ]);
    let of = |of: &str, field: &str| {
        let at = structs.get(of);
        at.and_then(|at| btf.member(*at, field))
            .ok_or_else(|| format!("struct {of} has no {field}"))
    };
    if of("cgroup", "self")? != 0 {
        return Err("struct cgroup does not begin with self".into());
    }
    Ok(Offsets {
        sock_net: of("sock", "skc_net")?,
        sock_family: of("sock", "skc_family")?,
        sock_state: of("sock", "skc_state")?,
        sock_flags: of("sock", "skc_flags")?,
        sock_daddr: of("sock", "skc_daddr")?,
        sock_rcv_saddr: of("sock", "skc_rcv_saddr")?,
        sock_dport: of("sock", "skc_dport")?,
        sock_num: of("sock", "skc_num")?,
        sock_v6_daddr: of("sock", "skc_v6_daddr")?,
        sock_v6_rcv_saddr: of("sock", "skc_v6_rcv_saddr")?,
        sock_cookie: of("sock", "skc_cookie")?,
        sock_protocol: of("sock", "sk_protocol")?,
        sock_type: of("sock", "sk_type")?,
        sock_err: of("sock", "sk_err")?,
        sock_cgroup: of("sock", "sk_cgrp_data")? + of("sock_cgroup_data", "cgroup")?,
        inet_sport: of("inet_sock", "inet_sport")?,
        packet_num: of("packet_sock", "num")?,
        tcp_bytes_sent: of("tcp_sock", "bytes_sent")?,
        tcp_bytes_retrans: of("tcp_sock", "bytes_retrans")?,
        tcp_bytes_received: of("tcp_sock", "bytes_received")?,
        tcp_segs_out: of("tcp_sock", "segs_out")?,
        tcp_total_retrans: of("tcp_sock", "total_retrans")?,
        tcp_srtt_us: of("tcp_sock", "srtt_us")?,
        socket_sk: of("socket", "sk")?,
        msg_name: of("msghdr", "msg_name")?,
        net_cookie: of("net", "net_cookie")?,
        cgroup_kn: of("cgroup", "kn")?,
        kernfs_id: of("kernfs_node", "id")?,
        cgroup_parent: of("cgroup_subsys_state", "parent")?,
        css_cgroup: of("cgroup_subsys_state", "cgroup")?,
        task_nsproxy: of("task_struct", "nsproxy")?,
        nsproxy_net: of("nsproxy", "net_ns")?,
        task_flags: of("task_struct", "flags")?,
        task_exit_code: of("task_struct", "exit_code")?,
        task_real_parent: of("task_struct", "real_parent")?,
        task_tgid: of("task_struct", "tgid")?,
        task_comm: of("task_struct", "comm")?,
        task_mm: of("task_struct", "mm")?,
        task_signal: of("task_struct", "signal")?,
        signal_group_exec: of("signal_struct", "group_exec_task")?,
        mm_arg_start: of("mm_struct", "arg_start")?,
        mm_arg_end: of("mm_struct", "arg_end")?,
        binprm_filename: of("linux_binprm", "filename")?,
    })
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct sock { struct sock_common __sk_common; }`, whose `skc_family` lies
    /// behind an unnamed union at byte 8.
    #[test]
    fn finds_members_behind_unnamed_ones() {
        let mut strings = vec![0u8];
        let mut string = |s: &str| {
            let at = strings.len() as u32;
            strings.extend(s.as_bytes());
            strings.push(0);
            at
        };
        let (sock, common, family) = (string("sock"), string("__sk_common"), string("skc_family"));
        let of_kind = |kind: u32, vlen: u32| kind << 24 | vlen;
        let types: Vec<u32> = [
            vec![sock, of_kind(kind::STRUCT, 1), 16, common, 2, 0],
            vec![0, of_kind(kind::STRUCT, 1), 16, 0, 3, 64],
            vec![0, of_kind(kind::UNION, 1), 8, family, 4, 16],
            vec![0, of_kind(1, 0), 2, 16],
        ]
        .concat();
        let mut data = MAGIC.to_le_bytes().to_vec();
        data.extend([1, 0]);
        let sizes = [
            24,
            0,
            types.len() as u32 * 4,
            types.len() as u32 * 4,
            strings.len() as u32,
        ];
        data.extend(sizes.iter().chain(&types).flat_map(|w| w.to_le_bytes()));
        data.extend(strings);
        let btf = Btf::parse(data).expect("valid");
        let at = btf.structs(&["sock"])["sock"];
        assert_eq!(btf.member(at, "skc_family"), Some(10));
        assert_eq!(btf.member(at, "skc_net"), None);
        assert!(Btf::parse(vec![1, 2, 3]).is_none());
    }

    #[test]
    fn ids_stay_where_names_are_left_out() {
        let strings = b"\0aside\0wanted\0";
        let types = [
            [1, kind::TYPEDEF << 24, 0],
            [7, kind::TYPEDEF << 24, 1],
            [7, kind::FUNCTION << 24, 1],
        ];
        let types = types.as_flattened();
        let length = size_of_val(types) as u32;
        let mut data = MAGIC.to_le_bytes().to_vec();
        data.extend([1, 0]);
        let sizes = [24, 0, length, length, strings.len() as u32];
        data.extend(sizes.iter().chain(types).flat_map(|w| w.to_le_bytes()));
        data.extend(strings);
        let only = Btf::parse(data).expect("valid").only(&["wanted"]);
        aya::Btf::parse(&only, aya::Endianness::default()).expect("as aya reads it");
        let only = Btf::parse(only).expect("valid");
        let seen = only.types.iter().skip(1).map(|at| {
            let name = word(&only.data, *at).map(|offset| only.name(offset));
            (only.kind(*at).expect("a kind"), name.expect("a name"))
        });
        let wanted: [(u32, &[u8]); 3] = [
            (kind::FORWARD, b""),
            (kind::TYPEDEF, b"wanted"),
            (kind::FUNCTION, b"wanted"),
        ];
        assert!(seen.eq(wanted));
    }
}
