"""`qlora search`: find method, rank, scaling and learning rate by trials on held-out data."""

from qlora_engine.cli.common import TRAIN_PACKAGES, add_command, prepare_libraries, require
from qlora_engine.training.options import FinetuneOptions, add_flags, build_options

SEARCH_PACKAGES = ("optuna",)
STRATEGIES = ("bayes", "random", "grid")
DESCRIPTION = """\
Tries values of the options of `qlora finetune` and keeps those with the lowest held-out loss.

--space says what is tried: `name=a,b,c` for values, `name=low..high` for a range. Names are method, r, alpha,
dropout, rslora, learning_rate, lr_schedule, warmup_steps, weight_decay, max_grad_norm and lora_plus; every other
option of `qlora finetune` is the same in all trials. r, alpha, dropout and rslora are settings of a trial's method,
and are left out where it has none of that name. A trial whose held-out loss is above the median of the others' at
the same step is stopped early. The base is read once. Ctrl-C stops; --resume goes on, with more --trials if wanted.

The folder gets best.yaml for `qlora finetune --config`, trials.json and search.png. The best loss is that of data by
which it was chosen: to report a figure, hold out other rows."""
EXAMPLE = """\
  qlora search --model MODEL --data rows.jsonl --output found --max-steps 60 --trials 20
  qlora search --model MODEL --data rows.jsonl --output found --strategy grid --space r=4,8,16 alpha=16,32
  qlora search --model MODEL --data rows.jsonl --output found --strategy random --trials 30 \\
      --space method=lora,dora,ia3 r=4..64 learning_rate=1e-4..1e-2
  qlora search --config found/options.yaml --resume --trials 40
  qlora finetune --config found/best.yaml"""


def add_parser(commands):
    """Describes the command."""
    parser = add_command(commands, "search", "find rank, scaling, learning rate and method", DESCRIPTION, EXAMPLE)
    parser.add_argument(
        "--space", nargs="+", metavar="NAME=VALUES", help="what is tried (default: r, alpha and rate)"
    )
    parser.add_argument("--strategy", choices=STRATEGIES, help="how points are chosen (default: bayes)")
    parser.add_argument("--trials", type=int, metavar="N", help="trials in all; a grid has its own (default: 20)")
    parser.add_argument("--no-prune", action="store_true", help="train every trial to its end")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the options of `qlora finetune`")
    add_flags(parser)
    return parser


def run(args) -> None:
    """Runs the command."""
    given = {name: value for name, value in vars(args).items() if name in FinetuneOptions.__dataclass_fields__}
    require(("yaml",))
    options = build_options(given, args.config)
    require(TRAIN_PACKAGES)
    require(SEARCH_PACKAGES, extra="search")
    prepare_libraries(options.model, args.debug)
    from qlora_engine.training.search import SearchOptions, search, settings_before
    from qlora_engine.training.search_report import table

    how = settings_before(options) if options.resume else {}
    asked = {"space": args.space and tuple(args.space), "strategy": args.strategy, "trials": args.trials}
    how |= {name: value for name, value in asked.items() if value is not None}
    if args.no_prune:
        how["prune"] = False
    result = search(options, SearchOptions(**how))
    print(table(result.trials))
    if result.best is None:
        print("no trial was completed")
        return
    print(f"\nbest held-out loss  {result.best['eval_loss']:.4f}, trial {result.best['trial']}")
    print(f"train with it       qlora finetune --config {result.output / 'best.yaml'}")
    print(f"picture             {result.output / 'search.png'}")
