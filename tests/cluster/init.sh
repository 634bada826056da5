# The first process of a host: bash init.sh LAB NAME ADDRESS. With it every process of the host ends.
set -e
cd "$1"
hostname "$2"
mount --bind etc/hosts /etc/hosts
mount --bind etc/resolv.conf /etc/resolv.conf
mount --bind etc/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
mkdir -m 1777 /run/tmp
ip link set lo up
echo ready
read -r _ # the switch's end of the cable is there
ip addr add "$3/24" dev eth0
ip link set eth0 up
/usr/sbin/sshd -f "$1/etc/sshd_config" -E "$1/log/sshd.$2" # each connection starts it again, from /
for _ in $(seq 500); do [ -s /run/sshd.pid ] && break || sleep 0.01; done # written once it listens
[ -s /run/sshd.pid ]
echo up
cd /
# Standard input ends with the process that made the lab, however that ends. Meanwhile bash reaps what it inherits.
while read -r _; do :; done
