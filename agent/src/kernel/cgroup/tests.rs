//! Trees as kubelets and runtimes make them.

use super::*;

const UID: &str = "0a1b2c3d-0000-4000-8000-00000000000f";
/// Of a static pod: the hash of its manifest.
const HASH: &str = "8f6a44fc62e8cb075753c843896568ca";

/// A tree with these directories, and what is found in it.
fn found(dirs: &[&str], whole: bool) -> (tempfile::TempDir, Pods) {
    let tmp = tempfile::tempdir().expect("directory");
    for dir in dirs {
        std::fs::create_dir_all(tmp.path().join(dir)).expect("made");
    }
    let mount = CgroupMount {
        path: tmp.path().to_owned(),
        v2: true,
        whole,
    };
    let roots = find_pods_roots(&[mount], None);
    (tmp, Pods { roots })
}

/// Where the pod is, the depth of its root, what else is there.
const LAYOUTS: [(&str, u32, &[&str]); 13] = [
    // cgroupfs driver, the three classes; containerd's containers are bare ids.
    ("kubepods/burstable/podUID", 1, &["ctr1", "ctr2"]),
    ("kubepods/besteffort/podUID", 1, &["ctr1"]),
    ("kubepods/podUID", 1, &["ctr1"]),
    // systemd driver, containerd.
    (
        "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podUID_.slice",
        1,
        &["cri-containerd-ctr1.scope"],
    ),
    (
        "kubepods.slice/kubepods-podUID_.slice",
        1,
        &["cri-containerd-ctr1.scope"],
    ),
    // systemd driver, CRI-O: conmon beside the container, and crun's sub-cgroup.
    (
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_.slice",
        1,
        &["crio-ctr1.scope/container", "crio-conmon-ctr1.scope"],
    ),
    // kind, both drivers: the node is a container, and its kubelet has a root of its own.
    (
        "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-podUID_.slice",
        2,
        &["cri-containerd-ctr1.scope", "../../../kubelet.service"],
    ),
    ("kubelet/kubepods/burstable/podUID", 2, &["ctr1"]),
    // k3s: all in one service, whose cgroup the kubelet's is beside.
    (
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_.slice",
        1,
        &[
            "cri-containerd-ctr1.scope",
            "../../../system.slice/k3s.service/containerd",
        ],
    ),
    // k3d, seen from its host.
    ("docker/k3d/kubepods/podUID", 3, &["ctr1"]),
    // microk8s and Talos: the cgroupfs layout beside their own services.
    (
        "kubepods/burstable/podUID",
        1,
        &[
            "ctr1",
            "../../../system.slice/snap.microk8s.daemon-containerd.service",
            "../../../podruntime/kubelet",
        ],
    ),
    // A cgroup root of the operator's, whose name looks like a pod's.
    (
        "my.slice/my-pods.slice/my-pods-kubepods.slice/my-pods-kubepods-burstable.slice/my-pods-kubepods-burstable-podUID_.slice",
        3,
        &["cri-containerd-ctr1.scope"],
    ),
    ("a/b/c/kubepods/burstable/podUID", 4, &["ctr1"]),
];

#[test]
fn pods_are_found_by_uid_in_every_layout() {
    for uid in [UID, HASH] {
        for (layout, level, beside) in LAYOUTS {
            let pod = layout
                .replace("UID_", &uid.replace('-', "_"))
                .replace("UID", uid);
            let beside: Vec<String> = beside.iter().map(|dir| format!("{pod}/{dir}")).collect();
            let mut dirs = vec![pod.as_str()];
            dirs.extend(beside.iter().map(String::as_str));
            let (tmp, pods) = found(&dirs, true);
            assert_eq!(pods.roots.len(), 1, "{layout}");
            assert_eq!(pods.roots[0].level, level, "{layout}");
            let scanned = pods.scan();
            assert_eq!(scanned.len(), 1, "{layout} {scanned:?}");
            assert_eq!(scanned[uid], [(tmp.path().join(&pod), true)], "{layout}");
        }
    }
}

#[test]
fn what_is_no_pod_is_none() {
    let (_tmp, pods) = found(
        &[
            "kubepods/burstable/pod",
            "kubepods/burstable/poor",
            "kubepods/other/podX",
            "kubepods.slice/kubepods-burstable.slice/other-podX.slice",
            "kubepods.slice/kubepods-burstable-podX.scope",
            "system.slice/podX.service",
            "user.slice/not-my-pods.slice",
        ],
        true,
    );
    assert_eq!(pods.roots.len(), 2);
    assert_eq!(pods.scan(), HashMap::new());
}

#[test]
fn within_a_cgroup_namespace_the_depth_is_not_known() {
    let (_tmp, pods) = found(&["kubelet/kubepods/podX"], false);
    assert_eq!(pods.roots[0].level, SOME_LEVEL);
    assert!(pods.scan().contains_key("X"));
}

#[test]
fn mounts_are_read() {
    let text = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\nproc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
    let mounts = parse_mounts(text);
    assert_eq!(mounts.len(), 2);
    assert!(mounts[1].v2 && mounts[1].path.ends_with("unified"));
    assert!(!mounts[0].v2);
}

#[test]
fn this_process_is_found_in_the_tree_and_has_begun() {
    let mounts = cgroup_mounts().expect("mounts");
    assert!(mounts.windows(2).all(|two| two[0].v2 >= two[1].v2));
    let own_pid = std::process::id() as i32;
    assert!(started(own_pid) < u64::MAX && started(-1) == u64::MAX);
    let tmp = tempfile::tempdir().expect("directory");
    let deep = tmp.path().join("a/b");
    std::fs::create_dir_all(&deep).expect("made");
    assert_eq!(own(tmp.path()), None);
    std::fs::write(deep.join("cgroup.procs"), format!("1\n{own_pid}\n")).expect("written");
    assert_eq!(own(tmp.path()), id(&deep).ok());
}
