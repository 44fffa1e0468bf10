import argparse
import dataclasses

import pytest

from qlora_engine.training.errors import OptionError
from qlora_engine.training.options import PREFERENCE_OPTIONS, FinetuneOptions, add_flags, build_options, flag

GIVEN = {"model": "m", "data": "d.jsonl"}


def parse(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(arguments))


def test_flags_that_are_not_given_leave_nothing():
    assert parse() == {}


@pytest.mark.parametrize(
    "apart",  # options that do not go with the others
    [
        ("objective", *PREFERENCE_OPTIONS),
        ("packing", "completion_only", "assistant_only", "loss_type"),
        ("packing", "completion_only", "assistant_only", "label_smoothing"),
    ],
)
def test_every_option_has_a_flag_and_a_yaml_key_that_say_the_same(tmp_path, apart):
    changed = {}
    for spec in dataclasses.fields(FinetuneOptions):
        default = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()
        if spec.name in ("resume", "overwrite", "model", "data", "cuda_graphs", *apart):
            continue
        if isinstance(default, bool):
            changed[spec.name] = not default
        elif spec.metadata["choices"]:
            changed[spec.name] = next(c for c in spec.metadata["choices"] if c != default)
        elif isinstance(default, int):
            changed[spec.name] = 2 * default or 3
        elif isinstance(default, float):
            changed[spec.name] = default / 2 or 0.25
        elif spec.type == float | None:
            changed[spec.name] = 1.5
        elif isinstance(default, list):
            changed[spec.name] = ["q_proj", "v_proj"]
        else:
            changed[spec.name] = "cpu"
    arguments = []
    for name, value in changed.items():
        if isinstance(value, bool):
            arguments.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        else:
            arguments += [flag(name), *(value if isinstance(value, list) else [str(value)])]
    from_flags = build_options({**GIVEN, **parse(*arguments)})
    file = tmp_path / "o.yaml"
    file.write_text(from_flags.to_yaml())
    from_yaml = build_options({}, file)
    assert from_flags == from_yaml
    assert {name: getattr(from_yaml, name) for name in changed} == changed


def test_flags_win_over_yaml_and_dashes_are_underscores(tmp_path):
    file = tmp_path / "o.yaml"
    file.write_text("model: m\ndata: d\nbatch-size: 4\nlearning_rate: 1e-3\nr: 4\n")
    options = build_options({"r": 32}, file)
    assert (options.batch_size, options.learning_rate, options.r) == (4, 0.001, 32)


def test_a_single_target_may_be_written_without_a_list(tmp_path):
    file = tmp_path / "o.yaml"
    file.write_text("model: m\ndata: d\ntarget_modules: q_proj\n")
    assert build_options({}, file).target_modules == ["q_proj"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("learning_rat: 1", "unknown key `learning_rat`; did you mean `learning_rate`?"),
        ("zzzzzz: 1", "unknown key `zzzzzz`; see `qlora finetune --help`"),
        ("r: four", "--r (`r`) is 'four'; expected a whole number"),
        ("r: 2.5", "is 2.5; expected a whole number"),
        ("r: true", "is True; expected a whole number"),
        ("r: 0", "is 0; expected at least 1"),
        ("dropout: 1.0", "expected at most 0.99"),
        ("learning_rate: 0", "expected more than 0"),
        ("learning_rate: .nan", "expected a finite number"),
        ("packing: 1", "is 1; expected true or false"),
        ("output: 3", "is 3; expected text"),
        ("dtype: int8", "expected one of auto, fp32, bf16, fp16"),
        ("target_modules: [1]", "expected a list of names"),
        ("blocksize: 48", "expected a power of two"),
        ("resume: true\noverwrite: true", "contradict each other"),
        ("model: ''", "no model was given; pass --model"),
        ("optimizer: adamw_fused\noptimizer_gpu_gib: 1", "whose state does not leave the GPU; choose paged_adamw"),
        ("lora_plus: 0", "expected more than 0"),
        ("- a", "holds a list; expected `name: value` lines"),
        ("r: [", "is not valid YAML"),
    ],
)
def test_bad_yaml_is_explained(tmp_path, text, reason):
    file = tmp_path / "o.yaml"
    file.write_text(text + ("" if text.startswith("-") or text.endswith("[") else "\ndata: d\n"))
    with pytest.raises(OptionError) as caught:
        build_options({} if "model" in text else {"model": "m"}, file)
    assert reason in str(caught.value)


def test_missing_yaml():
    with pytest.raises(OptionError, match=r"none\.yaml does not exist"):
        build_options(GIVEN, "none.yaml")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"activation_gib": 2.0, "gradient_checkpointing": "full"}, "--activation-gib"),
        ({"cuda_graphs": True, "packing": True}, "--packing"),
        ({"cuda_graphs": True, "offload_activations": True}, "--offload-activations"),
        ({"objective": "dpo", "packing": True}, "--packing does not go with --objective dpo"),
        ({"objective": "dpo", "cuda_graphs": True}, "--cuda-graphs does not go with --objective dpo"),
        ({"objective": "dpo", "assistant_only": True}, "--assistant-only does not go"),
        ({"objective": "dpo", "completion_only": False}, "--no-completion-only does not go"),
        ({"objective": "dpo", "loss_type": "ipo", "label_smoothing": 0.1}, "--label-smoothing is for"),
        ({"beta": 0.2}, "--beta is for --objective dpo"),
        ({"sft_weight": 0.2}, "--sft-weight is for --objective dpo"),
    ],
)
def test_what_a_step_cannot_be_at_once(given, words):
    with pytest.raises(OptionError, match=words):
        build_options({**GIVEN, **given})
