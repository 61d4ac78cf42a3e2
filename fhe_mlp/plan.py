"""What a run of step 5 will take, and the run itself, in this process or on a cluster, with the time that is left."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from fhe_mlp.circuit import Speed, load_network
from fhe_mlp.cluster import connect, run_on_cluster
from fhe_mlp.experiment import Data, Job, Result, Task, judge_memory, judge_time, price, run_task

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, about {remaining} left{postfix}"


def most_accurate(paths: Iterable[Path], data: Data) -> Path:
    """The float network with the best validation accuracy: what one would encrypt the plain way."""
    import onnxruntime

    def accuracy(path: Path) -> float:
        session = onnxruntime.InferenceSession(load_network(path).SerializeToString())
        probability = session.run(None, {session.get_inputs()[0].name: data["val"][0]})[0][:, 0]
        return float(np.mean((probability > 0.5) == data["val"][1]))

    return max(paths, key=accuracy)


def make_plan(
    jobs: dict[Job, dict[int, np.ndarray]], speed: Speed, limit: float, simulated_rows: int, here: bool
) -> list[Task]:
    """Compile every configuration; jobs: their test rows by batch; limit: seconds a sample that are affordable.

    here: whether this machine will run them, so that its memory counts.
    """
    tasks = []
    for job, drawn in (bar := tqdm(jobs.items(), desc="compiling", unit="circuit", disable=not jobs)):
        bar.set_postfix_str(job.label)
        facts, _ = price(job)
        judge_time(facts, speed.unit, limit)
        if here:
            judge_memory(facts)
        seconds = 0.0
        if facts["status"] != "cannot compile":
            seconds = facts["compile_time"] + speed.simulated_pbs * facts["pbs"] * simulated_rows
        task = Task(job, facts, drawn, seconds)
        if facts["status"] == "ok":
            keys = facts["evaluation_keys_MB"] * 1e6 * speed.key_byte
            task = Task(job, facts, drawn, seconds + keys + facts["predicted_seconds"] * (task.samples + 1))
        tasks.append(task)
    return tasks


def print_plan(tasks: Sequence[Task], finished: int) -> None:
    """Show what will run, what not and why, and about how long it takes."""
    if finished:
        print(f"\n{finished} configurations are finished and stay as they are")
    if tasks:
        columns = ("pbs", "complexity", "predicted_seconds", "evaluation_keys_MB", "predicted_memory_MB", "status")
        plan = pd.DataFrame({"model": t.job.model_name, "bits": t.job.bits, **t.facts} for t in tasks)
        plan = plan.reindex(columns=["model", "bits", *columns]).assign(minutes=[t.seconds / 60 for t in tasks])
        print(f"\n{plan.to_string(index=False, float_format='{:.4g}'.format)}")
    samples, runnable = sum(t.samples for t in tasks), sum(t.facts["status"] == "ok" for t in tasks)
    minutes = sum(t.seconds for t in tasks) / 60
    print(f"\n{len(tasks)} configurations to do, {runnable} of them encrypted, on {samples} rows in all: ", end="")
    print(f"about {minutes:.1f} min on a machine like this one,")
    print("after the prices of the plain way, which take a minute or so the first time", flush=True)


def run_plan(
    tasks: Sequence[Task], data: Data, simulated: np.ndarray, limit: float, scheduler: str | None
) -> Iterator[Result]:
    """Run the configurations here or, with the address of a scheduler, on its cluster; yield what is finished.

    The bar counts predicted seconds, so that the time left follows from those measured so far.
    """
    ready = samples = 0
    everything = sum(t.samples for t in tasks)
    with tqdm(total=sum(t.seconds for t in tasks), desc="encrypted", bar_format=BAR, smoothing=0.1) as bar:

        def show(weight: float, text: str = "") -> None:
            counts = f"{ready} of {len(tasks)} configurations, {samples} of {everything} samples"
            bar.set_postfix_str(f"{counts}; {text}" if text else counts, refresh=False)
            bar.update(min(weight, bar.total - bar.n))

        show(0)
        if scheduler:
            with connect(scheduler) as client:
                tell = functools.partial(show, 0)
                for task, results in run_on_cluster(client, scheduler, tasks, data, simulated, limit, tell):
                    yield from results
                    ready += 1
                    samples += task.samples
                    show(task.seconds)
            return
        for task in tasks:
            rest = task.seconds

            def tick(text: str, finished: int, each: float = task.facts.get("predicted_seconds", 0)) -> None:
                nonlocal samples, rest
                samples += finished
                rest -= finished * each
                show(finished * each, text)

            yield from run_task(task, data, simulated, limit, tick)
            ready += 1
            show(max(0.0, rest))
