"""Fill in what a configuration leaves to its default rules, and what follows from it."""

import os
from dataclasses import replace
from typing import Any, TypeVar

from .fields import BatchConfig, Config, DataConfig, ModelConfig, ParallelConfig

_Section = TypeVar("_Section", ModelConfig, BatchConfig, ParallelConfig)


def resolve(config: Config, world_size: int) -> Config:
    """Fill in what was left to its default rule.

    Fields whose inputs are missing stay None: `validate` names those inputs.
    """
    batch = _batch(config, world_size)
    optimizer = config.optimizer
    if optimizer.lr_decay_iters is None:
        optimizer = replace(optimizer, lr_decay_iters=batch.train_iters)
    return replace(
        config,
        model=_model(config.model, batch.seq_length),
        parallel=_parallel(config.parallel),
        batch=batch,
        optimizer=optimizer,
        data=_data(config.data),
    )


def _or_default(section: _Section, name: str, value: int | str | None) -> _Section:
    """Fill in one field of a section where it was not given."""
    if getattr(section, name) is not None:
        return section
    change: dict[str, Any] = {name: value}
    return replace(section, **change)


def _model(model: ModelConfig, seq_length: int) -> ModelConfig:
    hidden, heads = model.hidden_size, model.num_attention_heads
    if hidden:
        # A gated layer has three matrices instead of two: 2/3 of the width makes them as large.
        width = int(4 * hidden * 2 / 3 / 64) * 64 if model.gated else 4 * hidden
        model = _or_default(model, "ffn_hidden_size", width)
    if hidden and heads:
        model = _or_default(model, "kv_channels", hidden // heads)
    return _or_default(model, "max_position_embeddings", seq_length)


def _batch(config: Config, world_size: int) -> BatchConfig:
    batch = config.batch
    if batch.micro_batch_size:
        smallest = batch.micro_batch_size * data_parallel_size(config.parallel, world_size)
        batch = _or_default(batch, "global_batch_size", smallest)
    if batch.train_samples and batch.global_batch_size:
        batch = _or_default(batch, "train_iters", batch.train_samples // batch.global_batch_size)
    return batch


def _parallel(parallel: ParallelConfig) -> ParallelConfig:
    strategy = "optim" if parallel.use_distributed_optimizer else "no_shard"
    return _or_default(parallel, "data_parallel_sharding_strategy", strategy)


def _data(data: DataConfig) -> DataConfig:
    if data.tokenizer_type is None and data.vocab_file and data.merge_file:
        data = replace(data, tokenizer_type="GPT2BPETokenizer")  # as Megatron's pretrain_gpt.py
    # Absolute, so that what was trained here can be used from elsewhere.
    names = ("tokenizer_model", "vocab_file", "merge_file")
    given = {name: getattr(data, name) for name in names if getattr(data, name)}
    return replace(data, **{name: os.path.abspath(path) for name, path in given.items()})


def optimizer_shards(parallel: ParallelConfig, world_size: int) -> int:
    """Return over how many processes the optimizer's state of each parameter is cut."""
    if parallel.data_parallel_sharding_strategy == "no_shard":
        return 1
    replicas = data_parallel_size(parallel, world_size) * parallel.context_parallel_size
    return replicas // parallel.num_distributed_optimizer_instances


def key_value_copies(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return how many tensor-parallel processes hold each key-value head.

    More than one where there are fewer heads than processes.
    """
    return max(1, parallel.tensor_model_parallel_size // model.num_kv_heads)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return how many copies of the model a world has.

    1 where the sizes do not divide it (validate says so).
    """
    return max(1, world_size // max(1, model_parallel_size(parallel)))


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Return how many processes share one copy of the model, each sample's tokens included."""
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
