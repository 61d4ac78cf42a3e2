"""Step 5: compile the best networks at 2-7 bits and classify beats in clear and encrypted (TFHE, Concrete ML).

Every configuration (network, bits) is compiled first; then the plan with the predicted times is printed, and what is
affordable runs encrypted on a seeded draw of test rows. Where step 3 trained a network for a bit width, that one is
taken (quantized/{name}_{bits}bits.onnx), else Concrete ML quantizes the float network. The last sigmoid stays with the
client: the encrypted graph ends in the logit, whose sign is the decision. What each configuration saves is told against
the plain way: n_bits only, ten rows of calibration, no rounding, sigmoid encrypted; of it only the price is computed.

Each finished batch of a configuration is on disk before the next starts. The same command again goes on where a run
was cut short; another network, data set, setting, version or program starts new workbooks and keeps the old ones.

Reads   pruned_model_top_*.onnx and quantized/ in --workdir (python h5_onnx_converter.py makes them), the arrays in
        --data-dir and, for the pictures, benchmark.xlsx in --workdir when it is there (make bench)
Writes  to --workdir: results_batch_{number}.xlsx, fhe_summary.xlsx, fhe_frontier.png; to --export: what to deploy
Run     python fhe_experiments.py
        python fhe_experiments.py --top 10 --batches 145 --dry-run      (what would it take?)
        python fhe_experiments.py --reference --top 1 --bits 2 3        (the plain way, encrypted where affordable)
        python fhe_experiments.py --export deployed                     (client and server for one configuration)
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fhe_mlp.circuit import PLAIN, Setting, calibrate_machine, load_network
from fhe_mlp.cluster import LOCAL, scheduler_address
from fhe_mlp.common import (
    InputError,
    check_writable,
    digest,
    machine_facts,
    make_parser,
    natural_int,
    only_run_in,
    positive_float,
    positive_int,
    run_in_child,
)
from fhe_mlp.deployment import check_new, export
from fhe_mlp.experiment import CODE_SHA256, Data, Job, accuracies, drawn_rows, make_job, price, versions
from fhe_mlp.networks import by_rank
from fhe_mlp.plan import make_plan, most_accurate, print_plan, run_plan
from fhe_mlp.quantized import BITS
from fhe_mlp.results import Workbooks, other_points, plot_frontier, read_benchmark, read_plain, write_summary
from preprocess_mitbih import load_arrays

TOP = 6  # best networks of step 3
BATCH_SIZE = 50  # consecutive test rows a batch, as published
SAMPLES = 10  # rows drawn from each batch, as published
CALIBRATION_ROWS = 1000  # training rows that fix the quantization ranges
PLAIN_BITS = BITS  # whose price is told, of the plain way
PLAIN_CALIBRATION_ROWS = 10  # of the plain way
MAX_LOSS = 0.01  # of validation accuracy: what counts as equally accurate when prices are compared or one is chosen
SIMULATED_ROWS = 500  # test rows for the simulated accuracy; simulation takes milliseconds a row
ROUNDING_BITS = 6  # leading accumulator bits kept where Concrete ML quantizes; step 3's networks have their own
P_ERROR = 2.0**-13  # chance that one bootstrap is off by one step; Concrete ML's default is 2^-40
MAX_SECONDS = 60.0  # seconds a sample above which a configuration is not run
GO_ON = "what is finished is saved in results_batch_*.xlsx; the same command goes on from there"  # after Ctrl-C
SHOWN = ["model_name", "q_bits", "rounding_bits", "complexity", "times_cheaper_than_plain", "accuracy_clear_test_set"]
SHOWN += ["accuracy_simulated", "run_seconds", "n", "accuracy_fhe", "on_front", "status"]  # columns printed at the end


def plain_prices(path: Path, data: Data, calibration: np.ndarray, basis: dict[str, Any], workdir: Path) -> pd.DataFrame:
    """What the plain way costs for the float network in `path`, a row for each bit width; nothing is encrypted.

    Taken from fhe_summary.xlsx in `workdir` where the same was computed before. The row that prices are compared with
    is marked in column "compared": the cheapest whose validation accuracy is at most MAX_LOSS below the best of them.
    """
    jobs = [make_job(path, bits, PLAIN, data, calibration[:PLAIN_CALIBRATION_ROWS], basis) for bits in PLAIN_BITS]
    known = read_plain(workdir)
    if list(known.get("identity", [])) == [job.key for job in jobs]:
        return known
    rows = []
    for job in tqdm(jobs, desc="plain way, for comparison", unit="circuit"):
        facts, module = price(job)
        row = {"model_name": job.model_name, "q_bits": job.bits, **job.identity, **facts}
        if module is not None:
            row |= accuracies(module, job, data, np.array([], dtype=int))
        rows.append(row)
    table = pd.DataFrame(rows)
    table["compared"] = False
    if "complexity" in table and table["complexity"].notna().any():
        good = table[table["accuracy_clear_validation"] >= table["accuracy_clear_validation"].max() - MAX_LOSS]
        table.loc[good["complexity"].idxmin(), "compared"] = True
    return table


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    option = parser.add_argument
    option("--models", type=Path, nargs="+", help=".onnx files (default: the best of step 4)")
    option("--top", type=positive_int, default=TOP, help="how many of the best networks")
    option("--bits", type=int, nargs="+", choices=BITS, default=BITS, help="of weights and activations")
    option("--batch-size", type=positive_int, default=BATCH_SIZE, help="consecutive test rows a batch")
    option("--samples", type=positive_int, default=SAMPLES, help="rows drawn from each batch")
    option("--batches", type=positive_int, default=1, help="how many batches")
    option("--start-batch", type=natural_int, default=0, help="number of the first batch, from 0")
    option("--max-seconds", type=positive_float, default=MAX_SECONDS, help="most seconds a sample; dearer is not run")
    option("--post-training", action="store_true", help="leave step 3's quantized networks aside, quantize here")
    option("--rounding-bits", type=int, choices=range(2, 9), default=ROUNDING_BITS, help="kept when quantizing here")
    option("--p-error", type=float, default=P_ERROR, help="chance that one bootstrap fails by a step")
    option("--reference", action="store_true", help="the plain way: no rounding, p_error 2^-40")
    option("--dry-run", action="store_true", help="print the plan, run nothing, write nothing")
    option("--scheduler", type=scheduler_address, help="Dask's (tcp://HOST:8786), or local:N for N processes here")
    option(
        "--export", type=Path, metavar="DIR", help="write client and server for the best of the named models and bits"
    )
    args = parser.parse_args(argv)
    if not 2.0**-60 <= args.p_error < 1:
        parser.error("--p-error must lie between 2^-60 and 1")
    if args.export and (args.dry_run or args.scheduler):
        parser.error("--export goes with neither --dry-run nor --scheduler")
    return args


def known_jobs(
    args: argparse.Namespace, paths: list[Path], make: Callable[[Path, int], Job]
) -> dict[tuple[Path, int], Job]:
    """The configurations of all networks at hand, by rank and bits: their rows may stand together in the workbooks.

    Raises InputError for a damaged file among those that are asked for; others are passed over.
    """
    known = {}
    for path in dict.fromkeys([*by_rank(args.workdir, ".onnx"), *paths]):
        for bits in BITS:
            try:
                load_network(path)
                known[path, bits] = make(path, bits)
            except InputError:
                if path in paths and bits in args.bits:
                    raise
    return known


def described_settings(args: argparse.Namespace, setting: Setting, plain: Path) -> dict[str, Any]:
    """The settings sheet: machine, versions, options, and what the columns mean."""
    from concrete.fhe import Configuration

    return {
        **machine_facts(),
        "rounding_bits": "leading bits of each accumulator that the encrypted ReLU looks at; their number is the price",
        "p_error": setting.p_error,
        "p_error in words": f"one encrypted ReLU in {1 / setting.p_error:,.0f} may fail by a step; an accumulator "
        "between two rounding steps may be taken for either, so that encrypted outputs are often some steps off; "
        "accuracy_simulated has this noise, accuracy_clear_same_rows is without it on the same rows",
        "security": f"{int(Configuration().security_level)} bits (Concrete's default); p_error does not change it",
        "calibration": f"{CALIBRATION_ROWS} training rows and those that drive an accumulator to its ends",
        "plain way": f"{plain.stem}, n_bits only, {PLAIN_CALIBRATION_ROWS} training rows as calibration",
        "times_cheaper_than_plain": "complexity of the plain way at its cheapest bit width within "
        f"{100 * MAX_LOSS:g} point of its best validation accuracy, divided by this complexity",
        "on_front": "no configuration that costs as much or less has a better validation accuracy",
        "identity": "rows of the same identity stand for each other; it is a digest of network, bits and setting, of "
        "data_sha256, code_sha256, rows_sha256, versions, seed, batch_size and samples",
        **{f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items()},
        "times": "seconds; *_seconds: median of one sample, after one run that warms up; fhe_time: sum over num_items",
    }


def chosen_networks(args: argparse.Namespace) -> list[Path]:
    """Paths of the float networks that are asked for. Raises InputError where there are none or names collide."""
    paths = args.models or by_rank(args.workdir, ".onnx")[: args.top]
    if not paths:
        raise InputError(f"{args.workdir}: no pruned_model_top_*.onnx; make them with: python h5_onnx_converter.py")
    if len({path.stem for path in paths}) < len(paths):
        raise InputError("--models: two files have the same name; their rows could not be told apart")
    return paths


def drawn_by_batch(args: argparse.Namespace, rows: int) -> dict[int, np.ndarray]:
    """Indices of the drawn test rows, of `rows`, by number of the batch. Raises InputError past the last one."""
    batches = range(args.start_batch, args.start_batch + args.batches)
    last = (rows - 1) // args.batch_size
    if batches[-1] > last:
        raise InputError(f"batch {batches[-1]} does not exist, the last is {last}; see --start-batch and --batches")
    return {batch: drawn_rows(batch, args.batch_size, args.samples, rows, args.seed) for batch in batches}


def main(argv: Sequence[str] | None = None) -> None:
    """Compile all, tell what it will take, run encrypted what is affordable and not yet done."""
    args = parse_arguments(argv)
    if args.export:
        check_new(args.export)
    data = load_arrays(args.data_dir)
    drawn = drawn_by_batch(args, len(data["test"][1]))
    paths = chosen_networks(args)
    setting = PLAIN if args.reference else Setting(args.rounding_bits, args.p_error, 0.0, not args.post_training)
    rng = np.random.default_rng(args.seed)
    calibration = data["train"][0][rng.permutation(len(data["train"][0]))[:CALIBRATION_ROWS]]
    if setting == PLAIN:
        calibration = calibration[:PLAIN_CALIBRATION_ROWS]
    simulated = np.sort(rng.permutation(len(data["test"][1]))[:SIMULATED_ROWS])
    basis = {
        "data_sha256": digest(b"".join(array.tobytes() for part in data.values() for array in part)),
        "code_sha256": CODE_SHA256,
        "rows_sha256": digest(calibration.tobytes() + simulated.tobytes()),  # of calibration and simulation
        **versions(),
        "seed": args.seed,
        "batch_size": args.batch_size,
        "samples": args.samples,
    }
    known = known_jobs(args, paths, lambda path, bits: make_job(path, bits, setting, data, calibration, basis))
    jobs = [known[path, bits] for path in paths for bits in args.bits]
    if args.export:
        export(jobs[: len(args.bits)], data, MAX_LOSS, args.data_dir, args.export)
        return
    plain_network = most_accurate(dict.fromkeys(path for path, _ in known), data)
    settings = described_settings(args, setting, plain_network)
    benchmark = read_benchmark(args.workdir)
    with contextlib.ExitStack() as stack:
        if not args.dry_run:
            check_writable(args.workdir)
            stack.enter_context(only_run_in(args.workdir))
        workbooks = Workbooks(args.workdir, [job.key for job in known.values()], settings)
        print("measuring this machine ...", flush=True)
        speed = calibrate_machine(setting, args.seed)
        missing = {job: {b: rows for b, rows in drawn.items() if not workbooks.finished(job.key, b)} for job in jobs}
        missing = {job: rows for job, rows in missing.items() if rows}
        here = args.scheduler is None or args.scheduler.startswith(LOCAL)
        tasks = make_plan(missing, speed, args.max_seconds, SIMULATED_ROWS, here)
        print_plan(tasks, len(jobs) - len(tasks))
        if args.dry_run:
            return
        plain = plain_prices(plain_network, data, calibration, basis, args.workdir)
        workbooks.set_foreign_aside()
        left = {job.key: len(rows) for job, rows in missing.items()}
        for result in run_plan(tasks, data, simulated, args.max_seconds, args.scheduler):
            workbooks.add(result)
            left[result.row["identity"]] -= 1
            if not left[result.row["identity"]]:
                write_summary(args.workdir, workbooks, plain, settings)
        summary = write_summary(args.workdir, workbooks, plain, settings)
    if summary["complexity"].notna().any():
        plot_frontier(summary, other_points(plain, benchmark), args.workdir / "fhe_frontier.png")
    shown = summary[[name for name in SHOWN if name in summary]]
    print(f"\n{shown.to_string(index=False, float_format='{:.4g}'.format)}\n")
    print(f"wrote {len(drawn)} results_batch_*.xlsx, fhe_summary.xlsx and fhe_frontier.png to {args.workdir}")


if __name__ == "__main__":
    run_in_child(main, GO_ON)
