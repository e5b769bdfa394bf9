"""Slice tokens of a pre-trained network, and what they say about a volume."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.io.bundles import kind_of
from med3dinsight_ext.io.configs import EVALUATED
from med3dinsight_ext.io.files import volume_stem
from med3dinsight_ext.io.reading import read_json
from med3dinsight_ext.planning.run_folder import PROGRAM, results, trained
from med3dinsight_ext.workflows import infer


def embed(model: str, volume: str, quiet: bool = True, **overrides: Any) -> dict[str, Tensor]:
    """Slice tokens of a volume: vectors in the spaces of the teacher's image and text embeddings.

    Args:
        model: folder of a pre-training or of its published bundle, or owner/name of a repository of
            Hugging Face.
        volume: file, or folder of a DICOM series.
        quiet: print warnings and errors alone.
        overrides: keys of the inference config, as ``grid_per_plane``, the slices of a plane (32).

    Returns:
        plane (n,), position (n,) as a fraction of the file's extent in RAS, and (n, d) tokens of
        unit length for each space: image and text, or joint.

    Raises:
        ValueError: the model is no pre-training, or the file is missing or bad.

    Examples:
        >>> tokens = embed("runs/scans/pretrain", "new.nii.gz")  # doctest: +SKIP
        >>> tokens["image"].shape  # doctest: +SKIP
        torch.Size([96, 1280])
    """
    with tempfile.TemporaryDirectory() as folder:
        stem = _inferred(model, volume, Path(folder), quiet, overrides)
        return load_file(f"{stem}_tokens.safetensors")


def ask(
    model: str,
    volume: str,
    *texts: str,
    out: str | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """Score texts along the axes of a volume by a pre-trained network, with a page to look at.

    Args:
        model: as for ``embed``; pre-trained with captions.
        volume: file, or folder of a DICOM series.
        texts: what to look for, as "the left kidney".
        out: folder to write; default: answers in ``model``.
        quiet: print warnings and errors alone.
        overrides: keys of the inference config.

    Returns:
        For each text and plane the positions as fractions of the file's extent in RAS, the scores
        (cosine of slice token and text), and the position of the best slice.

    Raises:
        ValueError: the model is no pre-training with captions, the file is missing or bad, or
            ``out`` has answers about another volume of this name.
    """
    if not texts:
        raise ValueError(
            f'texts must be given, got none; like {PROGRAM} ask {model} {volume} "the liver"'
        )
    if wrong := [text for text in map(str, texts) if not text or text[0] in EVALUATED]:
        raise ValueError(f"texts must begin with a letter or digit, got {wrong[0]!r}; reword it")
    folder = Path(out) if out else results(model, trained(model)[0], "answers")
    overrides["prompts"] = [str(text) for text in texts]
    answered = folder / f"{volume_stem(volume)}_text.json"
    if answered.is_file():
        other = read_json(answered, "answer").get("image")
        own = str(Path(volume).absolute())
        if other is None or os.path.realpath(other) != os.path.realpath(own):
            raise ValueError(
                f"out must hold no answer about another volume of this name, got {answered} about "
                f"{other}, not {own}; give --out another folder"
            )
    stem = _inferred(model, volume, folder, quiet, overrides)
    found = json.loads(Path(f"{stem}_text.json").read_text("utf-8"))["prompts"]
    if not quiet:
        for text, planes in found.items():
            best = ", ".join(f"{plane} {row['best']:.2f}" for plane, row in planes.items())
            print(f"{text}: best at {best} of the extent")
        page = Path(f"{stem}_text.html")
        print(f"\nlook at {page if page.is_file() else page.with_suffix('.json')}")
    return found


def _inferred(
    model: str, volume: str, folder: Path, quiet: bool, overrides: dict[str, Any]
) -> Path:
    """Run the inference of a pre-trained network; returns the stem of what it wrote."""
    home, bundle, overlays = trained(model)
    if kind_of(bundle) != "pretraining":
        raise ValueError(
            f"model must be a pre-training, got {model}, which is fine-tuned; name the folder that "
            f"{PROGRAM} pretrain wrote"
        )
    path = Path(volume)
    if not path.exists():
        raise ValueError(f"volume must exist, got {volume}; correct the path")
    try:
        infer(home, bundle, overlays, [{"image": str(path.absolute())}], folder, overrides, quiet)
    except RuntimeError:  # MONAI's, of a worker that could not read it as of anything else
        read_volume(str(path))
        raise
    return folder / volume_stem(path)
