#!/bin/bash
# Train on two nodes of one Linux machine, as root: two network namespaces, joined by one cable, run
# on the CPU through torchrun.
#   examples/two_nodes.sh --preset tiny --mock-data --tokenizer-type NullTokenizer \
#       --vocab-size 256 --seq-length 64 --lr 1e-3 --micro-batch-size 2 --global-batch-size 8 \
#       --train-iters 20 --log-interval 5 --eval-iters 0 --pipeline-model-parallel-size 2
# The arguments are pretrain_gpt.py's. PROCESSES=2 starts two processes on each node. Ranks 0 and 1
# are on the first node, so that --tensor-model-parallel-size 2 stays inside of nodes. To see a
# network fail, run one of the commands that this script prints first.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
nodes=("trivium$$-0" "trivium$$-1")
addresses=(10.77.0.1 10.77.0.2)

refuse() {
    echo "two_nodes.sh: $*" >&2
    exit 2
}

cleanup() {
    trap '' INT TERM HUP
    for signal in TERM KILL; do
        for _ in {1..40}; do
            left=$(for node in "${nodes[@]}"; do ip netns pids "$node" 2> /dev/null || true; done)
            [ -n "$left" ] || break 2
            kill -s "$signal" $left 2> /dev/null || true
            sleep 0.25
        done
    done
    for node in "${nodes[@]}"; do ip netns delete "$node" 2> /dev/null || true; done
}

# One node's torchrun, each line with the node's name in front.
start_node() {
    local k=$1
    shift
    local run=("$python" -m torch.distributed.run --nnodes 2 --node-rank "$k"
        --nproc-per-node "${PROCESSES:-1}"
        --master-addr "${addresses[0]}" --master-port 29500 "$root/pretrain_gpt.py" "$@")
    {
        ip netns exec "${nodes[k]}" "${run[@]}" 2>&1 >&3 3>&- |
            sed -u "s/^/node $k | /" >&2 3>&-
    } 3>&1 | sed -u "s/^/node $k | /"
}

[ "$(uname)" = Linux ] || refuse "network namespaces are Linux's"
[ "$(id -u)" = 0 ] || refuse "network namespaces need root; try sudo"
command -v ip > /dev/null || refuse "there is no ip command; install iproute2"
command -v "$python" > /dev/null ||
    refuse "there is no $python; run make setup, or name a Python with PYTHON=..."

trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
for node in "${nodes[@]}"; do
    ip netns add "$node" || refuse "no network namespace can be made here"
done
ip link add cable netns "${nodes[0]}" type veth peer name cable netns "${nodes[1]}" ||
    refuse "no pair of virtual interfaces can be made here"
for k in 0 1; do
    ip -n "${nodes[k]}" address add "${addresses[k]}/24" dev cable
    ip -n "${nodes[k]}" link set cable up
    ip -n "${nodes[k]}" link set lo up
done
echo "two nodes: ${nodes[*]}"
echo "to cut the cable: ip -n ${nodes[1]} link set cable down"
# Lost both ways: were it one way alone, the first node to give up could still tell the other by
# closing its connections.
lose() {
    local nobody="lladdr 02:00:00:00:00:01 dev cable nud permanent"
    echo "ip -n ${nodes[$1]} neighbour replace ${addresses[$2]} $nobody"
}
echo "to lose what it carries: $(lose 0 1); $(lose 1 0)"

# Gloo would take the address that the host name stands for: it is the same one on both nodes, and
# reaches neither.
export GLOO_SOCKET_IFNAME=cable
# Both nodes would claim the same GPUs.
export CUDA_VISIBLE_DEVICES=
# Without it torch warns that the nodes' addresses have no names.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
jobs=()
for k in 0 1; do
    start_node "$k" "$@" &
    jobs+=($!)
done
status=0
for k in 0 1; do
    code=0
    wait "${jobs[k]}" || code=$?
    if [ "$code" != 0 ]; then
        echo "two_nodes.sh: node $k ended with exit status $code" >&2
        status=1
    fi
done
exit $status
