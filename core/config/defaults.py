"""Fill in what a configuration leaves to its default rules, and what follows from it."""

import os
from dataclasses import replace

from .fields import Config, ModelConfig, ParallelConfig


def resolve(config: Config, world_size: int) -> Config:
    """Fill in what was left to its default rule. Fields whose inputs are missing stay None: `validate` names those inputs."""
    model, batch, optimizer, data = config.model, config.batch, config.optimizer, config.data
    if data.tokenizer_type is None and data.vocab_file and data.merge_file:
        data = replace(data, tokenizer_type="GPT2BPETokenizer")  # as Megatron's pretrain_gpt.py
    # Absolute, so that what was trained here can be used from elsewhere.
    paths = {name: getattr(data, name) for name in ("tokenizer_model", "vocab_file", "merge_file")}
    data = replace(data, **{name: os.path.abspath(path) for name, path in paths.items() if path})
    h = model.hidden_size
    if h and model.ffn_hidden_size is None:
        model = replace(
            model, ffn_hidden_size=int(4 * h * 2 / 3 / 64) * 64 if model.gated else 4 * h
        )
    if h and model.num_attention_heads and model.kv_channels is None:
        model = replace(model, kv_channels=h // model.num_attention_heads)
    if model.max_position_embeddings is None:
        model = replace(model, max_position_embeddings=batch.seq_length)
    if batch.global_batch_size is None and batch.micro_batch_size:
        batch = replace(
            batch,
            global_batch_size=batch.micro_batch_size
            * data_parallel_size(config.parallel, world_size),
        )
    if batch.train_iters is None and batch.train_samples and batch.global_batch_size:
        batch = replace(batch, train_iters=batch.train_samples // batch.global_batch_size)
    if optimizer.lr_decay_iters is None:
        optimizer = replace(optimizer, lr_decay_iters=batch.train_iters)
    parallel = config.parallel
    if parallel.data_parallel_sharding_strategy is None:
        parallel = replace(
            parallel,
            data_parallel_sharding_strategy="optim"
            if parallel.use_distributed_optimizer
            else "no_shard",
        )
    return replace(
        config, model=model, parallel=parallel, batch=batch, optimizer=optimizer, data=data
    )


def optimizer_shards(parallel: ParallelConfig, world_size: int) -> int:
    """Over how many processes the optimizer's state of each parameter is cut."""
    if parallel.data_parallel_sharding_strategy == "no_shard":
        return 1
    return (
        data_parallel_size(parallel, world_size)
        * parallel.context_parallel_size
        // parallel.num_distributed_optimizer_instances
    )


def key_value_copies(model: ModelConfig, parallel: ParallelConfig) -> int:
    """How many tensor-parallel processes hold each key-value head: several where there are fewer heads than processes."""
    return max(1, parallel.tensor_model_parallel_size // model.num_kv_heads)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Copies of the model in a world of `world_size`; 1 where the sizes do not divide (validate says so)."""
    per_model = (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    return max(1, world_size // max(1, per_model))
