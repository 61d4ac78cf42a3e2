"""What step 5 runs, in which order and where, and how long it will take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fhe_mlp import circuit
from fhe_mlp.arrays import Arrays
from fhe_mlp.cluster import Cluster
from fhe_mlp.configuration import Configuration, Setting

WORKERS_DIED = "its workers died, several in a row"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, about {remaining} left{postfix}"


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


def measure_speed(setting: Setting, seed: int, cluster: Cluster | None) -> circuit.Speed:
    """What a worker of the cluster, or this machine, takes."""
    if cluster is None:
        return circuit.measure_speed(setting, seed)
    ((_, _, speed),) = cluster.map(circuit.measure_speed, [(setting, seed)], lambda text: None)
    return speed


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


def failed_results(task: Task) -> Iterator[circuit.Result]:
    """Rows of a configuration whose workers died."""
    row = {"model_name": task.configuration.model_name, "q_bits": task.configuration.bits, **task.facts}
    row |= {**task.configuration.identity, "status": "failed", "reason": WORKERS_DIED}
    for batch, index in task.drawn.items():
        yield batch, {**row, "batch": batch, "num_items": len(index)}, None


def run_plan(
    tasks: Sequence[Task],
    data: Arrays,
    simulated: np.ndarray,
    beats: pd.DataFrame | None,
    limit: float,
    cluster: Cluster | None,
) -> Iterator[circuit.Result]:
    """Run the tasks here or on the cluster and yield what is finished; arguments as circuit.run_batches has them.

    The bar counts predicted seconds, so that the time left follows from those measured so far.
    """
    ready = samples = 0
    everything = sum(t.samples for t in tasks)
    jobs = [(t.configuration, t.facts, t.drawn, data, simulated, beats, limit) for t in tasks]
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
