"""Step 5: compile the best networks at 2-7 bits and classify beats cleartext and encrypted (TFHE, Concrete ML).

Every configuration (network, bits) is compiled first; then the plan with the predicted times is printed, and what is
affordable runs encrypted on test rows drawn by class and record. Where step 3 trained a network for a bit width, that
one is taken (quantized/{name}_{bits}bits.onnx), else Concrete ML quantizes the float network. The last sigmoid stays
with the client: the encrypted graph ends in the logit, whose sign is the decision. A network without neurons is not
compiled; it runs as one packed product (fhe_mlp/packed.py). Costs are compared with default PTQ: n_bits only, ten rows
of calibration, no rounding, the sigmoid encrypted as well.

Each finished configuration and batch is in the database before the next starts; rerun the command to resume. Results of
another network, data set, setting or version are kept apart in the same database.

Reads   pruned_model_top_*.onnx and quantized/ in --workdir (python h5_onnx_converter.py makes them),
        the arrays in --data-dir
Writes  to --workdir: fhe_results.sqlite and, from it, results_batch_{number}.xlsx, fhe_summary.xlsx, fhe_frontier.png;
        fhe_steps.csv and fhe_steps.png, the figures of steps 1 to 5;
        to --export: what to deploy
Run     python fhe_experiments.py
        python fhe_experiments.py --top 10 --batches 145 --dry-run      (estimate only)
        python fhe_experiments.py --reference --top 1 --bits 2 3        (default PTQ, encrypted where affordable)
        python fhe_experiments.py --export deployed                     (client and server for one configuration)
        python fhe_experiments.py --report                              (workbooks and pictures anew from the database)
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fhe_mlp import circuit, cli
from fhe_mlp.arrays import (
    Arrays,
    expected_leads,
    feature_table,
    load_arrays,
    load_scaler,
    rows_of,
    stratified_order,
    training_probability,
    unseen_patients,
)
from fhe_mlp.cluster import connect, scheduler_address
from fhe_mlp.configuration import DEFAULT_PTQ, Configuration, Setting, identify, load_configuration, versions
from fhe_mlp.deployment import check_new, export
from fhe_mlp.networks import by_rank, public_map
from fhe_mlp.plan import make_plan, measure_speed, print_plan, run_plan
from fhe_mlp.quantized import BITS, SAME_COST, TOLERATED_LOSS
from fhe_mlp.report import Report
from fhe_mlp.steps import read_steps
from fhe_mlp.store import Store

TOP = 6  # best networks of step 3
BATCH_SIZE = 50  # test rows a batch, as published; here in an order stratified by class and record
SAMPLES = 10  # rows drawn from each batch, as published
CALIBRATION_ROWS = 1000  # training rows that fix the quantization ranges
DEFAULT_PTQ_BITS = BITS  # of weights and activations, of default PTQ
DEFAULT_PTQ_ROWS = 10  # of calibration, of default PTQ
SIMULATED_ROWS = 500  # test rows for the simulated accuracy; simulation takes milliseconds a row
ROUNDING_BITS = 6  # leading accumulator bits kept where Concrete ML quantizes; step 3's networks have their own
P_ERROR = 2.0**-13  # of them: chance that one bootstrap is off by one step; Concrete ML's default is 2^-40
MAX_SECONDS = 60.0  # seconds a sample above which a configuration is not run
EXAMPLE_BEATS = 5  # of the training part, exported
DATABASE = "fhe_results.sqlite"
RESUME = f"finished results are in {DATABASE}; rerun the command to resume"  # printed after Ctrl-C


# -------------------------------------------------------------------------------------------------------- what is asked
def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.make_parser(__doc__)
    option = parser.add_argument
    option("--models", type=Path, nargs="+", help=".onnx files (default: the best of step 4)")
    option("--top", type=cli.positive_int, default=TOP, help="how many of the best networks")
    option("--bits", type=int, nargs="+", choices=BITS, default=BITS, help="of the weights")
    option("--batch-size", type=cli.positive_int, default=BATCH_SIZE, help="test rows a batch")
    option("--samples", type=cli.positive_int, default=SAMPLES, help="rows drawn from each batch")
    option("--batches", type=cli.positive_int, default=1, help="how many batches")
    option("--start-batch", type=cli.natural_int, default=0, help="number of the first batch, from 0")
    option("--max-seconds", type=cli.positive_float, default=MAX_SECONDS, help="a beat; what is slower is not run")
    option("--max-loss", type=cli.positive_float, default=TOLERATED_LOSS, help="validation accuracy given up for cost")
    option("--post-training", action="store_true", help="leave step 3's quantized networks aside, quantize here")
    option("--rounding-bits", type=int, choices=range(2, 9), default=ROUNDING_BITS, help="of networks quantized here")
    chance = cli.number(float, 2.0**-60, cli.BELOW_ONE, "between 2^-60 and 1")
    option("--p-error", type=chance, default=P_ERROR, help="of networks quantized here: that one bootstrap is off")
    option("--reference", action="store_true", help="default PTQ: no rounding, p_error 2^-40, the sigmoid encrypted")
    option("--scheduler", type=scheduler_address, help="Dask's (tcp://HOST:8786), or local:N for N processes here")
    only = parser.add_mutually_exclusive_group().add_argument
    only("--dry-run", action="store_true", help="print the plan, run nothing, write nothing")
    option("--beside", type=Path, metavar="DIR", help="a --workdir whose networks are shown side by side with these")
    only("--report", action="store_true", help="write workbooks and pictures from the database, run nothing")
    only("--export", type=Path, metavar="DIR", help="write client and server for the best configuration")
    args = parser.parse_args(argv)
    given = parser.parse_args(argv, argparse.Namespace(p_error=None, rounding_bits=None))
    if args.reference and (given.p_error or given.rounding_bits or args.post_training):
        parser.error("--reference fixes what --p-error, --rounding-bits and --post-training would set")
    if args.export and args.scheduler:
        parser.error("--export does not use --scheduler")
    args.bits = sorted(set(args.bits))
    return args


def chosen_networks(args: argparse.Namespace) -> list[Path]:
    """Paths of the float networks that are asked for. Raises InputError where there are none or names collide."""
    top = 1 if args.export else args.top
    paths = args.models or by_rank(args.workdir, ".onnx")[:top]
    if not paths:
        raise cli.InputError(f"{args.workdir}: no pruned_model_top_*.onnx; make them with: python h5_onnx_converter.py")
    if len({path.stem for path in paths}) < len(paths):
        raise cli.InputError("--models: two files have the same name; their rows could not be told apart")
    return paths


def drawn_rows(batch: int, batch_size: int, samples: int, order: np.ndarray) -> np.ndarray:
    """Rising indices of the test rows drawn from batch number `batch`, the first of its stretch of `order`."""
    return np.sort(order[batch * batch_size : (batch + 1) * batch_size][:samples])


def drawn_by_batch(args: argparse.Namespace, order: np.ndarray) -> dict[int, np.ndarray]:
    """Indices of the drawn test rows by number of the batch. Raises InputError past the last one."""
    batches = range(args.start_batch, args.start_batch + args.batches)
    last = (len(order) - 1) // args.batch_size
    if batches[-1] > last:
        raise cli.InputError(f"batch {batches[-1]} does not exist, the last is {last}; see --start-batch and --batches")
    return {batch: drawn_rows(batch, args.batch_size, args.samples, order) for batch in batches}


@dataclass(frozen=True)
class Experiment:
    """What all configurations of one command share."""

    data: Arrays
    setting: Setting
    calibration: np.ndarray  # training rows (n, features)
    simulated: np.ndarray  # indices of test rows
    order: np.ndarray  # of test rows, in which batches are taken
    beats: pd.DataFrame | None  # record and AAMI class of the test rows, where they are known
    patients: str  # whether the test patients are in the training part
    basis: dict[str, Any]  # what identifies results besides network, bits and setting

    def configuration(self, path: Path, bits: int) -> Configuration:
        """The network in `path` at `bits`."""
        return load_configuration(path, bits, self.setting, self.data, self.calibration, self.basis)

    def identity(self, path: Path, bits: int) -> str:
        """Its name in the database, without loading it."""
        return identify(path, bits, self.setting, self.basis)["identity"]


def describe(args: argparse.Namespace) -> Experiment:
    """Arrays, setting and the seeded choice of rows."""
    data = load_arrays(args.data_dir, public_map(args.workdir))
    beats, named = rows_of(args.data_dir, data)
    X, order = data["train"][0], stratified_order(beats["test"], args.seed)
    rows = np.random.default_rng(args.seed).choice(
        len(X), min(CALIBRATION_ROWS, len(X)), replace=False, p=training_probability(beats)
    )
    calibration, simulated = X[rows], np.sort(order[:SIMULATED_ROWS])
    setting = DEFAULT_PTQ if args.reference else Setting(args.rounding_bits, args.p_error, 0.0, not args.post_training)
    if args.reference:
        calibration = calibration[:DEFAULT_PTQ_ROWS]
    basis = {
        "data_sha256": cli.digest(b"".join(array.tobytes() for part in data.values() for array in part)),
        "rows_sha256": cli.digest(calibration.tobytes() + simulated.tobytes()),  # of calibration and simulation
        **versions(),
        "seed": args.seed,
        "batch_size": args.batch_size,
        "samples": args.samples,
    }
    patients = ("unseen patients" if unseen_patients(beats) else "known patients") if named else "unknown patients"
    return Experiment(data, setting, calibration, simulated, order, beats["test"] if named else None, patients, basis)


# ------------------------------------------------------------------------------------------- what it costs: default PTQ
def reference_network(workdir: Path, paths: Sequence[Path]) -> Path:
    """The float network that default PTQ is applied to: of the best validation accuracy, which is in its name."""
    ranked = by_rank(workdir, ".onnx")
    return max(ranked, key=lambda path: path.stem.split("_acc_")[-1]) if ranked else paths[0]


def comparison_basis(reference: Path, experiment: Experiment, max_loss: float) -> str:
    """Name of the rows that other models have in the database for the same data and versions."""
    return cli.digest(repr((identify(reference, 0, DEFAULT_PTQ, experiment.basis)["identity"], max_loss)))


def default_ptq(reference: Path, experiment: Experiment, max_loss: float) -> list[dict[str, Any]]:
    """What default PTQ gives at each bit width, a row each: cleartext accuracy, which needs no circuit.

    Compiled is only what our costs are compared with ("compared"): the fewest bits whose validation accuracy is at most
    `max_loss` below the best. Wider ones cost more and take minutes to compile; `make bench` has them all.
    """
    rows, configurations = {}, {}
    calibration = experiment.calibration[:DEFAULT_PTQ_ROWS]
    for bits in DEFAULT_PTQ_BITS:
        name = {
            "name": f"default PTQ, {bits} bits",
            "kind": "default PTQ",
            "model_name": reference.stem,
            "q_bits": bits,
        }
        configuration = load_configuration(reference, bits, DEFAULT_PTQ, experiment.data, calibration, experiment.basis)
        try:
            found = circuit.accuracies(
                circuit.quantize(configuration), configuration, experiment.data, np.array([], dtype=int)
            )
        except circuit.CIRCUIT_ERRORS as error:
            rows[bits] = {**name, "note": cli.first_line(error)}
            continue
        rows[bits] = {**name, "balanced_accuracy_validation": found["balanced_accuracy_validation"]}
        rows[bits] |= {"balanced_accuracy": found["balanced_accuracy_test_set"], "compared": False}
        configurations[bits] = configuration
    best = max((row.get("balanced_accuracy_validation", 0) for row in rows.values()), default=0)
    for bits, configuration in configurations.items():
        if rows[bits]["balanced_accuracy_validation"] >= best - max_loss:
            facts, module = circuit.cost(configuration)
            if module is not None:
                rows[bits] |= {"complexity": facts["complexity"], "pbs": facts["pbs"], "compared": True}
                break
            rows[bits]["note"] = facts["reason"]
    return list(rows.values())


# ---------------------------------------------------------------------------------------------------------- the results
def described_settings(args: argparse.Namespace, experiment: Experiment, reference: Path) -> dict[str, Any]:
    """The settings sheet: machine, versions, options, and what the columns mean."""
    return {
        **cli.machine_facts(),
        "rounding_bits": "leading bits of each accumulator that its table look-up sees; complexity rises with them",
        "p_error": "chance that one encrypted table look-up is off by a step; an accumulator between two "
        "rounding steps may be taken for either, so that encrypted outputs are often some steps off; "
        "accuracy_simulated and noisy_balanced_accuracy_* (of step 3's networks, all rows) have this noise, "
        "accuracy_clear_same_rows and balanced_accuracy_* are without it",
        "security_bits": "Concrete's security level of keys and ciphertexts; p_error does not change it",
        "patients of the test set": experiment.patients,
        "encrypted and simulated rows": "drawn by class and record, half of them N, so harder than the test set",
        "*_low95, *_high95": "95 % intervals; of the test set by a bootstrap over records, of encrypted rows Wilson's",
        "calibration": "of step 3's networks, the training rows of each integer's minimum and maximum; of others, "
        f"{CALIBRATION_ROWS} drawn training rows",
        "default PTQ": f"{reference.stem}, n_bits only, {DEFAULT_PTQ_ROWS} training rows as calibration",
        "complexity_ratio_default_ptq": "complexity of default PTQ, at the fewest bits whose validation accuracy is "
        f"within {100 * args.max_loss:g} points of its best, divided by this complexity",
        "on_front": "no configuration of the same or lower complexity has as good a validation accuracy",
        "identity": "rows of the same identity stand for each other; it is a digest of network, bits and setting, of "
        "data_sha256, rows_sha256, versions, seed, batch_size and samples",
        **{f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items()},
        "times": "seconds; *_seconds: median of one sample, after one run that warms up; fhe_time: sum over num_items",
    }


def report_for(args: argparse.Namespace, experiment: Experiment, paths: Sequence[Path], store: Store) -> Report:
    """What is written for the networks at hand: those of step 4 in --workdir, and the ones in `paths`."""
    reference = reference_network(args.workdir, paths)
    at_hand = dict.fromkeys([*by_rank(args.workdir, ".onnx"), *paths])
    known = [experiment.identity(path, bits) for path in at_hand for bits in BITS]
    basis = comparison_basis(reference, experiment, args.max_loss)
    settings = described_settings(args, experiment, reference)
    return Report(args.workdir, store, known, basis, settings, experiment.patients, args.beside)


# ----------------------------------------------------------------------------------------------------------- the export
def best_for_export(found: Sequence[dict[str, Any]], max_loss: float) -> int:
    """Number of the configuration to deploy; found: the facts of each, with q_bits, complexity, validation accuracy.

    Of those at most `max_loss` below the best, the lowest complexity; of those that cost the same but for SAME_COST,
    the most bits, and then the best accuracy.
    """
    accuracy = [f.get("noisy_balanced_accuracy_validation", f["balanced_accuracy_validation"]) for f in found]
    good = [number for number, one in enumerate(accuracy) if one >= max(accuracy) - max_loss]
    most = min(found[number]["complexity"] for number in good) * (1 + SAME_COST)
    same = [number for number in good if found[number]["complexity"] <= most]
    return max(same, key=lambda number: (found[number]["q_bits"], accuracy[number]))


def export_best(args: argparse.Namespace, experiment: Experiment, paths: Sequence[Path]) -> None:
    """Write client and server for the best configuration of the networks in `paths`.

    Raises InputError when none of them can be compiled.
    """
    found = []
    jobs = [(path, bits) for path in paths for bits in args.bits]
    for path, bits in tqdm(jobs, desc="choosing", unit="circuit", disable=len(jobs) == 1):
        configuration = experiment.configuration(path, bits)
        facts, module = circuit.cost(configuration)
        if module is None:
            print(f"{configuration.label}: {facts['reason']}")
            continue
        facts |= circuit.accuracies(module, configuration, experiment.data, np.array([], dtype=int))
        facts["q_bits"] = bits
        found.append((facts, module, configuration))
    if not found:
        raise cli.InputError("none of the configurations can be compiled; see --models and --bits")
    facts, module, configuration = found[best_for_export([facts for facts, _, _ in found], args.max_loss)]
    X = load_arrays(args.data_dir)["train"][0]
    model = {
        "name": configuration.label,
        "output": "logit" if configuration.setting.threshold == 0 else "probability",
        "threshold": configuration.setting.threshold,
        "p_error": configuration.p_error,
        "security_bits": facts["security_bits"],
        "complexity": facts["complexity"],
        "pbs": facts["pbs"],
        "test_balanced_accuracy": facts.get("noisy_balanced_accuracy_test_set", facts["balanced_accuracy_test_set"]),
        "test_rows": facts["test_set_rows"],
        "expand": public_map(args.workdir),
        "leads": expected_leads(args.data_dir),
        "features": feature_table(args.data_dir, X.shape[1]),
        "scaler": load_scaler(args.data_dir),
    }
    export(module, model, X[:EXAMPLE_BEATS], args.export)
    print(f"wrote client/, server/ and README.md for {configuration.label} to {args.export}")


# ---------------------------------------------------------------------------------------------------------- the command
def main(argv: Sequence[str] | None = None) -> None:
    """Compile all, print what it will take, run encrypted what is affordable and not yet done."""
    args = parse_arguments(argv)
    if args.export:
        check_new(args.export)
    if args.beside:
        read_steps(args.beside)
    experiment = describe(args)
    drawn = drawn_by_batch(args, experiment.order)
    paths = chosen_networks(args)
    if args.export:
        export_best(args, experiment, paths)
        return
    keys = {(path, bits): experiment.identity(path, bits) for path in paths for bits in args.bits}
    write = not (args.dry_run or args.report)
    if write:
        cli.check_writable(args.workdir)
    with Store(args.workdir / DATABASE, write) as store:
        report = report_for(args, experiment, paths, store)
        finished = store.finished(keys.values())
        missing = {}
        for (path, bits), key in keys.items():
            rows = {batch: index for batch, index in drawn.items() if (key, batch) not in finished}
            if rows and not args.report:
                missing[experiment.configuration(path, bits)] = rows
        if not missing:
            if not args.report:
                print(f"all {len(keys)} configurations are finished and stay as they are")
            if not args.dry_run:
                report.write()
            return
        with connect(args.scheduler) if args.scheduler else contextlib.nullcontext() as cluster:
            print("measuring the machine ...", flush=True)
            speed = measure_speed(experiment.setting, args.seed, cluster)
            tasks = make_plan(missing, speed, args.max_seconds, len(experiment.simulated), cluster)
            print_plan(tasks, len(keys) - len(tasks))
            if args.dry_run:
                return
            if "default PTQ" not in set(store.comparison(report.basis).get("kind", [])):
                print("default PTQ, for comparison ...", flush=True)
                for row in default_ptq(reference_network(args.workdir, paths), experiment, args.max_loss):
                    store.compare(report.basis, row)
            sent = {part: experiment.data[part] for part in ("val", "test")}
            left = {batch: sum(batch in rows for rows in missing.values()) for batch in drawn}
            results = run_plan(tasks, sent, experiment.simulated, experiment.beats, args.max_seconds, cluster)
            for batch, row, predictions in results:
                store.add(batch, row, predictions)
                left[batch] -= 1
                if not left[batch]:
                    report.write_batch(batch)
        report.write([])


def show_saved() -> None:
    """After a run that was interrupted or killed: workbooks and pictures of what it has finished, if anything."""
    args = parse_arguments(None)
    if not (args.dry_run or args.report or args.export) and (args.workdir / DATABASE).exists():
        print("writing the workbooks of what is finished ...", flush=True)
        main([*sys.argv[1:], "--report"])


if __name__ == "__main__":
    cli.run_in_child(main, RESUME, show_saved)
