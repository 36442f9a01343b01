"""Declare the configuration of a run: one frozen dataclass per subject, a sentence per field.

Flags and YAML keys are made from these fields (flags.py): a new field is a new flag. A field has
the type that it has in a run, that is after `resolve` and `validate`. So `num_layers: int =
option(None, ...)` is a number that the user must give or that a default rule fills in: None stands
for "not given" until then. A field that may stay None in a run says so in its type: `int | None`.
"""

import json
from dataclasses import dataclass, field, fields
from math import ceil, isfinite
from typing import Any, NamedTuple, get_args

from .windows import layers_with_window, tokens_before

PIPELINE_SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")
# What each optimizer keeps of every parameter beside its fp32 master, as checkpoints name it.
OPTIMIZER_STATE = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum",),
}
NORM_PLACEMENTS = ("pre", "post", "both")
# Llama 3.1's rule beside its factor.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Ways to scale rotary frequencies, and the numbers that each needs.
ROPE_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", *LLAMA3_ROPE),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
}
# What yarn and longrope may be given beside them.
ROPE_OPTIONS = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)


class Activation(NamedTuple):
    """The function of a feed-forward layer.

    name: what ops call it
    gated: the function of one projection multiplies a second projection
    """

    name: str
    gated: bool


GELU, EXACT_GELU = "gelu_tanh", "gelu_erf"
# Switch of ModelConfig -> function. At most one may be on (validate); GELU if none is. --exact-gelu
# takes GELU by the error function. This table is all that says it: a new activation is a field, a
# row here, and its two functions in ops.
ACTIVATIONS = {
    "swiglu": Activation("silu", gated=True),
    "geglu": Activation(GELU, gated=True),
    "squared_relu": Activation("squared_relu", gated=False),
}
# Kind of tokenizer -> the fields that it needs.
TOKENIZERS: dict[str, tuple[str, ...]] = {
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "NullTokenizer": ("vocab_size",),
}
SHARDING_STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")


def option(
    default: Any, help: str, choices: tuple[str, ...] | None = None, many: bool = False
) -> Any:
    """Declare a field that is also a flag.

    default: its value without the flag; None stands for "not given"
    help: its sentence in --help
    choices: the values it may have; None for any
    many: whether the flag takes several values
    """
    return field(default=default, metadata={"help": help, "choices": choices, "many": many})


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model."""

    num_layers: int = option(None, "Number of transformer layers.")
    hidden_size: int = option(None, "Width of the residual stream.")
    ffn_hidden_size: int = option(
        None,
        "Width of the feed-forward layer; 4h if not given, int(8h/3/64)*64 with --swiglu or "
        "--geglu.",
    )
    num_attention_heads: int = option(None, "Number of query heads.")
    kv_channels: int = option(None, "Size of one head; hidden size / heads if not given.")
    group_query_attention: bool = option(
        False, "Share each key-value head among several query heads."
    )
    num_query_groups: int = option(1, "Number of key-value heads, with --group-query-attention.")
    max_position_embeddings: int = option(
        None, "Longest sequence the model accepts; the sequence length if not given."
    )
    position_embedding_type: str = option(
        "learned_absolute", "How positions enter the model.", ("learned_absolute", "rope", "none")
    )
    rotary_base: float = option(10000.0, "Base of the rotary frequencies (theta).")
    rotary_percent: float = option(1.0, "Share of each head's dims that are rotated.")
    rotary_interleaved: bool = option(
        False, "Rotate neighbouring dims instead of the two halves of a head."
    )
    use_rope_scaling: bool = option(False, "Scale the rotary frequencies as Llama 3.1 does.")
    rope_scaling_factor: float = option(
        8.0, "Factor of --use-rope-scaling: 8 for Llama 3.1, 32 for Llama 3.2."
    )
    rope_scaling: str | None = option(
        None,
        "Another scaling of the rotary frequencies, as JSON in Hugging Face's words: rope_type "
        "linear, llama3, yarn or longrope (new).",
    )
    rotary_base_local: float | None = option(
        None,
        "Base of the rotary frequencies in layers with a window, which are not scaled then (new).",
    )
    normalization: str = option("LayerNorm", "Kind of norm.", ("LayerNorm", "RMSNorm"))
    norm_epsilon: float = option(1e-5, "Added to the variance inside every norm.")
    apply_layernorm_1p: bool = option(
        False, "Store the weight of every norm as its distance from 1."
    )
    norm_placement: str = option(
        "pre",
        "Where a layer's norms stand: before each branch, after it, or both (new).",
        NORM_PLACEMENTS,
    )
    parallel_residual: bool = option(
        False,
        "Attention and feed-forward layer read the same input: x + attention(x) + mlp(x) (new).",
    )
    swiglu: bool = option(False, "Gated SiLU in the feed-forward layer.")
    geglu: bool = option(False, "Gated GELU in the feed-forward layer (new).")
    exact_gelu: bool = option(
        False, "GELU by the error function instead of its tanh approximation (new)."
    )
    squared_relu: bool = option(False, "Squared ReLU in the feed-forward layer.")
    disable_bias_linear: bool = option(False, "No bias in the linear layers.")
    add_qkv_bias: bool = option(
        False, "Bias in the query, key and value projections, even with --disable-bias-linear."
    )
    add_attn_out_bias: bool = option(
        False, "Bias in the output projection of attention, even with --disable-bias-linear (new)."
    )
    qk_layernorm: bool = option(False, "Normalize queries and keys, before the rotation.")
    qk_layernorm_width: str = option(
        "head",
        "What --qk-layernorm normalizes: each head, or the projection (new).",
        ("head", "projection"),
    )
    softmax_scale: float | None = option(
        None, "Factor of the attention scores; 1 / sqrt(head size) if not given."
    )
    attn_logit_softcapping: float | None = option(
        None, "Keep attention scores in (-c, c) by c tanh(score / c) (new)."
    )
    final_logit_softcapping: float | None = option(
        None, "Keep logits in (-c, c) by c tanh(logit / c) (new)."
    )
    window_size: str | None = option(
        None, "Attend to a window: W,0 is the token itself and W before it."
    )
    window_attn_skip_freq: str | None = option(
        None,
        "Which layers have the window: N, all but every N-th, or a list of 1 (window) and 0 such "
        "as [1]*3+[0]; all if not given.",
    )
    scale_embeddings: bool = option(False, "Multiply the embeddings by sqrt(hidden size) (new).")
    untie_embeddings_and_output_weights: bool = option(
        False, "Give the output head weights of its own."
    )
    make_vocab_size_divisible_by: int = option(
        128,
        "Pad the vocabulary to a multiple of this x tensor parallel; it never changes the loss.",
    )
    init_method_std: float = option(
        0.02,
        "Standard deviation of the initial weights; residual projections start at this / sqrt(2 "
        "layers).",
    )
    hf_model_type: str | None = option(
        None,
        "Family of Hugging Face's that --save-hf exports; if not given, that of --hf-config, or "
        "the first that has such a model (new).",
    )
    attention_dropout: float = option(0.1, "Dropout of the attention probabilities.")
    hidden_dropout: float = option(0.1, "Dropout of the embeddings and of each residual branch.")

    @property
    def head_size(self) -> int:
        """Return D, the size of one head."""
        return self.kv_channels

    @property
    def num_kv_heads(self) -> int:
        """Return K, the number of key-value heads."""
        return self.num_query_groups if self.group_query_attention else self.num_attention_heads

    @property
    def linear_bias(self) -> bool:
        """Return whether linear layers have a bias, unless another switch gives them one."""
        return not self.disable_bias_linear

    @property
    def qkv_bias(self) -> bool:
        """Return whether the query, key and value projections have a bias."""
        return self.linear_bias or self.add_qkv_bias

    @property
    def attention_out_bias(self) -> bool:
        """Return whether the output projection of attention has a bias."""
        return self.linear_bias or self.add_attn_out_bias

    @property
    def _feed_forward(self) -> Activation:
        given = (kind for switch, kind in ACTIVATIONS.items() if getattr(self, switch))
        return next(given, Activation(GELU, gated=False))

    @property
    def gated(self) -> bool:
        """Return whether the feed-forward layer is down(activation(gate(x)) * up(x))."""
        return self._feed_forward.gated

    @property
    def activation(self) -> str:
        """Return the name that ops have for the function of the feed-forward layer."""
        name = self._feed_forward.name
        return EXACT_GELU if name == GELU and self.exact_gelu else name

    @property
    def norms_per_layer(self) -> int:
        """Return how many norms of the hidden states a layer has."""
        return 4 if self.norm_placement == "both" else 2

    @property
    def rope_rule(self) -> dict[str, Any] | None:
        """Return how rotary frequencies are scaled, in Hugging Face's words; None for not."""
        if self.use_rope_scaling:
            return {"rope_type": "llama3", "factor": self.rope_scaling_factor} | LLAMA3_ROPE
        return json.loads(self.rope_scaling) if self.rope_scaling else None

    def window(self, layer: int) -> int | None:
        """Return how many tokens a query of `layer` sees, itself included; None for all before it.

        Megatron's W,0 is a window of W + 1 tokens. Raises FlagError for a --window-size or
        --window-attn-skip-freq that cannot be read.
        """
        if self.window_size is None:
            return None
        before = tokens_before(self.window_size)
        has_window = layers_with_window(self.window_attn_skip_freq, self.num_layers, layer)
        return before + 1 if has_window else None

    @property
    def tied(self) -> bool:
        """Return whether the output head is the embedding."""
        return not self.untie_embeddings_and_output_weights

    def padded_vocabulary(self, vocab_size: int, tp: int) -> int:
        """Return the rows of the embedding for a vocabulary of `vocab_size`."""
        multiple = self.make_vocab_size_divisible_by * tp
        return ceil(vocab_size / multiple) * multiple


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of the run over processes."""

    tensor_model_parallel_size: int = option(1, "Processes that share each layer.")
    pipeline_model_parallel_size: int = option(1, "Stages the layers are cut into.")
    context_parallel_size: int = option(1, "Processes that share each sequence.")
    expert_model_parallel_size: int = option(1, "Processes that share the experts.")
    sequence_parallel: bool = option(
        False, "Cut norms and dropout over the tensor-parallel processes by tokens; saves memory."
    )
    pipeline_schedule: str | None = option(
        None,
        "Order of the pipeline's work; 1f1b, or interleaved with several chunks, if not given "
        "(new).",
        PIPELINE_SCHEDULES,
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "Layers of each model chunk of an interleaved pipeline."
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "Model chunks of each process of an interleaved pipeline."
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "Layers of the first pipeline process; the others share the rest."
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "Layers of the last pipeline process; the others share the rest."
    )
    pipeline_model_parallel_layout: str | None = option(
        None, "What each stage holds, such as 'Et*3|(tt|)*4,t|L': E embedding, t layer, L loss."
    )
    account_for_embedding_in_pipeline_split: bool = option(
        False, "Count the embedding as one layer when layers are shared out."
    )
    account_for_loss_in_pipeline_split: bool = option(
        False, "Count the head and loss as one layer when layers are shared out."
    )
    cp_comm_type: str = option(
        "p2p",
        "How keys and values reach the other context-parallel processes: ring, all-gather or "
        "all-to-all.",
        ("p2p", "allgather", "a2a"),
    )
    use_distributed_optimizer: bool = option(
        False, "Cut optimizer state over the data-parallel processes (ZeRO-1)."
    )
    data_parallel_sharding_strategy: str = option(
        None,
        "What data-parallel processes share out; optim with --use-distributed-optimizer, else "
        "no_shard, if not given.",
        SHARDING_STRATEGIES,
    )
    num_distributed_optimizer_instances: int = option(
        1, "Copies of the sharded state: shard within 1/this of data parallel."
    )
    overlap_grad_reduce: bool = option(
        False, "Reduce gradients while the backward pass still runs."
    )
    overlap_param_gather: bool = option(
        False,
        "Gather updated weights while the next forward pass runs, with "
        "--use-distributed-optimizer.",
    )
    ddp_bucket_size: int | None = option(
        None,
        "Elements of a gradient bucket; max(40 million, 1 million x data parallel) if not given.",
    )
    recompute_granularity: str | None = option(
        None,
        "Compute activations again in backward: all of a layer, or its attention.",
        ("full", "selective"),
    )
    recompute_method: str = option(
        "uniform",
        "Groups of --recompute-num-layers layers, or that many of each stage.",
        ("uniform", "block"),
    )
    recompute_num_layers: int = option(
        1, "Layers of a recomputed group (uniform) or recomputed layers of a stage (block)."
    )
    distributed_backend: str | None = option(
        None, "Transport; nccl on GPUs and gloo on CPUs if not given.", ("nccl", "gloo")
    )
    distributed_timeout_minutes: float = option(
        10, "Minutes a collective may take before the run ends with an error."
    )
    compile: bool = option(
        False,
        "Compile the layers with torch.compile; what passes between ranks and into gradients "
        "stays outside (new).",
    )
    deterministic_mode: bool = option(
        False, "Only deterministic kernels; an operation without one is an error."
    )
    device: str = option("auto", "Where to run (new).", ("auto", "cpu", "cuda"))
    kernels: str = option(
        "auto",
        "Implementation of the fused operations: auto, torch, triton or native, and after commas "
        "OP=ONE for single ones (new).",
    )
    attention_backend: str = option(
        "auto",
        "Which scaled-dot-product attention of PyTorch to use.",
        ("auto", "flash", "fused", "unfused", "local"),
    )

    def bucket_size(self, copies: int) -> int:
        """Return about how many elements a gradient bucket has.

        copies: processes that hold the same parameters, data x context parallel.
        """
        return self.ddp_bucket_size or max(40_000_000, 1_000_000 * copies)


@dataclass(frozen=True)
class BatchConfig:
    """Size of the batches, and the end of the run."""

    seq_length: int = option(None, "Tokens of a sample.")
    micro_batch_size: int = option(None, "Samples of one forward pass on one process.")
    global_batch_size: int = option(
        None,
        "Samples of one update over all processes; micro-batch size x data parallel if not given.",
    )
    train_iters: int = option(None, "Updates to train for.")
    train_samples: int | None = option(None, "Samples to train for, instead of --train-iters.")
    exit_interval: int | None = option(
        None, "Save and exit after an iteration that this number divides."
    )
    exit_duration_in_mins: float | None = option(None, "Save and exit after this many minutes.")
    exit_signal_handler: bool = option(
        False, "Save and exit at the end of the step on SIGTERM or SIGUSR1."
    )
    seed: int = option(1234, "Everything random follows from it.")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rate and weight decay."""

    optimizer: str = option(
        "adam",
        "adam and adamw are the same: Adam with decoupled weight decay.",
        tuple(OPTIMIZER_STATE),
    )
    lr: float = option(None, "Highest learning rate.")
    min_lr: float = option(0.0, "Lowest learning rate, also past the end of the decay.")
    lr_decay_style: str = option(
        "linear",
        "Shape of the decay.",
        ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int = option(
        None, "Iterations until the lowest rate, warm-up included; all of them if not given."
    )
    lr_warmup_iters: int = option(0, "Iterations of linear warm-up.")
    lr_warmup_fraction: float | None = option(
        None, "Warm-up as a share of the decay iterations, instead of --lr-warmup-iters."
    )
    lr_warmup_init: float = option(0.0, "Learning rate at the start of the warm-up.")
    lr_wsd_decay_style: str = option(
        "exponential",
        "Shape of the last phase of WSD.",
        ("linear", "cosine", "exponential", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = option(None, "Iterations of the last phase of WSD.")
    weight_decay: float = option(
        0.01, "Decoupled weight decay; biases and other 1-D tensors are not decayed."
    )
    clip_grad: float = option(1.0, "Clip the global gradient norm to this; 0 does not clip.")
    adam_beta1: float = option(0.9, "Decay of the first moment.")
    adam_beta2: float = option(0.999, "Decay of the second moment.")
    adam_eps: float = option(1e-8, "Added to the root of the second moment.")
    sgd_momentum: float = option(0.9, "Momentum of --optimizer sgd.")


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats. fp32 if neither bf16 nor fp16 is asked for."""

    bf16: bool = option(
        False, "bf16 weights and activations with fp32 masters and fp32 gradient accumulation."
    )
    fp16: bool = option(False, "fp16 weights and activations with fp32 masters and loss scaling.")
    loss_scale: float | None = option(None, "Constant loss scale for fp16; dynamic if not given.")
    initial_loss_scale: float = option(2.0**32, "First value of the dynamic loss scale.")
    min_loss_scale: float = option(1.0, "Lowest value of the dynamic loss scale.")
    loss_scale_window: int = option(
        1000, "Good updates in a row after which the loss scale doubles."
    )
    hysteresis: int = option(2, "Bad updates after which the loss scale is halved.")


@dataclass(frozen=True)
class DataConfig:
    """Data and tokenizer."""

    data_path: tuple[str, ...] = option(
        (), "Prefixes of .bin/.idx files, or weight prefix pairs.", many=True
    )
    split: str = option("969,30,1", "Shares of training, validation and test.")
    train_data_path: tuple[str, ...] = option(
        (), "Data for training alone, in place of --data-path and --split.", many=True
    )
    valid_data_path: tuple[str, ...] = option((), "Data for validation alone.", many=True)
    test_data_path: tuple[str, ...] = option((), "Data for testing alone.", many=True)
    data_cache_path: str | None = option(
        None, "Folder of the index cache; beside the data if not given."
    )
    mock_data: bool = option(False, "Train on made-up tokens.")
    num_workers: int = option(2, "Processes that read data, per rank.")
    dataloader_type: str = option(
        "single", "Samples come in one pass over the order of the run.", ("single",)
    )
    reset_position_ids: bool = option(False, "Count positions from the start of each document.")
    reset_attention_mask: bool = option(False, "Attention does not cross the end of a document.")
    eod_mask_loss: bool = option(
        False, "Leave predictions made from an end-of-document token out of the loss."
    )
    tokenizer_type: str = option(None, "Kind of tokenizer.", tuple(TOKENIZERS))
    tokenizer_model: str | None = option(None, "Folder or file of the tokenizer.")
    vocab_file: str | None = option(None, "vocab.json of GPT2BPETokenizer.")
    merge_file: str | None = option(None, "merges.txt of GPT2BPETokenizer.")
    vocab_size: int | None = option(
        None,
        "NullTokenizer: ids run from 0 to this - 1, the end of document is this. Others: may only "
        "enlarge.",
    )

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Return the five tokenizer flags, as data.tokenizer.build_tokenizer takes them."""
        return {
            "tokenizer_type": self.tokenizer_type,
            "tokenizer_model": self.tokenizer_model,
            "vocab_file": self.vocab_file,
            "merge_file": self.merge_file,
            "vocab_size": self.vocab_size,
        }


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and loading of checkpoints."""

    save: str | None = option(None, "Folder that checkpoints are published in.")
    load: str | None = option(None, "Folder to resume from: that of --save, or one iter_N in it.")
    async_save: bool = option(
        False, "Write checkpoints in processes of their own while training goes on."
    )
    save_interval: int | None = option(
        None, "Iterations between checkpoints; the last iteration is saved as well."
    )
    non_persistent_save_interval: int | None = option(
        None, "Iterations between checkpoints that the next one replaces."
    )
    save_keep_last: int | None = option(
        None, "Keep this many of the newest checkpoints and delete older ones (new)."
    )
    save_retain_interval: int | None = option(
        None,
        "Keep the newest checkpoint and those of iterations that this number divides; delete the "
        "others.",
    )
    save_keep_best: int | None = option(
        None,
        "Keep the newest checkpoint and this many of the lowest validation loss; delete the "
        "others (new).",
    )
    ckpt_step: int | None = option(None, "Load this iteration and no other.")
    load_mode: str | None = option(
        None,
        "What --load takes over, by the table in docs/checkpoints.md; continue (everything), or "
        "model_only with --finetune, if not given (new).",
        (
            "continue",
            "model_only",
            "model_data",
            "model_opt_data",
            "optimizer_only",
            "transfer",
            "transfer_with_lr",
            "cooldown",
        ),
    )
    cooldown_iters: int | None = option(
        None,
        "Iterations from the loaded checkpoint down to --min-lr, with --load-mode cooldown (new).",
    )
    finetune: bool = option(False, "Load the weights alone and start at iteration 0.")
    no_load_optim: bool = option(False, "Leave the optimizer's moments as they start.")
    exit_on_missing_checkpoint: bool = option(
        True,
        "A missing --load is an error; Megatron's way, to start from scratch, is "
        "--no-exit-on-missing-checkpoint.",
    )
    save_hf: str | None = option(
        None, "At the end, export the weights as a Hugging Face folder (new)."
    )


@dataclass(frozen=True)
class LoggingConfig:
    """Reports and evaluation."""

    log_interval: int = option(100, "Iterations between log lines.")
    eval_interval: int = option(1000, "Iterations between evaluations.")
    eval_iters: int = option(100, "Global batches of one evaluation; 0 for none.")
    log_throughput: bool = option(False, "Add tokens/s, TFLOP/s and MFU to the log line.")
    tensorboard_dir: str | None = option(None, "Folder for TensorBoard.")
    metrics_jsonl: str | None = option(
        None,
        "File of one JSON object per iteration; metrics.jsonl under --save if not given (new).",
    )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @staticmethod
    def of(values: dict[str, Any]) -> "Config":
        """Return a configuration of field names and values, whatever their sections.

        Names that no section has are the caller's error.
        """
        sections = {}
        for name, section in SECTIONS.items():
            names = {item.name for item in fields(section)}
            own = {key: value for key, value in values.items() if key in names}
            sections[name] = section(**own)
        return Config(**sections)

    def sections(self) -> dict[str, dict[str, Any]]:
        """Return plain nested values, as the resolved configuration is printed and saved."""
        return {name: _plain(getattr(self, name)) for name in SECTIONS}


# Section -> its class.
SECTIONS: dict[str, Any] = {item.name: type(item.default) for item in fields(Config)}


def _plain(section: Any) -> dict[str, Any]:
    values = {item.name: getattr(section, item.name) for item in fields(section)}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def flag_of(field_name: str) -> str:
    """Return the flag of a field: --num-layers for num_layers."""
    return "--" + field_name.replace("_", "-")


def wrong_types(section: Any) -> list[str]:
    """Return what a section that did not come through flags holds of the wrong type.

    Each as "field is value".
    """
    found = []
    for item in fields(section):
        value = getattr(section, item.name)
        if not _is_of_type(value, item):
            found.append(f"{item.name} is {value!r}")
    return found


def _is_of_type(value: Any, item: Any) -> bool:
    if value is None and item.default is None:
        return True  # not given
    kinds = get_args(item.type) or (item.type,)
    if float in kinds and type(value) is int:
        return True
    is_finite = not isinstance(value, float) or isfinite(value)
    return type(value) in kinds and is_finite
