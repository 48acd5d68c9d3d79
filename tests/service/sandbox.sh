#!/bin/bash
# sandbox.sh start | sh COMMAND.. | stop: a systemd as PID 1 of namespaces of its own, over an overlay of / that vanishes
# with it. SANDBOX names its directory (below /run). Needs root, and Debian's systemd, dbus and util-linux.
# /tmp inside is emptied at the start, and there is no network but loopback's.
B=${SANDBOX:?}
CG=$(findmnt -nt cgroup2 -o TARGET | head -1)/$(basename "$B")
leader() { pgrep -P "$(cat "$B/pid")"; }
case $1 in
start)
    mkdir -p "$B" "$CG"
    (
        echo $BASHPID > "$CG/cgroup.procs"
        exec setsid unshare -mpCuin --fork --kill-child=KILL "$(readlink -f "$0")" inside > "$B/log" 2>&1 < /dev/null
    ) &
    echo $! > "$B/pid"
    for _ in {1..100}; do
        sleep .2
        nsenter -t "$(leader)" -a systemctl is-system-running &> /dev/null && exit
    done
    cat "$B/log"
    exit 1
    ;;
inside)
    set -e
    mount --make-rprivate /
    mkdir -p "$B/r"
    mount -t tmpfs tmpfs "$B/r"
    mkdir "$B"/r/{u,w,m}
    M=$B/r/m
    mount -t overlay overlay -o "lowerdir=/,upperdir=$B/r/u,workdir=$B/r/w" "$M"
    mount -t proc proc "$M/proc"
    mount --bind "$M/proc/sys" "$M/proc/sys"
    mount -o remount,bind,ro "$M/proc/sys"
    mount -t sysfs -o ro sysfs "$M/sys"
    mount -t cgroup2 cgroup2 "$M/sys/fs/cgroup"
    mount -t tmpfs -o mode=755 tmpfs "$M/run"
    mount -t tmpfs -o mode=755 tmpfs "$M/dev"
    mkdir "$M"/dev/{shm,pts}
    for d in null zero full random urandom tty; do
        touch "$M/dev/$d"
        mount --bind "/dev/$d" "$M/dev/$d"
    done
    mount -t tmpfs tmpfs "$M/dev/shm"
    ln -s /proc/self/fd "$M/dev/fd"
    wanted="systemd-journald.service dbus.socket"
    [ -e "$M/lib/systemd/system/cron.service" ] && wanted="$wanted cron.service"
    printf '[Unit]\nRequires=systemd-journald.service dbus.socket\nWants=%s\nAllowIsolate=yes\n' "$wanted" \
        > "$M/etc/systemd/system/sandbox.target"
    mkdir -p "$M/old"
    cd "$M"
    pivot_root . old
    umount -l /old
    exec env -i container=sandbox PATH=/usr/sbin:/usr/bin:/sbin:/bin setpriv \
        --bounding-set=-sys_time,-sys_module,-sys_boot /lib/systemd/systemd --system --unit=sandbox.target
    ;;
sh)
    shift
    exec nsenter -t "$(leader)" -a "$@"
    ;;
stop)
    kill -KILL "$(leader)" 2> /dev/null
    for _ in {1..50}; do
        [ -d "$CG" ] || break
        find "$CG" -depth -type d -exec rmdir {} + 2> /dev/null
        sleep .1
    done
    rm -rf "$B"
    [ ! -d "$CG" ]
    ;;
esac
