"""kdiff and diffusers, the same networks with the same weights, in training and in sampling: who is faster?

    python examples/benchmarks/speed.py                       # both networks, both cores and one: some hours
    python examples/benchmarks/speed.py --networks unet --cores 2 --jobs "training step" network   # a few minutes
    python examples/benchmarks/speed.py --networks unet --jobs "DDIM / 20 networks"   # what sampling adds to it
    python examples/benchmarks/speed.py --toy                 # does it run? no figures to believe
    python examples/benchmarks/speed.py --networks dit-xl --precision bfloat16 --batch 64      # where there is a GPU
    python examples/benchmarks/speed.py --networks sd15 adm64 cifar10 dit-xl --batch 2 --jobs network --one --plain

The last line is of the U-Nets of Stable Diffusion 1.5, ADM and DDPM and of DiT-XL/2 as published: 2 to 4 GB of weights
each, so one process at a time (`--one`); and with what `pip install` alone gives (`--plain`).

It needs `kdiff[all]`. Every contestant is a process: diffusers on PyTorch, as it stands and with `torch.compile`, and
kdiff on each backend. They take turns, round after round, and a figure is the median of the rounds; so whatever else
the machine does meets all alike. It leaves table.md, results.json and speed.png.

All allocate their memory in the same way: by tcmalloc with `--allocator libtcmalloc_minimal.so.4` (Debian's package
libtcmalloc-minimal4 has it), else by glibc in huge pages that it keeps (TUNABLES below). glibc as it stands costs a
fifth of DiT's training on JAX and a tenth of its evaluation on PyTorch, diffusers' as well. JAX with more than one core
runs with an option of XLA (jaxlib 0.10 has it): convolutions with few channels would use a single core.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PEERS = ("diffusers", "diffusers compiled")
BACKENDS = ("tensorflow", "jax", "torch")
TUNABLES = {"hugetlb": 1, "arena_max": 1, "trim_threshold": 4 * 10**9, "mmap_threshold": 4 * 10**9}
SEVERAL_CORES = {"kdiff jax": {"XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"}}
JOBS = {
    "training step": {"job": "train"},
    "training step by hand": {"job": "by_hand"},
    "training step on arrays": {"job": "train_on_arrays"},
    "100 batches of the pipeline": {"job": "read"},
    "network": {"job": "evaluate"},
    "DDIM, 20 steps": {"job": "sample", "solver": "ddim", "guided": False},
    "DDIM, guided": {"job": "sample", "solver": "ddim", "guided": True},
    "DPM-Solver++, 20 steps": {"job": "sample", "solver": "dpm_solver_pp", "guided": False},
    "DPM-Solver++, guided": {"job": "sample", "solver": "dpm_solver_pp", "guided": True},
    "DDIM / 20 networks": {"job": "sample", "solver": "ddim", "guided": False},
    "DPM-Solver++ / 20 networks": {"job": "sample", "solver": "dpm_solver_pp", "guided": False},
}
STEPS = 20
START = "start and memory"
OWN = ("by_hand", "train_on_arrays", "read")  # what is compared with kdiff's own training step
OF_NETWORKS = ("DDIM / 20 networks", "DPM-Solver++ / 20 networks")  # and with its own evaluations of the network


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["unet", "dit"])
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--cores", nargs="+", type=int, default=sorted({1, os.cpu_count()}, reverse=True))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of one turn")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--jobs", nargs="+", default=[*JOBS, START], choices=[*JOBS, START])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--allocator", help="a library that all load first, such as libtcmalloc_minimal.so.4")
    parser.add_argument("--plain", action="store_true", help="no allocator, and no variable for anyone")
    parser.add_argument("--one", action="store_true", help="start anew for each turn, so that one is in memory alone")
    parser.add_argument("--toy", action="store_true", help="tiny networks, one round")
    parser.add_argument("--out", type=Path, default=Path("runs") / "speed")
    options = parser.parse_args()
    if options.allocator:  # where it is not found, the dynamic linker says so and goes on without it
        run = subprocess.run(["true"], env=memory(options.allocator), capture_output=True, text=True)
        if run.stderr:
            parser.error(f"--allocator: {run.stderr.strip()}")
    if options.toy:
        options.networks, options.cores, options.peers = ["tiny-unet"], [1], PEERS[:1]
        options.jobs = ["training step", "training step by hand", "network", "DDIM, guided", OF_NETWORKS[0], START]
        options.rounds, options.seconds, options.batch = 1, 0.1, 2
    return options


def memory(allocator: str | None, plain: bool = False) -> dict[str, str]:
    """The environment in which a process allocates with that library, or with glibc as TUNABLES says, or as it is."""
    if plain:
        return {}
    if allocator:
        return {"LD_PRELOAD": allocator}
    return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())}


class Contestant:
    """A process of `contestants.py`; `ask` waits for its reply."""

    def __init__(self, name: str, cores: int, network: str, folder: Path, options: argparse.Namespace, *flags: str):
        kind, *rest = name.split()
        self.name = name
        backend = {"KERAS_BACKEND": rest[0]} if kind == "kdiff" else {}
        if name in SEVERAL_CORES and cores > 1 and not options.plain:  # kdiff sets it then
            backend |= SEVERAL_CORES[name]
        environment = {**os.environ, **memory(options.allocator, options.plain), **backend}
        environment |= {"TF_CPP_MIN_LOG_LEVEL": "3", **({} if options.plain else {"OMP_NUM_THREADS": str(cores)})}
        command = [sys.executable, str(HERE / "contestants.py"), kind, "--network", network, "--folder", str(folder)]
        command += ["--batch", str(options.batch), "--precision", options.precision, *flags]
        command += ["--compiled"] if "compiled" in rest else []
        command += [] if START in options.jobs or any("train" in label for label in options.jobs) else ["--trained"]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if os.environ.get("QUIET", "1") == "1" else None,
            text=True,
            bufsize=1,
            preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores]),
        )

    def reply(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}; QUIET=0 shows what it said")
        return json.loads(line)

    def ask(self, **job) -> dict:
        print(json.dumps(job), file=self.process.stdin)
        return self.reply()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def race(contestants: list[Contestant], job: dict, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a time, by name, in each round. The first time of each, in which it compiles, does not count."""
    counts, found = {}, {}
    for contestant in contestants:
        contestant.ask(**job)
        seconds = contestant.ask(**job)["seconds"]
        counts[contestant.name] = max(1, round(options.seconds / seconds))
        found[contestant.name] = [seconds] if counts[contestant.name] == 1 else []
    for turn in range(options.rounds - min(map(len, found.values()))):
        for contestant in contestants[turn % len(contestants) :] + contestants[: turn % len(contestants)]:
            found[contestant.name].append(contestant.ask(**job, count=counts[contestant.name])["seconds"])
    return found


def race_alone(names: list[str], rest: tuple, job: dict, options: argparse.Namespace) -> dict[str, list[float]]:
    """As `race`, each turn in a process of its own: what it takes when nothing else is in memory."""
    found = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            contestant = Contestant(name, *rest)
            contestant.reply()
            contestant.ask(**job)
            seconds = contestant.ask(**job)["seconds"]
            found[name].append(contestant.ask(**job, count=max(1, round(options.seconds / seconds)))["seconds"])
            contestant.end()
    return found


def in_turns(contestants: list[Contestant], job: dict, other: dict, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of `job` as parts of those of `other`, by name; the two take turns in one process."""
    found = {}
    for contestant in contestants:
        seconds = [contestant.ask(**one)["seconds"] for one in (job, other, job, other)][2:]
        counts = [max(1, round(options.seconds / one)) for one in seconds]
        turns = [
            [contestant.ask(**one, count=count)["seconds"] for one, count in zip((job, other), counts, strict=True)]
            for _ in range(options.rounds)
        ]
        own, others = (statistics.median(times) for times in zip(*turns, strict=True))
        found[contestant.name] = own / others
    return found


def ratios(contestants: list[Contestant], label: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """A training step as parts of this job; or this sampling as parts of as many evaluations of the network."""
    if label in OF_NETWORKS:
        found = in_turns(contestants, JOBS[label], JOBS["network"], options)
        return {name: [ratio / STEPS] for name, ratio in found.items()}
    found = in_turns(contestants, JOBS["training step"], JOBS[label], options)
    return {name: [ratio] for name, ratio in found.items()}


def is_ratio(label: str) -> bool:
    return JOBS[label]["job"] in OWN or label in OF_NETWORKS


def starts(names: list[str], *rest) -> dict[str, dict]:
    """What the start of each costs, and its memory: a process each, one after the other."""
    found = {}
    for name in names:
        contestant = Contestant(name, *rest, "--cold")
        found[name] = contestant.reply()
        contestant.end()
    return found


def imports(repeats: int) -> dict[str, dict]:
    """Seconds that an import takes, the least of some, by backend: that of Keras, and what kdiff adds to it."""
    found = {}
    program = "import time; a = time.perf_counter(); import keras; b = time.perf_counter(); import kdiff; "
    program += "print(b - a, time.perf_counter() - b)"
    for backend in BACKENDS:
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        runs = [
            subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
            for _ in range(repeats)
        ]
        times = [[float(word) for word in run.stdout.split()] for run in runs]
        found[backend] = {name: min(time[i] for time in times) for i, name in enumerate(("keras", "kdiff"))}
    return found


def measure(network: str, cores: int, options: argparse.Namespace) -> dict:
    """All that is known of one network on so many cores: seconds by job and name, starts, and the machine's limit."""
    names = [*options.peers, *(f"kdiff {backend}" for backend in options.backends)]
    with tempfile.TemporaryDirectory() as folder:
        rest = (cores, network, Path(folder), options)
        Contestant("write", *rest).process.wait()
        if options.one:
            return measure_alone(names, rest, options)
        contestants = [Contestant(name, *rest) for name in names]
        for contestant in contestants:
            contestant.reply()
        own = [contestant for contestant in contestants if contestant.name.startswith("kdiff")]
        found = {"rate": contestants[0].ask(job="multiply", count=20)["rate"], **own[0].ask(job="flops")}
        found |= {"seconds": {}, "ratios": {}}
        for label in [label for label in JOBS if label in options.jobs]:
            print(f"{network}, {cores} cores: {label} ...", flush=True)
            if is_ratio(label):
                found["ratios"][label] = ratios(own, label, options)
            else:
                found["seconds"][label] = race(contestants, JOBS[label], options)
        for contestant in contestants:
            contestant.end()
        found["starts"] = starts(names, *rest) if START in options.jobs else dict.fromkeys(names)
    return found


def measure_alone(names: list[str], rest: tuple, options: argparse.Namespace) -> dict:
    """The races of `measure` among processes that come one after the other."""
    first = {"diffusers": {"job": "multiply", "count": 20}, f"kdiff {options.backends[0]}": {"job": "flops"}}
    found = {"seconds": {}, "ratios": {}, "starts": dict.fromkeys(names)}
    for name, job in first.items():
        contestant = Contestant(name, *rest)
        contestant.reply()
        found |= contestant.ask(**job)
        contestant.end()
    for label in [label for label in JOBS if label in options.jobs and not is_ratio(label)]:
        print(f"{rest[1]}, {rest[0]} cores: {label} ...", flush=True)
        found["seconds"][label] = race_alone(names, rest, JOBS[label], options)
    return found


def median(found: dict, label: str, name: str, kind: str = "seconds") -> float:
    return statistics.median(found[kind].get(label, {}).get(name, [float("nan")]))


def best_peer(found: dict, label: str) -> float:
    return min(median(found, label, name) for name in PEERS if name in found["seconds"][label])


def table(found: dict, title: str, batch: int) -> str:
    """Seconds, and in brackets how many times as fast as the faster of the peers; then what the figures amount to."""
    labels = list(found["seconds"])
    columns = [*labels, "of the peak", "fit / by hand", "fit / on arrays", "step / batch", *OF_NETWORKS]
    columns += ["first step", "memory", "of training"]
    lines = [f"### {title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in found["starts"]:
        cells = []
        for label in labels:
            seconds = median(found, label, name)
            ratio = "" if name in PEERS else f" ({best_peer(found, label) / seconds:.2f}x)"
            cells.append(f"{1e3 * seconds:.0f} ms{ratio}")
        ratios = {
            "of the peak": 3 * batch * found["flops"] / median(found, "training step", name) / found["rate"],
            "fit / by hand": median(found, "training step by hand", name, "ratios"),
            "fit / on arrays": median(found, "training step on arrays", name, "ratios"),
            "step / batch": 100 * median(found, "100 batches of the pipeline", name, "ratios"),
            **{label: median(found, label, name, "ratios") for label in OF_NETWORKS},
        }
        cells += ["" if math.isnan(ratio) else f"{ratio:.3g}" for ratio in ratios.values()]
        start = found["starts"][name]
        measures = {"first step": "s", "peak GiB": "GiB", "training GiB": "GiB"}
        cells += [f"{start[measure]:.2f} {unit}" if start else "" for measure, unit in measures.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """How many times as fast as the faster peer, a panel for each network and number of cores."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(10, 2.6 * len(results)), squeeze=False, layout="constrained")
    for axis, (title, found) in zip(axes[:, 0], results.items(), strict=True):
        labels, own = list(found["seconds"]), [name for name in found["starts"] if name not in PEERS]
        for i, name in enumerate(own):
            ratios = [best_peer(found, label) / median(found, label, name) for label in labels]
            axis.bar([x + 0.8 * i / len(own) for x in range(len(labels))], ratios, 0.8 / len(own), label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(title=title, ylabel="times as fast")
        axis.set_xticks([x + 0.4 - 0.4 / len(own) for x in range(len(labels))])
        axis.set_xticklabels(label.replace(", ", ",\n") for label in labels)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=len(BACKENDS))
    figure.savefig(path, dpi=120)


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for network, cores in itertools.product(options.networks, options.cores):
        title = f"{network}, batches of {options.batch}, {options.precision}, {cores} cores"
        results[title] = measure(network, cores, options)
    page = [table(found, title, options.batch) for title, found in results.items()]
    added = imports(1 if options.toy else 5)
    page += [f"`import kdiff` adds to `import keras`: {json.dumps(added)} seconds"]
    how = "glibc as it stands" if options.plain else options.allocator or "glibc, as TUNABLES in speed.py says"
    page += [f"Memory is allocated by {how}."]
    (options.out / "table.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    (options.out / "results.json").write_text(json.dumps({"races": results, "imports": added}, indent=1))
    plot(results, options.out / "speed.png")
    print("\n\n".join(page))


if __name__ == "__main__":
    main()
