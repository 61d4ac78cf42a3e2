"""The plan of step 5 with its predicted times, and the run: jobs for workers, and results for the database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fhe_mlp.experiments import jobs
from fhe_mlp.experiments.configuration import Configuration, Draws, Experiment
from fhe_mlp.experiments.results import Results
from fhe_mlp.workers import LOST, Workers

ALONE = 3  # rows of a configuration that run one at a time, to measure the seconds of one beat
JOB_SECONDS = 60.0  # predicted, of a job: what a kill can lose
MOST_ROWS = 1000  # of a job
DIED = {"status": "failed", "reason": "its workers died, several in a row"}
UNFINISHED = {"status": "unfinished", "reason": "rerun the command to resume"}
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, about {remaining} left{postfix}"


@dataclass(eq=False)
class Task:
    """A configuration and the test rows that are left to run."""

    configuration: Configuration
    facts: jobs.Facts  # of the database
    rows: np.ndarray
    beats: int  # of a payload at most
    seconds: float = 0.0  # predicted, for keys and rows

    @property
    def measured(self) -> bool:
        """Whether its accuracies are known."""
        return "test_set_rows" in self.facts

    @property
    def finished(self) -> bool:
        """Whether another attempt would add nothing."""
        status = self.facts["status"]
        return status == "cannot compile" or (status == "ok" and not len(self.rows))

    @property
    def runnable(self) -> bool:
        """Whether it has rows, and nothing forbids to run them."""
        return self.facts["status"] == "ok" and len(self.rows) > 0

    def calls(self) -> Iterator[list[np.ndarray]]:
        """Yield jobs of about JOB_SECONDS: the rows of each payload, at first one, then as many as it holds.

        Ends early where the configuration has failed meanwhile.
        """
        rows, beats = self.rows, self.beats
        each = max(self.seconds / len(rows), JOB_SECONDS / MOST_ROWS)
        alone = min(len(rows), ALONE if beats > 1 else len(rows))
        job: list[np.ndarray] = []
        for call in np.split(rows, [*range(1, alone), *range(alone, len(rows), beats)]):
            if job and each * sum(map(len, [*job, call])) > JOB_SECONDS:
                yield job
                job = []
            if self.facts["status"] != "ok":
                return
            job.append(call)
        yield job

    def store(self, results: Results, clear: np.ndarray | None = None, runs: Sequence[jobs.Facts] = ()) -> None:
        """Store the facts, with the cleartext logits and the runs that are new."""
        self.rows = np.setdiff1d(self.rows, [run["test_row"] for run in runs])
        results.add({**self.facts, **(UNFINISHED if self.runnable else {})}, clear, runs)


def find_tasks(experiment: Experiment, draws: Draws, results: Results) -> list[Task]:
    """Return a task for each configuration, with the facts that are stored and the drawn rows that have not run."""
    stored = {facts["identity"]: facts for facts in results.facts(experiment.configurations)}
    runs, tasks = results.runs(experiment.configurations), []
    drawn = np.concatenate([draws.rows(batch) for batch in draws.batches])
    for key, configuration in experiment.configurations.items():
        names = {"model_name": configuration.model_name, "q_bits": configuration.bits}
        new = {**names, **configuration.identity, "identity": key, "status": "new"}
        rows = np.setdiff1d(drawn, runs.loc[runs["identity"] == key, "test_row"])
        beats = experiment.beats if configuration.network else 1
        tasks.append(Task(configuration, stored.get(key, new), rows, beats))
    return tasks


def carry_out(workers: Workers, function: Callable, coming: Iterable[tuple], bar: tqdm) -> Iterator[tuple[Task, Any]]:
    """Run `function` for each (task, share of the bar, arguments) that is coming.

    Adds the facts of a finished job to its task, and yields this with what else the job found.
    """
    handed: list[tuple[Task, float]] = []

    def arguments() -> Iterator[tuple]:
        for task, share, *more in coming:
            handed.append((task, share))
            yield task.configuration.key, *more

    def waiting() -> None:
        bar.set_postfix_str("" if workers.count() else "waiting for a worker to come back")

    for number, result in workers.map(function, arguments(), waiting):
        task, share = handed[number]
        facts, found = (DIED, None) if result is LOST else result
        task.facts |= facts
        yield task, found
        bar.update(share)


def compile_all(tasks: Sequence[Task], workers: Workers) -> None:
    """Add to the facts of each task the cost of its circuit, or why it has none."""
    new = [task for task in tasks if not task.measured]
    with tqdm(total=len(new), desc="compiling", unit="circuit", disable=not new) as bar:
        list(carry_out(workers, jobs.cost, [(task, 1) for task in new], bar))
    for task in tasks:
        if "complexity" in task.facts:
            task.facts |= {"status": "ok", "reason": ""}


def predict(tasks: Sequence[Task], workers: Workers, limit: float, here: bool) -> None:
    """Add predicted seconds to the facts, and refuse what takes more than `limit` of them per beat.

    The first task with bootstraps shows how long keys and a beat take. here: whether the workers are on this machine,
    so that its memory is a limit too.
    """
    ready = [task for task in tasks if task.facts["status"] == "ok"]
    for task in ready:
        task.facts |= jobs.too_large(task.facts) if here else {}
    first = next((task for task in ready if task.facts["complexity"] and task.facts["status"] == "ok"), None)
    per_unit = per_megabyte = 0.0
    if first:
        print("measuring the machine ...", flush=True)
        list(carry_out(workers, jobs.encrypt, [(first, 0, [])], tqdm(disable=True)))
        per_unit = first.facts.get("warm_up_seconds", 0.0) / first.facts["complexity"]
        per_megabyte = first.facts.get("keygen_time", 0.0) / first.facts["evaluation_keys_MB"]
    for task in ready:
        each = task.facts["predicted_seconds"] = task.facts["complexity"] * per_unit
        if each > limit:
            reason = f"predicted {each:.0f} s per beat, over --max-seconds {limit:g}"
            task.facts |= {"status": "too slow", "reason": reason}
        elif task.facts["status"] == "ok":
            task.seconds = task.facts["evaluation_keys_MB"] * per_megabyte + each * (len(task.rows) + 1)


def print_plan(tasks: Sequence[Task], finished: int) -> None:
    """Print which tasks will run, which not, and about how long it takes. finished: configurations without a task."""
    if finished:
        print(f"\n{finished} configurations are finished and stay as they are")
    columns = ["model", "bits", "pbs", "complexity", "predicted_seconds", "evaluation_keys_MB", "predicted_memory_MB"]
    rows = [{"model": t.configuration.model_name, "bits": t.configuration.bits, **t.facts} for t in tasks]
    plan = pd.DataFrame(rows).reindex(columns=[*columns, "status"]).assign(minutes=[t.seconds / 60 for t in tasks])
    print(f"\n{plan.to_string(index=False, float_format='{:.4g}'.format)}")
    runnable = [task for task in tasks if task.runnable]
    rows, minutes = sum(len(task.rows) for task in runnable), sum(task.seconds for task in runnable) / 60
    print(f"\n{len(tasks)} configurations to do, {len(runnable)} of them encrypted, on {rows} rows in all: ", end="")
    print(f"about {minutes:.1f} min", flush=True)


def measure_all(tasks: Sequence[Task], workers: Workers) -> Iterator[tuple[Task, np.ndarray | None]]:
    """Add accuracies to the facts of each task, and yield it with its cleartext logits (n,) where they are new."""
    new = [task for task in tasks if "complexity" in task.facts and not task.measured]
    yield from ((task, None) for task in tasks if task not in new)
    with tqdm(total=len(new), desc="cleartext", unit="network", disable=not new) as bar:
        yield from carry_out(workers, jobs.measure, [(task, 1) for task in new], bar)


def encrypt_all(tasks: Sequence[Task], workers: Workers, results: Results) -> None:
    """Run the rows of each task, and store what a job returns.

    The bar counts predicted seconds, so that the time left follows from those measured so far.
    """
    runnable = [task for task in tasks if task.runnable]
    done, everything = 0, sum(len(task.rows) for task in runnable)

    def coming() -> Iterator[tuple[Task, float, list[np.ndarray]]]:
        for task in runnable:
            each = task.seconds / len(task.rows)
            yield from ((task, each * sum(map(len, calls)), calls) for calls in task.calls())

    with tqdm(total=sum(task.seconds for task in runnable), desc="encrypted", bar_format=BAR, smoothing=0.1) as bar:
        for task, runs in carry_out(workers, jobs.encrypt, coming(), bar):
            task.store(results, runs=runs or ())
            done += len(runs or ())
            bar.set_postfix_str(f"{done} of {everything} rows; {task.configuration.label}", refresh=False)
