#!/bin/bash
# Two nodes on one machine: two network namespaces, joined by one cable, train together through torchrun. Linux, root, iproute2.
#   examples/two_nodes.sh --preset tiny --mock-data --tokenizer-type NullTokenizer --vocab-size 256 --seq-length 64 \
#       --micro-batch-size 2 --global-batch-size 8 --train-iters 20 --lr 1e-3 --pipeline-model-parallel-size 2
# Arguments go to pretrain_gpt.py. PROCESSES=2 starts two processes on each node: those of one node are neighbours in rank, so
# --tensor-model-parallel-size 2 stays inside a node. To see a network fail, run the command printed at the start while it trains.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
PATH=$PATH:/usr/sbin:/sbin
refuse() { echo "two_nodes.sh: $*" >&2; exit 2; }
[ -x "$(command -v "$python")" ] || refuse "no $python; run make setup, or name a Python with PYTHON="
command -v ip > /dev/null || refuse "no ip command; install iproute2"
[ "$(id -u)" = 0 ] || refuse "network namespaces need root; try sudo"

nodes=("trivium$$-0" "trivium$$-1") addresses=(10.77.0.1 10.77.0.2)
cleanup() {
    trap '' INT TERM HUP
    for signal in TERM KILL; do
        pids=$(for node in "${nodes[@]}"; do ip netns pids "$node" 2> /dev/null || true; done)
        [ -z "$pids" ] || { kill -s "$signal" $pids 2> /dev/null || true; sleep 1; }
    done
    for node in "${nodes[@]}"; do ip netns del "$node" 2> /dev/null || true; done
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

for node in "${nodes[@]}"; do ip netns add "$node" || refuse "no network namespace can be made here"; done
ip link add cable netns "${nodes[0]}" type veth peer name cable netns "${nodes[1]}" || refuse "no veth pair can be made here"
for k in 0 1; do
    ip -n "${nodes[k]}" address add "${addresses[k]}/24" dev cable
    ip -n "${nodes[k]}" link set cable up
    ip -n "${nodes[k]}" link set lo up
done
echo "two nodes: ${nodes[*]}; to cut the cable: ip -n ${nodes[1]} link set cable down"

# Gloo and NCCL would take the address that the host name stands for, which is the same on both nodes.
export GLOO_SOCKET_IFNAME=cable NCCL_SOCKET_IFNAME=cable OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
agents=()
for k in 0 1; do
    ip netns exec "${nodes[k]}" "$python" -m torch.distributed.run --nnodes 2 --node-rank "$k" --nproc-per-node "${PROCESSES:-1}" \
        --master-addr "${addresses[0]}" --master-port 29500 --max-restarts 0 --monitor-interval 0.5 "$root/pretrain_gpt.py" "$@" \
        > >(sed -u "s/^/node $k | /") 2> >(sed -u "s/^/node $k | /" >&2) &
    agents+=($!)
done
status=0
for k in 0 1; do
    code=0
    wait "${agents[k]}" || code=$?
    [ "$code" = 0 ] || { echo "two_nodes.sh: node $k ended with status $code" >&2; status=1; }
done
exit $status
