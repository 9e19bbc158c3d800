"""Arms that begin by themselves and take something of other arms' models, or join two models before they go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_tables import TABLE, changed, fake, formula, run, write_table

from moekit.ablation.plan import Job, Plan
from moekit.ablation.processes import moekit_commands
from moekit.ablation.table import read_table
from moekit.cli.program import main
from moekit.cli.recipes import reconfigured
from moekit.errors import UserError
from moekit.runs import Run

STUDENT = {"of": "many", "distill": {"weight": 0.5, "inherit": "none"}, "settings": {"model.num_experts": 0}}
JOINED = {
    "of": "many",
    "aggregate": {"with": "other", "shared": 1, "plain": True},
    "fine_tune": {"tune": "all"},
    "settings": {"model.num_experts": 16, "train": {"max_steps": 7, "learning_rate": 0.001}},
}
ARMS: dict[str, Any] = {
    "many": {},
    "few": {"settings": {"model.num_experts": 2}},
    "other": {"order_offset": 1000},
    "student": STUDENT,
    "joined": JOINED,
}
CLAIM = TABLE["claims"][0] | {"arm": "student", "against": "few"}
CONTROL = TABLE["control"] | {"arm": "other", "against": "many"}
GRID = TABLE["learning_rates"]


def table(**parts: Any) -> dict[str, Any]:
    return changed(**{"arms": ARMS, "claims": [CLAIM], "control": CONTROL, "learning_rates": None, **parts})


def with_arm(name: str, **parts: Any) -> dict[str, Any]:
    """The arms with one that differs."""
    return {"arms": ARMS | {name: ARMS.get(name, {}) | parts}}


def hashed(arm: dict[str, Any]) -> dict[str, Any]:
    """A table of hash layers, whose setting `model.embeddings` takes the folder of a run."""
    arms = {"plain": {"settings": {"model.num_experts": 0}}, "clustered": arm}
    asked = {"arm": "clustered", "against": "plain"}
    model = {"dim": 16, "heads": 2, "hidden_dim": 16, "layers": 2, "layer": 1, "num_experts": 2}
    return table(
        recipe="hash_layers", arms=arms, claims=[CLAIM | asked], control=CONTROL | asked,
        settings={"model": model, "train": {"max_steps": 20, "warmup_steps": 4}},
    )  # fmt: skip


CLUSTERED = {"of": "plain", "given_as": "model.embeddings", "settings": {"model.hash": "clustered"}}


def test_a_student_begins_under_settings_of_its_own(tmp_path: Path) -> None:
    made = Plan.of(read_table(write_table(tmp_path, table())), reconfigured)
    job = made.job("student", 3)
    assert job.of == made.job("many", 3)
    assert job.config.train == made.job("few", 3).config.train, "as an arm of its own, not gentler"
    ((*command,),) = moekit_commands(job, job.folder(tmp_path))
    assert command[3:7] == ["distill", "moe_lm", "--teacher", str(job.of.folder(tmp_path))]
    assert {"--distill.weight=0.5", "--distill.inherit=none", "--resume"} <= {*command}
    less = table(**with_arm("student", distill={"weight": 0.25, "inherit": "none"}))
    other = Plan.of(read_table(write_table(tmp_path, less)), reconfigured).job("student", 3)
    named = {each.digest for each in (*(made.job(name, 3) for name in ("many", "few", "student")), other)}
    assert len(named) == 4


def test_two_models_are_joined_before_one_goes_on(tmp_path: Path) -> None:
    made = Plan.of(read_table(write_table(tmp_path, table())), reconfigured)
    job = made.job("joined", 3)
    assert job.needs == (made.job("many", 3), made.job("other", 3))
    one, other = (each.folder(tmp_path) for each in job.needs)
    folder = job.folder(tmp_path)
    before, after = moekit_commands(job, folder)
    assert before[3:6] == ["aggregate", str(one), str(other)]
    assert {"--shared=1", "--plain"} <= {*before}
    assert after[3:6] == ["finetune", "moe_lm", "--init_from"]
    assert after[6] == before[before.index("--out") + 1]
    folder.mkdir()
    (folder / "config.yaml").touch()
    assert [words[3] for words in moekit_commands(job, folder)] == ["finetune"], "one that goes on is not joined again"


def test_the_order_alone_may_differ(tmp_path: Path) -> None:
    made = Plan.of(read_table(write_table(tmp_path, table())), reconfigured)
    one, other = (made.job(name, 3).config for name in ("many", "other"))
    assert one.train == other.train
    assert (one.data.order_seed, other.data.order_seed) == (3, 1003)


def test_a_setting_takes_the_folder_of_another_run(tmp_path: Path) -> None:
    made = Plan.of(read_table(write_table(tmp_path, hashed(CLUSTERED))), reconfigured)
    job = made.job("clustered", 3)
    ((*command,),) = moekit_commands(job, job.folder(tmp_path))
    assert command[3:5] == ["run", "hash_layers"]
    written = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text())
    assert job.of is not None
    assert written["model"]["embeddings"] == str(job.of.folder(tmp_path))
    elsewhere = Plan.of(read_table(write_table(tmp_path / "elsewhere", hashed(CLUSTERED))), reconfigured)
    assert elsewhere.job("clustered", 3).digest == job.digest, "where runs lie does not name them"


def test_runs_wait_for_all_that_they_need(tmp_path: Path) -> None:
    """The result says what was taken of whom; what is of a model that diverged is not made."""

    def ends(job: Job) -> dict[str, Any]:
        end = formula(job if job.of is None else job.of)
        return end | {"end": "diverged"} if job.label.startswith("other, seed 2") else end

    found, _ = run(write_table(tmp_path, table()), tmp_path / "runs", fake(ends))
    assert found is not None
    assert found["arms"]["student"]["distill"] == STUDENT["distill"]
    assert found["arms"]["joined"]["aggregate"] == JOINED["aggregate"]
    assert found["arms"]["other"]["order_offset"] == 1000
    states = [one["state"] for one in found["arms"]["joined"]["runs"].values()]
    assert states == ["done", "unfinished", "done", "done", "done"]
    page = (tmp_path / "results" / "table.md").read_text()
    assert "taught by many, distill.weight 0.5, distill.inherit none" in page
    assert "aggregate.with other" in page
    assert "order + 1000" in page


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (with_arm("student", of=""), r"arms\.student\.distill: is for an arm that says whose models it learns from"),
        (with_arm("student", of="joined"), r"arms\.student\.of: must name an arm that trains from scratch"),
        (with_arm("student", fine_tune={}), r"a model is fine-tuned or taught, not both"),
        (with_arm("student", distill={"weigth": 1}), r"arms\.student\.distill\.weigth: unknown setting.*weight"),
        (with_arm("student", distill={"weight": 2.0}), r"arms\.student\.distill: .*must be a share in 0\.\.1"),
        (with_arm("student", distill={"inherit": "all"}), r"distill\.inherit must be one of everything, non_moe, none"),
        ({"learning_rates": GRID}, r"arms\.student\.distill: is for tables without a grid"),
        (with_arm("joined", aggregate={"shared": 1}), r"joined\.aggregate\.with: must name an arm"),
        (with_arm("joined", aggregate={"with": "student"}), r"joined\.aggregate\.with: must name an arm.*'student'"),
        (with_arm("joined", aggregate={"with": "other", "gate": "fresh"}), r"aggregate\.gate: unknown option.*gates"),
        (with_arm("joined", aggregate={"with": "other", "gates": "new"}), r"aggregate\.gates: must be .*'new'"),
        (with_arm("student", aggregate={"with": "other"}), r"student\.aggregate: is for an arm that goes on"),
        (with_arm("student", order_offset=5), r"student\.order_offset: is of an arm that trains from scratch"),
        (hashed(CLUSTERED | {"of": ""}), r"clustered\.given_as: is for an arm that says whose models"),
        (hashed(CLUSTERED | {"given_as": "model.embedings"}), r"clustered\.given_as: .* are: model\.embeddings\.$"),
        (hashed(CLUSTERED | {"given_as": "model.dim"}), r"clustered\.given_as: must be a setting of the model"),
        (hashed(CLUSTERED | {"given_as": "data.order_seed"}), r"clustered\.given_as: must be a setting of the model"),
        (with_arm("student", distill={"weight": "much"}), r"student\.distill\.weight must be a number: got 'much'"),
        (with_arm("student", distill={"until": 1.5}), r"student\.distill\.until must be a whole number: got 1\.5"),
        (with_arm("student", distill={"layers": "first"}), r"student\.distill\.layers must be as"),
        (with_arm("student", distill={"layers": "decoder.layers=0,9"}), r"student\.distill: the layers of .* below 2"),
        (with_arm("student", distill={"inherit": "everything"}, settings={"model.dim": 32}), r"distill: .*sizes"),
        (with_arm("joined", aggregate={"with": "many"}), r"joined\.aggregate\.with: must name another arm than `of`"),
        (with_arm("joined", aggregate={}), r"joined\.aggregate: is empty"),
        (with_arm("joined", aggregate={"with": "other", "shared": 3}), r"aggregate\.shared: must be mean, 1 or 2: got"),
        (with_arm("joined", aggregate={"with": "other", "plain": 1}), r"aggregate\.plain: must be one of true, false"),
        (with_arm("joined", aggregate={"with": "few", "plain": True}), r"joined\.fine_tune: .*that of the run.*router"),
        (with_arm("joined", aggregate={"with": "other"}), r"joined\.aggregate: a token chooses 4 experts .* and 2 by"),
        (with_arm("joined", settings=JOINED["settings"] | {"model.num_experts": 8}), r"\(8, 16\) here.*\(16, 16\)"),
        (with_arm("joined", fine_tune={"rank": "two"}), r"joined\.fine_tune\.rank must be a whole number: got 'two'"),
        (with_arm("other", order_offset=2), r"other\.order_offset: must lead to other seeds .*\[3, 4, 5\] are in both"),
        (with_arm("other", order_offset=1.5), r"other\.order_offset: must be a whole number: got 1\.5"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused_before_anything_is_run(parts: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = parts if "recipe" in parts else table(**parts)
    with pytest.raises(UserError, match=said):
        Plan.of(read_table(write_table(tmp_path, given)), reconfigured)


def pruned(**options: Any) -> dict[str, Any]:
    """The arms with one that is pruned so."""
    return {"arms": ARMS | {"half": {"of": "many", "prune": options}}}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (pruned(), r"arms\.half\.prune: is empty"),
        (pruned(by="random"), r"arms\.half\.prune\.keep: is missing"),
        (pruned(keep="half"), r"arms\.half\.prune\.keep: must be a number of experts"),
        (pruned(keep="500%"), r"arms\.half\.prune: keep must be a number of experts, or a share .* got 5\.0"),
        (pruned(keep=99), r"arms\.half\.prune: keep at most 8 experts"),
        (pruned(keep=4, by="magic"), r"prune\.by: must be one of utilisation, reversed, random, reap: got 'magic'"),
        (pruned(keep=4, seed=-1), r"arms\.half\.prune\.seed: must be a whole number"),
        (pruned(keep=4, plain="no"), r"arms\.half\.prune\.plain: must be one of true, false"),
        (pruned(keep=4, by="random", task="causal_lm"), r"arms\.half\.prune: .*leave them out with --by random"),
        (pruned(keep=4, out="elsewhere"), r"arms\.half\.prune\.out: unknown option"),
        ({"arms": ARMS | {"many": {"settings": {"model.num_experts": 0}}, "half": {"of": "many", "prune": {"keep": 1}},
                          "student": {}, "joined": {}}}, r"arms\.half\.prune: .*many has none"),
    ],
)  # fmt: skip
def test_options_of_pruning_are_refused_before_a_model_trains(parts: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        Plan.of(read_table(write_table(tmp_path, table(**parts))), reconfigured)


@pytest.mark.parametrize(("plain", "words"), [(True, ["--keep=4", "--plain"]), (False, ["--keep=4"])])
def test_flags_of_pruning_are_given_as_flags(plain: bool, words: list[str], tmp_path: Path) -> None:
    made = Plan.of(read_table(write_table(tmp_path, table(**pruned(keep=4, plain=plain)))), reconfigured)
    job = made.job("half", 1)
    before, _ = moekit_commands(job, job.folder(tmp_path))
    assert before[3] == "prune"
    assert before[5:-2] == words


def test_a_joined_model_may_choose_as_its_function_needs(tmp_path: Path) -> None:
    """Without `plain` experts write as before only if a token chooses twice as many."""
    settings = JOINED["settings"] | {"model": {"num_experts": 16, "k": 4}}
    settings.pop("model.num_experts")
    arms = with_arm("joined", aggregate={"with": "other"}, settings=settings)
    made = Plan.of(read_table(write_table(tmp_path, table(**arms))), reconfigured)
    assert made.job("joined", 1).config.model.k == 4


SMALL = {
    "model": {"dim": 16, "heads": 2, "hidden_dim": 16, "layers": 2, "num_experts": 2, "k": 1},
    "tasks.causal_lm.tokens": 128,
    "data": {"babel_languages": 2, "babel_sentences": 200, "vocab_size": 400},
    "train": {"max_steps": 4, "warmup_steps": 1, "validate_every": 2},
    "evaluate": {"max_sentences": 10, "valid_sentences": 10, "samples": 0},
}  # fmt: skip


@pytest.mark.slow
def test_a_table_of_real_runs(tmp_path: Path) -> None:
    steps = {"max_steps": 2, "warmup_steps": 1, "validate_every": 1, "learning_rate": 0.001}
    joined = JOINED | {"aggregate": {"with": "other"}, "settings": {"model.num_experts": 4, "train": steps}}
    arms = {name: ARMS[name] for name in ("many", "other", "student")} | {"joined": joined}
    asked = {"arm": "student", "against": "many"}
    made = table(settings=SMALL, arms=arms, claims=[CLAIM | asked], seeds=[1, 2], control=None, no_control="a test")
    path, runs = write_table(tmp_path, made), tmp_path / "runs"
    assert main(["ablate", str(path), "--runs", str(runs), "--out", str(tmp_path / "out"), "--jobs", "2"]) == 0
    plan = Plan.of(read_table(path), reconfigured)
    folders = {name: plan.job(name, 1).folder(runs) for name in arms}
    assert Run.open(folders["student"]).settings["teacher"] == str(folders["many"])
    assert {layer.num_experts for layer in Run.open(folders["joined"]).layers().values()} == {4}
    one, other = (Run.open(folders[name]).loaded.weights for name in ("many", "other"))
    assert any(not one[name].equal(other[name]) for name in one), "another order makes another model"


@pytest.mark.slow
def test_clusters_of_a_real_run(tmp_path: Path) -> None:
    settings = SMALL | {"model": {"dim": 16, "heads": 2, "hidden_dim": 16, "layers": 2, "layer": 1, "num_experts": 2}}
    made = hashed(CLUSTERED) | {"settings": settings, "seeds": [1, 2], "no_control": "a test"}
    made.pop("control")
    path, runs = write_table(tmp_path, made), tmp_path / "runs"
    assert main(["ablate", str(path), "--runs", str(runs), "--out", str(tmp_path / "out"), "--jobs", "2"]) == 0
