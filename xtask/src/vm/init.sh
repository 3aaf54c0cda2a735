#!/busybox sh
# The first program of the machine: puts a writable layer over the files of the
# host, and goes on there.

# Without a written exit code the host takes the run for failed.
fail() {
    /busybox echo "init: $1"
    /busybox poweroff -f
}

/busybox mkdir -p /dev /proc /sys /host /layer /new
/busybox mount -t devtmpfs dev /dev || fail "no /dev"
exec </dev/null >/dev/console 2>&1
/busybox mount -t proc proc /proc || fail "no /proc"
/busybox mount -t sysfs sys /sys || fail "no /sys"
while read -r module; do
    /busybox insmod "/$module" || fail "cannot load $module"
done </order

# The host's files do not change under us in a way that matters: let them be
# cached, or starting a program takes seconds.
/busybox mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /host ||
    fail "cannot mount the host's files"
/busybox mount -t tmpfs layer /layer || fail "no memory for a layer"
/busybox mkdir -p /layer/upper/.vm /layer/work
/busybox cp /busybox /main /command /layer/upper/.vm/ || fail "no memory for files"
/busybox mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work root /new ||
    fail "cannot layer"

/busybox mount --move /dev /new/dev
/busybox mount --move /proc /new/proc
/busybox mount --move /sys /new/sys
# What runs on the host does not run here.
/busybox mount -t tmpfs run /new/run || fail "no /run"
exec /busybox switch_root /new /bin/sh /.vm/main
fail "cannot switch to the host's files"
