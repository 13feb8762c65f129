#!/bin/bash
# A sweep on Slurm: a Ray of its own over the allocation, and the sweep on it. Before the time limit the sweep is ended
# and the job put back into the queue, where the same command goes on.
#
#   sbatch deploy/slurm.sh CARD [key=value]... [--results DIR]
#
# Change: the lines below to your site, and how fedstill's environment is entered. The folder in which sbatch is called
# and the results have to lie on a file system that all nodes share.
#SBATCH --job-name=fedstill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
##SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: sbatch deploy/slurm.sh CARD [key=value]... [--results DIR]" >&2; exit 2; }
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
workers=$((SLURM_JOB_NUM_NODES - 1))
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1; exit}')
export RAY_ADDRESS="$ip:$((20000 + SLURM_JOB_ID % 20000))" # one port for each job, as jobs may share a node

# Only those who have the token can use this Ray. srun hands it on to the nodes.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')

room=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --block)
place="/tmp/ray-$SLURM_JOB_ID" # short: Ray's sockets have long names
nodes=() sweep="" again=""

stop() {
    trap '' TERM USR1
    [ ${#nodes[@]} = 0 ] || kill -TERM "${nodes[@]}" 2>/dev/null || true
    wait || true
    rm -rf "$place"
}
trap stop EXIT
# USR1: the time is nearly over. TERM: the job is cancelled, or preempted, after which Slurm itself puts it back.
trap 'again=yes; [ -z "$sweep" ] || kill -TERM "$sweep" 2>/dev/null || true' USR1
trap 'again=""; [ -z "$sweep" ] || kill -TERM "$sweep" 2>/dev/null || true' TERM

srun --nodes=1 --ntasks=1 --nodelist="$head" env -u RAY_ADDRESS ray start --head --node-ip-address="$ip" \
    --port="${RAY_ADDRESS##*:}" --include-dashboard=false --temp-dir="$place" "${room[@]}" &
nodes+=($!)
if [ "$workers" -gt 0 ]; then
    srun --nodes="$workers" --ntasks="$workers" --exclude="$head" ray start --address="$RAY_ADDRESS" "${room[@]}" &
    nodes+=($!)
fi

# A sweep sees what is there when it starts: all nodes have to be.
python3 - "$SLURM_JOB_NUM_NODES" <<'PYTHON'
import os, socket, sys, time

host, _, port = os.environ["RAY_ADDRESS"].rpartition(":")
ends = time.monotonic() + 300
while True:
    try:
        socket.create_connection((host, int(port)), 5).close()
        break
    except OSError:
        if time.monotonic() > ends:
            sys.exit("Ray's head did not start within 5 minutes")
        time.sleep(1)

import ray

ray.init(logging_level="ERROR", log_to_driver=False)
while (there := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[1]):
    if time.monotonic() > ends:
        sys.exit(f"only {there} of {sys.argv[1]} nodes joined within 5 minutes")
    time.sleep(1)
PYTHON

code=0
if [ -z "$again" ]; then
    echo "sweep on ${SLURM_JOB_NUM_NODES} nodes, start ${SLURM_RESTART_COUNT:-0}"
    fedstill sweep "$@" execution.address=auto &
    sweep=$!
    # A signal ends a wait, not the sweep: ask again until that has ended.
    while true; do
        code=0
        wait "$sweep" || code=$?
        kill -0 "$sweep" 2>/dev/null || break
    done
fi
if [ -n "$again" ] && [ "$code" -ge 128 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    code=0
fi
exit "$code"
