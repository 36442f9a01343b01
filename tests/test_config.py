"""Flags, layers of YAML, and what validate says."""

import json

import pytest
import torch
import yaml
from runs import CHUNKS, CP, INSTANCES, PP, RECOMPUTE, SCHEDULE, STRATEGY, TP, ZERO1

import pretrain_gpt
from trivium.config import Config, ConfigError, flags, megatron_flags, resolve
from trivium.config.presets import PRESETS, published_vocabulary
from trivium.config.validate import validate
from trivium.estimate.parameters import total_parameters
from trivium.interop.families import read_flags
from trivium.launch import Process
from trivium.mesh import Mesh

GOOD = (
    "--preset tiny --seq-length 64 --micro-batch-size 2 --train-iters 10 --lr 1e-3 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 100"
)


def config_of(text: str, world_size: int = 1) -> Config:
    return resolve(flags.parse(text.split()).config, world_size)


def problems_of(text: str, world_size: int = 1) -> str:
    return "\n".join(validate(config_of(text, world_size), world_size))


def test_defaults_are_megatrons():
    config = Config()
    assert (
        config.model.attention_dropout,
        config.model.hidden_dropout,
        config.model.normalization,
    ) == (0.1, 0.1, "LayerNorm")
    assert (
        config.optimizer.clip_grad,
        config.optimizer.weight_decay,
        config.optimizer.adam_beta2,
    ) == (1.0, 0.01, 0.999)
    assert (config.optimizer.lr_decay_style, config.batch.seed, config.data.split) == (
        "linear",
        1234,
        "969,30,1",
    )
    assert (
        config.logging.log_interval,
        config.logging.eval_interval,
        config.logging.eval_iters,
    ) == (100, 1000, 100)
    assert (config.precision.initial_loss_scale, config.precision.hysteresis) == (2.0**32, 2)
    assert config.model.tied and config.model.linear_bias and not config.model.swiglu


def test_feed_forward_width_follows_megatrons_rule():
    base = (
        "--num-layers 2 --hidden-size 768 --num-attention-heads 12 --seq-length 8 "
        "--micro-batch-size 1 --train-iters 1 --lr 1"
    )
    assert config_of(base).model.ffn_hidden_size == 3072
    assert (
        config_of(base + " --swiglu").model.ffn_hidden_size
        == int(768 * 4 * 2 / 3 / 64) * 64
        == 2048
    )


def test_dashes_and_underscores_are_the_same():
    assert config_of(GOOD.replace("--seq-length", "--seq_length")) == config_of(GOOD)


def test_command_line_wins_over_later_yaml_over_earlier_over_preset(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("num_layers: 3\nhidden-size: 512\nlr: 1e-4\n")
    second.write_text("model:\n  num_layers: 5\noptimizer: {lr: 2.0e-4}\n")
    config = flags.parse(f"--preset tiny --lr 3e-4 --config {first} {second}".split()).config
    assert (
        config.model.num_layers,
        config.model.hidden_size,
        config.optimizer.lr,
        config.model.num_attention_heads,
    ) == (5, 512, 3e-4, 4)


def test_a_flag_can_be_switched_off_again(tmp_path):
    layer = tmp_path / "a.yaml"
    layer.write_text("bf16: true")
    assert flags.parse(["--config", str(layer)]).config.precision.bf16
    assert not flags.parse(["--config", str(layer), "--no-bf16"]).config.precision.bf16


def test_resolved_configuration_reads_back_the_same():
    config = config_of(GOOD + " --data-cache-path a/b --lr-warmup-fraction 0.1 --bf16")
    assert flags.read_config(flags.write_config(config)) == config


def test_every_parse_problem_is_named_at_once_with_the_nearest_flag():
    with pytest.raises(ConfigError) as error:
        flags.parse(
            [
                "--num-layer",
                "3",
                "--num-experts",
                "8",
                "--lr",
                "fast",
                "--train-iters",
                "1.5",
                "--normalization",
                "GroupNorm",
            ]
        )
    text = str(error.value)
    assert "5 problems" in text
    for expected in (
        "did you mean --num-layers?",
        "--num-experts is not available",
        "--lr 'fast' is not a finite number",
        "1.5' is not a whole",
        "RMSNorm",
    ):
        assert expected in text


def test_unknown_yaml_key_names_file_and_nearest(tmp_path):
    layer = tmp_path / "run.yaml"
    layer.write_text("hiden_size: 3\n")
    with pytest.raises(
        ConfigError, match=r"run.yaml: hiden_size is unknown; did you mean hidden_size\?"
    ):
        flags.parse(["--config", str(layer)])


def test_flags_without_effect_are_accepted_with_their_values_and_named():
    request = flags.parse(
        [
            "--use-mcore-models",
            "--transformer-impl",
            "local",
            "--no-bias-gelu-fusion",
            "--lr",
            "1e-3",
        ]
    )
    assert request.without_effect == (
        "--use-mcore-models",
        "--transformer-impl",
        "--no-bias-gelu-fusion",
    )
    assert request.config.optimizer.lr == 1e-3


def test_a_flag_without_effect_takes_its_own_values_and_no_more():
    with pytest.raises(ConfigError, match="unrecognized arguments: stray"):
        flags.parse(["--use-mcore-models", "stray"])


def test_flags_fall_under_patterns():
    assert flags.parse(["--tp-comm-overlap-ag"]).without_effect == ("--tp-comm-overlap-ag",)
    with pytest.raises(ConfigError, match="--moe-router-topk is not available in this version"):
        flags.parse(["--moe-router-topk", "2"])


@pytest.mark.parametrize(
    "text",
    [
        "lr: .inf",
        "train_iters: .inf",
        "preset: [1]",
        "bf16: 'true'",
        "lr: [1]",
        "weight_decay: .nan",
    ],
)
def test_nonsense_in_yaml_is_a_problem(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=text.split(":")[0]):
        flags.parse(["--config", f"{tmp_path}/a.yaml"])


def test_yaml_may_deny_what_is_refused_and_knows_the_aliases(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "recompute_activations: false\nnum_experts: null\nmodel:\nuse_rotary_position_embeddings: "
        "true\n"
    )
    config = flags.parse(["--config", f"{tmp_path}/a.yaml"]).config
    assert (config.model.position_embedding_type, config.parallel.recompute_granularity) == (
        "rope",
        None,
    )


def test_recompute_activations_is_the_selective_kind():
    assert (
        flags.parse(["--recompute-activations"]).config.parallel.recompute_granularity
        == "selective"
    )


def test_bpe_files_imply_their_tokenizer_as_in_megatron():
    assert (
        config_of(
            GOOD.split(" --tokenizer-type")[0] + " --vocab-file a --merge-file b"
        ).data.tokenizer_type
        == "GPT2BPETokenizer"
    )


def test_no_flag_is_in_two_lists():
    known = {name.replace("_", "-") for section in Config().sections().values() for name in section}
    lists = [
        known,
        set(megatron_flags.WITHOUT_EFFECT),
        set(megatron_flags.REFUSED),
        set(megatron_flags.ALIASES),
    ]
    assert sum(map(len, lists)) == len(set().union(*lists))


def test_a_good_configuration_has_no_problem():
    assert problems_of(GOOD) == ""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            "--global-batch-size 101 --micro-batch-size 4",
            "--global-batch-size 101 is not a multiple of --micro-batch-size 4 x data parallel 2 "
            "= 8; nearest that work: 96, 104",
        ),
        ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size 0 must be above 0"),
        (
            "--expert-model-parallel-size 2",
            "--expert-model-parallel-size 2: there are no experts in this version; use 1",
        ),
        (
            "--num-query-groups 3",
            "--num-query-groups 3 does not divide --num-attention-heads 4; use one of 1, 2, 4",
        ),
        (
            "--seq-length 128 --max-position-embeddings 64",
            "--seq-length 128 is longer than --max-position-embeddings 64",
        ),
        ("--bf16 --fp16", "--bf16 and --fp16 exclude each other"),
        ("--lr-warmup-iters 10", "--lr-warmup-iters 10 is not below --lr-decay-iters 10"),
        ("--min-lr 1", "--min-lr 1.0 is not between 0 and --lr 0.001"),
        (
            "--tokenizer-type HuggingFaceTokenizer",
            "--tokenizer-type HuggingFaceTokenizer needs --tokenizer-model",
        ),
        ("--split 1,2,3,4", "--split '1,2,3,4'"),
        ("--save-interval 5", "--save-interval 5 needs --save"),
        (
            "--data-path nowhere/x",
            "--data-path nowhere/x: no file nowhere/x.idx and no file nowhere/x.bin",
        ),
        ("--loss-scale 8", "--loss-scale 8.0 needs --fp16"),
        ("--lr-decay-style WSD", "needs --lr-wsd-decay-iters"),
        ("--hidden-dropout 1", "--hidden-dropout 1.0 is not in [0, 1)"),
        ("--seed -1", "--seed -1"),
    ],
)
def test_a_problem_names_flag_numbers_and_remedy(change, expected):
    assert expected in problems_of(f"{GOOD} {change}", world_size=2)


PLAIN = GOOD.replace(
    "--preset tiny", "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --attention-dropout 0"
)
ROPE = "--position-embedding-type rope"
FAMILIES = [
    ("--swiglu --geglu", "--swiglu and --geglu exclude each other"),
    ("--swiglu --exact-gelu", "--exact-gelu has no GELU to act on with --swiglu"),
    ("--qk-layernorm-width projection", "needs --qk-layernorm"),
    ("--qk-layernorm --qk-layernorm-width projection", "give --normalization RMSNorm"),
    ("--parallel-residual --norm-placement post", "give --norm-placement pre or both"),
    ("--attn-logit-softcapping 50 --attention-dropout 0.1", "give --attention-dropout 0, not 0.1"),
    ("--softmax-scale 0", "--softmax-scale 0.0 must be above 0"),
    ("--window-attn-skip-freq 2", "--window-attn-skip-freq 2 needs --window-size"),
    ("--window-size 4", "--window-size 4 is not W,0"),
    ("--window-size 4,4", "--window-size 4,4 is not W,0"),
    ("--window-size __import__('os'),0", "is not W,0"),
    (
        "--window-size 4,0 --window-attn-skip-freq 0",
        "--window-attn-skip-freq 0 is not N, or a 0 or 1",
    ),
    ("--window-size 4,0 --window-attn-skip-freq [1]*9", "a 0 or 1 for each of the 4 layers"),
    (
        "--window-size 4,0 --window-attn-skip-freq [1]*4-[0]",
        "is not N, or a 0 or 1 for each of the 4 layers such as [1]*3+[0]",
    ),
    ("--rotary-base-local 100", "--rotary-base-local 100.0 needs --position-embedding-type rope"),
    (f"{ROPE} --rotary-base-local 100", "give --window-size"),
    (f"{ROPE} --rope-scaling 3", "is no JSON object"),
    (f'{ROPE} --rope-scaling {{"rope_type":"ntk"}}', "rope_type 'ntk' is none of default, linear"),
    (
        f'{ROPE} --rope-scaling {{"rope_type":"linear"}}',
        "linear needs factor, a number above 0, not None",
    ),
    (
        f'{ROPE} --use-rope-scaling --rope-scaling {{"rope_type":"linear","factor":2}}',
        "exclude each other",
    ),
    (
        f'{ROPE} --rope-scaling {{"rope_type":"longrope","factor":2,'
        '"original_max_position_embeddings":8,"short_factor":[1],"long_factor":[2]}',
        "above 0",
    ),
]


@pytest.mark.parametrize(("change", "expected"), FAMILIES, ids=[change for change, _ in FAMILIES])
def test_a_model_that_cannot_be_names_flag_and_remedy(change, expected):
    assert expected in problems_of(f"{PLAIN} {change}")


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        ("", [5, 5, 5, 5]),
        ("2", [5, None, 5, None]),
        ("[1]*3+[0]*1", [5, 5, 5, None]),
        ("([0]+[1])*2", [None, 5, None, 5]),
    ],
)
def test_windows_of_layers_as_megatron_writes_them(pattern, windows):
    """Megatron's W,0 is the token itself and W before it: W + 1 tokens."""
    model = config_of(
        f"{PLAIN} --window-size 4,0" + (f" --window-attn-skip-freq {pattern}" if pattern else "")
    ).model
    assert [model.window(layer) for layer in range(4)] == windows


def test_a_hugging_face_configuration_is_a_layer_under_the_flags(tmp_path):
    hf = {
        "model_type": "qwen3",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    hf |= {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }
    (tmp_path / "config.json").write_text(json.dumps(hf))
    for source in (str(tmp_path), str(tmp_path / "config.json"), json.dumps(hf)):
        config = flags.parse(
            ["--hf-config", source, "--num-layers", "2", "--tokenizer-type", "NullTokenizer"],
            read_flags,
        ).config
        model = config.model
        assert (
            model.num_layers,
            model.hidden_size,
            model.num_kv_heads,
            model.head_size,
            model.rotary_base,
        ) == (2, 64, 2, 32, 1e6)
        assert (
            model.qk_layernorm and model.hf_model_type == "qwen3" and config.data.vocab_size == 999
        )
    for source, problem in (
        ("nowhere", "nowhere: No such file"),
        ("{", "not JSON"),
        ('{"model_type": "mixtral"}', "a mixture of experts"),
        ('{"model_type": "bert"}', "'bert' is none of llama, gpt2"),
        ('{"model_type": "llama"}', "num_attention_heads is missing"),
        (json.dumps(hf | {"hidden_size": "wide"}), "wrong kind"),
        (json.dumps(hf | {"hidden_act": "mish"}), "activation 'mish' is none of silu"),
    ):
        with pytest.raises(ConfigError, match=problem) as error:
            flags.parse(["--hf-config", source], read_flags)
        assert len(error.value.problems) == 1
    with pytest.raises(ConfigError, match="exclude each other"):
        flags.parse(["--hf-config", str(tmp_path), "--preset", "tiny"], read_flags)


# Processes, flags, what the one problem says (flag, numbers, remedy), and that remedy as flags.
LAYOUTS = {
    "tensor parallel and heads": (
        8,
        f"{TP} 8",
        ("--num-attention-heads 4", f"{TP} 8", "use 8"),
        "--num-attention-heads 8",
    ),
    "tensor parallel and width": (
        2,
        f"{TP} 2 --ffn-hidden-size 101",
        ("--ffn-hidden-size 101", f"{TP} 2", "100, 102"),
        "--ffn-hidden-size 102",
    ),
    "more key-value heads than ranks": (
        4,
        f"{TP} 4 --num-attention-heads 12 --num-query-groups 6",
        ("--num-query-groups 6", f"{TP} 4", "change one of them"),
        "--num-query-groups 4",
    ),
    "fewer key-value heads than ranks": (
        4,
        f"{TP} 4 --num-attention-heads 12 --num-query-groups 3",
        ("--num-query-groups 3", f"{TP} 4", "change one of them"),
        "--num-query-groups 2",
    ),
    "sequence parallel": (
        4,
        f"{TP} 4 --sequence-parallel --seq-length 62",
        ("--sequence-parallel", "--seq-length 62", f"{TP} 4", "64"),
        "--seq-length 64",
    ),
    "sequence and context parallel": (
        8,
        f"{TP} 4 {CP} 2 --sequence-parallel --seq-length 60",
        ("--sequence-parallel", "--seq-length 60", f"{TP} 4", f"{CP} 2", "64"),
        "--seq-length 64",
    ),
    "context parallel": (
        4,
        f"{CP} 4 --seq-length 60",
        ("--seq-length 60", f"2 x {CP} 4", "56, 64"),
        "--seq-length 56",
    ),
    "exchanged heads": (
        8,
        f"{TP} 2 {CP} 4 --cp-comm-type a2a",
        (
            "--cp-comm-type a2a",
            "--num-attention-heads 4",
            f"{TP} 2 x {CP} 4 = 8",
            "p2p or allgather",
        ),
        "--cp-comm-type allgather",
    ),
    "ring and documents": (
        2,
        f"{CP} 2 --reset-attention-mask",
        ("--cp-comm-type p2p", "--reset-attention-mask", "allgather or a2a"),
        "--cp-comm-type a2a",
    ),
    "ring and attention dropout": (
        2,
        f"{CP} 2 --attention-dropout 0.1",
        ("--cp-comm-type p2p", "--attention-dropout 0", "allgather or a2a"),
        "--cp-comm-type allgather",
    ),
    "layers and stages": (
        2,
        f"{PP} 2 --num-layers 5",
        ("--num-layers 5", f"{PP} 2", "use 4 or 6"),
        "--num-layers 6",
    ),
    "schedule and chunks": (
        2,
        f"{PP} 2 {SCHEDULE} 1f1b {CHUNKS} 2",
        (f"{SCHEDULE} 1f1b", "not 2", "use interleaved"),
        f"{SCHEDULE} interleaved",
    ),
    "chunks of an interleaved schedule": (
        2,
        f"{PP} 2 {SCHEDULE} interleaved",
        (f"{SCHEDULE} interleaved", f"{CHUNKS} 2"),
        f"{CHUNKS} 2",
    ),
    "zb-h1 and full recompute": (
        2,
        f"{PP} 2 {SCHEDULE} zb-h1 {RECOMPUTE} full",
        (f"{SCHEDULE} zb-h1", f"{RECOMPUTE} full", "use selective"),
        f"{RECOMPUTE} selective",
    ),
    "zb-v and full recompute": (
        2,
        f"{PP} 2 {SCHEDULE} zb-v {RECOMPUTE} full",
        (f"{SCHEDULE} zb-v", f"{RECOMPUTE} full", "use selective"),
        f"{RECOMPUTE} selective",
    ),
    "gathering what is not cut": (
        2,
        "--overlap-param-gather",
        ("--overlap-param-gather", f"needs {ZERO1}"),
        ZERO1,
    ),
    "instances of what is not cut": (
        2,
        f"{INSTANCES} 2",
        (f"{INSTANCES} 2", f"needs {ZERO1}"),
        ZERO1,
    ),
    "instances that do not divide": (
        8,
        f"{CP} 2 {ZERO1} {INSTANCES} 3",
        (f"{INSTANCES} 3", "data parallel x context parallel = 8", "use 1"),
        f"{INSTANCES} 1",
    ),
    "sharding asked for and denied": (
        2,
        f"{ZERO1} {STRATEGY} no_shard",
        (ZERO1, f"{STRATEGY} no_shard", "give one"),
        "--no-use-distributed-optimizer",
    ),
    "parameters cut over a pipeline": (
        4,
        f"{PP} 2 {STRATEGY} optim_grads_params",
        (f"{STRATEGY} optim_grads_params", "2", "use optim_grads"),
        f"{STRATEGY} optim_grads",
    ),
}


@pytest.mark.parametrize(
    ("ranks", "layout", "words", "remedy"), LAYOUTS.values(), ids=list(LAYOUTS)
)
def test_a_layout_that_cannot_be_is_one_problem_and_its_remedy_works(ranks, layout, words, remedy):
    (problem,) = validate(config_of(f"{GOOD} {layout}", ranks), ranks)
    assert all(word in problem for word in words), problem
    assert problems_of(f"{GOOD} {layout} {remedy}", ranks) == ""


@pytest.mark.parametrize(
    ("ranks", "layout", "numbers", "valid"),
    [
        (
            6,
            f"{TP} 2 {PP} 2",
            ("6 processes", f"{TP} 2 x {PP} 2 x {CP} 1 = 4", "start 4, 8"),
            (4, 8),
        ),
        (3, f"{TP} 4", ("3 processes", "= 4", "start 4"), (4,)),
        (
            30,
            f"{TP} 4 {CP} 2 {PP} 2",
            ("30 processes", f"{TP} 4 x {PP} 2 x {CP} 2 = 16", "start 16, 32"),
            (16, 32),
        ),
    ],
)
def test_a_number_of_processes_that_cannot_be_names_the_nearest_that_can(
    ranks, layout, numbers, valid
):
    (problem,) = validate(config_of(f"{GOOD} {layout}", ranks), ranks)
    assert all(number in problem for number in numbers), problem
    assert [problems_of(f"{GOOD} {layout}", count) for count in valid] == [""] * len(valid)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_wrong_number_of_processes_is_refused_before_any_process_group(monkeypatch, rank):
    """On every rank, since none of them asks another: a group would hang until its time is out."""

    def never(*args, **kwargs):
        raise AssertionError("a process group was asked for")

    monkeypatch.setattr(torch.distributed, "init_process_group", never)
    monkeypatch.setattr(Mesh, "connect", never)
    with pytest.raises(ConfigError, match="6 processes are not a multiple"):
        pretrain_gpt.main(f"{GOOD} {TP} 2 {PP} 2".split(), Process(rank, 6, rank))


def test_several_layout_problems_are_told_at_once():
    problems = problems_of(
        f"{GOOD} {TP} 3 {CP} 2 --seq-length 62 --overlap-param-gather --attention-dropout 0.1",
        world_size=7,
    )
    for flag in (
        "7 processes",
        "--num-attention-heads 4",
        "--ffn-hidden-size 704",
        "--seq-length 62",
        "--cp-comm-type p2p",
        "--overlap-param-gather",
    ):
        assert flag in problems


def test_missing_flags_are_all_named():
    text = problems_of("--bf16")
    for name in (
        "num-layers",
        "hidden-size",
        "num-attention-heads",
        "seq-length",
        "micro-batch-size",
        "lr",
        "train-iters",
        "data-path",
        "tokenizer-type",
    ):
        assert f"--{name}" in text


def test_presets_count_what_the_models_really_have():
    """Counts published for the originals, to the last weight."""
    known = {
        "gpt2-124m": 124_439_808,
        "llama2-7b": 6_738_415_616,
        "llama3-8b": 8_030_261_248,
        "llama3.2-1b": 1_235_814_400,
        "llama3.1-405b": 405_853_388_800,
    }
    for name, count in known.items():
        model = resolve(Config.of(PRESETS[name]), 1).model
        assert total_parameters(model, published_vocabulary(name)) == count, name


def test_presets_say_everything_explicitly():
    for name, preset in PRESETS.items():
        assert {
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "norm_epsilon",
            "swiglu",
            "hidden_dropout",
        } <= set(preset), name
        assert yaml.safe_load(yaml.safe_dump(preset)) == preset
