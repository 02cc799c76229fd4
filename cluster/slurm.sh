#!/bin/bash
# One job on a Slurm cluster: Ray is started on the nodes of the allocation, the job runs on the first, Ray is stopped.
#
#   sbatch --nodes=4 cluster/slurm.sh jobs/vision/vision.yaml --set storage=/shared/runs
#
# Everything after the script's name goes to `onetomany run`. The repository, its environment and the storage must be on
# a disk that all nodes share. Submit from the repository, or set ONETOMANY_HOME to it and ONETOMANY_PYTHON to a Python.
# After a lost node or preemption Slurm queues the job again, and it goes on from its storage. Whole nodes only: `ray
# symmetric-run` ends with `ray stop`, which ends every Ray process that the user has on the node.

#SBATCH --job-name=onetomany
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log

set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: sbatch [SBATCH OPTIONS] cluster/slurm.sh JOB [OPTIONS OF onetomany run]" >&2
    exit 2
fi

cd "${ONETOMANY_HOME:-${SLURM_SUBMIT_DIR:?run this with sbatch}}"
python=${ONETOMANY_PYTHON:-$PWD/.venv/bin/python}
PATH=$(dirname "$python"):$PATH
export PATH
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}   # `python -P` looks in no folder that is not named
port=$((10000 + SLURM_JOB_ID % 20000))
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# Ray's ports are open to everyone on the cluster's network, so a token. It must be the same on all nodes: a file that
# only this user can read, on the shared disk, removed at the end.
work=$(mktemp -d "$PWD/.slurm-$SLURM_JOB_ID-XXXXXX")
trap 'rm -rf "$work"' EXIT
(umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' > "$work/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$work/token
export RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300   # seconds until all nodes have joined; 30 is short on a slow disk

cpus=${SLURM_CPUS_ON_NODE:-$(nproc)}
gpus=${SLURM_GPUS_ON_NODE:-0}

# `ray symmetric-run` exits with 0 when Ray itself could not start, so the job's exit code comes through a file.
status=0
# shellcheck disable=SC2016  # expanded by the inner bash, on the node where the job runs
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    "$python" -P -m ray.scripts.scripts symmetric-run \
    --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "$cpus" --num-gpus "$gpus" \
    -- bash -c 'code=0; "${@:2}" || code=$?; echo "$code" > "$1"; exit "$code"' onetomany "$work/code" \
    "$python" -P -m pipeline.cli run "$@" --address auto || status=$?

if [[ -s $work/code ]]; then
    exit "$(< "$work/code")"
fi
echo "the job did not start: Ray could not be brought up on all nodes (see above)" >&2
exit $((status == 0 ? 1 : status))
