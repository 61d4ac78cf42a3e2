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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fhe_mlp import cli, experiments
from fhe_mlp.dataset import load_dataset, stratified_order
from fhe_mlp.deployment import check_new, export_network
from fhe_mlp.encrypted import BEATS_PER_CALL, scheme_names
from fhe_mlp.experiments import Draws, Experiment, Report, Results, Task, Terms
from fhe_mlp.networks import by_rank
from fhe_mlp.quantized import BITS, SAME_COST, TOLERATED_LOSS
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


def chosen_networks(args: argparse.Namespace) -> list[Path]:
    """Return the paths of the float networks. Raises InputError where there are none or names collide."""
    paths = args.models or by_rank(args.workdir, ".onnx")[: 1 if args.export else args.top]
    if not paths:
        raise cli.InputError(f"{args.workdir}: no pruned_model_top_*.onnx; make them with: python h5_onnx_converter.py")
    if len({path.stem for path in paths}) < len(paths):
        raise cli.InputError("--models: two files have the same name; their rows could not be told apart")
    return paths


def describe(args: argparse.Namespace) -> tuple[Experiment, Draws, list[str]]:
    """Load data and networks.

    Returns the experiment that is asked for, its test rows, and the keys of all configurations at hand: those of
    --workdir and of the experiment.
    """
    paths = chosen_networks(args)
    data = load_dataset(args.data_dir, experiments.public_map(paths))
    order, X = stratified_order(data.test.beats, args.seed), data.train.X
    draws = Draws(order, args.batch_size, args.samples, range(args.start_batch, args.start_batch + args.batches))
    last = (len(order) - 1) // args.batch_size
    if draws.batches[-1] > last:
        wanted = f"batch {draws.batches[-1]} does not exist, the last is {last}"
        raise cli.InputError(f"{wanted}; see --start-batch and --batches")
    rng = np.random.default_rng(args.seed)
    calibration = X[rng.choice(len(X), min(CALIBRATION_ROWS, len(X)), replace=False, p=data.draw)]
    basis = {"data_sha256": data.sha256, **experiments.versions(), "seed": args.seed}
    terms = Terms(args.scheme, args.post_training, args.rounding_bits, args.p_error, basis)
    # What is asked for comes first, and so do refusals of its files.
    asked = [terms.load(path, bits, X.shape[1]) for path in paths for bits in args.bits]
    at_hand = dict.fromkeys([*by_rank(args.workdir, ".onnx"), *paths])
    known = [terms.load(path, bits, X.shape[1]).key for path in at_hand for bits in BITS]
    simulated = np.sort(order[:SIMULATED_ROWS])
    beats = BEATS_PER_CALL if args.export else max(2, min(BEATS_PER_CALL, args.samples - experiments.ALONE))
    configurations = {configuration.key: configuration for configuration in asked}
    return Experiment(data, basis, calibration, simulated, beats, args.max_seconds, configurations), draws, known


def describe_settings(args: argparse.Namespace, patients: str) -> dict[str, Any]:
    """Return the settings sheet: machine, versions, options, and what columns mean."""
    options = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items()}
    return {**cli.machine_facts(), "patients of the test set": patients, **options, **experiments.meanings()}


def best_for_export(candidates: Sequence[dict[str, Any]], max_loss: float) -> int:
    """Return the number of the candidate to deploy, from the facts of each: q_bits, complexity and accuracies.

    Of those at most `max_loss` below the best, the lowest complexity; of those that cost the same but for SAME_COST,
    the most bits, and then the best accuracy.
    """
    name = "balanced_accuracy_validation"
    accuracy = [facts.get(f"noisy_{name}", facts[name]) for facts in candidates]
    good = [number for number, value in enumerate(accuracy) if value >= max(accuracy) - max_loss]
    most = min(candidates[number]["complexity"] for number in good) * (1 + SAME_COST)
    same = [number for number in good if candidates[number]["complexity"] <= most]
    return max(same, key=lambda number: (candidates[number]["q_bits"], accuracy[number]))


def export(experiment: Experiment, key: str, model: dict[str, Any], X: np.ndarray, folder: Path) -> None:
    """Write client and server of a configuration; a job, since it compiles."""
    export_network(experiments.compiled(experiment, key), model, X, folder)


def export_best(args: argparse.Namespace, experiment: Experiment, tasks: list[Task], workers: Workers) -> None:
    """Write client and server for the best of the tasks. Raises InputError when none can be compiled."""
    experiments.measure_all(tasks, workers, None)
    candidates = [task for task in tasks if task.measured and task.configuration.network]
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


def run(args: argparse.Namespace, experiment: Experiment, tasks: list[Task], results: Results) -> None:
    """Compile, print the plan, and measure and encrypt what is affordable; or export."""
    scheduler = args.scheduler or f"{LOCAL}1"
    here = scheduler.startswith(LOCAL)
    processes, address = (int(scheduler.removeprefix(LOCAL)), None) if here else (0, scheduler)
    with open_workers(experiment, processes, address, experiments.versions) as workers:
        experiments.compile_all(tasks, workers)
        if args.export:
            export_best(args, experiment, tasks, workers)
            return
        experiments.predict(tasks, workers, args.max_seconds, here)
        experiments.print_plan(tasks, len(experiment.configurations) - len(tasks))
        if not args.dry_run:
            experiments.measure_all(tasks, workers, results)
            experiments.encrypt_all(tasks, workers, results)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile all, print what it will take, run encrypted what is affordable and not yet done."""
    args = parse_arguments(argv)
    if args.export:
        check_new(args.export)
    if args.beside:
        experiments.read_beside(args.workdir, args.beside)
    experiment, draws, keys = describe(args)
    write = not (args.dry_run or args.report or args.export)
    if write:
        cli.check_writable(args.workdir)
    with Results(args.workdir / DATABASE, write) as results:
        settings = describe_settings(args, experiment.data.patients)
        report = Report(args.workdir, results, keys, experiment, draws, settings, args.beside)
        tasks = experiments.find_tasks(experiment, draws, results)
        if not args.export:
            tasks = [task for task in tasks if not task.finished]
        try:
            if not tasks and not args.report:
                print(f"all {len(experiment.configurations)} configurations are finished and stay as they are")
            elif not args.report:
                run(args, experiment, tasks, results)
        except KeyboardInterrupt:
            if write and results.facts(keys):
                print("\nwriting the workbooks of what is finished ...", flush=True)
                report.write()
            raise
        if write or args.report:
            report.write()


if __name__ == "__main__":
    cli.run(main, RESUME)
