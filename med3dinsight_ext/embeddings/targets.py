"""Training targets: slices sampled from the store, mapped into the augmented volume."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.engines.utils import PrepareBatch
from monai.transforms import MapTransform, Randomizable
from safetensors import safe_open
from torch import Tensor

from med3dinsight_ext.data.patients import patient_name
from med3dinsight_ext.data.volumes import STRAIGHT, UNSHEAR, shear
from med3dinsight_ext.embeddings.entry import read_entry


class SliceTargets(NamedTuple):
    """Targets of the slices of a batch.

    Attributes:
        image: (b, s, d) unit embeddings of the slices.
        text: (b, s, d') unit embeddings of their captions, zeros where there is none.
        has_text: (b, s) bool.
        valid: (b, s) bool, False where a row is padding.
        plane: (b, s) long: 0 sagittal, 1 coronal, 2 axial.
        position: (b, s) float, fraction of the extent of ``volume``, in [0, 1].
        modality: (b, s) long, index into ``slicing.MODALITIES``.
        volume: (b, 1, x, y, z), the student's input.
        patient: (b, s) long, equal for the volumes of one patient alone.
    """

    image: Tensor
    text: Tensor
    has_text: Tensor
    valid: Tensor
    plane: Tensor
    position: Tensor
    modality: Tensor
    volume: Tensor
    patient: Tensor


def shuffle_captions(
    items: Sequence[dict[str, Any]], share: float, seed: int = 0
) -> list[dict[str, Any]]:
    """Assign a share of all captions to other slices, as label noise or as a control.

    Args:
        items: from ``Store.fill``.
        share: of the captions, in [0, 1], that are permuted among each other; none of them stays.
        seed: of the choice.

    Returns:
        The items, with ``texts_from``: row to (entry, row of its text) for each changed caption.

    Raises:
        ValueError: ``share`` is out of range.
    """
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}; 0.2 shuffles a fifth")
    if not share:
        return list(items)
    places = []
    for number, item in enumerate(items):
        with safe_open(item["targets"], "pt") as file:
            places += [(number, row) for row in range(file.get_slice("text_row").get_shape()[0])]
    count = round(share * len(places))
    order = np.random.default_rng(seed).permutation(len(places))[: 2 if count == 1 else count]
    texts_from: list[dict[int, tuple[str, int]]] = [{} for _ in items]
    for place, other in zip(order, np.roll(order, 1), strict=True):  # one cycle: none stays
        number, row = places[place]
        texts_from[number][row] = (items[places[other][0]]["targets"], places[other][1])
    return [{**item, "texts_from": found} for item, found in zip(items, texts_from, strict=True)]


def map_positions(
    plane: Tensor,
    position: Tensor,
    size: Tensor,
    source: Tensor,
    target: Tensor,
    shape: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Planes and positions of a volume's slices in a flipped, cropped, padded or rescaled copy.

    Args:
        plane: (s,) long, in the source.
        position: (s,) fraction of the source's extent, in [0, 1].
        size: (3,) voxels of the source.
        source: (4, 4) affine of the source, voxels to mm.
        target: (4, 4) affine of the copy.
        shape: (x, y, z) voxels of the copy.

    Returns:
        plane (s,) and position (s,) in the copy; a position outside [0, 1] was cropped away.

    Raises:
        ValueError: the source is sheared or the copy was rotated, so that slices are tilted.
    """
    step = torch.linalg.solve(target.double(), source.double())  # source voxel -> copy voxel
    size_of_step = step[:3, :3].abs()
    new_axis = size_of_step.argmax(0)  # for each source axis
    off = size_of_step.clone()
    off[new_axis, torch.arange(3)] = 0
    if len(set(new_axis.tolist())) < 3 or off.max() > 1e-3 * size_of_step.max():
        if (angle := shear(source)) > STRAIGHT:
            raise ValueError(
                f"volume must have axes at right angles, got {angle:.2g} degrees of shear (gantry "
                f"tilt); {UNSHEAR}"
            )
        raise ValueError(
            "image must be flipped, cropped, padded, zoomed or turned by right angles only, got a "
            "rotated grid, in which slices tilt; take rotations and deformations out of the "
            "transforms before SampleTargetsd"
        )
    index = position.double() * size.double()[plane] - 0.5
    axis = new_axis[plane]
    moved = step[axis, plane] * index + step[axis, 3]
    # The other two axes add nothing: their step is zero along this one.
    return axis, ((moved + 0.5) / torch.tensor(shape, dtype=torch.float64)[axis]).float()


class SampleTargetsd(MapTransform, Randomizable):
    """Add the targets of some slices of each volume, at their positions in the augmented volume.

    Apply it after every spatial transform. At least half of the slices have a caption, if there are
    as many. Reads the item's ``targets``, the path of its entry, and ``texts_from``, if set by
    ``shuffle_captions``. Adds plane, position, modality_index, image_target, text_target, has_text,
    valid and patient_index (see ``SliceTargets``, without the batch axis).

    Args:
        keys: the image, a MetaTensor (1, x, y, z).
        embedding_dims: of the store.
        slices: slices a volume, >= 1, padded if there are fewer or none; None takes all in order.
        min_similarity: captions with a lower cosine similarity to their slice are left out; needs a
            teacher with one joint space.

    Raises:
        TypeError: ``min_similarity`` is no number, or the image is no MetaTensor.
        ValueError: an argument is out of range, or all slices are wanted and there are none.
    """

    def __init__(
        self,
        keys: str,
        embedding_dims: dict[str, int],
        slices: int | None = 16,
        min_similarity: float | None = None,
    ) -> None:
        super().__init__(keys)
        if not isinstance(min_similarity, (int, float, type(None))):
            raise TypeError(f"min_similarity must be a number or None, got {min_similarity!r}")
        if min_similarity is not None and "joint" not in embedding_dims:
            raise ValueError(
                f"min_similarity must be None, got {min_similarity}: this teacher's images and "
                "texts have two spaces; use one such as CLIP, SigLIP or BiomedCLIP"
            )
        self.min_similarity = min_similarity
        if slices is not None and slices < 1:
            raise ValueError(f"slices must be at least 1, got {slices}; use None for all")
        self.slices = slices
        self.text_length = embedding_dims.get("joint", embedding_dims.get("text", 0))

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        image = data[self.keys[0]]
        if not isinstance(image, MetaTensor):
            raise TypeError(
                f"image must be a MetaTensor, got {type(image).__name__}; load it by LoadImaged"
            )
        entry = self._entry(data)
        grid = entry["size"], entry["affine"], image.affine, image.shape[1:]
        try:
            plane, position = map_positions(entry["plane"].long(), entry["position"], *grid)
        except ValueError as error:
            raise ValueError(f"{error} (entry {data['targets']})") from error
        has_text = torch.zeros(len(plane), dtype=torch.bool)
        has_text[entry["text_row"].long()] = True
        row_of_text = torch.zeros(len(plane), dtype=torch.long)
        row_of_text[entry["text_row"].long()] = torch.arange(len(entry["text_row"]))
        inside = (position >= 0) & (position <= 1)
        usable = inside.nonzero().flatten()
        if self.slices is None and not len(usable):
            raise ValueError(
                f"image must hold a stored slice, got none of {len(plane)} inside "
                f"{image.meta.get('filename_or_obj', 'a volume')}; raise per_plane or patch_size "
                f"(entry {data['targets']})"
            )
        if self.slices is not None:
            usable = self._draw(usable, has_text)
        count = len(usable) if self.slices is None else self.slices
        pad = count - len(usable)
        valid = torch.arange(count) < len(usable)
        usable = torch.cat((usable, usable.new_zeros(pad)))
        has_text = has_text[usable] & valid
        text = torch.zeros(count, self.text_length)
        if has_text.any():
            text[has_text] = entry["text"][row_of_text[usable[has_text]]].float()
        kept = {key: value for key, value in data.items() if key != "texts_from"}
        return {
            **kept,
            "plane": plane[usable],
            "position": position[usable].clamp(0, 1),
            "modality_index": entry["modality"].long().expand(count),
            "image_target": entry["image"][usable].float() * valid[:, None],
            "text_target": text,
            "has_text": has_text,
            "valid": valid,
            "patient_index": patient_index(data, "targets").expand(count),
        }

    def _entry(self, data: dict[str, Any]) -> dict[str, Tensor]:
        """The volume's entry, with shuffled and without dissimilar captions."""
        entry = read_entry(data["targets"])
        good = torch.ones(len(entry["text_row"]), dtype=torch.bool)
        if self.min_similarity is not None and len(good):  # of its own caption, not another's
            image = entry["image"][entry["text_row"].long()].float()
            good = (image * entry["text"].float()).sum(1) >= self.min_similarity
        for row, (path, other) in data.get("texts_from", {}).items():
            with safe_open(path, "pt") as file:
                entry["text"][row] = file.get_slice("text")[other]
        if not good.all():
            entry["text"], entry["text_row"] = entry["text"][good], entry["text_row"][good]
        return entry

    def _draw(self, usable: Tensor, has_text: Tensor) -> Tensor:
        assert self.slices is not None
        order = usable[torch.from_numpy(self.R.permutation(len(usable)))]
        captioned, others = order[has_text[order]], order[~has_text[order]]
        half = max(-(-self.slices // 2), self.slices - len(others))
        return torch.cat((captioned[:half], others))[: self.slices]


def patient_index(data: dict[str, Any], file: str) -> Tensor:
    """Number of an item's patient, the same in every process; without one, of its ``file``."""
    name = patient_name(data, str(data[file]))
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()
    return torch.tensor(int.from_bytes(digest[:8], "big", signed=True))


class PrepareSlices(PrepareBatch):
    """Convert a batch of ``SampleTargetsd`` to (volume, targets, (plane, position), {}).

    Args:
        blank: set the student's volume to zero: a control that leaves it plane and position alone.
    """

    def __init__(self, blank: bool = False) -> None:
        self.blank = blank

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, SliceTargets, tuple[Tensor, Tensor], dict[str, Any]]:
        def get(key: str) -> Tensor:
            value = batchdata[key].as_subclass(Tensor)  # the network needs no metadata
            return value.to(device=device, non_blocking=non_blocking, **kwargs)

        volume = get("image")
        plane, position = get("plane"), get("position")
        targets = SliceTargets(
            get("image_target"), get("text_target"), get("has_text"), get("valid"),
            plane, position, get("modality_index"), volume, get("patient_index"),
        )  # fmt: skip
        student_input = torch.zeros_like(volume) if self.blank else volume
        return student_input, targets, (plane, position), {}
