#!/bin/sh
# The roles of containers in docker/compose.yaml.
#
#   role.sh secrets         create the cluster's token and the run's secret, unless they exist
#   role.sh head            run the head of the Ray cluster and its dashboard, without a worker
#   role.sh worker          run a node for one worker
#   role.sh train           train $IST_CONFIG on the cluster and write the report; resumes an earlier run
#   role.sh torchrun RANK   train $IST_CONFIG as node RANK of two, without Ray
#   role.sh healthy WHAT    check the health of this container's Ray at port/path WHAT
#   role.sh COMMAND ...     run a command
#
# $IST_RUN names the run folder under /runs, $IST_TRAIN_ARGS contains further options of ist train.
set -eu

# A container may be in two networks: other nodes must use its address in the private network.
address_of() {
    getent ahostsv4 "$1" | head -n 1 | cut -d ' ' -f 1
}

# On a busy machine, a node may need longer than Ray's limit of half a minute to start.
join() {
    for attempt in 1 2 3; do
        if ray start --address=ray-head:6379 --node-ip-address="$(address_of "$(hostname)")" \
            --object-store-memory="$OBJECT_STORE_BYTES" "$@"; then
            return
        fi
        echo "role.sh: this node did not join the cluster (attempt $attempt of 3)" >&2
        ray stop --force
    done
    return 1
}

run_dir="/runs/${IST_RUN:-cluster}"
role="${1:-help}"
case "$role" in
secrets)
    umask 077
    for name in ray-token run-secret; do
        if [ ! -s "/secrets/$name" ]; then
            python -c 'import secrets; print(secrets.token_hex(32), end="")' >"/secrets/$name.new"
            mv "/secrets/$name.new" "/secrets/$name"
        fi
    done
    ;;
head)
    exec ray start --head --block --port=6379 --node-ip-address="$(address_of ray-head)" --num-cpus=0 \
        --object-store-memory="$OBJECT_STORE_BYTES" --dashboard-host=0.0.0.0 --dashboard-port=8265
    ;;
worker)
    exec ray start --block --address=ray-head:6379 --node-ip-address="$(address_of "$(hostname)")" --num-cpus=1 \
        --object-store-memory="$OBJECT_STORE_BYTES" # started anew by Docker if it fails
    ;;
train)
    join --num-cpus=0
    # shellcheck disable=SC2086  # several options
    ist train "$IST_CONFIG" --pool ray --address auto --run-dir "$run_dir" --auto-resume ${IST_TRAIN_ARGS:-}
    ist report "$run_dir"
    ;;
torchrun)
    # shellcheck disable=SC2086  # several options
    torchrun --nnodes 2 --node-rank "$2" --nproc-per-node 2 --master-addr torchrun-0 --master-port 29500 \
        -m ist train "$IST_CONFIG" --pool torchrun --run-dir "$run_dir-torchrun" --auto-resume ${IST_TRAIN_ARGS:-}
    if [ "$2" = 0 ]; then
        ist report "$run_dir-torchrun"
    fi
    ;;
healthy)
    exec python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "http://127.0.0.1:$2"
    ;;
help)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"
    ;;
*)
    exec "$@"
    ;;
esac
