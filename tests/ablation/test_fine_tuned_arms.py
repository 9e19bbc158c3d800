"""Arms that go on with the models of others: their rates, their runs, their commands, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_tables import TABLE, changed, fake, formula, run, write_table

from moekit.ablation.plan import Job, Plan
from moekit.ablation.processes import moekit_commands
from moekit.ablation.table import RECIPES, read_table, table_files
from moekit.cli.program import main
from moekit.cli.recipes import reconfigured
from moekit.errors import UserError
from moekit.runs import Run

ARMS: dict[str, Any] = {
    **TABLE["arms"],
    "tuned": {"of": "many", "fine_tune": {"tune": "all"}, "settings": {"train": {"max_steps": 7, "warmup_steps": 2}}},
    "frozen": {"of": "many", "fine_tune": {"tune": "experts-routers"}, "settings": {"train.max_steps": 7}},
}
RATES = {"values": [0.0005, 0.002], "seeds": [101], "metric": "loss.causal_lm"}
CLAIM = TABLE["claims"][0] | {"arm": "tuned", "against": "frozen", "smallest": 0.01}


def table(**parts: Any) -> dict[str, Any]:
    return changed(**{"arms": ARMS, "fine_tuning_rates": RATES, "claims": [CLAIM], **parts})


def ends(job: Job) -> dict[str, Any]:
    """Fine-tuning gains 0.3 at a rate of 0.002 and 0.1 at another; of experts alone it is the other way round."""
    if job.fine_tune is None:
        return formula(job)
    assert job.of is not None
    good = (job.config.train.learning_rate == 0.002) == (dict(job.fine_tune)["tune"] == "all")
    return formula(job.of) | {"loss": formula(job.of)["loss"] - (0.3 if good else 0.1), "work": 1e8}


def test_rates_are_chosen_in_two_stages(tmp_path: Path) -> None:
    path, runs = write_table(tmp_path, table()), tmp_path / "runs"
    found, _ = run(path, runs, fake(ends))
    assert found is not None
    assert {arm: got["chosen"] for arm, got in found["learning_rates"]["arms"].items()} == {
        "many": 0.004, "few": 0.004, "again": 0.004,
    }  # fmt: skip
    chosen = {arm: got["chosen"] for arm, got in found["fine_tuning_rates"]["arms"].items()}
    assert chosen == {"tuned": 0.002, "frozen": 0.0005}
    assert {arm: found["arms"][arm]["learning_rate"] for arm in chosen} == chosen
    # Three arms at two rates and two seeds; two at two rates and one seed, of a run that is there; five at five seeds.
    began = sum(len(each.read_text().splitlines()) for each in runs.glob("*/began"))
    assert began == 3 * 2 * 2 + 2 * 2 + 5 * 5
    claim = found["claims"][0]
    assert claim["difference"] == pytest.approx(0.0), "each at its own rate gains as much"
    page = (tmp_path / "results" / "table.md").read_text()
    assert "Learning rates of fine-tuning, by `loss.causal_lm` of seeds 101" in page
    assert "fine-tuned of many, fine_tune.tune experts-routers" in page
    again, said = run(path, runs, fake(ends))
    assert again is not None
    assert "4 of 4 done" not in said, "the run that they go on with is counted too"
    assert "25 of 25 done" in said


@pytest.mark.slow
def test_kept_runs_are_found_again(tmp_path: Path) -> None:
    path = write_table(tmp_path, table())
    first, _ = run(path, tmp_path / "runs", fake(ends))
    results = tmp_path / "results"
    again, said = run(path, tmp_path / "elsewhere", fake(ends), out=results)
    assert first is not None
    assert again is not None
    assert again["claims"] == first["claims"]
    assert not list((tmp_path / "elsewhere").glob("*/began")), said


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"arms": ARMS | {"few": {"fine_tune": {}}}}, r"arms\.few\.fine_tune: is for an arm that says whose models"),
        ({"arms": ARMS | {"few": {"of": "tuned"}}}, r"arms\.few\.of: must name an arm that trains from scratch"),
        (
            {"arms": ARMS | {"few": {"of": "many", "fine_tune": {}, "prune": {"keep": 2}}}},
            r"arms\.few\.prune: leaves 2 experts of .*there are \d+ by the settings.*Set model\.num_experts",
        ),
        ({"fine_tuning_rates": None}, r"arms\.tuned\.fine_tune: needs a learning rate: give fine_tuning_rates"),
        ({"fine_tuning_rates": RATES | {"seeds": [3]}}, r"fine_tuning_rates\.seeds: must be other seeds"),
        ({"arms": TABLE["arms"], "claims": TABLE["claims"]}, r"fine_tuning_rates: are of arms that fine-tune"),
        ({"arms": ARMS | {"few": {"of": "many", "fine_tune": {"tuen": "all"}}}}, r"\.few\.fine_tune\.tuen: unknown"),
        ({"arms": ARMS | {"few": {"of": "many", "fine_tune": {"tune": "expert"}}}}, r"arms\.few\.fine_tune: .*expert'"),
        ({"arms": ARMS | {"few": {"of": "many", "fine_tune": {"rank": -1}}}}, r"fine_tune\.rank must be .*got -1"),
        (
            {"arms": ARMS | {"few": {"settings": {"model.num_experts": 0}},
                             "tuned": {"of": "few", "fine_tune": {"tune": "experts"}}}},
            r"arms\.tuned\.fine_tune: the parameters to train must be some of the model's",
        ),
        ({"claims": [CLAIM | {"kind": "within checkpoint"}]}, r"both arms must be of the same trained models"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused_before_anything_is_run(parts: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        Plan.of(read_table(write_table(tmp_path, table(**parts))), reconfigured)


def test_the_command_goes_on_with_the_other_run(tmp_path: Path) -> None:
    """Gentler settings than the other run's, under those of the arm; the file has all that the command takes."""
    made = Plan.of(read_table(write_table(tmp_path, table())), reconfigured)
    job = made.job("tuned", 3, {"many": 0.004, "tuned": 0.002})
    assert job.of == made.job("many", 3, {"many": 0.004})
    assert (job.config.train.schedule, job.config.train.max_steps, job.steps) == ("constant", 7, 7)
    assert job.config.train.learning_rate == 0.002
    ((*command,),) = moekit_commands(job, job.folder(tmp_path))
    assert command[3:7] == ["finetune", "moe_lm", "--init_from", str(job.of.folder(tmp_path))]
    assert "--fine_tune.tune=all" in command
    other = made.job("frozen", 3, {"many": 0.004, "frozen": 0.002})
    assert len({job.digest, other.digest, made.job("tuned", 3, {"many": 0.001, "tuned": 0.002}).digest}) == 3


def test_a_pruned_model_goes_on(tmp_path: Path) -> None:
    """It is pruned once, before the run begins, and not again where that goes on."""
    few = {"of": "many", "prune": {"keep": 2, "by": "random"}, "fine_tune": {"tune": "all"},
           "settings": {"model.num_experts": 2}}  # fmt: skip
    made = Plan.of(read_table(write_table(tmp_path, table(arms=ARMS | {"few": few}))), reconfigured)
    job = made.job("few", 3, {"many": 0.004, "few": 0.002})
    assert job.of is not None
    folder = job.folder(tmp_path)
    before, command = moekit_commands(job, folder)
    begin = before[-2]
    assert before[3:-3] == ["prune", str(job.of.folder(tmp_path)), "--by=random", "--keep=2"]
    assert command[3:7] == ["finetune", "moe_lm", "--init_from", begin]
    assert begin != str(folder)
    whole = made.job("tuned", 3, {"many": 0.004, "tuned": 0.002})
    assert job.digest != whole.digest
    folder.mkdir()
    (folder / "config.yaml").touch()
    assert moekit_commands(job, folder) == [command]


def test_runs_that_were_kept_before_have_their_names() -> None:
    """What a table with `fine_tune` adds to the digest is added to no other run's."""
    made = Plan.of(read_table(table_files()["hash_layers/facts"]), reconfigured)
    kept = RECIPES / "hash_layers" / "results" / "ablations" / "runs"
    assert [job for job in made.tuning_jobs() if not (kept / f"hash_layers-{job.digest}.json").is_file()] == []


@pytest.mark.slow
def test_a_table_of_real_runs(tmp_path: Path) -> None:
    settings = {
        "model": {"dim": 16, "heads": 2, "hidden_dim": 16, "layers": 2, "num_experts": 4},
        "tasks.causal_lm.tokens": 128,
        "data": {"babel_languages": 2, "babel_sentences": 200, "vocab_size": 400},
        "train": {"max_steps": 4, "warmup_steps": 1, "validate_every": 2},
        "evaluate": {"max_sentences": 10, "valid_sentences": 10, "samples": 0},
    }  # fmt: skip
    small = {"train": {"max_steps": 2, "warmup_steps": 1, "validate_every": 1}}
    arms = {
        "many": {},
        "tuned": {"of": "many", "fine_tune": {"tune": "experts"}, "settings": small},
        "half": {"of": "many", "prune": {"keep": 2}, "fine_tune": {}, "settings": small | {"model.num_experts": 2}},
    }
    rates = {"fine_tuning_rates": RATES | {"values": [0.01]}, "learning_rates": None}
    control = {"control": None, "no_control": "a test"}
    claims = [CLAIM | {"against": against} for against in ("many", "half")]
    claims[1]["id"] = "half"
    path = write_table(tmp_path, table(settings=settings, arms=arms, claims=claims, seeds=[1, 2], **rates, **control))
    assert (
        main(["ablate", str(path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--jobs", "2"])
        == 0
    )
    made = Plan.of(read_table(path), reconfigured)
    tuned = made.job("tuned", 1, {"tuned": 0.01})
    assert tuned.of is not None
    one, other = (Run.open(each.folder(tmp_path / "runs")).loaded.weights for each in (tuned.of, tuned))
    moved = {name for name in one if not one[name].equal(other[name])}
    assert moved
    assert all(".experts." in name for name in moved)
    half = Run.open(made.job("half", 1, {"half": 0.01}).folder(tmp_path / "runs")).loaded.weights
    counts = {name: (tensor.shape[0], half[name].shape[0]) for name, tensor in one.items() if ".experts." in name}
    assert counts
    assert set(counts.values()) == {(4, 2)}
