#!/usr/bin/env bash
# Runs `im3d train` as N processes on this machine, each with a GPU of its own where there are GPUs.
#
#     launch/local/train.sh 8 runs/logs --config=configs/tiny_turntable.py --workdir=runs/turntable
#
# Writes LOGS/process-I.log. On SIGTERM, SIGUSR1 and Ctrl-C the run saves and stops. A run that exits with 75 for
# another reason is started again. If one process fails, the others are ended. The exit code is that of the processes.

set -euo pipefail

if (($# < 2)); then
  echo "usage: $0 PROCESSES LOGS im3d-train-flags..." >&2
  exit 2
fi
processes=$1 logs=$2
shift 2
mkdir -p "$logs"
coordinator="localhost:${PORT:-12345}"

asked=
trap 'asked=1; signal_all TERM' TERM USR1 INT

signal_all() {
  jobs -rp | xargs --no-run-if-empty kill -s "$1" 2>/dev/null || :
}

start_all() {
  for ((i = 0; i < processes; i++)); do
    JAX_LOCAL_DEVICE_IDS=$i im3d train --coordinator="$coordinator" --num-processes="$processes" \
      --process-id="$i" "$@" >>"$logs/process-$i.log" 2>&1 &
  done
}

# The first exit code that is neither 0 nor 75 becomes that of the run. The other processes are killed 5 seconds
# later, when they too have had time to report.
wait_for_all() {
  status=0
  while true; do
    code=0
    wait -n || code=$?
    case $code in
      0 | 75) ((status)) || status=$code ;;
      127) return ;; # none is left
      *)
        # A trapped signal interrupts `wait`, and the processes go on to save.
        ((code > 128)) && [[ $asked ]] && continue
        ((status == 0 || status == 75)) || continue
        status=$code
        sleep 5
        signal_all KILL
        ;;
    esac
  done
}

while
  start_all "$@"
  wait_for_all
  ((status == 75)) && [[ ! $asked ]]
do
  echo "saved and stopped: starts again"
done
((status == 0)) || echo "ended with $status; see $logs/process-*.log" >&2
exit "$status"
