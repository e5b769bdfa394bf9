"""The runner of benchmarks/evidence on volumes of a second, and its statistics."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from fakes import write_volumes
from monai.bundle import ConfigParser
from running import ROOT
from scipy.stats import permutation_test

from evidence import planning, questions, readout_tables, results, tables
from evidence import run as runner
from evidence.differences import (
    Cell,
    Difference,
    cells,
    counts,
    difference,
    holm,
    outcome,
    p_value,
)
from med3dinsight_ext.data.splits import take
from med3dinsight_ext.metrics.classification import auroc_of

EVIDENCE = ROOT / "benchmarks" / "evidence"
PLAN = yaml.safe_load((EVIDENCE / "plan.yaml").read_text())
SMALL = {"spacing": [2.0, 2.0, 2.0], "patch_size": [32, 32, 32], "device": "$torch.device('cpu')"}


def small_plan() -> dict[str, Any]:
    """plan.yaml with a fake teacher and a network of a few channels."""
    plan = copy.deepcopy(PLAN)
    plan["corpora"]["hippocampus"] |= SMALL
    plan["tasks"]["hippocampus"] |= SMALL
    plan["backbones"]["unet"]["backbone"] |= {"channels": [4, 8, 8, 8], "num_res_units": 1}
    plan["pretrain"] |= {"teacher": {"_target_": "fakes.teacher"}, "per_plane": 2, "slices": 3}
    return plan


def write_hippocampus(root: Path) -> None:
    """Volumes under the names that the plan has for the hippocampus: 8 to develop on, 2 to test."""
    folder = write_volumes(root / "hippocampus", 10)
    (folder / "segmentation.json").rename(folder / "dataset.json")
    for path in (folder / "labels").glob("*.nii.gz"):  # the ball's upper half is the second class
        image: Any = nib.load(path)
        ball = np.asarray(image.dataobj)
        middle = int(np.median(ball.nonzero()[2]))
        ball[..., middle:] *= 2
        nib.save(nib.Nifti1Image(ball, image.affine), path)
    names = [f"v{i}" for i in range(10)]
    split = {"development": names[:8], "test": names[8:]}
    (folder / "split.json").write_text(json.dumps(split))
    rows = [
        {"image": f"{name}.nii.gz", "plane": "axial", "index": 13, "caption": f"a ball in {name}"}
        for name in names[:6]
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Smoke(NamedTuple):
    root: Path
    call: Callable[..., None]

    @property
    def results(self) -> Path:
        return self.root / "results"

    def records(self) -> dict[str, dict[str, Any]]:
        return results.read("smoke", self.results)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """The smoke budget, run once."""
    root = tmp_path_factory.mktemp("evidence")
    write_hippocampus(root)
    plan = root / "plan.yaml"
    plan.write_text(yaml.safe_dump(small_plan()))

    def call(**options: Any) -> None:
        fixed = {"out": str(root / "out"), "results": str(root / "results"), "plan": str(plan)}
        runner.main(str(root), "smoke", **(fixed | options))

    call()
    return Smoke(root, call)


def test_every_run_of_the_smoke_budget_leaves_a_record_with_its_circumstances(
    smoke: Smoke,
) -> None:
    records = smoke.records()
    assert set(records) == set(planning.planned(PLAN, "smoke"))
    for record in records.values():
        assert "error" not in record
        assert record["steps"] >= 2 and record["seconds"] > record["train_seconds"] > 0
        assert record["cpu_seconds"] > 0 and record["peak_megabytes"] > 50
        assert {"commit", "device", "threads", "versions", "seed", "settings"} <= set(record)


def test_records_hold_no_path_of_this_machine(smoke: Smoke) -> None:
    records = smoke.records()
    assert records and str(smoke.root) not in json.dumps(records)


def test_fine_tuning_reports_the_transfer_and_every_evaluation_case(smoke: Smoke) -> None:
    record = smoke.records()["hippocampus-unet-default-n3-s0"]
    assert record["transfer"]["encoder_share"] == 1
    assert record["transfer"]["file"] == "hippocampus-unet-default-pretrain-s0"
    names = {row["case"] for row in record["cases"]}
    assert len(record["cases"]) == 2 * 2 and len(names) == 2  # a quarter of 8 cases, two classes
    assert all((smoke.root / name).exists() for name in names)
    assert all(0 <= row["dice"] <= 1 for row in record["cases"] if row["class"] == "anterior")


def test_matched_scratch_gets_the_time_of_pre_training_too(smoke: Smoke) -> None:
    records = smoke.records()
    before = records["hippocampus-unet-default-pretrain-s0"]["cpu_seconds"]
    scratch = records["hippocampus-unet-scratch-n3-s0"]["cpu_seconds"]
    steps = 2 * max(1, round(2 * (before + scratch) / scratch / 2))
    assert records["hippocampus-unet-scratch_matched-n3-s0"]["steps"] == steps


def test_finished_runs_are_not_repeated(smoke: Smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "execute", lambda *_: pytest.fail("a run was repeated"))
    smoke.call()
    assert smoke.records()


def test_expected_times_come_from_finished_runs(
    smoke: Smoke, capsys: pytest.CaptureFixture[str]
) -> None:
    (kept,) = results.remove("smoke", ["hippocampus-unet-scratch-n3-s0"], smoke.results)
    smoke.call(dry_run=True)
    results.add("smoke", kept, smoke.results)
    shown = capsys.readouterr().out
    assert "scratch-n3-s0  " in shown and "1 runs to do" in shown and "nan" not in shown


def test_other_settings_under_the_name_of_a_finished_run_are_an_error(smoke: Smoke) -> None:
    plan = small_plan()
    plan["finetune"]["learning_rate"] = 0.5
    path = smoke.root / "other.yaml"
    path.write_text(yaml.safe_dump(plan))
    with pytest.raises(ValueError, match="other learning_rate for hippocampus-unet-scratch-n3-s0"):
        smoke.call(plan=str(path))


def test_a_failed_run_leaves_its_error_and_is_tried_again_only_when_asked(
    smoke: Smoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise ValueError("no room")

    folder, name = smoke.root / "failing", "hippocampus-unet-scratch-n3-s0"
    options = {"results": str(folder), "only": "*scratch-n3-s0"}
    with monkeypatch.context() as patch:
        patch.setattr(runner, "bundle_run", fail)
        smoke.call(**options)
        smoke.call(**options)
        failed = results.read("smoke", folder)[name]
        assert len(calls) == 1 and failed["error"] == "ValueError: no room"
    smoke.call(**options, retry=True)
    record = results.read("smoke", folder)[name]
    assert "error" not in record and record["failed_before"] == ["ValueError: no room"]


def test_lost_weights_bring_their_pre_training_back(smoke: Smoke) -> None:
    runs = planning.planned(small_plan(), "smoke")
    one = {name: run for name, run in runs.items() if "-default-" in name}
    (name,) = (name for name in one if "pretrain" not in name)
    done = {key: record for key, record in smoke.records().items() if key != name}
    here = runner.unfinished(one, done, smoke.root / "out" / "smoke")
    elsewhere = runner.unfinished(one, done, smoke.root / "nowhere")
    assert [run.name for run in here] == [name]
    assert [run.name for run in elsewhere] == list(one)


def test_a_finished_run_keeps_its_settings_and_may_lack_what_the_plan_pins() -> None:
    runs = planning.planned(small_plan(), "smoke").values()
    run = next(run for run in runs if run.about["arm"] == "default" and run.bundle == "pretrain")

    def done(**change: object) -> bool:
        settings = {key: value for key, value in run.settings.items() if key not in run.pinned}
        return runner.finished(run, {"settings": json.loads(json.dumps(settings | change))})

    assert run.pinned and done()
    for other in ({"loss::reconstruction_weight": 2.0}, {"slices": 99}):
        with pytest.raises(ValueError, match=f"settings of finished runs, got other {[*other][0]}"):
            done(**other)


@pytest.mark.parametrize(
    ("mode", "steps", "train_seconds", "expected"),
    [("linear", 0, 0, 60), ("finetune", 100, 50, 10 + 125), ("other", 100, 50, None)],
)
def test_time_is_expected_from_runs_of_the_same_kind(
    mode: str, steps: int, train_seconds: float, expected: float | None
) -> None:
    about = {"task": "t", "backbone": "b"}
    asked = {"steps": 250, "mode": "finetune" if mode == "other" else mode}
    run = planning.Run("x", "cls-finetune", about, [], asked)
    record = {"settings": {"mode": mode}, "steps": steps, "train_seconds": train_seconds}
    seconds = runner.expected_seconds(run, [about | record | {"seconds": 60}])
    assert np.isnan(seconds) if expected is None else seconds == expected


@pytest.mark.parametrize("budget", PLAN["budgets"])
def test_overrides_of_every_budget_are_keys_of_the_bundles(budget: str) -> None:
    runs = planning.planned(PLAN, budget)
    names = list(runs)
    assert all(names.index(need) < i for i, name in enumerate(names) for need in runs[name].needs)
    assert names


@pytest.mark.parametrize("budget", ["choice", "cpu", "parts", "pilot"])
def test_finished_runs_have_the_settings_of_the_plan(budget: str) -> None:
    runs, records = planning.planned(PLAN, budget), results.read(budget)
    done = [name for name in runs if runner.finished(runs[name], records.get(name))]
    assert len(done) >= 40 and set(done) == runs.keys() & records.keys()


def test_a_misspelt_override_stops_before_the_first_run() -> None:
    plan = small_plan()
    plan["arms"]["default"] = {"loss::knd": "cosine", "slicess": 3}
    with pytest.raises(SystemExit, match="slicess; did you mean slices"):
        planning.planned(plan, "smoke")


def test_an_unknown_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="budget must be one of .*smoke.*, got 'big'"):
        planning.planned(PLAN, "big")


def test_arms_differ_in_their_own_overrides_alone() -> None:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for run in planning.planned(PLAN, "gpu").values():
        own = {"seed", "max_cases"}
        if run.bundle == "pretrain":
            own |= set(PLAN["arms"][run.about["arm"]])
        shared = {key: v for key, v in run.settings.items() if key not in own}
        keys = ("corpus", "task", "backbone", "variant", "labels")
        where = [run.about.get(key) for key in keys]
        groups.setdefault(tuple(where), []).append(shared)
    for group in groups.values():
        common = set.intersection(*(set(settings) for settings in group))
        everything = set.union(*(set(settings) for settings in group))
        assert all(s[key] == group[0][key] for s in group for key in common)
        assert everything - common <= {key for arm in PLAN["arms"].values() for key in arm or ()}
    assert max(map(len, groups.values())) > 30


def test_fewer_labels_are_a_subset_and_seeds_choose_others(tmp_path: Path) -> None:
    write_hippocampus(tmp_path)
    train, _ = planning.items_of(PLAN["data"]["hippocampus"], tmp_path, "test")
    chosen = {(n, s): {i["image"] for i in take(train, n, s)} for n in (3, 5) for s in range(4)}
    assert all(chosen[3, s] < chosen[5, s] for s in range(4))
    assert len({frozenset(chosen[3, s]) for s in range(4)}) > 1


def test_data_sets_with_other_fields_make_one_corpus(tmp_path: Path) -> None:
    write_hippocampus(tmp_path)
    write_volumes(tmp_path / "more", 2)
    rows = [{"image": f"v{i}.nii.gz", "patient": f"p{i}"} for i in range(2)]
    (tmp_path / "more" / "rows.json").write_text(json.dumps(rows))
    plan = small_plan()
    plan["data"]["more"] = {"folder": "more", "datalist": "rows.json", "subsets": ["all", "all"]}
    plan["corpora"]["hippocampus"]["data"].append("more")
    run = next(iter(planning.planned(plan, "smoke").values()))
    files = planning.case_lists(plan, run, tmp_path, tmp_path / "out")
    rows = [json.loads(line) for line in Path(str(files["train"])).read_text().splitlines()]
    assert len(rows) > 6 and {tuple(row) for row in rows} == {("image", "modality")}


def test_choices_are_evaluated_on_development_cases_that_did_not_train(tmp_path: Path) -> None:
    write_hippocampus(tmp_path)
    about = PLAN["data"]["hippocampus"]
    train, held = planning.items_of(about, tmp_path, "held_out")
    development, test = planning.items_of(about, tmp_path, "test")
    images = [{item["image"] for item in items} for items in (train, held, development, test)]
    assert images[0] | images[1] == images[2] and not images[0] & images[1]
    assert len(images[1]) == 2 and not images[1] & images[3]


def records(arm: str, dice: list[list[float]], **about: Any) -> list[dict[str, Any]]:
    """Runs with the Dice of each case, one run a seed."""
    fixed = {
        "bundle": "seg-finetune",
        "task": "hippocampus",
        "backbone": "unet",
        "variant": "",
        "score": "test",
        "labels": 3,
        "settings": {},
        "arm": arm,
    } | about
    return [
        fixed
        | {
            "seed": seed,
            "cases": [{"case": f"c{i}", "class": "a", "dice": d} for i, d in enumerate(row)],
        }
        for seed, row in enumerate(dice)
    ]


def apart(ours: list[list[float]], theirs: list[list[float]]) -> Difference:
    made = ([outcome(r) for r in records("default", dice)] for dice in (ours, theirs))
    found = difference(*made)
    assert found is not None
    return found


def classified(seed: int = 0, gain: float = 0) -> dict[str, Any]:
    """A classifier's run on 40 cases, 10 of them positive, with ties."""
    draw = np.random.default_rng(seed)
    label = [i % 4 == 0 for i in range(40)]
    score = (draw.normal(size=40) + (1 + gain) * np.array(label)).round(1) / 10 + 0.5
    cases = [
        {"case": f"c{i:02}", "label": "yes" if y else "no", "p_no": 1 - p, "p_yes": p}
        for i, (y, p) in enumerate(zip(label, score.tolist(), strict=True))
    ]
    return {
        "task": "adrenal",
        "seed": 0,
        "cases": cases,
        "settings": {"class_names": ["no", "yes"]},
    }


def test_a_constant_gain_has_an_interval_of_no_width() -> None:
    base = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) / 2
    found = apart((base + 0.1).tolist(), base.tolist())
    assert found.cases == pytest.approx((0.1, 0.1)) and found.both == pytest.approx((0.1, 0.1))
    assert found.above == pytest.approx(0.1)


def test_a_gain_of_one_seed_alone_is_not_certain_over_seeds() -> None:
    found = apart([[0.8] * 20, [0.5] * 20, [0.45] * 20], [[0.5] * 20] * 3)
    assert found.cases[0] > 0 > found.both[0]
    assert found.seeds == pytest.approx([0.3, 0.0, -0.05])


def test_only_seeds_of_both_arms_are_compared_and_one_seed_decides_nothing() -> None:
    found = apart([[0.6] * 4, [0.1] * 4], [[0.5] * 4])
    assert found.seeds == pytest.approx([0.1]) and np.isnan(found.both).all()
    one = [
        r for arm, d in (("siglip", 0.6), ("siglip_image", 0.5)) for r in records(arm, [[d] * 4])
    ]
    lines = list(questions.answers(cells("cpu", one)))
    assert "- **Does text add to images?** Not known from one seed." in lines
    assert difference([outcome(r) for r in records("default", [[0.6] * 4])], []) is None


def test_runs_on_other_cases_are_not_compared() -> None:
    with pytest.raises(ValueError, match="must have scored the same cases"):
        apart([[0.6] * 4], [[0.5] * 5])


def test_a_class_or_case_without_a_dice_does_not_count() -> None:
    (record,) = records("default", [[0.6, 0.8]])
    record["cases"].append({"case": "c0", "class": "b", "dice": None})
    record["cases"].append({"case": "c1", "class": "b", "dice": 0.4})
    record["cases"] += [{"case": "c2", "class": c, "dice": None} for c in "ab"]
    found = outcome(record)
    assert found.value == pytest.approx((0.6 + 0.6) / 2)
    assert float(found.drawn.nanmean()) == pytest.approx(0.6)


def test_auroc_and_its_draws_equal_those_of_the_classification_report() -> None:
    record = classified()
    found = outcome(record)
    label = torch.tensor([row["label"] == "yes" for row in record["cases"]]).long()
    score = torch.tensor([[row["p_no"], row["p_yes"]] for row in record["cases"]]).double()
    once = torch.ones(40, 1, dtype=torch.float64)
    assert found.value == pytest.approx(float(auroc_of(score, label, once, 1)))
    drawn = auroc_of(score, label, counts(40, found.stream), 1)
    assert torch.allclose(found.drawn, drawn, equal_nan=True)


def test_p_of_dice_equals_scipys_permutation_test() -> None:
    parts = torch.linspace(-0.4, 1, 11, dtype=torch.float64)
    theirs = permutation_test((parts.numpy(),), np.mean, permutation_type="samples").pvalue
    assert p_value(parts, None) == pytest.approx(theirs, abs=0.005)
    assert p_value(parts - parts.mean(), None) > 0.9


def test_p_of_auroc_is_uniform_where_nothing_differs_and_small_where_much_does() -> None:
    def p(seed: int, gain: float) -> float:
        found = difference([outcome(classified(seed, gain))], [outcome(classified(seed + 500))])
        assert found is not None
        return found.p

    null = [p(seed, 0) for seed in range(200)]
    assert sum(value < 0.05 for value in null) < 22 and 0.35 < float(np.median(null)) < 0.65
    assert p(0, 6) < 0.01


def test_holm_raises_the_smallest_most_and_keeps_the_order() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.5]) == [1, 1] and holm([]) == []


def block(default: float, reconstruction: float = 0, full: float = 0, **about: Any) -> list[Cell]:
    """Cells with few and with all labels: what arms are above scratch."""
    noise = np.random.default_rng(0).normal(0, 0.01, (2, 3, 12))
    rows: list[dict[str, Any]] = []
    for labels, gain in ((about.pop("few", 3), default), (None, full)):
        arms = {"scratch": 0.0, questions.CHOSEN: gain, "reconstruction": reconstruction}
        for arm, above in arms.items():
            dice = 0.5 + above + noise[0] + 0.1 * (noise[1] if arm == questions.CHOSEN else 0)
            rows += records(arm, dice.tolist(), labels=labels, **about)
    return cells("cpu", rows)


def test_the_verdict_follows_its_rule() -> None:
    def word(*groups: list[Cell]) -> str:
        return questions.verdict([cell for group in groups for cell in group])[0].split("**")[1]

    win, null, loss = (dict[str, Any](default=d) for d in (0.1, 0, -0.1))
    tasks = ("hippocampus", "sarcoma_ct", "sarcoma_mr")
    first, ct, mr = (dict[str, Any](task=task) for task in tasks)
    last: dict[str, Any] = {"task": "adrenal", "few": 12}
    assert word(block(**win, **first), block(**win, **ct), block(**null, **last)) == "Reached"
    assert word(block(**win, **first), block(**null, **ct), block(**null, **last)) == "Not reached"
    assert word(block(**win, **first), block(**win, **ct)) == "Not complete yet"
    assert word(block(**null, **first), block(**null, **ct)) == "Not reached"
    worse = block(**win, **ct, full=-0.1)
    assert word(block(**win, **first), worse, block(**null, **last)) == "Not reached"
    behind = block(**win, **ct, reconstruction=0.2)
    assert word(block(**win, **first), behind, block(**null, **last)) == "Not reached"
    split = block(**win, **ct), block(**loss, **mr)
    assert word(block(**win, **first), *split, block(**null, **last)) == "Not reached"
    many = block(**win, **ct, few=14)  # of 29 these are not few
    assert word(block(**win, **first), many, block(**null, **last)) == "Not complete yet"


def test_without_test_cases_there_is_no_verdict() -> None:
    held = block(0.1, score="held_out")
    assert questions.verdict(held)[0].startswith("**Not known yet**")


def test_questions_are_answered_by_the_sign_of_the_interval_or_not_at_all() -> None:
    asked = "Do the 2D models add to masked reconstruction?"
    said = [
        next(line for line in questions.answers(block(gain)) if asked in line).split("** ")[1]
        for gain in (0.1, -0.1, 0)
    ]
    assert [text.split(":")[0] for text in said] == ["Yes", "On the contrary", "Not seen"]
    assert "+10.0" in said[0] and "−10.0" in said[1]
    rest = [line for line in questions.answers(block(0.1)) if "Does text add" in line]
    assert rest == ["- **Does text add to images?** Not run yet."]


def test_a_question_is_answered_where_both_of_its_arms_have_the_fewest_labels() -> None:
    rows = [
        run
        for labels, arms in ((3, ["default"]), (14, ["default", "siglip"]), (35, ["siglip"]))
        for arm in arms
        for run in records(arm, [[0.6 if arm == "default" else 0.5] * 4] * 2, labels=labels)
    ]
    said = next(
        line for line in questions.answers(cells("cpu", rows)) if "Does reconstruction add" in line
    )
    assert "Yes: +10.0 (+10.0 to +10.0)" in said and "of 1." in said


def test_noise_table_has_scores_by_loss_and_share() -> None:
    rows = [
        run
        for arm, dice in (("siglip", 0.6), ("siglip_noise_20", 0.5))
        for run in records(arm, [[dice] * 4] * 2)
    ]
    found = {"student": {"text_within_r5": 0.3}}
    before = [{"bundle": "pretrain", "arm": "siglip_noise_40", "retrieval": found}]
    page = tables.noise(cells("cpu", rows), before)
    assert "| SigLIP | 60.0 | 50.0 | – | – | – | 30.0 |" in page
    assert tables.noise(cells("cpu", rows[:2]), before) == []


def test_the_first_screen_quotes_the_write_up() -> None:
    said = (ROOT / "README.md").read_text().split("**Does it help?**")[1].split("\n\n")[0]
    figures = re.findall(r"[+−]?\d+\.\d \([^)]+\)", said)
    page = (EVIDENCE / "README.md").read_text().split("## Findings")[0]
    assert len(figures) == 5 and all(figure in page for figure in figures)
    dense = (EVIDENCE.parent / "dense" / "README.md").read_text()
    points = re.findall(r"([+−]\d+\.\d) points[^(]*\(([^);]+)", said)
    assert len(points) == 3
    for mean, ends in points:
        assert f"{mean} ({ends})".replace("−", "-") in dense


def test_questions_and_descriptions_name_arms_of_the_plan_or_of_none() -> None:
    asked = {arm for pairs in questions.QUESTIONS.values() for pair in pairs for arm in pair}
    assert set(PLAN["arms"]) == set(tables.ARMS) and "default" in asked
    assert set(questions.CASES) == set(PLAN["tasks"])


def test_the_chosen_arm_is_the_default_of_the_bundle() -> None:
    config = ConfigParser.load_config_file(ROOT / "bundles/pretrain/configs/train.json")
    chosen = PLAN["pinned"]["pretrain"] | PLAN["arms"][PLAN["chosen"]]
    parts = {key: value for key, value in chosen.items() if key.startswith(("loss::", "student::"))}
    assert parts
    for key, value in parts.items():
        part, name = key.split("::")
        assert config[part][name] == value, key


def test_the_page_has_each_arm_and_each_failed_run(smoke: Smoke) -> None:
    failed = {"name": "odd", "bundle": "pretrain", "error": "ValueError: why", "seconds": 1}
    results.add("smoke", failed | {"device": "x", "commit": "y"}, smoke.results)
    page = tables.readme(smoke.root)
    tables.draw(smoke.root)
    results.remove("smoke", ["odd"], smoke.results)
    assert "| scratch_matched | " in page and "- odd: ValueError: why" in page
    assert "**Not known yet**" in page and "scored on development cases" in page
    (figure,) = (smoke.root / "figures").glob("*.png")
    assert f"figures/{figure.name}" in page


def test_read_outs_rank_what_has_three_pre_trainings_on_each_of_two_corpora(tmp_path: Path) -> None:
    found: dict[str, Any] = {"scratch": {"12": [0.5, 0.5], "119": [0.6, 0.6]}}
    for corpus, level in (("both", 0.6), ("adrenal", 0.7)):
        for arm, above, seeds in (("a", 0.0, 3), ("b", 0.1, 3), ("c", 0.2, 2)):
            for seed in range(seeds):
                value = level + above + 0.03 * (seed - 1)
                name = f"{corpus}-unet-{arm}-pretrain-s{seed}"
                found[name] = {"12": [value, value], "119": [value, value + 0.02]}
    path = tmp_path / "readout-x.json"
    path.write_text(json.dumps({"auroc": found}))
    page = "\n".join(readout_tables.table(path))
    assert "| both-unet-a | 3 | 60.0 (57.0 to 63.0) | 61.0 (58.0 to 64.0) |" in page
    assert "| scratch | – | 50.0 | 60.0 |" in page
    # of either corpus the error is 3 / sqrt(3), of their mean 3 / sqrt(6)
    assert "standard error: `b` 75.5 ± 1.2, `a` 65.5 ± 1.2." in page and "`c`" not in page


def test_the_page_in_the_repository_is_generated_from_its_results() -> None:
    assert (EVIDENCE / "README.md").read_text() == tables.readme()
