from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import ignite.distributed as idist
import pytest
import torch
import torch.multiprocessing as mp
from ignite.exceptions import NotComputableError
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from test_recall import pairs
from torch import Tensor, nn
from torch.nn import functional as F

from med3dinsight_ext.metrics.retrieval import (
    Retrieval,
    RetrievalTable,
    depth_group,
    retrieval,
)


class Pred(NamedTuple):
    tokens: dict[str, Tensor]


class Target(NamedTuple):
    image: Tensor
    text: Tensor
    has_text: Tensor
    valid: Tensor
    plane: Tensor
    position: Tensor
    modality: Tensor
    patient: Tensor


def cohort(b: int = 5, s: int = 7, noise: float = 1.0, seed: int = 0) -> tuple[Pred, Target]:
    """Padding, missing captions and, in the text space, captions that occur twice."""
    g = torch.Generator().manual_seed(seed)
    valid = torch.rand(b, s, generator=g) < 0.8
    has_text = valid & (torch.rand(b, s, generator=g) < 0.8)
    image = F.normalize(torch.randn(b, s, 6, generator=g), dim=-1) * valid[..., None]
    words = F.normalize(torch.randn(9, 4, generator=g), dim=-1)
    text = words[torch.randint(9, (b, s), generator=g)] * has_text[..., None]
    plane = torch.randint(3, (b, s), generator=g)
    position = torch.rand(b, s, generator=g)
    tokens = {
        "image": image + noise * torch.randn(b, s, 6, generator=g),
        "text": text + noise * torch.randn(b, s, 4, generator=g),
    }
    patient = torch.arange(b)[:, None].expand(b, s)
    modality = patient % 2
    return Pred(tokens), Target(image, text, has_text, valid, plane, position, modality, patient)


def part(pred: Pred, target: Target, rows: slice) -> tuple[Pred, Target]:
    return Pred({k: v[rows] for k, v in pred.tokens.items()}), Target(*(v[rows] for v in target))


def test_order_of_slices_does_not_matter() -> None:
    slices = pairs()
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert retrieval(*slices) == pytest.approx(retrieval(*(row[shuffled] for row in slices)))


def test_length_of_tokens_does_not_matter() -> None:
    tokens, *rest = pairs()
    assert retrieval(tokens, *rest) == retrieval(37.0 * tokens, *rest)


def test_a_perfect_student_gets_one() -> None:
    _, targets, *rest = pairs()
    result = retrieval(targets, targets, *rest)
    assert (result["r1"], result["r1_low"], result["r1_high"]) == (1.0, 1.0, 1.0)
    assert result["r1_chance"] < 0.5


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("within", [True, False])
def test_a_constant_student_gets_chance(value: float, within: bool) -> None:
    tokens, *rest = pairs()
    result = retrieval(torch.full_like(tokens, value), *rest, within=within)
    for k in (1, 5, 10):
        assert result[f"r{k}"] == pytest.approx(result[f"r{k}_chance"], abs=1e-9)


def test_plane_and_bin_alone_are_at_chance_within() -> None:
    tokens, targets, plane, position, *rest = pairs(400)
    place = depth_group(plane, position, 4)
    coarse = F.one_hot(place, 12).float()
    blind = torch.zeros(400, 18)
    blind[:, :12] = coarse
    targets = torch.cat([3 * coarse, targets], 1)
    everywhere = retrieval(blind, targets, plane, position, *rest, within=False)
    inside = retrieval(blind, targets, plane, position, *rest, within=True)
    assert everywhere["r1"] > 5 * everywhere["r1_chance"]
    assert inside["r1"] == pytest.approx(inside["r1_chance"])


def test_depth_group_separates_planes_and_bins() -> None:
    plane = torch.tensor([0, 0, 0, 1, 2])
    position = torch.tensor([0.0, 0.24, 0.25, 0.24, 1.0])
    assert depth_group(plane, position, 4).tolist() == [0, 0, 1, 4, 11]


@pytest.mark.parametrize(("bins", "candidates"), [(1, 4.0), (2, 2.0)])
def test_depth_bins_part_the_candidates(bins: int, candidates: float) -> None:
    tokens, targets, *_ = pairs(4)
    position, volume = torch.tensor([0.1, 0.2, 0.7, 0.8]), torch.arange(4)
    same = torch.zeros(4).long()
    result = retrieval(tokens, targets, same, position, same, volume, depth_bins=bins)
    assert result["candidates"] == candidates


@pytest.mark.parametrize("bins", [3, 4])
def test_the_modality_alone_is_at_chance_within(bins: int) -> None:
    tokens, targets, plane, position, _, volume = pairs(400)
    modality = torch.arange(400) % 3
    known = F.one_hot(modality, 3).float()
    targets = torch.cat([3 * known, targets], 1)
    blind = torch.cat([known, torch.zeros_like(tokens)], 1)
    inside, together = (
        retrieval(blind, targets, plane, position, m, volume, depth_bins=bins)
        for m in (modality, modality * 0)
    )
    assert inside["r1"] == pytest.approx(inside["r1_chance"])
    assert together["r1"] > 2 * together["r1_chance"]


def test_queries_without_rivals_are_left_out() -> None:
    tokens, targets, *_ = pairs(5)
    plane, position = torch.tensor([0, 0, 0, 1, 2]), torch.full((5,), 0.5)
    result = retrieval(tokens, targets, plane, position, torch.zeros(5).long(), torch.arange(5))
    assert (result["queries"], result["candidates"]) == (3.0, 3.0)
    assert result["r1_chance"] == pytest.approx(1 / 3)


def test_no_rival_at_all_is_an_error() -> None:
    tokens, targets, *_ = pairs(3)
    with pytest.raises(NotComputableError, match="two candidates, got 3 slices of 1 patients"):
        retrieval(tokens, targets, torch.arange(3), torch.rand(3), *torch.zeros(2, 3).long())


def test_a_diverged_student_is_an_error() -> None:
    tokens, targets, *rest = pairs()
    tokens[3, 1] = float("nan")
    with pytest.raises(ValueError, match="tokens must be finite, got NaN or Inf in 1 of 40 rows"):
        retrieval(tokens, targets, *rest)


def test_another_width_is_an_error() -> None:
    _, targets, *rest = pairs()
    with pytest.raises(ValueError, match=r"one shape \(n, d\), got \(40, 3\) and \(40, 6\)"):
        retrieval(torch.zeros(40, 3), targets, *rest)


@pytest.mark.parametrize("target", ["image", "text"])
@pytest.mark.parametrize("within", [True, False])
def test_metric_equals_the_function_on_valid_slices(target: str, within: bool) -> None:
    pred, truth = cohort()
    metric = Retrieval(target, within, ks=(2, 3), depth_bins=2)
    metric.update(part(pred, truth, slice(0, 2)))
    metric.update(part(pred, truth, slice(2, 5)))
    mask = truth.has_text if target == "text" else truth.valid
    expected = retrieval(
        *(row[mask] for row in (pred.tokens[target], getattr(truth, target))),
        *(row[mask] for row in (truth.plane, truth.position, truth.modality, truth.patient)),
        within=within,
        ks=(2, 3),
        depth_bins=2,
    )
    assert metric.compute() == expected["r2"]
    assert metric.latest == expected


def test_the_interval_is_over_patients() -> None:
    """Two volumes a patient that are alike: half as many independent units."""
    pred, truth = cohort(b=12)
    twice = [Pred({k: v.repeat(2, 1, 1) for k, v in pred.tokens.items()})]
    twice += [Target(*(v.repeat(2, *[1] * (v.ndim - 1)) for v in truth))]
    by_volume = Target(*twice[1])._replace(patient=torch.arange(24)[:, None].expand(24, 7))
    width = []
    for target in (twice[1], by_volume):
        metric = Retrieval(within=False)
        metric.update((twice[0], target))
        metric.compute()
        width.append(metric.latest["r5_high"] - metric.latest["r5_low"])
    assert width[0] / width[1] == pytest.approx(2**0.5, rel=0.15)


def test_a_joint_token_is_compared_with_both_targets() -> None:
    pred, truth = cohort()
    truth = truth._replace(text=truth.image * truth.has_text[..., None])
    table = RetrievalTable()
    table.update((Pred({"joint": truth.image}), truth))
    result = table.compute()
    assert result["image_all_r1"] == result["text_all_r1"] == 1.0


def test_table_holds_each_single_metric() -> None:
    pred, truth = cohort()
    table = RetrievalTable()
    table.update((pred, truth))
    result = table.compute()
    for target, within in itertools.product(("image", "text"), (True, False)):
        metric = Retrieval(target, within)
        metric.update((pred, truth))
        scope = "within" if within else "all"
        assert result[f"{target}_{scope}_r1"] == metric.compute()
        assert result[f"{target}_{scope}_candidates"] == metric.latest["candidates"]


def test_table_leaves_out_what_has_no_captions() -> None:
    pred, truth = cohort()
    table = RetrievalTable()
    table.update((pred, truth._replace(has_text=torch.zeros_like(truth.valid))))
    assert {key.split("_")[0] for key in table.compute()} == {"image"}


def test_table_leaves_out_what_the_student_has_no_head_for() -> None:
    pred, truth = cohort()
    table = RetrievalTable()
    table.update((Pred({"image": pred.tokens["image"]}), truth))
    keys = table.compute().keys()
    assert {key.split("_")[0] for key in keys} == {"image"}
    assert {key for key in keys if re.fullmatch(r"image_all_r\d+", key)} == {
        "image_all_r1", "image_all_r5", "image_all_r10"
    }  # fmt: skip


def test_the_default_compares_images_within_modality_plane_and_depth() -> None:
    metrics = [Retrieval(), Retrieval("image", True, (1, 5, 10), 4), Retrieval(within=False)]
    for metric in metrics:
        metric.update(cohort())
        metric.compute()
    assert metrics[0].latest == metrics[1].latest != metrics[2].latest


def test_kept_slices_hold_no_graph() -> None:
    pred, truth = cohort()
    pred.tokens["image"].requires_grad_()
    metric = Retrieval()
    metric.update((pred, truth))
    assert not metric.kept["image"][0].tokens.requires_grad


def test_table_leaves_out_a_scope_without_rivals() -> None:
    pred, truth = cohort(b=1)
    truth = truth._replace(valid=truth.valid.new_ones(1, 7), image=pred.tokens["image"])
    truth = truth._replace(plane=torch.zeros(1, 7).long(), position=torch.arange(7)[None] / 7)
    table = RetrievalTable(depth_bins=7)
    table.update((pred, truth))
    assert {"_".join(key.split("_")[:2]) for key in table.compute()} == {"image_all", "text_all"}


def test_metric_without_captions_is_an_error() -> None:
    pred, truth = cohort()
    metric = Retrieval("text")
    metric.update((pred, truth._replace(has_text=torch.zeros_like(truth.valid))))
    with pytest.raises(NotComputableError, match="slices with a text token and target"):
        metric.compute()


def test_empty_table_is_an_error() -> None:
    with pytest.raises(NotComputableError, match="at least two, got none; evaluate more"):
        RetrievalTable().compute()


def test_unknown_target_is_an_error() -> None:
    with pytest.raises(ValueError, match="target must be one of .*, got 'audio'"):
        Retrieval("audio")


def test_decollated_output_is_an_error() -> None:
    with pytest.raises(TypeError, match="set decollate: false"):
        Retrieval().update(([1], [2]))


def test_reset_removes_the_slices() -> None:
    metric = Retrieval()
    metric.update(cohort())
    metric.reset()
    with pytest.raises(NotComputableError, match="got none"):
        metric.compute()


class Echo(nn.Module):
    """A network whose tokens are its input, as a MONAI engine sees it."""

    def forward(self, x: Tensor) -> Pred:
        return Pred({"joint": x})


def evaluate(batches: list[dict[str, Tensor]], **metrics: object) -> dict[str, float]:
    key, *more = metrics.items()
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=batches,
        network=Echo(),
        prepare_batch=lambda batch, *_args, **_kwargs: (
            batch["image"],
            Target(*(batch[name] for name in Target._fields)),
        ),
        key_val_metric=dict([key]),
        additional_metrics=dict(more),
        decollate=False,
    )
    engine.run()
    assert engine.state.best_metric == engine.state.metrics[key[0]]
    return engine.state.metrics


def test_monai_evaluator_selects_by_it() -> None:
    _, truth = cohort()
    truth = truth._replace(text=truth.image * truth.has_text[..., None])
    batches = [
        {name: MetaTensor(row[i : i + 2]) for name, row in truth._asdict().items()}
        for i in range(0, 5, 2)
    ]
    result = evaluate(batches, within=Retrieval("image"), table=RetrievalTable())
    assert result["within"] == result["image_within_r1"] == result["table"]["image_all_r1"] == 1.0


def _rank(rank: int, file: str, shares: list[slice], out: str) -> None:
    torch.set_num_threads(1)  # the thread pool does not survive a fork
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=len(shares)
    )
    idist.sync()
    table = RetrievalTable()
    if shares[rank].stop > shares[rank].start:
        table.update(part(*cohort(), shares[rank]))
    torch.save(table.compute(), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shares", [[slice(0, 4), slice(4, 5)], [slice(0, 5), slice(0, 0)]])
def test_uneven_ranks_equal_one_process(shares: list[slice], tmp_path: Path) -> None:
    mp.start_processes(
        _rank, (str(tmp_path / "store"), shares, str(tmp_path)), nprocs=2, start_method="fork"
    )
    alone = RetrievalTable()
    alone.update(cohort())
    expected = alone.compute()
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert list(got) == list(expected)
        assert all(abs(got[k] - expected[k]) < 1e-6 for k in got)
