"""A plan: the settings for a dataset on this machine, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from med3dinsight_ext.data.labels import check_names
from med3dinsight_ext.data.laterality import mirror
from med3dinsight_ext.data.layouts import Dataset, class_numbers
from med3dinsight_ext.io.configs import check_plain
from med3dinsight_ext.io.errors import summary
from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.io.reading import readable
from med3dinsight_ext.planning.dry_step import build, step_cost, usable_memory
from med3dinsight_ext.planning.rules import (
    covering_spacing,
    fitting_patch,
    steps_for,
    target_spacing,
    unet,
)
from med3dinsight_ext.planning.survey import Survey, survey

VOLUMES = 4  # in a step of a classifier, whose norm is that of the batch
SHARE = 0.7  # of the free memory that a step may take
SMALLEST = 16**3  # voxels of a patch
WIDTHS = ("channels", "features_per_stage")  # of a backbone: what is shown of it
WIDTH = 100  # characters of a line on the screen
TASK = (
    "label_names",
    "class_names",
    "mirror_axes",
    "mirror_pairs",
    "patches_per_volume",
    "ema_decay",
    "modality",  # of the volumes at hand
)


class Machine(NamedTuple):
    """What a device allows.

    voxels: of a patch, at most.
    wide: voxels of a patch up to which the network has 32 filters instead of 16.
    levels: halvings of the network.
    batch: patches in a step.
    budget: voxels that a training sees.
    least, most: patches that it sees.
    """

    voxels: int
    wide: int
    levels: int
    batch: int
    budget: float
    least: int
    most: int


CPU = Machine(330_000, 130_000, 3, 2, 8e8, 2_400, 10_000)
GPU = Machine(128**3, 128**3, 4, 4, 8e10, 20_000, 80_000)


class Plan(NamedTuple):
    """Settings of a config overlay, why each has its value, and what was seen."""

    settings: dict[str, Any]
    reasons: dict[str, str]
    seen: list[str]


def read_plan(path: str | Path) -> dict[str, Any]:
    """Settings of a plan's file.

    Raises:
        ValueError: it is no YAML file of settings.
    """
    with readable("plan", path, "name a file that the command plan wrote"):
        return dict(yaml.safe_load(Path(path).read_text("utf-8")))


def make_plan(
    dataset: Dataset,
    kept: Mapping[str, Any] | None = None,
    source: str = "",
    device: torch.device | None = None,
) -> Plan:
    """Settings for a dataset on this machine.

    Args:
        dataset: from ``read_dataset``; cases for tests are not looked at.
        kept: settings that are given, as those that a network was pre-trained with.
        source: of ``kept``, for the reasons.
        device: default: a GPU if there is one.

    Raises:
        ValueError: volumes or labels are bad, or the memory holds no patch.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = dataset.training()
    if not dataset.items:
        raise ValueError(
            f"development must have an image, got none in the split.json of {dataset.root}; add one"
        )
    labelled, kept = dataset.labelled(), dict(kept or {})
    found = survey(dataset.items)
    plan = Plan({}, {}, _seen(dataset, found))

    def put(key: str, value: Any, reason: str) -> None:
        plan.settings[key] = kept.get(key, value)
        plan.reasons[key] = f"as in {source}" if key in kept else reason

    if labelled:
        _put_classes(put, kept, dataset)
    reason = "told by the datalist or the intensities"
    if found.modality == "auto":
        reason = "each volume's own: told by the datalist or its intensities"
    put("modality", found.modality, reason)
    if found.ct_range:
        put("ct_range", list(found.ct_range), "HU of the labelled voxels, 0.5 to 99.5 %")
    whole = bool(labelled) and not dataset.segments()
    _put_grid(put, plan, found, device, whole)
    if whole:
        spacing, patch = (np.array(plan.settings[key]) for key in ("spacing", "patch_size"))
        larger = found.shapes * found.spacings > (patch + 1) * spacing
        if cut := int(larger.any(1).sum()):
            plan.seen.append(f"{cut} volumes are larger than the patch, which shows their centre")
    cores = torch.get_num_threads()
    put("num_workers", 0 if device.type == "cpu" else min(8, cores), f"{cores} threads")
    for key, value in kept.items():
        if key not in plan.settings:
            put(key, value, "")
    return plan


def _seen(dataset: Dataset, found: Survey) -> list[str]:
    """Lines on what was found."""
    labelled = dataset.labelled()
    shape, mm = np.median(found.shapes, 0), np.median(found.spacings, 0)
    kind = "label maps" if dataset.segments() else "classes"
    lines = [
        f"{len(dataset.items)} images, {len(labelled)} with {kind}"
        if labelled
        else f"{len(dataset.items)} images without labels",
        f"median {_times(shape)} voxels of {_times(mm)} mm; from {_times(found.spacings.min(0))} "
        f"to {_times(found.spacings.max(0))} mm",
        f"voxels of {found.sampled} images read: modality {' and '.join(found.kinds)}",
    ]
    return [*lines, *dataset.notes]


def _times(values: Sequence[float] | np.ndarray) -> str:
    return " × ".join(f"{value:.3g}" for value in values)


def check_settings(kept: Mapping[str, Any], source: str) -> None:
    """Stop if a given setting is not what the plan computes with.

    Args:
        kept: settings of ``make_plan``.
        source: of them, for the message.

    Raises:
        ValueError: naming the key.
    """

    def above_zero(values: Any, kind: Any, count: int = 3) -> bool:
        right = isinstance(values, list) and len(values) == count
        return right and all(isinstance(v, kind) and v is not True and v > 0 for v in values)

    def names(value: Any) -> bool:
        return isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value)

    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "patch_size": (lambda v: above_zero(v, int), "three whole numbers from 1"),
        "spacing": (lambda v: above_zero(v, (int, float)), "three numbers of mm above 0"),
        "batch_size": (lambda v: above_zero([v], int, 1), "a whole number from 1"),
        "steps": (lambda v: isinstance(v, str) or above_zero([v], int, 1), "a whole number from 1"),
        "label_names": (names, "a list of at least two texts"),
        "backbone": (lambda v: isinstance(v, dict) and "_target_" in v, "an object of a _target_"),
    }
    for key, (fits, wanted) in rules.items():
        if key in kept and not fits(kept[key]):
            raise ValueError(f"{key} must be {wanted}, got {kept[key]!r} in {source}; correct it")


def _put_classes(put: Any, kept: dict[str, Any], dataset: Dataset) -> None:
    """Class names and mirroring.

    Args:
        put: adds a setting.
        kept: settings that are given; loses a mirroring of classes before they were named.
        dataset: with labels.

    Raises:
        ValueError: a class name would run as code in a config.
    """
    labelled = dataset.labelled()
    if not dataset.segments():
        labels = {str(item["label"]) for item in labelled}
        classes = sorted(labels, key=int if all(map(str.isdecimal, labels)) else None)
        check_plain("labels", classes, f"rename this class in the list below {dataset.root}")
        put("class_names", classes, "all labels of the list")
        return
    names = dataset.names
    reason = "from dataset.json"
    if names is None:
        count = len(class_numbers(labelled))
        names = ["background", *(f"class_{i}" for i in range(1, count))]
        reason = "label values; edit the names: left and right pair up"
    check_plain("labels", names, f"rename this class in the dataset.json of {dataset.root}")
    check_names(names)
    put("label_names", names, reason)
    flips = mirror(names, labelled)
    if (given := kept.get("label_names", names)) != names:
        measured = {
            "mirror_axes": list(flips.axes),
            "mirror_pairs": [list(pair) for pair in flips.pairs],
        }
        if dataset.names is None and all(kept.get(k, v) == v for k, v in measured.items()):
            for key in measured:  # which nobody chose
                kept.pop(key, None)
        flips = mirror(given, labelled)
    put("mirror_axes", list(flips.axes), flips.reason)
    put("mirror_pairs", [list(pair) for pair in flips.pairs], "classes that swap when mirrored")
    put("patches_per_volume", 1, "so that batch_size counts the patches of a step")
    put("ema_decay", 0.99, "a running mean of the weights is validated and kept")


def _put_grid(put: Any, plan: Plan, found: Survey, device: torch.device, whole: bool) -> None:
    """Spacing, patch, network, batch and steps, by a dry step.

    Args:
        put: adds a setting.
        plan: that it is added to.
        found: measured.
        device: of the training.
        whole: a patch shows the whole volume, as for classification.
    """
    limits = GPU if device.type == "cuda" else CPU
    native = target_spacing(found.spacings, found.shapes)
    extent = np.median(found.shapes * found.spacings, 0)
    free, voxels = usable_memory(device), limits.voxels
    batch = VOLUMES if whole else limits.batch
    tried: list[int] = []
    while True:
        spacing = covering_spacing(extent / native, native, voxels, 1.0 if whole else 0.25)
        patch, strides = fitting_patch(extent / spacing, spacing, voxels, limits.levels)
        size = int(np.prod(patch))
        filters = 32 if size <= limits.wide else 16
        put(
            "spacing",
            spacing,
            "median of the images, isotropic up to factor two"
            if spacing == native
            else "coarser: a patch shows "
            + ("the whole volume" if whole else "a quarter of the volume"),
        )
        put("patch_size", patch, f"proportions of the median volume, {size:,} voxels")
        # Instance norm sets each channel's mean to zero, which hides sizes from a classifier.
        norm = "BATCH" if whole else "INSTANCE"
        reason = f"residual U-Net, {filters} filters" + (", batch norm" if whole else "")
        put("backbone", unet(filters, limits.levels, strides, norm), reason)
        put("batch_size", batch, "patches in a step")
        patch, batch = plan.settings["patch_size"], plan.settings["batch_size"]
        try:
            classes = len(plan.settings.get("label_names", [0]))
            network = build(plan.settings["backbone"], device, patch, classes)
            used, seconds = step_cost(network, patch, batch)
        except torch.OutOfMemoryError:
            used, seconds = free + 1, 0.0
        except Exception as error:  # of any network, whose settings were given
            raise ValueError(
                f"backbone must take patches of {_times(patch)} voxels, but failed with "
                f"{summary(error)}; correct patch_size or backbone, or leave them out"
            ) from error
        if used <= SHARE * free:
            break
        if batch > 2:
            batch = 2
        elif (voxels := voxels // 2) < SMALLEST or patch == tried:  # it is a given one
            raise ValueError(
                f"memory must hold a training step, got {free / 2**30:.1f} GiB free and "
                f"{used / 2**30:.1f} GiB needed by a patch of {_times(patch)} voxels; free memory, "
                "or give a smaller patch_size or backbone in a plan"
            )
        else:
            tried = patch
    cost = f"{used / 2**30:.1f} of {free / 2**30:.0f} GiB, {seconds:.1f} s a step here"
    plan.reasons["batch_size"] = f"{cost}; {plan.reasons['batch_size']}"
    _put_steps(put, plan, limits, batch, int(np.prod(patch)), seconds)


def _put_steps(
    put: Any, plan: Plan, limits: Machine, batch: int, voxels: int, seconds: float
) -> None:
    """Steps and what follows from them, from patches, their voxels and seconds of a step."""
    least, most = limits.least // batch, limits.most // batch
    steps = steps_for(batch * voxels, limits.budget, least, most)
    put("steps", steps, "fewer for a try")
    if isinstance(steps := plan.settings["steps"], int):  # else an expression of a given plan
        minutes = f"about {steps * seconds / 60:.0f} min in the network here"
        plan.reasons["steps"] = f"{minutes}; {plan.reasons['steps']}"
    put("max_epochs", "$-(-@steps // len(@train::dataloader))", "steps as epochs")
    put("warmup_epochs", "$max(1, @max_epochs // 20)", "a twentieth of them")
    put("val_interval", "$max(1, @max_epochs // 5)", "five validations")


def shown(plan: Plan) -> str:
    """What was seen and what was chosen and why, in one screen; the file has the whole text."""
    lines = [*plan.seen, ""]
    for key, value in plan.settings.items():
        if key == "backbone":
            value = next((value[name] for name in WIDTHS if name in value), value)
        text = _flow(value)
        lines.append(f"{key:<19}{_cut(text, 25):<26}{plan.reasons[key]}")
    return "\n".join(f"  {_cut(line, WIDTH - 2)}".rstrip() for line in lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _one_line(text: str) -> str:
    """A comment; a name of the data that breaks its line would begin a key."""
    return " ".join(text.splitlines())


def write_plan(plan: Plan, path: Path, title: str) -> None:
    """Write a plan as a commented overlay, for editing.

    Args:
        plan: to write.
        path: YAML file.
        title: first line.
    """
    head = [f"# {_one_line(title)}", *(f"#   {_one_line(line)}" for line in plan.seen)]
    rows = [
        f"{key}: {_flow(value)}"
        + (f"  # {_one_line(plan.reasons[key])}" if plan.reasons[key] else "")
        for key, value in plan.settings.items()
    ]
    text = "\n".join([*head, *rows, ""])
    write_atomic(path, lambda draft: draft.write_text(text, "utf-8"))
