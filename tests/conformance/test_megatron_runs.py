"""Megatron-style command lines, as in users' scripts, on files that megatron-core wrote."""

import numpy as np
import pytest
import torch
from runs import rows_of

import pretrain_gpt

indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")

COMMON = """
    --use-mcore-models --transformer-impl local --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1 --num-layers 2 --hidden-size 64 --num-attention-heads 4
    --seq-length 64 --max-position-embeddings 64 --attention-backend auto --micro-batch-size 4
    --global-batch-size 16 --train-iters 30 --lr 3.0e-3 --min-lr 3.0e-4 --lr-decay-style cosine
    --lr-warmup-iters 3 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
    --init-method-std 0.02 --bf16 --no-masked-softmax-fusion --tokenizer-type NullTokenizer
    --vocab-size 200 --split 90,10,0 --num-workers 1 --distributed-backend gloo --ckpt-format
    torch_dist --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --log-interval 10 --eval-interval 15 --eval-iters 2 --no_gradient_accumulation_fusion --seed
    42
"""
GPT = "--attention-dropout 0.1 --hidden-dropout 0.1 --no-bias-gelu-fusion"
LLAMA = """
    --normalization RMSNorm --swiglu --position-embedding-type rope --rotary-base 500000
    --disable-bias-linear --group-query-attention --num-query-groups 2
    --untie-embeddings-and-output-weights --attention-dropout 0.0 --hidden-dropout 0.0
    --norm-epsilon 1e-5 --no-rope-fusion
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Arithmetic walks modulo 200, written by megatron-core's own builder."""
    prefix, random = tmp_path_factory.mktemp("megatron") / "walks", np.random.RandomState(0)
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(300):
        walk = (
            random.randint(200) + random.randint(1, 4) * np.arange(random.randint(5, 150))
        ) % 200
        builder.add_document(torch.from_numpy(np.append(walk, 200)), [len(walk) + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("model", [GPT, LLAMA], ids=["gpt", "llama"])
def test_a_megatron_command_line_trains(data, tmp_path, capsys, model):
    arguments = (
        f"{COMMON} {model} --data-path {data} --save {tmp_path}/run --load {tmp_path}/run "
        "--save-interval 20"
    )
    assert pretrain_gpt.cli(arguments.split()) == 0
    out, rows = capsys.readouterr().out, rows_of(tmp_path / "run/metrics.jsonl")
    assert "flags without effect here: --use-mcore-models --transformer-impl" in out
    ignored = next(
        line for line in out.splitlines() if line.startswith("flags without effect here:")
    )
    for honoured in (
        "--use-distributed-optimizer",
        "--overlap-grad-reduce",
        "--overlap-param-gather",
        "--tensor-model-parallel-size",
    ):
        assert honoured not in ignored.split()
    assert len(rows) == 30 and rows[0]["lm_loss"] == pytest.approx(np.log(201), rel=0.02)
    assert rows[-1]["lm_loss"] < 0.8 * rows[0]["lm_loss"]
    assert len(rows_of(tmp_path / "run/metrics.jsonl", "valid")) == 2
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == "30"
