"""Step 5: compile the best networks at 2-7 bits and classify beats cleartext and encrypted (TFHE, Concrete ML).

Every configuration (network, bits) is compiled first; then the plan with the predicted times is printed, and what is
affordable runs encrypted on test rows drawn by class and record. Where step 3 trained a network for a bit width, that
one is taken (quantized/{name}_{bits}bits.onnx), else Concrete ML quantizes the float network. The last sigmoid stays
with the client: the encrypted graph ends in the logit, whose sign is the decision. A network without neurons is not
compiled but one packed product (fhe_mlp/packed.py). Costs are compared with default PTQ: n_bits only, ten rows of
calibration, no rounding, the sigmoid encrypted as well.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fhe_mlp import circuit, cli
from fhe_mlp.arrays import (
    CLASS_SHARES,
    Arrays,
    expected_leads,
    feature_table,
    load_arrays,
    load_scaler,
    rows_of,
    training_probability,
    unseen_patients,
)
from fhe_mlp.cluster import Cluster, connect, scheduler_address
from fhe_mlp.configuration import DEFAULT_PTQ, Configuration, Setting, identify, load_configuration, versions
from fhe_mlp.deployment import check_new, export
from fhe_mlp.networks import by_rank, public_map
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
WORKERS_DIED = "its workers died, several in a row"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, about {remaining} left{postfix}"


# -------------------------------------------------------------------------------------------------------- what is asked
def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.make_parser(__doc__)
    option = parser.add_argument
    option("--models", type=Path, nargs="+", help=".onnx files (default: the best of step 4)")
    option("--top", type=cli.positive_int, default=TOP, help="how many of the best networks")
    option("--bits", type=int, nargs="+", choices=BITS, default=BITS, help="of weights and activations")
    option("--batch-size", type=cli.positive_int, default=BATCH_SIZE, help="test rows a batch")
    option("--samples", type=cli.positive_int, default=SAMPLES, help="rows drawn from each batch")
    option("--batches", type=cli.positive_int, default=1, help="how many batches")
    option("--start-batch", type=cli.natural_int, default=0, help="number of the first batch, from 0")
    option("--max-seconds", type=cli.positive_float, default=MAX_SECONDS, help="what takes more a sample is not run")
    option("--max-loss", type=cli.positive_float, default=TOLERATED_LOSS, help="of validation accuracy, for less cost")
    option("--post-training", action="store_true", help="leave step 3's quantized networks aside, quantize here")
    option("--rounding-bits", type=int, choices=range(2, 9), default=ROUNDING_BITS, help="of networks quantized here")
    option("--p-error", type=float, default=P_ERROR, help="of these: chance that one bootstrap is off by a step")
    option("--reference", action="store_true", help="default PTQ: no rounding, p_error 2^-40, the sigmoid encrypted")
    option("--scheduler", type=scheduler_address, help="Dask's (tcp://HOST:8786), or local:N for N processes here")
    only = parser.add_mutually_exclusive_group().add_argument
    only("--dry-run", action="store_true", help="print the plan, run nothing, write nothing")
    option("--beside", type=Path, metavar="DIR", help="a --workdir whose networks are shown side by side with these")
    only("--report", action="store_true", help="write workbooks and pictures from the database, run nothing")
    only("--export", type=Path, metavar="DIR", help="write client and server for the best configuration")
    args = parser.parse_args(argv)
    if not 2.0**-60 <= args.p_error < 1:
        parser.error("--p-error must lie between 2^-60 and 1")
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


def stratified_order(beats: pd.DataFrame, seed: int) -> np.ndarray:
    """Row numbers in an order of which every stretch has each AAMI class and record in its share, until one runs out.

    beats: columns record and aami. Shares are those of training draws, so that ten rows have two S beats where S is one
    beat in thirty. Each row comes once: row r of a stratum (random order) has the place (r + 1/2) / share, and within a
    class, records come in the same way, with the square root of their beats as share.
    """
    shuffled = beats[["record", "aami"]].iloc[np.random.default_rng(seed).permutation(len(beats))]
    size = shuffled.groupby(["aami", "record"])["aami"].transform("size")
    in_record = (shuffled.groupby(["aami", "record"]).cumcount() + 0.5) / np.sqrt(size)
    shuffled = shuffled.iloc[np.argsort(in_record.to_numpy(), kind="stable")]
    place = (shuffled.groupby("aami").cumcount() + 0.5) / shuffled["aami"].map(CLASS_SHARES)
    return shuffled.index.to_numpy()[np.argsort(place.to_numpy(), kind="stable")]


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
    test_beats = beats["test"] if named else None
    return Experiment(data, setting, calibration, simulated, order, test_beats, patients, basis)


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


# ------------------------------------------------------------------------------------------------------------- the plan
@dataclass(frozen=True, eq=False)
class Task:
    """A configuration that is to run: what its compilation gave, and on which rows."""

    configuration: Configuration
    facts: dict[str, Any]  # of circuit.cost and the two judges below
    drawn: dict[int, np.ndarray]  # test rows by batch
    seconds: float  # predicted, for all of it
    worker: str | None = None  # that has compiled it

    @property
    def samples(self) -> int:
        """Rows that will run encrypted."""
        return sum(map(len, self.drawn.values())) if self.facts["status"] == "ok" else 0


def judge_time(facts: dict[str, Any], seconds_per_unit: float, limit: float) -> None:
    """Add the predicted seconds a sample to the facts of a compiled configuration, and refuse what exceeds `limit`."""
    if facts["status"] == "ok":
        seconds = facts["predicted_seconds"] = facts["complexity"] * seconds_per_unit
        if seconds > limit:
            reason = f"predicted {seconds:.0f} s a sample, over --max-seconds {limit:g}"
            facts |= {"status": "too slow", "reason": reason}


def compiled(configurations: Sequence[Configuration], cluster: Cluster | None) -> Iterator[tuple[int, str | None, Any]]:
    """Compile each configuration, here or on the cluster; yield its number, who did it and the facts of its cost."""
    with tqdm(total=len(configurations), desc="compiling", unit="circuit", disable=not configurations) as bar:
        if cluster:
            found = cluster.map(circuit.plan_circuit, [(c,) for c in configurations], bar.set_postfix_str)
        else:
            found = ((number, None, circuit.plan_circuit(c)) for number, c in enumerate(configurations))
        for number, worker, facts in found:
            bar.update()
            yield number, worker, facts or {"status": "failed", "reason": WORKERS_DIED}


def make_plan(
    missing: dict[Configuration, dict[int, np.ndarray]],
    speed: circuit.Speed,
    limit: float,
    simulated_rows: int,
    cluster: Cluster | None,
) -> list[Task]:
    """Tasks for the configurations of `missing` with their test rows by batch; limit: affordable seconds a sample."""
    configurations = list(missing)
    tasks: dict[int, Task] = {}
    for number, worker, facts in compiled(configurations, cluster):
        judge_time(facts, speed.unit, limit)
        if cluster is None or cluster.sharing:  # on this machine
            circuit.judge_memory(facts)
        task = Task(configurations[number], facts, missing[configurations[number]], 0.0, worker)
        seconds = speed.simulated_pbs * facts.get("pbs", 0) * simulated_rows
        if facts["status"] == "ok":
            seconds += facts["evaluation_keys_MB"] * 1e6 * speed.key_byte
            seconds += facts["predicted_seconds"] * (task.samples + 1)
        tasks[number] = replace(task, seconds=seconds)
    return [tasks[number] for number in sorted(tasks)]


def print_plan(tasks: Sequence[Task], finished: int) -> None:
    """Show what will run, what not and why, and about how long it takes."""
    if finished:
        print(f"\n{finished} configurations are finished and stay as they are")
    columns = ["model", "bits", "pbs", "complexity", "predicted_seconds", "evaluation_keys_MB", "predicted_memory_MB"]
    plan = pd.DataFrame({"model": t.configuration.model_name, "bits": t.configuration.bits, **t.facts} for t in tasks)
    plan = plan.reindex(columns=[*columns, "status"]).assign(minutes=[t.seconds / 60 for t in tasks])
    print(f"\n{plan.to_string(index=False, float_format='{:.4g}'.format)}")
    samples, runnable = sum(t.samples for t in tasks), sum(t.facts["status"] == "ok" for t in tasks)
    minutes = sum(t.seconds for t in tasks) / 60
    print(f"\n{len(tasks)} configurations to do, {runnable} of them encrypted, on {samples} rows in all: ", end="")
    print(f"about {minutes:.1f} min", flush=True)


# ----------------------------------------------------------------------------------- cleartext, simulated and encrypted
def failed_results(task: Task) -> Iterator[circuit.Result]:
    """Rows of a configuration whose workers died."""
    row = {"model_name": task.configuration.model_name, "q_bits": task.configuration.bits, **task.facts}
    row |= {**task.configuration.identity, "status": "failed", "reason": WORKERS_DIED}
    for batch, index in task.drawn.items():
        yield batch, {**row, "batch": batch, "num_items": len(index)}, None


def run_plan(
    tasks: Sequence[Task], experiment: Experiment, limit: float, cluster: Cluster | None
) -> Iterator[circuit.Result]:
    """Run the tasks here or on the cluster and yield what is finished.

    The bar counts predicted seconds, so that the time left follows from those measured so far.
    """
    ready = samples = 0
    everything = sum(t.samples for t in tasks)
    sent = {part: experiment.data[part] for part in ("val", "test")}
    jobs = [(t.configuration, t.facts, t.drawn, sent, experiment.simulated, experiment.beats, limit) for t in tasks]
    with tqdm(total=sum(t.seconds for t in tasks), desc="encrypted", bar_format=BAR, smoothing=0.1) as bar:

        def show(seconds: float, text: str = "") -> None:
            counts = f"{ready} of {len(tasks)} configurations, {samples} of {everything} samples"
            bar.set_postfix_str(f"{counts}; {text}" if text else counts, refresh=False)
            bar.update(min(seconds, bar.total - bar.n))

        if cluster:
            places = [task.worker for task in tasks]
            for number, worker, results in cluster.map(circuit.all_batches, jobs, lambda text: show(0, text), places):
                yield from failed_results(tasks[number]) if worker is None else results
                ready, samples = ready + 1, samples + tasks[number].samples
                show(tasks[number].seconds)
            return
        for task, job in zip(tasks, jobs):
            rest = task.seconds

            def tick(text: str, finished: int, each: float = task.facts.get("predicted_seconds", 0)) -> None:
                nonlocal samples, rest
                samples, rest = samples + finished, rest - finished * each
                show(finished * each, text)

            yield from circuit.run_batches(*job, tick)
            ready += 1
            show(max(0.0, rest))


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
    known = [
        identify(path, bits, experiment.setting, experiment.basis)["identity"] for path in at_hand for bits in BITS
    ]
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
        configuration = load_configuration(
            path, bits, experiment.setting, experiment.data, experiment.calibration, experiment.basis
        )
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
    setting, basis = experiment.setting, experiment.basis
    keys = {(path, bits): identify(path, bits, setting, basis)["identity"] for path in paths for bits in args.bits}
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
                new = load_configuration(path, bits, setting, experiment.data, experiment.calibration, basis)
                missing[new] = rows
        if not missing:
            if not args.report:
                print(f"all {len(keys)} configurations are finished and stay as they are")
            if not args.dry_run:
                report.write()
            return
        with connect(args.scheduler) if args.scheduler else contextlib.nullcontext() as cluster:
            print("measuring the machine ...", flush=True)
            if cluster:
                ((_, _, speed),) = cluster.map(circuit.measure_speed, [(setting, args.seed)], lambda text: None)
            else:
                speed = circuit.measure_speed(setting, args.seed)
            tasks = make_plan(missing, speed, args.max_seconds, len(experiment.simulated), cluster)
            print_plan(tasks, len(keys) - len(tasks))
            if args.dry_run:
                return
            if "default PTQ" not in set(store.comparison(report.basis).get("kind", [])):
                print("default PTQ, for comparison ...", flush=True)
                for row in default_ptq(reference_network(args.workdir, paths), experiment, args.max_loss):
                    store.compare(report.basis, row)
            left = {batch: sum(batch in rows for rows in missing.values()) for batch in drawn}
            for batch, row, predictions in run_plan(tasks, experiment, args.max_seconds, cluster):
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
