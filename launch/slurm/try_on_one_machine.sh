#!/usr/bin/env bash
# Tests train.sbatch without a cluster: SLURM on loopback, one node, and a job of two tasks that is preempted once.
#
#     apt-get install slurm-wlm munge        # Debian, Ubuntu; nothing is installed by this script
#     launch/slurm/try_on_one_machine.sh     # as root; `im3d` on the PATH; some minutes
#
# It starts munged, slurmctld and slurmd in a temporary directory and submits train.sbatch with the tiny config. When
# the job has made a few steps, it runs `scontrol requeue` and waits until the job has finished. It exits with 0 only
# if the job resumed from what it had saved and made every step exactly once. It ends its daemons in any case.

set -euo pipefail
cd "$(dirname "$0")/../.."

((EUID == 0)) || {
  echo "slurmd runs tasks as their users: run this as root" >&2
  exit 2
}
for program in munged slurmctld slurmd sbatch im3d; do
  command -v "$program" >/dev/null || {
    echo "$program is missing: apt-get install slurm-wlm munge; im3d must be on the PATH" >&2
    exit 2
  }
done

STEPS=30
PREEMPT_AT=5
dir=$(mktemp -d)
chmod 755 "$dir"
mkdir "$dir"/{munge,state,spool}
run=$dir/run
log=$dir/train.log
daemons=()

stop_daemons() {
  kill "${daemons[@]}" 2>/dev/null || :
  wait "${daemons[@]}" 2>/dev/null || :
}
trap stop_daemons EXIT

fail() {
  echo "FAILED: $*; see $dir" >&2
  tail -n 30 "$log" "$dir"/*d.log >&2 || :
  exit 1
}

# wait_until SECONDS COMMAND...: runs the command once a second until it succeeds; fails after so many seconds.
wait_until() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || return 1
    sleep 1
  done
}

# ---- A cluster of one node ----
head -c 1024 /dev/urandom >"$dir/munge/key"
chmod 400 "$dir/munge/key"
munged --foreground --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
  --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed" --log-file="$dir/munged.log" 2>/dev/null &
daemons+=($!)

host=$(hostname -s)
export SLURM_CONF=$dir/slurm.conf
# A requeued job also waits for cred_expire seconds. A preempted job may save for KillWait seconds.
cat >"$SLURM_CONF" <<EOF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobRequeue=1
KillWait=120
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOF
plugin=cgroup/v1
[[ ! -f /sys/fs/cgroup/cgroup.controllers ]] || plugin=cgroup/v2
printf 'CgroupPlugin=%s\nIgnoreSystemd=yes\n' "$plugin" >"$dir/cgroup.conf"
slurmctld -D 2>/dev/null &
daemons+=($!)
slurmd -D 2>/dev/null &
daemons+=($!)
wait_until 30 sh -c 'sinfo -h -o %T | grep -q idle' || fail "the node is not idle"

# ---- The job, preempted once ----
# Compiling takes most of the time, so there is little optimisation, and the second start uses the first one's cache.
export JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_COMPILATION_CACHE_DIR=$dir/compiled
job=$(sbatch --parsable --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --output="$log" \
  launch/slurm/train.sbatch --config=configs/tiny_text_to_image.py --workdir="$run" \
  --config.train.num_steps=$STEPS --config.train.checkpoint.every=1000 --config.train.log_every=1)
echo "job $job submitted"

# The steps that task 0 has logged, in the order of the log.
steps_made() {
  grep -oE '^0: step [0-9]+/' "$log" | grep -oE '[0-9]+/' | tr '/\n' ' ' | tr -s ' '
}
has_made() {
  (($(steps_made | wc -w) >= $1))
}
has_state() {
  scontrol show job "$job" | grep -q "JobState=$1"
}
wait_until 1200 has_made $PREEMPT_AT || fail "no $PREEMPT_AT steps in 20 minutes"
scontrol requeue "$job"
echo "preempted after step $(steps_made | awk '{print $NF}')"
wait_until 300 has_state PENDING || fail "not requeued"
saved=$(basename -a "$run"/checkpoints/* | sort -n | tail -n 1)
made=$(steps_made)
echo "waits for its turn; made steps $made"
echo "has saved step $saved"
wait_until 1200 has_state COMPLETED || fail "not finished in 20 minutes"

# ---- What it left ----
restarts=$(scontrol show job "$job" | grep -o 'Restarts=[0-9]*')
echo "SLURM says: JobState=COMPLETED $restarts"
grep -E '^job |SIGTERM|exit code|^0: (step|wrote)' "$log"
[[ $made == "$(seq -s ' ' "$saved") " ]] || fail "step $saved is not the last that was made"
[[ $(steps_made) == "$(seq -s ' ' $STEPS) " ]] || fail "some step was made twice or never"
((saved < STEPS)) || fail "it had finished before it was preempted"
[[ $restarts == Restarts=1 ]] || fail "not restarted once"
echo "OK: preempted, saved step $saved, resumed, finished step $STEPS; all is in $dir"
