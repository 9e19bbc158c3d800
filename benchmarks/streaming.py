"""Text larger than memory: generated files through sources, tokenizer and store to batches, and the memory it takes.

    python benchmarks/streaming.py --megabytes 1000 --bound 700

Memory is what `RssAnon` of /proc says: what the process holds of its own, without the pages of mapped files, which the
system takes back when it wants to. The tree is one process with threads. Exits with 1 where the bound is passed, or
where a second opening of the text gives other batches.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from moekit.data.module import MultitaskData
from moekit.data.sources import open_source
from moekit.environment import environment
from moekit.tasks import TaskData

STEPS = (0, 1, 63, 64, 5_000, 100_000)


class PeakMemory:
    """Watches the own memory of this process, in MiB."""

    def __init__(self) -> None:
        self.mebibytes = {"own": 0.0, "resident": 0.0}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.look()

    def look(self) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        for name, key in (("own", "RssAnon"), ("resident", "VmRSS")):
            self.mebibytes[name] = max(self.mebibytes[name], int(sizes[key].split()[0]) / 1024)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def write_text(folder: Path, megabytes: float, files: int) -> int:
    """Lines of made-up words, some of them twice, in files of three kinds; their bytes before packing."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwygpbvk"))
    words = np.array(["".join(rng.choice(letters, n)) for n in rng.integers(2, 10, 20_000)])
    chances = 1 / np.arange(1, len(words) + 1)
    chances /= chances.sum()
    written = 0
    for number in range(files):
        ending = ("txt", "jsonl", "txt.gz")[number % 3]
        path = folder / f"part-{number:03}.{ending}"
        with gzip.open(path, "wb", 1) if ending.endswith("gz") else path.open("wb") as out:
            size = 0
            while size < megabytes * 1e6 / files:
                drawn = rng.choice(words, 100_000, p=chances).tolist()
                ends = np.cumsum(rng.integers(3, 20, len(drawn) // 20)).tolist()
                lines = [" ".join(drawn[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
                lines += lines[:100]
                if ending == "jsonl":
                    texts = ["\n".join(lines[i : i + 20]) for i in range(0, len(lines), 20)]
                    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)]
                block = ("\n".join(lines) + "\n").encode()
                out.write(block)
                size += len(block)
            written += size
    return written


def batches(folder: Path, cache: Path) -> tuple[MultitaskData, list[str]]:
    """Prepare the text, unless it is, and take batches of some steps."""
    source = open_source("documents", folder, languages=["en"])
    data = MultitaskData(source, tasks={"causal_lm": TaskData()}, cache=cache, vocab_size=4000, tokens_per_step=8192)
    items = data.train_dataloader()._items
    found = [items[step]["causal_lm"].source.numpy().tobytes() for step in STEPS]
    return data, [hashlib.sha256(item).hexdigest()[:12] for item in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=20.0, help="text to generate")
    parser.add_argument("--files", type=int, default=12, help="over so many files")
    parser.add_argument("--bound", type=float, default=700.0, help="most MiB that the process may hold")
    parser.add_argument("--folder", type=Path, help="where the text and the cache go; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as where, PeakMemory() as peak:
        folder, cache = Path(where, "text"), Path(where, "cache")
        folder.mkdir()
        size = write_text(folder, given.megabytes, given.files)
        peak.look()
        generated, began = dict(peak.mebibytes), time.perf_counter()
        data, first = batches(folder, cache)
        seconds = time.perf_counter() - began
        again = batches(folder, cache)[1]
        counts = {name: where.count for name, where in data.store.sections.items()}
        result = {
            "megabytes": size / 1e6,
            "files": given.files,
            "sentences": counts,
            "tokens": len(data.store.tokens),
            "seconds": round(seconds, 1),
            "megabytes_per_second": round(size / 1e6 / seconds, 2),
            "mebibytes_before": {name: round(value) for name, value in generated.items()},
            "mebibytes_peak": {name: round(value) for name, value in peak.mebibytes.items()},
            "bound": given.bound,
            "same_batches_again": first == again,
            "machine": {name: environment()[name] for name in ("commit", "cpus_usable", "python", "platform")},
        }
        del data
    print(json.dumps(result, indent=1))
    return 0 if result["mebibytes_peak"]["own"] <= given.bound and first == again else 1


if __name__ == "__main__":
    sys.exit(main())
