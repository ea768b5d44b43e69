#!/usr/bin/env bash
# Train on several machines with torchrun: run this on each of them with the same arguments.
#
#   HEAD=10.0.0.1:29500 NODES=2 PER_NODE=2 launch/torchrun.sh configs/quickstart.yaml --set pool.coordinator=trains
#
# All arguments are passed to `ist train`. All machines need this package, your own modules and the data.
# NODES may be a range such as 1:4 if machines join and leave (with train.workers={min: ..., max: ...}). RESTARTS is the number
# of restarts after a process has died: add --run-dir DIR --auto-resume, with DIR on a shared disk.
# IST_SECRET_FILE names the run's secret, the same on all machines; default: ~/.ist/secret, created on first use.
# LOCAL_ADDR is the address by which other machines reach this one, if its host name does not resolve to it.
# GLOO_SOCKET_IFNAME (or NCCL_SOCKET_IFNAME) is the network interface to use, if there are several.
# train.workers must be NODES * PER_NODE (one less with pool.coordinator=dedicated).
# With pool.ranks_per_worker=node, each machine is one worker: train.workers must be NODES.
set -euo pipefail
: "${HEAD:?set HEAD to host:port of the first machine}" "${NODES:?set NODES}" "${PER_NODE:?set PER_NODE}"
where=()
if [ -n "${LOCAL_ADDR:-}" ]; then
    host=0
    [ "$LOCAL_ADDR" = "${HEAD%:*}" ] && host=1
    where=(--local-addr "$LOCAL_ADDR" --rdzv-conf "is_host=$host")
fi
# Strangers who connect must not use up the file descriptors of torchrun's store.
ulimit -n "$(ulimit -Hn)"
# Otherwise torch 2.13 does not send rank 0's address to a node that joins later.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
# Without this option, torchrun ends at SIGHUP or SIGINT even if they are ignored, as under nohup.
ignored=$((16#$(sed -n 's/^SigIgn:[[:space:]]*//p' /proc/self/status 2>/dev/null || true)0 / 16))
signals=()
if [ $((ignored & 7)) != 0 ]; then
    heeded=SIGTERM
    [ $((ignored & 1)) = 0 ] && heeded+=,SIGHUP
    [ $((ignored & 2)) = 0 ] && heeded+=,SIGINT
    [ $((ignored & 4)) = 0 ] && heeded+=,SIGQUIT
    signals=(--signals-to-handle "$heeded")
fi
exec torchrun "${signals[@]}" --nnodes "$NODES" --max-restarts "${RESTARTS:-0}" --nproc-per-node "$PER_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-ist}" "${where[@]}" -m ist train "$@"
