# Runs as process 1 once the files of the host are there.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8 TERM=dumb RUST_BACKTRACE=1

fail() {
    echo "main: $1"
    /.vm/busybox poweroff -f
}

mkdir -p /dev/pts /dev/shm /run/lock
mount -t devpts devpts /dev/pts || fail "no /dev/pts"
mount -t tmpfs shm /dev/shm || fail "no /dev/shm"
chmod 1777 /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup || fail "no cgroup2"
modprobe --all veth bridge tls inet_diag tcp_diag || fail "a module is missing"
ip link set lo up || fail "no loopback"
hostname vm
ulimit -n 65536

# What the command says must not be mixed with what the kernel says, so it has
# a port of its own, as has the exit code.
for port in /dev/ttyS1 /dev/ttyS2; do
    /.vm/busybox stty -F "$port" raw -echo || fail "no $port"
done
sh /.vm/command >/dev/ttyS1 2>&1
echo "exit $?" >/dev/ttyS2
/.vm/busybox poweroff -f
