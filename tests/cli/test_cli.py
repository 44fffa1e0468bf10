"""The command line as a user meets it: in a process of its own, with exit codes, messages and files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_engine.cli.main import COMMANDS, main
from tests.training.tiny_llm import pairs, preferences, save_model, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def qlora(*arguments, cwd=None, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "qlora_engine.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=ENVIRONMENT,
        **settings,
    )


def succeeded(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the model `tiny`, data `rows.jsonl`, and a finished run `run`."""
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "tiny")
    write_jsonl(folder / "rows.jsonl", pairs(80))
    (folder / "options.yaml").write_text(
        "model: tiny\ndata: rows.jsonl\noutput: run\ndevice: cpu\nr: 4\nmax_steps: 20\nbatch_size: 8\n"
        "learning_rate: 1e-2\nsamples: 1\nsample_tokens: 4\n"
    )
    done = qlora("finetune", "--config", "options.yaml", "--r", 8, cwd=folder)
    (folder / "finetune.txt").write_text(succeeded(done))
    return folder


def test_finetune_prints_what_it_measured(place):
    printed = (place / "finetune.txt").read_text()
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert summary["adapter"]["r"] == 8  # the flag, not the file
    held = summary["eval_loss"]
    assert held["after"] < held["before"]
    assert f"held-out loss    {held['before']:.4f} -> {held['after']:.4f}" in printed
    for word in ("peak memory", "model in 16 bits", "model in 4 bits", "run/adapter", "run/loss_curve.png"):
        assert word in printed


@pytest.fixture
def here(place, monkeypatch, capsys):
    """Runs a command inside this process, in `place`, and returns its standard output: libraries load only once."""
    monkeypatch.chdir(place)

    def run(*arguments) -> str:
        capsys.readouterr()
        code = main(list(map(str, arguments)))
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


WORDS = ("--prompt", "the tree is", "--max-new-tokens", 6)


def test_generate_from_prompt_and_from_standard_input(place, here):
    base = here("generate", "--model", "tiny", *WORDS)
    adapted = here("generate", "--model", "tiny", "--adapter", "run/adapter", *WORDS)
    assert adapted != base
    arguments = ["generate", "--model", "tiny", "--adapter", "run/adapter", "--max-new-tokens", 6]
    assert succeeded(qlora(*arguments, cwd=place, input="the tree is\n")) == adapted


def test_sampling_follows_the_seed(here):
    arguments = ["generate", "--model", "tiny", *WORDS, "--temperature", 2.0, "--seed"]
    texts = [here(*arguments, seed) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_generate_with_the_chat_template(here):
    assert here("generate", "--model", "tiny", "--chat", *WORDS) != here("generate", "--model", "tiny", *WORDS)


def test_quantize_then_generate_is_the_same_model(here):
    here("quantize", "--model", "tiny", "--output", "tiny-nf4", "--dtype", "fp32")
    assert here("generate", "--model", "tiny-nf4", *WORDS) == here("generate", "--model", "tiny", *WORDS)


def test_quantize_embeddings_and_head(place, here):
    from safetensors import safe_open

    flags = ("--quantize-embeddings", "--quantize-head")
    printed = here("quantize", "--model", "tiny", "--output", "tiny-all", "--dtype", "fp32", *flags)
    tensors = safe_open(place / "tiny-all" / "model.safetensors", "pt")
    held = sum(tensors.get_tensor(name).nbytes * (1 if "norm" not in name else 0.5) for name in tensors.keys())  # noqa: SIM118
    assert f"in 4 bits   {held / 2**20:,.1f} MiB" in printed
    assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118
    assert here("generate", "--model", "tiny-all", *WORDS) == here("generate", "--model", "tiny", *flags, *WORDS)


@pytest.mark.parametrize("flags", [["--scales", "search"], ["--scales", "signed", "--no-double-quant"]])
def test_quantize_with_other_scales(place, here, flags):
    from safetensors import safe_open

    files = []
    for output, more in (("by-absmax", [f for f in flags if f == "--no-double-quant"]), ("by-search", flags)):
        here("quantize", "--model", "tiny", "--output", output, *more)
        files.append(safe_open(place / output / "model.safetensors", "pt"))
    assert set(files[0].keys()) == set(files[1].keys())
    name = "model.layers.0.mlp.up_proj.weight"
    assert files[0].get_tensor(name).shape == files[1].get_tensor(name).shape
    assert (files[0].get_tensor(name) != files[1].get_tensor(name)).any()


def test_merge_gives_a_model_that_transformers_loads_alone(place, here):
    report = here("merge", "--model", "tiny", "--adapter", "run/adapter", "--output", "merged", "--into", "fp32")
    assert "written to merged" in report
    script = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("merged")
model = AutoModelForCausalLM.from_pretrained("merged")
ids = model.generate(**tokenizer("the tree is", return_tensors="pt"), max_new_tokens=6, do_sample=False)
assert not any(name.startswith("qlora_engine") for name in sys.modules)
print(tokenizer.decode(ids[0], skip_special_tokens=True).removeprefix("the tree is"))
"""
    alone = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=place, env=ENVIRONMENT, timeout=300
    )
    assert succeeded(alone) == here("generate", "--model", "tiny", "--adapter", "run/adapter", *WORDS)


def test_merge_into_nf4_reports_what_was_lost(place, here):
    arguments = ["--model", "tiny", "--adapter", "run/adapter", "--output", "merged-nf4", "--into", "nf4"]
    assert "every layer kept at least" in here("merge", *arguments)
    layers = json.loads((place / "merged-nf4" / "merge_report.json").read_text())["layers"]
    assert {"delta_norm", "kept", "error"} <= layers[0].keys()
    assert "q_proj" in here("merge", *arguments, "--layers")
    here("generate", "--model", "merged-nf4", "--prompt", "the", "--max-new-tokens", 2)


def test_resuming_a_run_from_its_own_options(place, here):
    """What an interrupted run prints works: its options file alone is enough."""
    here("finetune", "--config", "options.yaml", "--output", "again", "--save-every", 15, "--max-steps", 20)
    adapter = place / "again" / "adapter" / "adapter_model.safetensors"
    first = adapter.read_bytes()
    adapter.unlink()
    here("finetune", "--config", "again/options.yaml", "--resume")
    assert adapter.read_bytes() == first


def test_interrupt_saves_a_checkpoint_and_the_printed_command_continues(place):
    arguments = ["finetune", "--config", "options.yaml", "--output", "stopped", "--max-steps", "2000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_engine.cli.main", *arguments],
        cwd=place,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = place / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "continue with: qlora finetune --config stopped/options.yaml --resume" in errors
    assert list((place / "stopped" / "checkpoints").glob("checkpoint-*/adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/model"], "the model path /no/such/model does not exist"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2: not valid JSON"),
        (["--target-modules", "q_porj"], "q_proj"),
        (["--model", "huge"], "too little memory on cpu"),
        (["--config", "typo.yaml"], "typo.yaml has an unknown key `batchsize`; did you mean `batch_size`?"),
        (["--resume"], "there is no checkpoint in new"),
        (["--output", "run"], "run already holds a run; pass --resume"),
    ],
    ids=["model", "data", "target", "memory", "yaml", "resume", "output"],
)
def test_mistakes_are_one_sentence_and_exit_code_2(place, arguments, message):
    (place / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (place / "typo.yaml").write_text("batchsize: 3\n")
    _promise_4_tib(place / "huge")
    given = ["finetune", "--model", "tiny", "--data", "rows.jsonl", "--output", "new", "--device", "cpu", *arguments]
    done = qlora(*given, cwd=place)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("qlora: error: ")
    assert message in last
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (place / "new").exists()


def _promise_4_tib(folder: Path) -> None:
    """A model whose header promises more than any machine has; only headers are read before loading."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    tensor = {"dtype": "F16", "shape": [2**21, 2**20], "data_offsets": [0, 4 * 2**40]}
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": tensor}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "rows.jsonl, line 1: there is no `chosen` and no `rejected`: the columns are completion, prompt;",
        ),
        (["--packing"], "--packing does not go with --objective dpo: a pair of sequences stays one; leave it out"),
        (["--cuda-graphs"], "--cuda-graphs does not go with --objective dpo"),
        (["--objective", "lm", "--beta", "0.2"], "--beta is for --objective dpo"),
        (["--objective", "lm", "--data", "preferences.jsonl"], "are preferences; pass --objective dpo"),
        (["--data", "preferences.jsonl", "--eval-data", "rows.jsonl"], "rows.jsonl, line 1: there is no `chosen`"),
    ],
    ids=["columns", "packing", "graphs", "beta", "objective", "held out"],
)
def test_mistakes_with_preferences(place, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    write_jsonl(place / "preferences.jsonl", preferences(4))
    given = [
        "finetune",
        "--model",
        "tiny",
        "--data",
        "rows.jsonl",
        "--output",
        "new",
        "--objective",
        "dpo",
        *arguments,
    ]
    assert main(given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qlora: error: ")
    assert message in error
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "no/such/model", "--prompt", "x"], "does not exist"),
        (["generate", "--model", "tiny", "--prompt", ""], "the prompt is empty"),
        (["generate", "--model", "tiny", "--prompt", "x", "--top-p", "2"], "--top-p is 2.0; expected more than 0"),
        (["generate", "--model", "tiny", "--prompt", "x", "--adapter", "nowhere"], "nowhere"),
        (["generate", "--model", "run/adapter", "--prompt", "x"], "holds an adapter, not a model"),
        (["generate", "--model", "rows.jsonl", "--prompt", "x"], "is a file; expected a model folder"),
        (["quantize", "--model", "empty", "--output", "q"], "is not a model folder: it has no config.json"),
        (["quantize", "--model", "tiny", "--output", "q", "--blocksize", "48"], "blocksize is 48"),
        (["quantize", "--model", "tiny", "--output", "q", "--scales", "signed"], "cannot be double-quantized"),
        (["merge", "--model", "tiny", "--adapter", "tiny", "--output", "q"], "adapter_config.json"),
        (["convert", "empty", "q"], "there is no GGUF file at empty"),
        (["convert", "fake.gguf", "q"], "does not begin with the letters GGUF"),
    ],
)
def test_mistakes_of_the_other_commands(place, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    (place / "empty").mkdir(exist_ok=True)
    (place / "fake.gguf").write_bytes(b"no")
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qlora: error: ")
    assert message in error
    assert not (place / "q").exists()


def test_debug_shows_the_traceback():
    from qlora_engine.training.errors import ModelError

    with pytest.raises(ModelError, match="/no/such/model does not exist"):
        main(["generate", "--model", "/no/such/model", "--prompt", "x", "--debug"])


def test_env_json_says_what_serves_each_operator_and_why(monkeypatch):
    report = json.loads(succeeded(qlora("env", "--json")))
    assert report["operators"]["linear_nf4"]["cpu"] in ("compiled", "reference")
    assert report["library"]["in_use"] == (report["library"]["why_not"] is None)
    assert report["packages"]["torch"]
    assert report["cuda"]["available"] == (report["cuda"]["why_not"] is None)


def test_env_says_why_the_library_is_not_in_use():
    text = subprocess.run(
        [sys.executable, "-m", "qlora_engine.cli.main", "env"],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "QLORA_ENGINE_BACKEND": "reference"},
    ).stdout
    assert "not in use: QLORA_ENGINE_BACKEND=reference" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"example:\n  qlora {command}" in shown or f"| qlora {command}" in shown


def test_help_is_quick():
    """Nothing heavy is imported before it is needed."""
    script = (
        "import sys; from qlora_engine.cli.main import build_parser; build_parser().format_help(); "
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert succeeded(done).strip() == "[]"


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m qlora_engine.cli.main env | true"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_estimate_reads_the_configuration_alone(place, here, tmp_path):
    (tmp_path / "config.json").write_text((place / "tiny" / "config.json").read_text())
    printed = here("estimate", tmp_path, "--gpu", "24GiB", "--seq", 512, "--batch-size", 2)
    assert "LlamaForCausalLM" in printed
    assert "2 sequences of 512 tokens" in printed
    assert "fits into 24.0 GiB" in printed
    report = json.loads(here("estimate", "--config", "options.yaml", "--gpu", "0.5", "--json"))
    assert report["adapter_parameters"] == sum(
        2 * 4 * (a + b) for a, b in ((64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64))
    )
    assert not report["fits"]
    assert sum(report["bytes"].values()) == report["total"]


@pytest.mark.parametrize("size", ["24 pounds", "0", "-1GiB", ""])
def test_estimate_refuses_a_size_that_is_none(place, size, capsys):
    assert main(["estimate", str(place / "tiny"), f"--gpu={size}"]) == 2
    assert "expected a size such as 24GiB" in capsys.readouterr().err
