"""Transfer of pre-trained weights into a fine-tuning network, by name and shape."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from med3dinsight_ext.io.configs import with_shared
from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.training.transfer_report import TransferReport, percent
from med3dinsight_ext.training.weights import read_weights, renamed

logger = logging.getLogger(__name__)


def match(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    report: TransferReport,
    parameters: Iterable[str],
    encoder: Iterable[str] | None = None,
    growing: Collection[str] = (),
) -> dict[str, Tensor]:
    """Tensors of ``source`` that fit into ``target`` by name and shape; fills in ``report``.

    Args:
        source: weights of the file.
        target: state dict to fill.
        report: its lists and shares are set.
        parameters: names in ``target`` that count for ``share``.
        encoder: names in ``target`` that count for ``encoder_share``.
        growing: names of convolution weights, (out, in, ...), that may take more input channels
            than the file has; the extra ones are zero.
    """
    fitting = {}
    for name, value in target.items():
        if name not in source:
            report.skipped[name] = "not in the file"
        elif name in growing:
            given = source[name].to(value.dtype)
            fitting[name] = torch.zeros_like(value, device=given.device)
            fitting[name][:, : given.shape[1]] = given
            extra = value.shape[1] - given.shape[1]
            many = "s start" if extra > 1 else " starts"
            report.extended[name] = f"{extra} extra input channel{many} at zero"
        elif source[name].shape != value.shape:
            shapes = f"{tuple(source[name].shape)}, the network's is {tuple(value.shape)}"
            report.skipped[name] = f"its shape in the file is {shapes}"
        else:
            fitting[name] = source[name].to(value.dtype)
    report.loaded = list(fitting)
    report.unused = [name for name in source if name not in target]

    def share(names: Iterable[str]) -> float:
        sizes = {name: target[name].numel() for name in names}
        return sum(sizes[n] for n in sizes if n in fitting) / max(1, sum(sizes.values()))

    report.share = share(parameters)
    report.encoder_share = None if encoder is None else share(encoder)
    return fitting


def _differ_in_inputs(theirs: torch.Size, ours: torch.Size) -> bool:
    """Whether two shapes of a convolution's weight differ in the input channels at most."""
    return theirs[:1] + theirs[2:] == ours[:1] + ours[2:] and len(ours) > 2


def growing_inputs(network: nn.Module, source: Mapping[str, Tensor]) -> list[str]:
    """Weights of a network's input convolutions, if it has more input channels than the image.

    The numbers of channels are those of the first convolution. Others that differ in the same way
    read the input too: residual branches, skip connections.

    Args:
        network: whose first convolution, in the order of its modules, reads the input.
        source: weights of the file.
    """
    shapes = {
        f"{prefix}.weight".lstrip("."): module.weight.shape
        for prefix, module in network.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    changes = {
        name: (source[name].shape[1], ours[1])
        for name, ours in shapes.items()
        if name in source and _differ_in_inputs(source[name].shape, ours)
    }
    first = changes.get(next(iter(shapes), ""))
    if first is None or first[0] != 1 or first[1] == 1:  # clicks would come before earlier answers
        return []
    return [name for name, change in changes.items() if change == first]


def load_pretrained(
    network: nn.Module,
    path: str | Path,
    rename: Mapping[str, str] | None = None,
    min_match: float = 1.0,
    encoder: Sequence[str] | None = None,
    add_channels: bool = False,
) -> TransferReport:
    """Copy weights into a network by name and shape; all of them, or an error names the cause.

    Args:
        network: is changed.
        path: as in ``read_weights``.
        rename: as in ``renamed``, for weights with other names.
        min_match: share of the encoder's parameters that must be loaded, in (0, 1]; of all
            parameters if ``encoder`` is None.
        encoder: names of the encoder's parameters.
        add_channels: the network may have more input channels than the one of the file; the extra
            ones start at zero weight, so that its output is the same as without them.

    Raises:
        ValueError: less than ``min_match`` fits; names the likely cause.
    """
    if not 0 < min_match <= 1:
        raise ValueError(f"min_match must be in (0, 1], got {min_match}")
    source = renamed(read_weights(path), rename or {})
    target = network.state_dict()
    source = _without_ddp(source, target)
    report = TransferReport(str(path), type(network).__name__)
    growing = growing_inputs(network, source) if add_channels else ()
    fitting = match(source, target, report, dict(network.named_parameters()), encoder, growing)
    arrived = report.share if report.encoder_share is None else report.encoder_share
    if not fitting or arrived < min_match:
        of = "parameters" if encoder is None else "encoder's parameters"
        raise ValueError(
            f"pretrained must fill {percent(min_match)} of the {of} of {report.network}, got "
            f"{percent(arrived)}: {_cause(source, target, report, encoder)}\n{report}"
        )
    network.load_state_dict({**target, **fitting})
    return report


def _without_ddp(source: dict[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the prefix of ``DistributedDataParallel``, unless the network has it too."""
    if any(name in target for name in source) or not all(n.startswith("module.") for n in source):
        return source
    return {name.removeprefix("module."): value for name, value in source.items()}


def _cause(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    report: TransferReport,
    encoder: Sequence[str] | None,
) -> str:
    """The likeliest reason why tensors were skipped, and the fix."""
    skipped = [n for n in (encoder or target) if n in report.skipped]
    other = [name for name in skipped if name in source]
    for name in other:
        theirs, ours = source[name].shape, target[name].shape
        if _differ_in_inputs(theirs, ours) and min(theirs[1], ours[1]) < 4:
            more = ", or let extra ones start at zero with add_channels=True"
            return (
                f"{name} takes {theirs[1]} input channels in the file and {ours[1]} in the network;"
                f" build the network with in_channels={theirs[1]}{more * (theirs[1] < ours[1])}"
            )
    if any("pos" in name for name in other):
        return (
            "the position embedding has another length, so another patch_size; use that of the "
            "pre-training"
        )
    if other:
        return (
            "the names are the same but the shapes differ, so the backbone has another width or "
            "patch size; use the backbone of the pre-training"
        )
    return (
        f"another backbone, or names with another prefix (file: {', '.join(list(source)[:2])} …; "
        f"network: {', '.join(skipped[:2])} …); use the backbone of the pre-training, or map the "
        "names with rename; min_match lets a network start with less"
    )


class Transfer:
    """Loads the weights that a run starts from, and keeps the report in its checkpoints.

    Args:
        network: to fill; None if there is none.
        path: weights file; None starts from scratch.
        report_file: JSON file to write.
        rename: as in ``load_pretrained``.
        min_match: as in ``load_pretrained``.
        encoder: names of the encoder's parameters.
        add_channels: as in ``load_pretrained``.
    """

    def __init__(
        self,
        network: nn.Module | None,
        path: str | Path | None,
        report_file: str | Path,
        rename: Mapping[str, str] | None = None,
        min_match: float = 1.0,
        encoder: Sequence[str] | None = None,
        add_channels: bool = False,
    ) -> None:
        self.network = network
        self.path = path
        self.report_file = Path(report_file)
        self.options: dict[str, Any] = dict(
            rename=rename, min_match=min_match, encoder=encoder, add_channels=add_channels
        )
        self.report = TransferReport("", type(network).__name__)

    def load(self) -> TransferReport:
        """Fill the network, log the report and write it.

        Raises:
            ValueError: as in ``load_pretrained``, or there is a file but no network.
        """
        if self.network is None:
            if self.path:
                raise ValueError(
                    f"pretrained must have a network to fill, got {self.path} and no backbone; "
                    "add the backbone overlay of the pre-training, or leave pretrained out"
                )
            return self.report
        if self.path:
            self.report = load_pretrained(self.network, self.path, **self.options)
        if idist.get_rank() == 0:
            logger.info(str(self.report))
            text = json.dumps(asdict(self.report), indent=1)
            write_atomic(self.report_file, lambda draft: draft.write_text(text))
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """The report as plain data, for a checkpoint."""
        return {"report": asdict(self.report)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the report of the run that is resumed."""
        self.report = TransferReport(**state["report"])


def transfer_report(weights: str, network: str, **overrides: Any) -> None:
    """Print the report of a transfer, without training.

    Args:
        weights: weights file.
        network: config of a fine-tuning bundle, or several with commas (train.json and a backbone
            overlay), with the ``backbone`` to fill; or a second weights file.
        overrides: of the config, as in ``monai.bundle run``.
    """
    if network.endswith((".json", ".yaml", ".yml")):
        first, *overlays = network.split(",")
        parser = ConfigParser(ConfigParser.load_config_files([*with_shared(first), *overlays]))
        parser.update({"bundle_root": ".", **overrides})
        ours = parser.get_parsed_content("transfer")
        any_match = {"min_match": torch.finfo().tiny}
        print(load_pretrained(ours.network, weights, **{**ours.options, **any_match}))
        return
    source, target = read_weights(weights), read_weights(network)
    report = TransferReport(weights, network)
    match(_without_ddp(source, target), target, report, target)
    print(report)
