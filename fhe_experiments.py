"""Step 5: encrypt the best networks at 2 to 7 bits, run test rows, and compare with the same networks in cleartext.

Every configuration (network, bits) is compiled first; then the plan with the predicted times is printed, and what is
affordable runs encrypted on test rows drawn by class and record. Where step 3 quantized a network to a number of bits,
that one is run (quantized/{name}_{bits}bits.onnx), by the scheme of encryption that accepts it (fhe_mlp/encrypted/);
elsewhere Concrete ML quantizes the float network. The client adds the offset and applies the sigmoid after decryption,
so that the sign of the decrypted logit is the decision.

Results are in the database before the next rows are run; rerun the command to resume. Results of other networks, data,
settings or versions are stored apart in the same database.

Reads   pruned_model_top_*.onnx and quantized/ in --workdir (python h5_onnx_converter.py makes them),
        the arrays in --data-dir
Writes  to --workdir: fhe_results.sqlite and, from it, results_batch_{number}.xlsx, fhe_summary.xlsx, fhe_frontier.png;
        fhe_steps.csv and fhe_steps.png, the figures of steps 1 to 5;
        to --export: what to deploy
Run     python fhe_experiments.py
        python fhe_experiments.py --top 10 --batches 145 --dry-run      (estimate only)
        python fhe_experiments.py --export deployed                     (client and server for one configuration)
        python fhe_experiments.py --report                              (workbooks and pictures anew from the database)
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp import cli, experiments
from fhe_mlp.dataset import load_dataset, stratified_order
from fhe_mlp.deployment import check_new, export_network
from fhe_mlp.encrypted import BEATS_PER_CALL, scheme_names
from fhe_mlp.experiments import Draws, Experiment, Report, Results, jobs, load_configuration, tasks
from fhe_mlp.networks import by_rank, load_mlp
from fhe_mlp.quantized import BITS, RANKING, TOLERATED_LOSS, lowest_cost
from fhe_mlp.scaling import NONE
from fhe_mlp.workers import LOST, Workers, open_workers

TOP = 6  # best networks of step 3
BATCH_SIZE = 50  # test rows a batch, as published; here in an order stratified by class and record
SAMPLES = 10  # rows drawn from each batch, as published
CALIBRATION_ROWS = 1000  # training rows from which Concrete ML takes ranges
SIMULATED_ROWS = 500  # test rows for the simulated accuracy
MAX_SECONDS = 60.0  # per beat; what is slower is not run
EXAMPLE_BEATS = 5  # of the training part, exported
DATABASE = "fhe_results.sqlite"
RESUME = f"finished results are in {DATABASE}; rerun the command to resume"  # printed after Ctrl-C
LOCAL = "local:"  # before the number of processes on this machine


def scheduler_address(text: str) -> str:
    """argparse type: an address, or local:N with at most as many processes as this machine has cores."""
    number = text.removeprefix(LOCAL)
    if text.startswith(LOCAL) and not (number.isdecimal() and 0 < int(number) <= cli.cores()):
        raise argparse.ArgumentTypeError(f"{text!r}: give {LOCAL}1 to {LOCAL}{cli.cores()}, at most a process a core")
    return text


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = cli.make_parser(__doc__)
    option = parser.add_argument
    option("--models", type=Path, nargs="+", help=".onnx files (default: the best of step 4)")
    option("--top", type=cli.positive_int, default=TOP, help="how many of the best networks")
    option("--bits", type=int, nargs="+", choices=BITS, default=BITS, help="of the weights")
    option("--batch-size", type=cli.positive_int, default=BATCH_SIZE, help="test rows a batch")
    option("--samples", type=cli.positive_int, default=SAMPLES, help="rows drawn from each batch")
    option("--batches", type=cli.positive_int, default=1, help="how many batches")
    option("--start-batch", type=cli.natural_int, default=0, help="number of the first batch, from 0")
    option("--max-seconds", type=cli.positive_float, default=MAX_SECONDS, help="per beat; what is slower is not run")
    option("--max-loss", type=cli.positive_float, default=TOLERATED_LOSS, help="validation accuracy given up for cost")
    option("--scheme", choices=scheme_names(), help="of encryption (default: the first that accepts a network)")
    option("--post-training", action="store_true", help="leave step 3's quantized networks aside, quantize here")
    what = "of networks quantized here"
    option("--rounding-bits", type=int, choices=range(2, 9), default=experiments.ROUNDING_BITS, help=what)
    chance = cli.number(float, 2.0**-60, cli.BELOW_ONE, "between 2^-60 and 1")
    option("--p-error", type=chance, default=experiments.P_ERROR, help=f"{what}: that one bootstrap is off")
    option("--scheduler", type=scheduler_address, help="Dask's (tcp://HOST:8786), or local:N for N processes here")
    only = parser.add_mutually_exclusive_group().add_argument
    only("--dry-run", action="store_true", help="print the plan, run nothing, write nothing")
    option("--beside", type=Path, metavar="DIR", help="a --workdir whose networks are shown side by side with these")
    only("--report", action="store_true", help="write workbooks and pictures from the database, run nothing")
    only("--export", type=Path, metavar="DIR", help="write client and server for the best configuration")
    args = parser.parse_args(argv)
    if args.export and (args.scheduler or args.post_training):
        parser.error("--export runs here and with networks of step 3: without --scheduler and --post-training")
    args.bits = sorted(set(args.bits))
    return args


def describe(args: argparse.Namespace) -> tuple[Experiment, Draws, list[str]]:
    """Load data and networks.

    Returns the experiment that is asked for, its test rows, and the keys of all configurations at hand: those of
    --workdir and of the experiment. Raises InputError where there is no network, or names collide.
    """
    paths = args.models or by_rank(args.workdir, ".onnx")[: 1 if args.export else args.top]
    if not paths:
        raise cli.InputError(f"{args.workdir}: no pruned_model_top_*.onnx; make them with: python h5_onnx_converter.py")
    if len({path.stem for path in paths}) < len(paths):
        raise cli.InputError("--models: two files have the same name; their rows could not be told apart")
    files = [path.with_suffix(".h5") for path in paths]
    maps = {load_mlp(file, "python dynamic_pruning_eval.py").map for file in files if file.exists()} or {NONE}
    if len(maps) > 1:
        several = ", ".join(sorted(maps))
        raise cli.InputError(f"--models: networks of several public maps ({several}); run them one by one")
    data = load_dataset(args.data_dir, *maps)
    order, X = stratified_order(data.test.beats, args.seed), data.train.X
    draws = Draws(order, args.batch_size, args.samples, range(args.start_batch, args.start_batch + args.batches))
    last = (len(order) - 1) // args.batch_size
    if draws.batches[-1] > last:
        wanted = f"batch {draws.batches[-1]} does not exist, the last is {last}"
        raise cli.InputError(f"{wanted}; see --start-batch and --batches")
    rng = np.random.default_rng(args.seed)
    calibration = X[rng.choice(len(X), min(CALIBRATION_ROWS, len(X)), replace=False, p=data.draw)]
    basis = {"data_sha256": data.sha256, **experiments.versions(), "seed": args.seed}
    load = functools.partial(load_configuration, features=X.shape[1], args=args, basis=basis)
    asked = [load(path, bits) for path in paths for bits in args.bits]  # first, and so are refusals of its files
    at_hand = dict.fromkeys([*by_rank(args.workdir, ".onnx"), *paths])
    known = list(dict.fromkeys(load(path, bits).key for path in at_hand for bits in BITS))
    beats = BEATS_PER_CALL if args.export else max(2, min(BEATS_PER_CALL, args.samples - tasks.ALONE))
    rows, configurations = np.sort(order[:SIMULATED_ROWS]), {one.key: one for one in asked}
    return Experiment(data, basis, calibration, rows, beats, args.max_seconds, configurations), draws, known


def best_for_export(candidates: Sequence[dict[str, Any]], max_loss: float) -> int:
    """Return the number of the candidate to deploy, from the facts of each: of lowest_cost, the most accurate.

    max_loss: of validation accuracy, below the best.
    """
    name = "balanced_accuracy_validation"
    rows = [(one["q_bits"], one["complexity"], one.get(f"noisy_{name}", one[name])) for one in candidates]
    table = pd.DataFrame(rows, columns=["bits", "predicted_complexity", RANKING]).sort_values(RANKING, ascending=False)
    return lowest_cost(table, table[RANKING].max() - max_loss).name


def export(experiment: Experiment, key: str, model: dict[str, Any], X: np.ndarray, folder: Path) -> None:
    """Write client and server of a configuration; a job, since it compiles."""
    export_network(jobs.compiled(experiment, key), model, X, folder)


def export_best(args: argparse.Namespace, experiment: Experiment, todo: list[tasks.Task], workers: Workers) -> None:
    """Write client and server for the best of the tasks. Raises InputError when none can be compiled."""
    list(tasks.measure_all(todo, workers))
    candidates = [task for task in todo if task.measured and task.configuration.network]
    if not candidates:
        raise cli.InputError("no network of step 3 that can be compiled is among these; see --models and --bits")
    best = candidates[best_for_export([task.facts for task in candidates], args.max_loss)]
    data, facts, configuration = experiment.data, best.facts, best.configuration
    model = {
        "name": configuration.label,
        "p_error": configuration.network.p_error,
        "test_balanced_accuracy": facts.get("noisy_balanced_accuracy_test_set", facts["balanced_accuracy_test_set"]),
        "test_rows": facts["test_set_rows"],
        **{name: facts[name] for name in ("complexity", "pbs", "security_bits")},
        **{name: getattr(data, name) for name in ("map", "leads", "features", "scaler")},
    }
    X = data.train.X if data.map == NONE else load_dataset(args.data_dir).train.X  # before the map
    ((_, result),) = workers.map(export, [(configuration.key, model, X[:EXAMPLE_BEATS], args.export)])
    if result is LOST:
        raise cli.InputError(f"{configuration.label}: its process was killed, perhaps for want of memory")
    print(f"wrote client/, server/ and README.md for {configuration.label} to {args.export}")


def run(args: argparse.Namespace, experiment: Experiment, todo: list[tasks.Task], results: Results) -> None:
    """Compile, print the plan, and measure and encrypt what is affordable; or export."""
    scheduler = args.scheduler or f"{LOCAL}1"
    here = scheduler.startswith(LOCAL)
    processes, address = (int(scheduler.removeprefix(LOCAL)), None) if here else (0, scheduler)
    with open_workers(experiment, processes, address, experiments.versions) as workers:
        tasks.compile_all(todo, workers)
        if args.export:
            export_best(args, experiment, todo, workers)
            return
        tasks.predict(todo, workers, args.max_seconds, here)
        tasks.print_plan(todo, len(experiment.configurations) - len(todo))
        if not args.dry_run:
            for task, clear in tasks.measure_all(todo, workers):
                task.store(results, clear)
            tasks.encrypt_all(todo, workers, results)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile all, print what it will take, run encrypted what is affordable and not yet done."""
    args = parse_arguments(argv)
    if args.export:
        check_new(args.export)
    beside = experiments.read_beside(args.workdir, args.beside) if args.beside else None
    experiment, draws, keys = describe(args)
    write = not (args.dry_run or args.report or args.export)
    if write:
        cli.check_writable(args.workdir)
    options = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items()}
    settings = {**cli.machine_facts(), "patients of the test set": experiment.data.patients, **options}
    with Results(args.workdir / DATABASE, write) as results:
        report = Report(args.workdir, results, keys, experiment, draws, settings | experiments.meanings(), beside)
        todo = tasks.find_tasks(experiment, draws, results)
        todo = [task for task in todo if args.export or not task.finished]
        try:
            if not todo and not args.report:
                print(f"all {len(experiment.configurations)} configurations are finished and stay as they are")
            elif not args.report:
                run(args, experiment, todo, results)
        except KeyboardInterrupt:
            if write and results.facts(keys):
                print("\nwriting the workbooks of what is finished ...", flush=True)
                report.write()
            raise
        if write or args.report:
            report.write()


if __name__ == "__main__":
    cli.run(main, RESUME)
