//! The agents beside the one in charge, as the hooks know them: those that drain dial for
//! the connections that they have, and sockets that were made by their listeners go on.

use std::{collections::HashSet, path::Path};

use postern_ebpf::{ANY_TGID, Agent};

use super::{
    maps::hold,
    pins::{Kernel, KernelError},
};

/// An agent by its process and cgroup, as the hooks see both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AgentProcess {
    pub tgid: u32,
    pub cgroup: u64,
}

impl Kernel {
    /// Makes an agent known that hands over, or did so before.
    pub fn add_agent(&self, agent: AgentProcess) -> Result<(), KernelError> {
        let AgentProcess { tgid, cgroup } = agent;
        for tgid in [0, tgid] {
            let key = Agent {
                cgroup,
                tgid,
                _pad: 0,
            };
            let added = hold(&self.maps.agents).insert(key, 1, 0);
            added.map_err(|source| KernelError::Map {
                name: "AGENTS",
                source,
            })?;
        }
        Ok(())
    }

    /// All that are known beside the one in charge; a `tgid` of 0 stands for a cgroup whose
    /// agents may all have ended.
    pub fn agents(&self) -> Vec<AgentProcess> {
        let agents = hold(&self.maps.agents);
        let known = agents.keys().flatten();
        known
            .map(|agent| AgentProcess {
                tgid: agent.tgid,
                cgroup: agent.cgroup,
            })
            .collect()
    }

    /// Cgroups that sockets of agents are in.
    pub fn agent_cgroups(&self) -> HashSet<u64> {
        let others = self.agents().into_iter().map(|agent| agent.cgroup);
        others.chain([self.configured().agent_cgroup]).collect()
    }

    /// Forgets agents that have ended, and says how many are left.
    pub fn draining(&self) -> usize {
        let mut left = 0;
        for AgentProcess { tgid, cgroup } in self.agents() {
            // Of one in a process namespace of its own nobody can tell.
            if tgid == 0 || tgid == ANY_TGID {
                continue;
            }
            if Path::new(&format!("/proc/{tgid}")).exists() {
                left += 1;
                continue;
            }
            let key = Agent {
                cgroup,
                tgid,
                _pad: 0,
            };
            let _gone_by_itself = hold(&self.maps.agents).remove(&key);
        }
        left
    }
}
