#!/usr/bin/env bash
# A real Slurm cluster of several nodes on this machine, for tests.
set -euo pipefail

print_help() {
    cat <<'TEXT'
usage: tests/cluster/slurm_rig.sh up N | exec COMMAND... | on NODE COMMAND... | processes NODE |
                                  kill-node NODE | start-node NODE | down

  up N             start a controller and the nodes node1 ... nodeN; returns when all are idle
  exec COMMAND...  run a command (sbatch, squeue, ...) on the login node
  on NODE CMD...   run a command on a node
  processes NODE   the process ids (in the node's namespace) of all but its daemons
  kill-node NODE   kill all processes of the node at once, as a power failure does
  start-node NODE  boot it again
  down             stop everything

Each node, and the controller, has its own namespaces: network, host name, processes, mounts, /dev/shm, TMPDIR. The
other files are this machine's. The nodes' network is a bridge within the controller's namespace; nothing touches the machine's.
Each node claims 4 cores and 4 GPUs, which are null devices, and runs an ssh server that lets root in.
There are two partitions: debug, and high, whose jobs preempt those of debug (they are requeued after 8 s).

Needs root with CAP_SYS_ADMIN, and the Debian packages slurm-wlm openssh-server iproute2 procps util-linux.

  SLURM_RIG_DIR      folder of its files (/tmp/slurm_rig)
  SLURM_RIG_NETWORK  first three numbers of the nodes' addresses (10.77.0)
  SLURM_RIG_TIMEOUT  seconds after which a node that does not answer is down (60)
TEXT
}

rig=${SLURM_RIG_DIR:-${TMPDIR:-/tmp}/slurm_rig}
network=${SLURM_RIG_NETWORK:-10.77.0}
cores=4
gpus=4
memory=64000
# For the files of PMIx and Open MPI, which nodes must not share.
scratch=$rig/scratch
export SLURM_CONF=$rig/slurm.conf
# Jobs inherit these from sbatch: mpirun runs as root, and does not bind the ranks of two nodes to the same cores.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_hwloc_default_binding_policy=none

fail() {
    printf 'slurm_rig.sh: error: %s\n' "$*" >&2
    exit 1
}

need_programs() {
    local program missing=()
    for program in slurmctld slurmd sbatch sshd ssh-keygen ip unshare nsenter; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("$program")
    done
    ((${#missing[@]} == 0)) || fail "missing: ${missing[*]}; apt-get install slurm-wlm openssh-server iproute2"
    [[ $(id -u) == 0 ]] || fail "only root can create nodes"
}

write_slurm_configuration() {
    local count=$1 number
    # Slurm waits for as long as a credential is valid (cred_expire) before it starts a requeued job again.
    cat >"$SLURM_CONF" <<TEXT
ClusterName=rig
SlurmctldHost=ctl($network.1)
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
TmpFS=$scratch
StateSaveLocation=$rig/state
SlurmdSpoolDir=$rig/spool/%n
SlurmctldPidFile=$rig/process/slurmctld.daemon
SlurmdPidFile=$rig/process/%n.daemon
SlurmctldLogFile=$rig/log/slurmctld.log
SlurmdLogFile=$rig/log/%n.log
MailProg=/bin/true
# nodes may claim more cores and memory than this machine has
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SlurmdTimeout=${SLURM_RIG_TIMEOUT:-60}
KillWait=5
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptParameters=send_user_signal
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
NodeName=node[1-$count] NodeAddr=$network.[11-$((10 + count))] CPUs=$cores RealMemory=$memory Gres=gpu:$gpus State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1 GraceTime=8
PartitionName=high  Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
TEXT
    echo "CgroupPlugin=disabled" >"$rig/cgroup.conf"
    for ((number = 0; number < gpus; number++)); do
        mknod -m 666 "$rig/gpu/nvidia$number" c 1 3
    done
    echo "NodeName=node[1-$count] Name=gpu File=$rig/gpu/nvidia[0-$((gpus - 1))]" >"$rig/gres.conf"
}

write_ssh_configuration() {
    ssh-keygen -q -t ed25519 -N '' -f "$rig/ssh/key"
    ssh-keygen -q -t ed25519 -N '' -f "$rig/ssh/hostkey"
    cp "$rig/ssh/key.pub" "$rig/ssh/authorized_keys"
    cat >"$rig/ssh/client.d/rig.conf" <<TEXT
Host *
  IdentityFile $rig/ssh/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
TEXT
    cat >"$rig/ssh/sshd_config" <<TEXT
HostKey $rig/ssh/hostkey
AuthorizedKeysFile $rig/ssh/authorized_keys
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
TEXT
}

# The program of a node's process 1, a shell, which also reaps the node's orphans.
write_init() {
    local count=$1 number
    {
        echo "127.0.0.1 localhost"
        echo "$network.1 ctl"
        for ((number = 1; number <= count; number++)); do
            echo "$network.$((10 + number)) node$number"
        done
    } >"$rig/hosts"
    cat >"$rig/init.sh" <<TEXT
hostname "\$1"
export HOSTNAME=\$1 SLURM_CONF=$SLURM_CONF PATH=\$PATH:/usr/sbin:/sbin
mount --bind $rig/hosts /etc/hosts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs $scratch
mkdir -p /run/sshd
[ -d /etc/ssh/ssh_config.d ] && mount --bind $rig/ssh/client.d /etc/ssh/ssh_config.d
ip link set lo up
: >$rig/run/\$1.booted
until [ -e $rig/run/\$1.network ]; do sleep 0.02; done
if [ "\$1" = ctl ]; then
    slurmctld -D &
else
    slurmd -D -N "\$1" &
    /usr/sbin/sshd -D -e -f $rig/ssh/sshd_config &
fi
while :; do
    sleep 3600 &
    wait \$!
done
TEXT
}

# boot NAME ADDRESS
boot() {
    local name=$1 address=$2 outer inner='' controller
    rm -f "$rig/run/$name".*
    setsid unshare --mount --uts --ipc --net --pid --fork --kill-child=KILL --mount-proc \
        bash "$rig/init.sh" "$name" </dev/null >>"$rig/log/$name.init" 2>&1 &
    outer=$!
    for _ in {1..6000}; do
        if [[ -e $rig/run/$name.booted ]]; then
            inner=$(cut -d' ' -f1 "/proc/$outer/task/$outer/children" 2>/dev/null) || inner=
            [[ -z $inner ]] || break
        fi
        sleep 0.02
    done
    [[ -n $inner ]] || fail "$name did not boot: $(tail -n 3 "$rig/log/$name.init")"
    echo "$inner" >"$rig/process/$name"
    if [[ $name == ctl ]]; then
        # The bridge has the name of the nodes' interfaces: horovodrun looks for one that all hosts share.
        nsenter -t "$inner" -n sh -c "ip link add eth0 type bridge && ip addr add $address/24 dev eth0 && ip link set eth0 up"
    else
        controller=$(<"$rig/process/ctl")
        # may be left by a node whose power was cut
        nsenter -t "$controller" -n ip link delete "v$name" 2>/dev/null || true
        ip link add "v$name" netns "$controller" type veth peer name eth0 netns "$inner"
        nsenter -t "$controller" -n sh -c "ip link set v$name master eth0 up"
        nsenter -t "$inner" -n sh -c "ip addr add $address/24 dev eth0 && ip link set eth0 up"
    fi
    : >"$rig/run/$name.network"
}

# on NAME COMMAND...
on() {
    local process
    process=$(cat "$rig/process/$1" 2>/dev/null) || fail "$1 is not up"
    shift
    TMPDIR=$scratch nsenter -t "$process" -m -u -i -n -p --wdns="$PWD" -- "$@"
}

start_node() {
    mkdir -p "$rig/spool/$1"
    boot "$1" "$network.$((10 + ${1#node}))"
}

all_idle() {
    [[ $(on ctl sinfo -h -p debug -t idle -o %D 2>/dev/null) == "$1" ]]
}

up() {
    local count=$1 number
    need_programs
    [[ ! -e $rig/process/ctl ]] || fail "already up in $rig"
    mkdir -p "$rig"/{scratch,state,spool,process,log,gpu,run,ssh/client.d}
    write_slurm_configuration "$count"
    write_ssh_configuration
    write_init "$count"
    boot ctl "$network.1"
    for ((number = 1; number <= count; number++)); do
        start_node "node$number"
    done
    for _ in {1..3000}; do
        all_idle "$count" && return
        sleep 0.1
    done
    tail -n 20 "$rig"/log/* >&2
    fail "not all nodes became idle"
}

# kill_node NAME: waits until its processes are gone.
kill_node() {
    local process
    process=$(cat "$rig/process/$1" 2>/dev/null) || return 0
    kill -KILL "$process" 2>/dev/null || true
    for _ in {1..2000}; do
        [[ -e /proc/$process ]] || break
        sleep 0.05
    done
    rm -f "$rig/process/$1"
}

processes() {
    # Process 1, its sleep, the daemons and this command itself do not belong to jobs.
    on "$1" ps -e -o pid=,ppid=,comm= |
        awk '$1 != 1 && $3 !~ /^(slurmd|slurmctld|sshd|sshd-session|sleep|ps)$/ { print $1, $3 }'
}

down() {
    local file
    [[ -e $rig/slurm.conf ]] || return 0
    on ctl timeout 5 scancel --user root >/dev/null 2>&1 || true
    for file in "$rig"/process/node[0-9]* "$rig/process/ctl"; do
        # slurmd's own files have process ids of the node's namespace
        [[ ! -e $file || $file == *.daemon ]] || kill_node "$(basename "$file")"
    done
    rm -rf "$rig"
}

action=${1:-}
shift || true
case $action in
    up) up "${1:?up takes a number of nodes}" ;;
    exec) on ctl "$@" ;;
    on) on "$@" ;;
    processes) processes "${1:?processes takes a node}" ;;
    kill-node) kill_node "${1:?kill-node takes a node}" ;;
    start-node) start_node "${1:?start-node takes a node}" ;;
    down) down ;;
    -h | --help) print_help ;;
    *) print_help >&2 && exit 2 ;;
esac
