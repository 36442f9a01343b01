"""Megatron-LM's flags that are no field of ours: without effect, refused, or another spelling."""

# Flags of Megatron that change nothing here, by how many values they take. They are accepted, and
# listed in one notice. A trailing * stands for any ending.
_SWITCHES = """
    use-mcore-models no-load-rng no-save-rng use-dist-ckpt auto-detect-ckpt-format
    calculate-per-token-loss no-query-key-layer-scaling accumulate-allreduce-grads-in-fp32
    attention-softmax-in-fp32 cross-entropy-loss-fusion no-persist-layer-norm
    use-cpu-initialization no-masked-softmax-fusion no-bias-gelu-fusion no-bias-swiglu-fusion
    no-bias-dropout-fusion no-rope-fusion no-gradient-accumulation-fusion
    gradient-accumulation-fusion bias-gelu-fusion bias-swiglu-fusion bias-dropout-fusion
    apply-rope-fusion disable-jit-fuser no-async-tensor-model-parallel-allreduce
    async-tensor-model-parallel-allreduce no-overlap-p2p-communication delay-wgrad-compute
    no-create-attention-mask-in-dataloader create-attention-mask-in-dataloader use-flash-attn
    manual-gc lazy-mpu-init no-check-for-nan-in-loss-and-grad check-for-nan-in-loss-and-grad
    override-opt-param-scheduler no-mmap-bin-files no-ckpt-fully-parallel-save
    ckpt-fully-parallel-save ckpt-fully-parallel-load ckpt-assume-constant-structure
    use-persistent-ckpt-worker log-validation-ppl-to-tensorboard log-timers-to-tensorboard
    log-learning-rate-to-tensorboard log-loss-scale-to-tensorboard
    no-log-loss-scale-to-tensorboard log-memory-to-tensorboard log-world-size-to-tensorboard
    log-batch-size-to-tensorboard log-params-norm log-num-zeros-in-grad log-progress log-energy
    log-straggler disable-straggler-on-startup no-one-logger enable-one-logger one-logger-async
    no-barrier-with-level-1-timing use-tp-pp-dp-mapping use-sharp tp-comm-* nvtx-ranges
    te-rng-tracker inference-rng-tracker enable-gloo-process-groups disable-gloo-process-groups
    ddp-average-in-collective align-grad-reduce no-align-grad-reduce align-param-gather
"""
_WITH_VALUE = """
    transformer-impl local-rank ckpt-format dist-ckpt-format dist-ckpt-strictness
    manual-gc-interval tensorboard-log-interval tensorboard-queue-size timing-log-level
    timing-log-option data-impl distributed-timeout-seconds-after-init empty-unused-memory-level
    check-weight-hash-across-dp-replicas-interval ddp-num-buckets nccl-communicator-config-path
    high-priority-stream-groups cross-entropy-fusion-impl num-dataset-builder-threads rerun-mode
    logging-level one-logger-project one-logger-run-name
"""
WITHOUT_EFFECT = {**dict.fromkeys(_SWITCHES.split(), 0), **dict.fromkeys(_WITH_VALUE.split(), 1)}

# Flags that ask for something else than happens here: refused, with what to use instead.
_LATER = "is not available in this version"
REFUSED = {
    "use-torch-fsdp2": (
        "has no counterpart; use --data-parallel-sharding-strategy optim_grads_params"
    ),
    "use-megatron-fsdp": (
        "has no counterpart; use --data-parallel-sharding-strategy optim_grads_params"
    ),
    "step-batch-size-schedule": f"{_LATER}; use a constant --global-batch-size",
    "rampup-batch-size": f"{_LATER}; use a constant --global-batch-size",
    "num-experts": f"{_LATER}; leave it out",
    "expert-tensor-parallel-size": f"{_LATER}; leave it out",
    "use-legacy-models": "has no counterpart; leave it out",
    "apply-query-key-layer-scaling": (
        "has no counterpart; leave it out: scores are computed in fp32"
    ),
    "fp32-residual-connection": "has no counterpart; leave it out, or train in fp32",
    "init-method-xavier-uniform": "has no counterpart; use --init-method-std",
    "train-data-exact-num-epochs": "has no counterpart; use --train-samples",
    "data-args-path": f"{_LATER}; use --data-path",
    "no-save-optim": (
        "has no counterpart: a checkpoint always resumes; use --save-hf for weights alone"
    ),
    "lr-decay-samples": "has no counterpart; use --lr-decay-iters",
    "lr-warmup-samples": "has no counterpart; use --lr-warmup-iters or --lr-warmup-fraction",
    "exit-signal": f"{_LATER}; --exit-signal-handler takes SIGTERM and SIGUSR1",
    "start-weight-decay": f"{_LATER}; use a constant --weight-decay",
    "end-weight-decay": f"{_LATER}; use a constant --weight-decay",
    "weight-decay-incr-style": f"{_LATER}; use a constant --weight-decay",
    "grad-reduce-in-bf16": "has no counterpart: gradients are summed in fp32; leave it out",
    "ckpt-convert-format": "has no counterpart; leave it out",
    "eval-only": "has no counterpart; use tools/evaluate.py",
    "skip-train": "has no counterpart; use tools/evaluate.py",
    "full-validation": f"{_LATER}; use --eval-iters",
    "multiple-validation-sets": f"{_LATER}; leave it out",
    "per-split-data-args-path": (
        f"{_LATER}; use --train-data-path, --valid-data-path, --test-data-path"
    ),
    "multi-latent-attention": f"{_LATER}; leave it out",
    "rotary-seq-len-interpolation-factor": (
        'has no counterpart; use --rope-scaling \'{"rope_type":"linear","factor":F}\''
    ),
    "label-smoothing": "has no counterpart; leave it out",
    "cuda-graph-impl": f"{_LATER}; leave it out",
    "enable-cuda-graph": f"{_LATER}; leave it out",
    "profile": f"{_LATER}; leave it out",
    "no-initialization": (
        "has no counterpart: initial weights depend on the seed alone; leave it out"
    ),
    "data-parallel-random-init": (
        "has no counterpart: initial weights depend on the seed alone; leave it out"
    ),
    "openai-gelu": "has no counterpart: GELU is the tanh approximation already; leave it out",
    "quick-geglu": "has no counterpart; use --geglu",
    "lr-wsd-decay-samples": "has no counterpart; use --lr-wsd-decay-iters",
    "first-last-layers-bf16": f"{_LATER}; use --bf16",
    "fp16-lm-cross-entropy": "has no counterpart: the loss is computed in fp32; leave it out",
    "use-precision-aware-optimizer": (
        "has no counterpart: masters and moments are fp32; leave it out"
    ),
    "main-grads-dtype": "has no counterpart: gradients are summed in fp32; leave it out",
    "main-params-dtype": "has no counterpart: masters are fp32; leave it out",
    "exp-avg-dtype": "has no counterpart: moments are fp32; leave it out",
    "exp-avg-sq-dtype": "has no counterpart: moments are fp32; leave it out",
    "optimizer-cpu-offload": f"{_LATER}; leave it out",
    "distribute-saved-activations": f"{_LATER}; leave it out",
    "overlap-param-gather-with-optimizer-step": f"{_LATER}; leave it out",
    "embedding-init-method-std": "has no counterpart; use --init-method-std",
    "head-lr-mult": "has no counterpart; leave it out",
    "glu-linear-offset": "has no counterpart; leave it out",
    "softmax-type": "has no counterpart; leave it out",
    "pretrained-checkpoint": "has no counterpart; use --load with --finetune",
    "tiktoken-pattern": "cannot be chosen; leave it out for Megatron's v2",
    "vocab-extra-ids": "has no counterpart; enlarge --vocab-size",
    "spec": "has no counterpart: the model is what its flags say; leave it out",
    "use-checkpoint-opt-param-scheduler": (
        "has no counterpart: the schedule is what its flags say; leave it out"
    ),
    "use-checkpoint-args": (
        "has no counterpart; use --config SAVE/iter_N/config.yaml, saved beside every checkpoint"
    ),
    "apply-residual-connection-post-layernorm": "has no counterpart; leave it out",
    "yaml-cfg": "has no counterpart; use --config",
    "adlr-autoresume": "has no counterpart; use --exit-signal-handler",
    "external-cuda-graph": f"{_LATER}; leave it out",
    "fp8-*": f"{_LATER}; use --bf16",
    "fp4-*": f"{_LATER}; use --bf16",
    "moe-*": f"{_LATER}; leave it out",
    "mtp-*": f"{_LATER}; leave it out",
    "mla-*": f"{_LATER}; leave it out",
    "profile-*": f"{_LATER}; leave it out",
    "use-pytorch-profiler": f"{_LATER}; leave it out",
    "decoupled-*": "has no counterpart: embedding and head use --lr; leave it out",
    "non-persistent-*": (
        "has no counterpart; use --non-persistent-save-interval alone: such checkpoints are "
        "written under --save, as the others"
    ),
    "wandb-*": f"{_LATER}; use --tensorboard-dir or --metrics-jsonl",
}

# Other spellings of Megatron: the flag it stands for, and its value.
ALIASES = {
    "use-rotary-position-embeddings": ("position-embedding-type", "rope"),
    "no-position-embedding": ("position-embedding-type", "none"),
    "recompute-activations": ("recompute-granularity", "selective"),
}
