"""What a run is: frozen values, made from flags and YAML files. No torch in here."""

from .defaults import data_parallel_size, key_value_copies, optimizer_shards, resolve
from .errors import ConfigError, FlagError
from .fields import (
    ACTIVATIONS,
    LLAMA3_ROPE,
    OPTIMIZER_STATE,
    PIPELINE_SCHEDULES,
    ROPE_OPTIONS,
    ROPE_SCALINGS,
    SHARDING_STRATEGIES,
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    wrong_types,
)

__all__ = [
    "ACTIVATIONS",
    "LLAMA3_ROPE",
    "OPTIMIZER_STATE",
    "PIPELINE_SCHEDULES",
    "ROPE_OPTIONS",
    "ROPE_SCALINGS",
    "SHARDING_STRATEGIES",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "FlagError",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "data_parallel_size",
    "key_value_copies",
    "optimizer_shards",
    "resolve",
    "wrong_types",
]
