"""Every arm of the game through the real command: references by another road, identities bit for bit."""

import json
import math
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, read_jsonl, weights

Train = Callable[..., Path]


ARMS = {
    "none": ["regularizer=none"],
    "kl": ["regularizer=kl", "alpha=0.5"],
    "kl-window": ["regularizer=kl", "alpha=0.3", "regularizer.history=2", "regularizer.pairs=union"],
    "kl-generator": ["regularizer=kl", "regularizer.history=null", "regularizer.reference=generator"],
    "fictitious": ["regularizer=fictitious_play"],
    "fictitious-reuse": ["regularizer=fictitious_play", "regularizer.pairs=reuse"],
    "mixture": ["regularizer=mixture_of_two"],
    "mixture-as-released": ["regularizer=mixture_of_two", "regularizer.reference=last", "regularizer.pairs=union"],
    "mixture-geometric": ["regularizer=mixture_of_two", "regularizer.reference=geometric"],
    "base": ["regularizer=base"],
}


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """scripts/verify.py, which shares no code with the package; returns what it prints, or why it fails."""

    def run(root: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["verify.py", str(root), "--rows", "48"])
        try:
            runpy.run_path(str(ROOT / "scripts" / "verify.py"), run_name="__main__")
        except SystemExit as failure:
            return f"failed: {failure}"
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by this module's runs, so that they share the SFT stage."""
    return tmp_path_factory.mktemp("outputs")


QUICK = ("kl", "fictitious")  # the rest is slow


@pytest.mark.parametrize("arm", [pytest.param(arm, marks=[] if arm in QUICK else pytest.mark.slow) for arm in ARMS])
def test_another_road_gives_the_same_references_first_loss_and_first_margin(
    arm: str, train: Train, outputs: Path, verify: Callable[[Path], str]
) -> None:
    root = train(*ARMS[arm], "schedule.iterations=3", name=arm, outputs=outputs)
    assert verify(root).count("reference off") == 3


def test_a_swapped_reference_is_seen_by_the_other_road(
    train: Train, outputs: Path, tmp_path: Path, verify: Callable[[Path], str]
) -> None:
    root = train(*ARMS["kl"], "schedule.iterations=3", name="kl", outputs=outputs)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    run = json.loads((copy / "run.json").read_text())
    run["settings"]["regularizer.alpha"] = [0.4]
    (copy / "run.json").write_text(json.dumps(run))
    assert verify(copy).startswith("failed: the stored references")


@pytest.mark.slow
def test_iteration_0_is_the_same_for_every_regularizer_bit_for_bit(train: Train, outputs: Path) -> None:
    roots = [train(*words, "schedule.iterations=3", name=arm, outputs=outputs) for arm, words in ARMS.items()]
    assert len({weights(root, 1) for root in roots}) == 1
    assert len({(root / "iteration-00/pairs.parquet").read_bytes() for root in roots}) == 1
    assert len({weights(root, 3) for root in roots}) == len(roots)  # and then they part


@pytest.mark.slow
def test_identities_hold_bit_for_bit_without_sharing_a_stage(train: Train, tmp_path: Path) -> None:
    """alpha = 0 is SPIN, a history of one is SPIN: run apart, in folders that cannot share."""
    spin = train("regularizer=none", outputs=tmp_path / "a")
    for i, words in enumerate((["alpha=0"], ["regularizer=fictitious_play", "regularizer.history=1"])):
        other = train(*words, outputs=tmp_path / str(i))
        assert weights(other, 2) == weights(spin, 2)
        assert (other / "metrics.jsonl").read_bytes() == (spin / "metrics.jsonl").read_bytes()


def test_plain_spin_begins_every_iteration_at_log_2(train: Train, outputs: Path) -> None:
    root = train(*ARMS["none"], "schedule.iterations=3", name="none", outputs=outputs)
    first = [row for row in read_jsonl(root / "metrics.jsonl") if row["step"] == 1 and "train/loss" in row]
    assert len(first) == 3
    for row in first:
        assert math.isclose(row["train/loss"], math.log(2), abs_tol=1e-6)
        assert abs(row["train/margin"]) < 1e-5


def test_at_the_start_of_every_iteration_the_margin_of_every_row_is_zero(train: Train, outputs: Path) -> None:
    """Precompute, table, collate and training forward agree: at theta = pi_t against pi_t, Delta = 0 in every row."""
    from spin_reg import iterates
    from spin_reg.scorer import Scorer
    from spin_reg.settings import Dtype, Loss
    from spin_reg.specs import Policy
    from spin_reg.stages.train import pair_terms

    root = train(*ARMS["none"], "schedule.iterations=3", name="none", outputs=outputs)
    for t in range(3):
        policy = iterates.load(root / f"iterate-{t:02d}/model", Policy(Dtype.float32, None, None)).model
        for row in pq.read_table(root / f"iteration-{t:02d}/pairs.parquet").to_pylist():
            terms = pair_terms(Scorer(policy), [row], Loss(), 1.0)
            assert abs(terms["margin"].item()) < 1e-4, row["example_id"]
    iterates.forget()


def test_the_run_folder_holds_what_it_promises(train: Train, outputs: Path) -> None:
    root = train(*ARMS["fictitious"], "schedule.iterations=3", name="fictitious", outputs=outputs)
    for name in ("run.json", "config.yaml", "run.log", "metrics.jsonl"):
        assert (root / name).stat().st_size > 0
    for k in range(4):
        assert (root / f"iterate-{k:02d}/model/model.safetensors").exists()
        metrics = json.loads((root / f"iterate-{k:02d}/evaluate/metrics.json").read_text())
        wanted = {"heldout_nll", "kl_data", "kl_data_se", "kl_off", "kl_to_base", "length_mean"}
        wanted |= {"margin", "accuracy", "kl_to_previous"} if k else set()
        assert {f"eval/{name}" for name in wanted} <= set(metrics)
        assert k or not {"eval/margin", "eval/accuracy"} & set(metrics)
    table = pq.read_table(root / "iteration-02/pairs.parquet")
    assert table.column_names[:8] == [
        *("example_id", "prompt_ids", "real_ids", "generated_ids", "sampled_from", "finish_reason"),
        *("reference_real_logprob", "reference_generated_logprob"),
    ]
    rows = table.to_pylist()
    assert len(rows) == 24 and {row["sampled_from"] for row in rows} == {0, 1, 2}
    end = rows[0]["real_ids"][-1]
    for row in rows:
        assert row["real_ids"].count(end) == 1 and row["real_ids"][-1] == end
        assert row["generated_ids"].count(end) == (row["finish_reason"] == "stop")
        assert (row["generated_ids"][-1] == end) == (row["finish_reason"] == "stop")


def test_union_pairs_every_prompt_with_every_iterate_and_reuse_asks_for_fewer_answers(
    train: Train, outputs: Path
) -> None:
    union = train(*ARMS["mixture-as-released"], "schedule.iterations=3", name="mixture-as-released", outputs=outputs)
    rows = pq.read_table(union / "iteration-02/pairs.parquet").to_pylist()
    assert len(rows) == 48 and {row["sampled_from"] for row in rows} == {1, 2}
    reuse = train(*ARMS["fictitious-reuse"], "schedule.iterations=3", name="fictitious-reuse", outputs=outputs)
    answers = [len(pq.read_table(p)) for p in sorted(reuse.glob("iterate-*/answers/train-*/answers.parquet"))]
    assert answers[0] == 24 and all(0 < n < 24 for n in answers[1:])
    kept = {
        (row["example_id"], tuple(row["generated_ids"]))
        for t in (1, 2)
        for row in pq.read_table(reuse / f"iteration-{t:02d}/pairs.parquet").to_pylist()
        if row["sampled_from"] == 0
    }
    first = {
        (row["example_id"], tuple(row["generated_ids"]))
        for row in pq.read_table(reuse / "iteration-00/pairs.parquet").to_pylist()
    }
    assert kept and kept <= first
