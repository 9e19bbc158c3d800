"""Makes the run folders of `folders.tar.xz`, and records in `expected.json` what the commands make of them.

They show that later code opens what this code wrote, so they are made again only where a format is given up::

    PYTHONPATH=. python tests/recipes/old_folders/make_folders.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

import torch  # noqa: E402
from old_folders import using  # noqa: E402
from recording import machine, read_folder, write_record  # noqa: E402

from moekit.parallel import consolidate  # noqa: E402
from moekit.training.whole_checkpoint import consolidate_checkpoint  # noqa: E402

OPTIONS = [
    "--data.babel_languages", "2", "--data.babel_sentences", "300", "--data.vocab_size", "350",
    "--data.max_length", "32", "--data.num_workers", "0", "--data.cache", "cache",
    "--train.max_minutes", "0", "--train.warmup_steps", "20", "--train.learning_rate", "0.02", "--train.seed", "3",
    "--train.accelerator", "cpu",
    "--evaluate.max_sentences", "4", "--evaluate.valid_sentences", "4", "--evaluate.samples", "4",
    "--evaluate.beam_size", "2", "--evaluate.length_penalty", "1.5",
    "--model.dim", "8", "--model.heads", "2", "--model.hidden_dim", "8", "--model.num_experts", "3",
]  # fmt: skip
OF_RECIPE = {
    "zcode_m3": [
        "--model.encoder_layers", "1", "--model.decoder_layers", "1", "--model.every", "1",
        "--model.generator_dim", "8",
        "--tasks.translation.tokens", "512", "--tasks.denoising.tokens", "64",
        "--tasks.masked_lm.tokens", "64", "--tasks.replaced_token.tokens", "64",
    ],
    "moe_lm": ["--model.layers", "2", "--tasks.causal_lm.tokens", "512"],
    "switch": [
        "--model.encoder_layers", "1", "--model.decoder_layers", "1", "--model.every", "1",
        "--model.dim", "4", "--model.head_dim", "2", "--tasks.span_corruption.tokens", "256",
    ],
}  # fmt: skip


def options(name: str, out: str, steps: int) -> list[str]:
    log = ["--train.validate_every", str(steps), "--train.log_every", str(steps // 5)]
    return [*OPTIONS, *OF_RECIPE[name], "--train.max_steps", str(steps), *log, "--out", out]


def main() -> None:
    torch.set_num_threads(1)
    target = HERE / "folders.tar.xz"
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for name in using.LANGUAGES:
            using.recipe(name, "run", *options(name, name, using.STEPS))
        for name in using.EXPORTED:
            using.command("moekit.surgery", "export", name, "--out", f"{name}-exported", "--no-tokenizer")
        spread = [*options("moe_lm", "spread", 25), "--model.dim", "4", "--strategy.expert_parallel_size", "1"]
        # In a process of its own, which leaves no group of processes behind.
        subprocess.run([sys.executable, "-m", "moekit.recipes.moe_lm", "fit", *spread], check=True)
        Path(using.SHARDED).mkdir()
        shutil.move("spread/checkpoints/last.ckpt", f"{using.SHARDED}/last.ckpt")
        consolidate_checkpoint(f"{using.SHARDED}/last.ckpt", f"{using.SHARDED}/whole.ckpt")
        consolidate(f"{using.SHARDED}/last.ckpt", f"{using.SHARDED}/weights.safetensors")
        with tarfile.open(target, "w:xz", preset=9) as archive:
            for name in (*using.LANGUAGES, *(f"{name}-exported" for name in using.EXPORTED), using.SHARDED):
                archive.add(name, filter=anonymous)
        expected: dict[str, object] = {"machine": machine()}
        for name in using.LANGUAGES:
            folder = Path(name)
            using.recipe(name, "test", "--out", name)
            expected[f"{name} test"] = read_folder(folder)
            expected[f"{name} inspect"] = using.inspected(folder)
            expected[f"{name} markdown"] = using.command("moekit.report", name, "--markdown").splitlines()
            if name in using.WRITE:
                expected[f"{name} generate"] = using.generated(name, folder)
            expected[f"{name} finetune"] = read_folder(using.fine_tuned(name, folder, Path(f"{name}-tuned")))
            expected[f"{name} resume"] = read_folder(using.resumed(name, folder))
        for path in sorted(Path(using.SHARDED).iterdir()):
            expected[f"{path} inspect"] = using.inspected(path)
        write_record(HERE / "expected.json", expected)
        os.chdir(HERE)
    print(f"{target}: {target.stat().st_size:,} bytes")


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without names and hours."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0
    return entry


if __name__ == "__main__":
    main()
