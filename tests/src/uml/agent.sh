# Process 1 of the guest, run by busybox: sets it up, and then does what the host says line by line on its serial line,
# until that ends. Arguments: busybox, the directory of the kernel's modules, the directory shared with the host.
#
#   run NUMBER           runs NUMBER.sh in a shell of its own
#   shell NUMBER         starts a shell that stays, of that name; the end that is told is that of starting it
#   in NAME NUMBER       runs NUMBER.sh in that shell, which must have been started
#
# and answers `@guest ready`, `@guest end NUMBER CODE`, `@guest gone NAME`. What a script writes is in NUMBER.out and
# NUMBER.err before its end is told.
busybox=$1 modules=$2 shared=$3
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/mnt TMPDIR=/mnt/tmp LC_ALL=C
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sysfs /sys
$busybox mount -t tmpfs tmpfs /mnt
$busybox mkdir /mnt/nfs /mnt/tmp /mnt/shared /mnt/shells
$busybox mount -t hostfs -o "$shared" none /mnt/shared
$busybox ln -s /proc/self/fd /dev/fd
for module in net/sunrpc/sunrpc fs/nfs_common/grace fs/lockd/lockd fs/netfs/netfs fs/fscache/fscache fs/nfs/nfs \
    fs/nfs_common/nfs_acl fs/nfs/nfsv3; do
    $busybox insmod "$modules/kernel/$module.ko" || echo "no module $module"
done
$busybox ip link set lo up
$busybox ip addr add 10.77.0.2/24 dev vec0
$busybox ip link set vec0 up
# A packet takes 64 KiB in one piece. Where the page cache leaves none, the network's driver drops packets, and may hang.
memory=$($busybox sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo)
echo $((memory / 4)) >/proc/sys/vm/min_free_kbytes
cd /mnt

$busybox stty -F /dev/ttyS0 raw -echo
exec </dev/ttyS0 >/dev/ttyS0

once() {
    /bin/sh "/mnt/shared/$1.sh" </dev/null >"/mnt/shared/$1.out" 2>"/mnt/shared/$1.err"
    code=$?
    $busybox sync "/mnt/shared/$1.out" "/mnt/shared/$1.err"
    echo "@guest end $1 $code"
}

# A script that ends the shell, be it by a syntax error, ends what is run in it.
shell() {
    /bin/sh -c 'echo "@guest end $1 0"
    while read -r guest_number; do
        { . "/mnt/shared/$guest_number.sh"; } </dev/null >"/mnt/shared/$guest_number.out" 2>"/mnt/shared/$guest_number.err"
        guest_code=$?
        '"$busybox"' sync "/mnt/shared/$guest_number.out" "/mnt/shared/$guest_number.err"
        echo "@guest end $guest_number $guest_code"
    done' sh "$1" <>"/mnt/shells/$1"
    echo "@guest gone $1"
}

echo "@guest ready"
while read -r verb first second; do
    case $verb in
    run) once "$first" & ;;
    shell)
        $busybox mkfifo "/mnt/shells/$first"
        shell "$first" &
        ;;
    in) echo "$second" 1<>"/mnt/shells/$first" ;;
    esac
done
$busybox poweroff -f
