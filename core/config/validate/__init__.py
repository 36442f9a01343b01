"""What can be wrong with a configuration: every problem at once, each with its flag, both numbers and a remedy."""

import os
from collections.abc import Iterator
from math import lcm

from ..pipeline.from_flags import placement_of, stage_specs
from .defaults import data_parallel_size
from .fields import (
    ACTIVATIONS,
    EXACT_GELU,
    ROPE_OPTIONS,
    ROPE_SCALINGS,
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
)


def validate(config: Config, world_size: int) -> list[str]:
    """All problems of a resolved configuration on `world_size` processes; empty where there are none."""
    checks = (
        _missing,
        _model,
        _parallel,
        _batch,
        _optimizer,
        _precision,
        _data,
        _checkpoint,
        _logging,
    )
    return [problem for check in checks for problem in check(config, world_size)]


def _missing(config: Config, world_size: int) -> Iterator[str]:
    needed = {
        "num_layers": config.model.num_layers,
        "hidden_size": config.model.hidden_size,
        "num_attention_heads": config.model.num_attention_heads,
        "seq_length": config.batch.seq_length,
        "micro_batch_size": config.batch.micro_batch_size,
        "lr": config.optimizer.lr,
    }
    for name, value in needed.items():
        if value is None:
            preset = ", or a model by --preset" if hasattr(config.model, name) else ""
            yield f"{_flag(name)} is missing; give it on the command line, in a --config file{preset}"
    if config.batch.train_iters is None and config.batch.train_samples is None:
        yield "--train-iters is missing; give it, or --train-samples"


def model_problems(model: ModelConfig) -> list[str]:
    """What is wrong with a model by itself, whatever it is trained on and how it is laid out."""
    return list(_model(Config(model=model), 1))


def _model(config: Config, world_size: int) -> Iterator[str]:
    model, length = config.model, config.batch.seq_length
    names = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_channels",
        "num_query_groups",
        "make_vocab_size_divisible_by",
    )
    yield from _positive(model, *names, "rotary_base", "rope_scaling_factor", "init_method_std")
    if model.norm_epsilon < 0:
        yield f"--norm-epsilon {model.norm_epsilon} must not be negative"
    heads = model.num_attention_heads
    if (
        model.hidden_size
        and heads
        and heads > 0
        and model.hidden_size % heads
        and model.hidden_size // heads == model.kv_channels
    ):
        near = _nearest_multiples(model.hidden_size, heads)
        yield f"--hidden-size {model.hidden_size} is not a multiple of --num-attention-heads {heads}; use {near}, or set --kv-channels"
    if (
        model.group_query_attention
        and heads
        and model.num_query_groups > 0
        and heads % model.num_query_groups
    ):
        divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        yield f"--num-query-groups {model.num_query_groups} does not divide --num-attention-heads {heads}; use one of {divisors}"
    if model.num_query_groups > 1 and not model.group_query_attention:
        yield f"--num-query-groups {model.num_query_groups} needs --group-query-attention"
    activations = [_flag(name) for name in ACTIVATIONS if getattr(model, name)]
    if len(activations) > 1:
        yield f"{' and '.join(activations)} exclude each other; give one"
    if model.exact_gelu and model.activation != EXACT_GELU:
        yield f"--exact-gelu has no GELU to act on with {activations[0]}; leave one out"
    if model.qk_layernorm_width == "projection" and not model.qk_layernorm:
        yield "--qk-layernorm-width projection needs --qk-layernorm"
    if model.qk_layernorm_width == "projection" and (
        model.normalization != "RMSNorm" or model.apply_layernorm_1p
    ):
        yield "--qk-layernorm-width projection is an RMSNorm with a plain weight; give --normalization RMSNorm without --apply-layernorm-1p"
    if model.parallel_residual and model.norm_placement == "post":
        yield "--parallel-residual needs the norms before the branches; give --norm-placement pre or both"
    if model.use_rope_scaling and model.position_embedding_type != "rope":
        yield f"--use-rope-scaling needs --position-embedding-type rope, not {model.position_embedding_type}"
    if length and model.max_position_embeddings and length > model.max_position_embeddings:
        yield f"--seq-length {length} is longer than --max-position-embeddings {model.max_position_embeddings}; raise the latter to {length}"
    yield from _attention(model)
    yield from _rotary(model)
    for name in ("attention_dropout", "hidden_dropout"):
        if not 0 <= getattr(model, name) < 1:
            yield f"{_flag(name)} {getattr(model, name)} is not in [0, 1)"


def _attention(model: ModelConfig) -> Iterator[str]:
    """Scores and windows."""
    yield from _positive(
        model, "softmax_scale", "attn_logit_softcapping", "final_logit_softcapping"
    )
    if model.attn_logit_softcapping and model.attention_dropout > 0:
        cap = f"--attn-logit-softcapping {model.attn_logit_softcapping}"
        yield f"{cap} has no attention dropout; give --attention-dropout 0, not {model.attention_dropout}"
    if model.window_attn_skip_freq is not None and model.window_size is None:
        yield f"--window-attn-skip-freq {model.window_attn_skip_freq} needs --window-size"
    try:
        model.window(0)
    except ValueError as error:
        yield str(error)


def _rotary(model: ModelConfig) -> Iterator[str]:
    if model.position_embedding_type != "rope":
        for name in ("rope_scaling", "rotary_base_local"):
            if getattr(model, name) is not None:
                yield f"{_flag(name)} {getattr(model, name)} needs --position-embedding-type rope, not {model.position_embedding_type}"
        return
    if not model.kv_channels:
        return
    yield from _positive(model, "rotary_base_local")
    if model.rotary_base_local and model.window_size is None:
        yield f"--rotary-base-local {model.rotary_base_local} is for layers with a window; give --window-size, or leave it out"
    rotated = int(model.kv_channels * model.rotary_percent)
    if not 0 < model.rotary_percent <= 1:
        yield f"--rotary-percent {model.rotary_percent} is not in (0, 1]"
    elif rotated % 2:
        yield f"--rotary-percent {model.rotary_percent} of a head of {model.kv_channels} rotates {rotated} dims; the number must be even"
    if model.rope_scaling is not None:
        yield from _rope_scaling(model, rotated // 2)


def _rope_scaling(model: ModelConfig, pairs: int) -> Iterator[str]:
    """pairs: how many frequencies there are."""
    if model.use_rope_scaling:
        yield "--use-rope-scaling and --rope-scaling exclude each other; give one"
        return
    try:
        rule = dict(model.rope_rule)
    except (ValueError, TypeError):
        yield (
            f"--rope-scaling {model.rope_scaling} is no JSON object such as "
            + '{"rope_type":"linear","factor":2.0}'
        )
        return
    kind = rule.get("rope_type")
    if kind not in ROPE_SCALINGS:
        yield f"--rope-scaling: rope_type {kind!r} is none of {', '.join(ROPE_SCALINGS)}"
        return
    for key in ROPE_SCALINGS[kind]:
        value = rule.get(key)
        if key.endswith(("short_factor", "long_factor")):
            numbers = value if isinstance(value, list) else []
            if len(numbers) != pairs or not all(_is_positive(number) for number in numbers):
                yield f"--rope-scaling: {kind} needs {key}, {pairs} numbers above 0 (half of the dims of a head that are rotated), not {value}"
        elif not _is_positive(value):
            yield f"--rope-scaling: {kind} needs {key}, a number above 0, not {value}"
    options = ROPE_OPTIONS if kind in ("yarn", "longrope") else ()
    for key, value in rule.items():
        if key not in ("rope_type", *ROPE_SCALINGS[kind], *options):
            yield f"--rope-scaling: {key} is nothing that {kind} has; it takes {', '.join((*ROPE_SCALINGS[kind], *options)) or 'nothing'}"
        elif key in options and key != "truncate" and value is not None and not _is_positive(value):
            yield f"--rope-scaling: {key} must be a number above 0, not {value}"
    if kind == "yarn" and model.rotary_base <= 1:
        yield f"--rope-scaling yarn needs --rotary-base above 1, not {model.rotary_base}"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _parallel(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    yield from _positive(
        parallel,
        *sizes,
        "num_distributed_optimizer_instances",
        "ddp_bucket_size",
        "recompute_num_layers",
    )
    counts = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
    yield from _positive(
        parallel, *counts, "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
    )
    if parallel.expert_model_parallel_size != 1:
        yield f"--expert-model-parallel-size {parallel.expert_model_parallel_size}: there are no experts in this version; use 1"
    if parallel.distributed_timeout_minutes <= 0:
        yield f"--distributed-timeout-minutes {parallel.distributed_timeout_minutes} must be above 0"
    if parallel.device == "cpu" and parallel.distributed_backend == "nccl":
        yield "--distributed-backend nccl cannot carry --device cpu; use gloo"
    numbers = [getattr(parallel, name) for name in (*sizes, *counts)]
    if (
        any(number is not None and number < 1 for number in numbers)
        or parallel.num_distributed_optimizer_instances < 1
    ):
        return
    tp, pp, cp = numbers[:3]
    if world_size % (tp * pp * cp):
        unit = f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x --context-parallel-size {cp} = {tp * pp * cp}"
        yield f"{world_size} processes are not a multiple of {unit}; start {_nearest_multiples(world_size, tp * pp * cp)}, or change the sizes"
    yield from _tensor(config.model, tp)
    yield from _sequence(config)
    yield from _pipeline(config)
    yield from _sharding(config, world_size)


def _tensor(model: ModelConfig, tp: int) -> Iterator[str]:
    heads, kv_heads, width = model.num_attention_heads, model.num_kv_heads, model.ffn_hidden_size
    for name, value in (("num_attention_heads", heads), ("ffn_hidden_size", width)):
        if value and value % tp:
            yield f"{_flag(name)} {value} cannot be cut over --tensor-model-parallel-size {tp}; use {_nearest_multiples(value, tp)}, or another size"
    if kv_heads and kv_heads > 0 and kv_heads % tp and tp % kv_heads and not (heads and heads % tp):
        yield f"--num-query-groups {kv_heads} neither is a multiple of --tensor-model-parallel-size {tp} nor divides it; change one of them"


def _sequence(config: Config) -> Iterator[str]:
    """What cuts a sample by tokens."""
    model, parallel, length = config.model, config.parallel, config.batch.seq_length
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if cp > 1 and length and length % (2 * cp):
        yield f"--seq-length {length} is not a multiple of 2 x --context-parallel-size {cp}; use {_nearest_multiples(length, 2 * cp)}"
    elif parallel.sequence_parallel and length and length // cp % tp:
        unit = f"--context-parallel-size {cp} x --tensor-model-parallel-size {tp}"
        near = _nearest_multiples(length, tp if cp == 1 else lcm(2 * cp, cp * tp))
        yield f"--sequence-parallel: --seq-length {length} cannot be cut over {unit}; use {near}"
    if cp == 1:
        return
    ring = "--cp-comm-type p2p"
    if parallel.cp_comm_type == "p2p" and config.data.reset_attention_mask:
        yield f"{ring} cannot keep attention inside documents (--reset-attention-mask); use --cp-comm-type allgather or a2a"
    if parallel.cp_comm_type == "p2p" and model.attention_dropout > 0:
        yield f"{ring} has no attention dropout; give --attention-dropout 0, or use --cp-comm-type allgather or a2a"
    heads = model.num_attention_heads
    if parallel.cp_comm_type == "a2a" and heads and heads % tp == 0 and heads // tp % cp:
        unit = f"--tensor-model-parallel-size {tp} x --context-parallel-size {cp} = {tp * cp}"
        yield f"--cp-comm-type a2a: --num-attention-heads {heads} cannot be cut over {unit}; use --cp-comm-type p2p or allgather"


def _pipeline(config: Config) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    if not layers or layers < 1:
        return
    try:
        placement = placement_of(parallel, layers)
        stage_specs(parallel, layers)
    except ValueError as error:
        yield str(error)
        return
    if (
        placement.num_stages > 1
        and parallel.data_parallel_sharding_strategy == "optim_grads_params"
    ):
        stages = f"a pipeline of {placement.num_stages} stages"
        yield f"--data-parallel-sharding-strategy optim_grads_params cannot be combined with {stages}; use optim_grads"
    if placement.schedule in ("zb-h1", "zb-v") and parallel.recompute_granularity == "full":
        yield f"--pipeline-schedule {placement.schedule} defers weight gradients: not with --recompute-granularity full; use selective"


def _sharding(config: Config, world_size: int) -> Iterator[str]:
    """Data parallel: what is cut over its processes."""
    parallel, strategy = config.parallel, config.parallel.data_parallel_sharding_strategy
    copies, instances = (
        data_parallel_size(parallel, world_size) * parallel.context_parallel_size,
        parallel.num_distributed_optimizer_instances,
    )
    if parallel.use_distributed_optimizer and strategy == "no_shard":
        yield "--use-distributed-optimizer and --data-parallel-sharding-strategy no_shard exclude each other; give one"
    if instances > 1 and strategy == "no_shard":
        yield f"--num-distributed-optimizer-instances {instances} needs --use-distributed-optimizer"
    elif copies % instances:
        yield f"--num-distributed-optimizer-instances {instances} does not divide data parallel x context parallel = {copies}; use 1"
    if parallel.overlap_param_gather and strategy == "no_shard":
        yield "--overlap-param-gather needs --use-distributed-optimizer: nothing is gathered without it"


def _batch(config: Config, world_size: int) -> Iterator[str]:
    batch: BatchConfig = config.batch
    yield from _positive(
        batch,
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "train_samples",
        "exit_interval",
        "exit_duration_in_mins",
    )
    if batch.train_iters is not None and batch.train_iters <= 0:
        given = (
            f"--train-samples {batch.train_samples} is less than one batch:"
            if batch.train_samples
            else f"--train-iters {batch.train_iters}:"
        )
        yield f"{given} there must be at least 1 iteration"
    micro, total = batch.micro_batch_size, batch.global_batch_size
    if micro and total and micro > 0 and total > 0:
        dp = data_parallel_size(config.parallel, world_size)
        if total % (micro * dp):
            near = _nearest_multiples(total, micro * dp)
            unit = f"--micro-batch-size {micro} x data parallel {dp} = {micro * dp}"
            yield f"--global-batch-size {total} is not a multiple of {unit}; nearest that work: {near}"
    if (
        batch.train_samples
        and batch.train_iters
        and total
        and batch.train_iters != batch.train_samples // total
    ):
        yield f"--train-samples {batch.train_samples} and --train-iters {batch.train_iters} are both given; give one"
    if not 0 <= batch.seed < 2**32:
        yield f"--seed {batch.seed} is not in [0, 2^32)"


def _optimizer(config: Config, world_size: int) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.lr is not None and optimizer.lr <= 0:
        yield f"--lr {optimizer.lr} must be above 0"
    if optimizer.lr is not None and not 0 <= optimizer.min_lr <= optimizer.lr:
        yield f"--min-lr {optimizer.min_lr} is not between 0 and --lr {optimizer.lr}"
    if optimizer.lr is not None and not 0 <= optimizer.lr_warmup_init <= optimizer.lr:
        yield f"--lr-warmup-init {optimizer.lr_warmup_init} is not between 0 and --lr {optimizer.lr}"
    yield from _positive(optimizer, "lr_decay_iters", "lr_wsd_decay_iters")
    fraction, decay = optimizer.lr_warmup_fraction, optimizer.lr_decay_iters
    if fraction is not None and not 0 <= fraction < 1:
        yield f"--lr-warmup-fraction {fraction} is not in [0, 1)"
    if fraction is not None and optimizer.lr_warmup_iters:
        yield f"--lr-warmup-fraction {fraction} and --lr-warmup-iters {optimizer.lr_warmup_iters} are both given; give one"
    if decay and fraction is None and not 0 <= optimizer.lr_warmup_iters < decay:
        yield f"--lr-warmup-iters {optimizer.lr_warmup_iters} is not below --lr-decay-iters {decay}; warm up for at most {decay - 1}"
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_iters is None:
        yield "--lr-decay-style WSD needs --lr-wsd-decay-iters"
    if optimizer.lr_wsd_decay_iters and decay and optimizer.lr_wsd_decay_iters > decay:
        yield f"--lr-wsd-decay-iters {optimizer.lr_wsd_decay_iters} is more than --lr-decay-iters {decay}"
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"{_flag(name)} {getattr(optimizer, name)} is not in [0, 1)"
    if not 0 <= optimizer.sgd_momentum < 1:
        yield f"--sgd-momentum {optimizer.sgd_momentum} is not in [0, 1)"
    for name in ("weight_decay", "clip_grad", "adam_eps"):
        if getattr(optimizer, name) < 0:
            yield f"{_flag(name)} {getattr(optimizer, name)} must not be negative"


def _precision(config: Config, world_size: int) -> Iterator[str]:
    precision = config.precision
    if precision.bf16 and precision.fp16:
        yield "--bf16 and --fp16 exclude each other; give one"
    if precision.loss_scale is not None and not precision.fp16:
        yield f"--loss-scale {precision.loss_scale} needs --fp16"
    yield from _positive(
        precision,
        "loss_scale",
        "initial_loss_scale",
        "min_loss_scale",
        "loss_scale_window",
        "hysteresis",
    )


def _data(config: Config, world_size: int) -> Iterator[str]:
    data = config.data
    per_split = [
        name
        for name in ("train_data_path", "valid_data_path", "test_data_path")
        if getattr(data, name)
    ]
    sources = [
        f
        for f, given in (
            ("--data-path", data.data_path),
            ("--mock-data", data.mock_data),
            ("--train-data-path", per_split),
        )
        if given
    ]
    if not sources:
        yield "no data: give --data-path PREFIX (made by tools/preprocess_data.py), or --mock-data"
    if len(sources) > 1:
        yield f"{' and '.join(sources)} exclude each other; give one"
    if per_split and not data.train_data_path:
        yield f"{_flag(per_split[0])} needs --train-data-path"
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        yield from _prefixes(name, getattr(data, name))
    yield from _split(data.split)
    if data.num_workers < 0:
        yield f"--num-workers {data.num_workers} must not be negative"
    yield from _tokenizer(config)


def _prefixes(name: str, items: tuple[str, ...]) -> Iterator[str]:
    """Both files of every prefix must be there; a number may be a weight."""
    for item in items:
        missing = [
            item + suffix for suffix in (".idx", ".bin") if not os.path.exists(item + suffix)
        ]
        if missing and not _is_number(item):
            yield f"{_flag(name)} {item}: no file {' and no file '.join(missing)}; give the path without .bin or .idx"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _split(split: str) -> Iterator[str]:
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        yield f"--split {split!r} is not up to three shares such as 969,30,1"


def _tokenizer(config: Config) -> Iterator[str]:
    data, kind = config.data, config.data.tokenizer_type
    needs = {
        None: (),
        "NullTokenizer": ("vocab_size",),
        "GPT2BPETokenizer": ("vocab_file", "merge_file"),
        "HuggingFaceTokenizer": ("tokenizer_model",),
        "SentencePieceTokenizer": ("tokenizer_model",),
        "TikTokenizer": ("tokenizer_model",),
    }
    if kind is None:
        yield "--tokenizer-type is missing; give it with --tokenizer-model, or NullTokenizer with --vocab-size for data without text"
    for name in needs[kind]:
        if getattr(data, name) is None:
            yield f"--tokenizer-type {kind} needs {_flag(name)}"
    yield from _positive(data, "vocab_size")
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        path = getattr(data, name)
        if path is not None and name in needs[kind] and not os.path.exists(path):
            yield f"{_flag(name)} {path}: no such file or folder"


def _checkpoint(config: Config, world_size: int) -> Iterator[str]:
    checkpoint = config.checkpoint
    for name in ("save", "load", "save_hf"):
        if getattr(checkpoint, name) == "":
            yield f"{_flag(name)} is empty; name a folder, or leave it out"
    for name in (
        "save_interval",
        "non_persistent_save_interval",
        "save_keep_last",
        "save_retain_interval",
        "save_keep_best",
    ):
        yield from _positive(checkpoint, name)
        if getattr(checkpoint, name) and not checkpoint.save:
            yield f"{_flag(name)} {getattr(checkpoint, name)} needs --save FOLDER"
    if checkpoint.async_save and not checkpoint.save:
        yield "--async-save needs --save FOLDER"
    if checkpoint.save_hf and not checkpoint.save:
        yield f"--save-hf {checkpoint.save_hf} needs --save FOLDER: what is exported is the last checkpoint"
    yield from _best(config)
    yield from _loading(checkpoint)
    if checkpoint.save and os.path.isfile(os.path.join(checkpoint.save, "config.json")):
        yield f"--save {checkpoint.save} holds a config.json: it is a Hugging Face folder, and --load would take it for one; name another folder"
    yield from _writable("save", checkpoint.save)
    yield from _writable("save_hf", checkpoint.save_hf)


def _best(config: Config) -> Iterator[str]:
    """Every checkpoint that competes needs a loss that was measured at its iteration."""
    count, saved, evaluated = (
        config.checkpoint.save_keep_best,
        config.checkpoint.save_interval,
        config.logging.eval_interval,
    )
    if not count:
        return
    if config.logging.eval_iters <= 0:
        yield f"--save-keep-best {count} needs validation losses, and --eval-iters {config.logging.eval_iters} measures none; raise it"
    elif not _validates(config.data):
        yield f"--save-keep-best {count} needs validation losses, and there is no validation data; give it a share in --split, or --valid-data-path"
    if saved is None:
        yield f"--save-keep-best {count} needs --save-interval, a multiple of --eval-interval {evaluated}"
    elif evaluated > 0 and saved % evaluated:
        near = _nearest_multiples(saved, evaluated)
        yield f"--save-keep-best {count}: --save-interval {saved} is not a multiple of --eval-interval {evaluated}; save every {near}"


def _validates(data: DataConfig) -> bool:
    shares = [share.strip() for share in data.split.split(",")]
    split_off = (
        not data.train_data_path
        and len(shares) > 1
        and (not _is_number(shares[1]) or float(shares[1]) > 0)
    )
    return bool(data.valid_data_path) or split_off


def _loading(checkpoint: CheckpointConfig) -> Iterator[str]:
    """What --load takes over."""
    mode = checkpoint.load_mode
    if checkpoint.ckpt_step is not None and not checkpoint.load:
        yield f"--ckpt-step {checkpoint.ckpt_step} needs --load FOLDER"
    if mode and not checkpoint.load:
        yield f"--load-mode {mode} needs --load FOLDER"
    for name in ("finetune", "no_load_optim"):
        if getattr(checkpoint, name) and not checkpoint.load:
            yield f"{_flag(name)} needs --load FOLDER"
    if checkpoint.finetune and mode not in (None, "model_only"):
        yield f"--finetune is --load-mode model_only, not {mode}; give one of them"
    if checkpoint.no_load_optim and mode == "optimizer_only":
        yield "--no-load-optim leaves out all that --load-mode optimizer_only loads; give one of them"
    yield from _positive(checkpoint, "cooldown_iters")
    if mode == "cooldown" and checkpoint.cooldown_iters is None:
        yield "--load-mode cooldown needs --cooldown-iters N"
    if mode != "cooldown" and checkpoint.cooldown_iters is not None:
        yield f"--cooldown-iters {checkpoint.cooldown_iters} needs --load-mode cooldown"
    begins = (
        f"--load-mode {mode}"
        if mode not in (None, "continue")
        else "--finetune"
        if checkpoint.finetune
        else None
    )
    if (
        begins
        and checkpoint.load
        and checkpoint.save
        and os.path.realpath(checkpoint.load) == os.path.realpath(checkpoint.save)
    ):
        yield f"{begins}: --load and --save are both {checkpoint.save}; given again, it would begin from its own checkpoints; give another --save"


def _logging(config: Config, world_size: int) -> Iterator[str]:
    yield from _writable("tensorboard_dir", config.logging.tensorboard_dir)
    if config.logging.metrics_jsonl:
        yield from _writable(
            "metrics_jsonl", os.path.dirname(os.path.abspath(config.logging.metrics_jsonl))
        )
    yield from _positive(config.logging, "log_interval", "eval_interval")
    if config.logging.eval_iters < 0:
        yield f"--eval-iters {config.logging.eval_iters} must not be negative"


def _writable(name: str, folder: str | None) -> Iterator[str]:
    """The folder, or the nearest one above it that is there, must take files."""
    if not folder:
        return
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        yield f"{_flag(name)} {folder}: {existing} is no folder; name another"
    elif not os.access(existing, os.W_OK):
        yield f"{_flag(name)} {folder}: no permission to write in {existing}; name another folder"


def _positive(section: object, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value > 0:
            yield f"{_flag(name)} {value} must be above 0"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _nearest_multiples(value: int, unit: int) -> str:
    below, above = value // unit * unit, (value // unit + 1) * unit
    return f"{below}, {above}" if below else str(above)
