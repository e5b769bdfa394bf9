"""Pre-trained weights into a fine-tuning network: strictly, by name and shape, with a report."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.bundle import ConfigParser
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from med3dinsight_ext.io.configs import with_shared
from med3dinsight_ext.io.files import write_atomic

logger = logging.getLogger(__name__)
NESTED = ("state_dict", "model", "network", "student")  # where others keep the weights in a file
SHOWN = 12  # tensors that a printed report names


@dataclass
class TransferReport:
    """What arrived in a network, and what did not.

    Attributes:
        file: where the weights come from; "" for a start from scratch.
        network: class name of the network they went to.
        loaded: tensors of the network that were set.
        extended: those of them that hold more than the file gave, and what that is.
        skipped: tensors of the network that were not, with the reason.
        unused: tensors of the file that have no place in the network.
        share: of the network's parameters (elements, not tensors) that were set, in [0, 1];
            extended tensors count whole.
        encoder_share: the same of its encoder; None if it was not told apart.
    """

    file: str
    network: str
    loaded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    share: float = 0.0
    encoder_share: float | None = None
    extended: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.file:
            return f"{self.network} starts from scratch: pretrained is not set"
        encoder = "" if self.encoder_share is None else f"; encoder {_percent(self.encoder_share)}"
        total = len(self.loaded) + len(self.skipped)
        lines = [
            f"transfer {self.file} -> {self.network}",
            f"  loaded   {len(self.loaded)} of {total} tensors, "
            f"{_percent(self.share)} of the parameters{encoder}",
        ]
        for title, rows in (
            ("extended", [f"{name}: {what}" for name, what in self.extended.items()]),
            ("skipped", [f"{name}: {reason}" for name, reason in self.skipped.items()]),
            ("unused", self.unused),
        ):
            lines += [f"  {title:<9}{row}" for row in rows[:SHOWN]]
            if len(rows) > SHOWN:
                lines += [f"  {title:<9}… and {len(rows) - SHOWN} more"]
        return "\n".join(lines)


def _percent(share: float) -> str:
    """100 % only if nothing is missing."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.99):.2f} %"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a weights file by name; no code in it is ever run.

    Args:
        path: .safetensors, or what ``torch.save`` wrote: a flat state dict, or one that holds it
            under "state_dict", "model", "network" or "student" (then only its network is taken).

    Raises:
        ValueError: it is missing, empty, broken, holds objects other than tensors, or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"pretrained must be a weights file, got no file at {path}; correct it")
    if not path.stat().st_size:
        raise ValueError(f"pretrained must hold weights, got the empty file {path}; copy it again")
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"pretrained must hold tensors only, got {path}, which is broken or holds objects that "
            f"would run code when loaded ({reason}); save network.state_dict() alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"pretrained must be readable, got the broken file {path} ({error}); copy it again"
        ) from error
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            if key == "student":  # network, PSAT and heads
                content = {
                    name.removeprefix("network."): value
                    for name, value in content.items()
                    if name.startswith("network.")
                }
    tensors = (
        {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        found = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"pretrained must hold named tensors, got {found} in {path}")
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"pretrained must be finite, got NaN or infinity in {bad[:3]} of {path}")
    return tensors


def renamed(weights: Mapping[str, Tensor], rename: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights under other names.

    Args:
        weights: name to tensor.
        rename: regular expression to replacement, applied to every name in this order.

    Raises:
        ValueError: a pattern matches no name, or two tensors get one name.
    """
    result = dict(weights)
    for pattern, replacement in rename.items():
        if not any(re.search(pattern, name) for name in result):
            raise ValueError(
                f"rename must match names in the file, got {pattern!r}, which matches none; "
                f"the file has {', '.join(list(result)[:3])} …"
            )
        new = {re.sub(pattern, replacement, name): value for name, value in result.items()}
        if len(new) < len(result):
            raise ValueError(f"rename must keep names apart, but {pattern!r} joins some")
        result = new
    return result


def match(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    report: TransferReport,
    parameters: Iterable[str],
    encoder: Iterable[str] | None = None,
    growing: Collection[str] = (),
) -> dict[str, Tensor]:
    """The tensors of ``source`` that fit into ``target`` by name and shape; fills ``report``.

    Args:
        source: weights at hand.
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


def growing_inputs(network: nn.Module, source: Mapping[str, Tensor]) -> list[str]:
    """Weights of a network's input convolutions, if it has more input channels than ``source``.

    The first convolution tells how many channels there were and are. Others that differ in just
    the same way read the input too: residual branches, skip connections.

    Args:
        network: whose first convolution, in the order of its modules, reads the input.
        source: weights at hand.
    """
    shapes = {
        f"{prefix}.weight".lstrip("."): module.weight.shape
        for prefix, module in network.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    changes = {
        name: (source[name].shape[1], ours[1])
        for name, ours in shapes.items()
        if name in source and source[name].shape[:1] + source[name].shape[2:] == ours[:1] + ours[2:]
    }
    first = changes.get(next(iter(shapes), ""))
    if first is None or first[0] >= first[1]:
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
    """Copy weights into a network by name and shape, or say why not; all or nothing.

    Args:
        network: is changed.
        path: as in ``read_weights``.
        rename: as in ``renamed``, for weights that stand under other names.
        min_match: share of the encoder's parameters that must arrive, in (0, 1]; of all
            parameters if ``encoder`` is None.
        encoder: names of the encoder's parameters.
        add_channels: the network may have more input channels than the file; the extra ones start
            at zero weight, so that it computes what it did without them.

    Raises:
        ValueError: less than ``min_match`` fits; names the likely cause.
    """
    if not 0 < min_match <= 1:
        raise ValueError(f"min_match must be in (0, 1], got {min_match}")
    source = renamed(read_weights(path), rename or {})
    target = network.state_dict()
    if not any(name in target for name in source) and all(n.startswith("module.") for n in source):
        source = {name.removeprefix("module."): value for name, value in source.items()}  # DDP's
    report = TransferReport(str(path), type(network).__name__)
    growing = growing_inputs(network, source) if add_channels else ()
    fitting = match(source, target, report, dict(network.named_parameters()), encoder, growing)
    arrived = report.share if report.encoder_share is None else report.encoder_share
    if not fitting or arrived < min_match:
        of = "parameters" if encoder is None else "encoder's parameters"
        raise ValueError(
            f"pretrained must fill {_percent(min_match)} of the {of} of {report.network}, got "
            f"{_percent(arrived)}: {_cause(source, target, report, encoder)}\n{report}"
        )
    network.load_state_dict({**target, **fitting})
    return report


def _cause(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    report: TransferReport,
    encoder: Sequence[str] | None,
) -> str:
    """The likeliest reason for what did not arrive, and the remedy."""
    skipped = [n for n in (encoder or target) if n in report.skipped]
    other = [name for name in skipped if name in source]
    for name in other:
        theirs, ours = source[name].shape, target[name].shape
        if (
            len(theirs) == len(ours) > 2
            and theirs[1] != ours[1]
            and (theirs[0], *theirs[2:]) == (ours[0], *ours[2:])
            and 4 > min(theirs[1], ours[1])
        ):
            more = ", or let extra ones start at zero with add_channels=True"
            return (
                f"{name} takes {theirs[1]} input channels in the file and {ours[1]} in the "
                f"network; build the network with in_channels={theirs[1]}"
                f"{more if theirs[1] < ours[1] else ''}"
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
    theirs_, ours_ = ", ".join(list(source)[:2]), ", ".join(skipped[:2])
    return (
        f"another backbone, or names with another prefix (file: {theirs_} …; network: {ours_} …); "
        "use the backbone of the pre-training, or map the names with rename; min_match lets "
        "a network start with less"
    )


class Transfer:
    """Weights for a run to start from, and the report that stays with it.

    Args:
        network: to fill.
        path: weights file; None starts from scratch.
        report_file: JSON that the report is written to.
        rename: as in ``load_pretrained``.
        min_match: as in ``load_pretrained``.
        encoder: names of the encoder's parameters.
        add_channels: as in ``load_pretrained``.
    """

    def __init__(
        self,
        network: nn.Module,
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
        self.rename = rename
        self.min_match = min_match
        self.encoder = encoder
        self.add_channels = add_channels
        self.report = TransferReport("", type(network).__name__)

    def load(self) -> TransferReport:
        """Fill the network, log the report and write it."""
        if self.path:
            self.report = load_pretrained(
                self.network, self.path, self.rename, self.min_match, self.encoder,
                self.add_channels,
            )  # fmt: skip
        if idist.get_rank() == 0:
            logger.info(str(self.report))
            text = json.dumps(asdict(self.report), indent=1)
            write_atomic(self.report_file, lambda draft: draft.write_text(text))
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """The report as plain data, for a checkpoint."""
        return {"report": asdict(self.report)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the report of the run that is resumed."""
        self.report = TransferReport(**state["report"])


def parameter_groups(
    network: nn.Module,
    encoder: Sequence[str],
    learning_rate: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Optimiser groups with a learning rate that rises through the encoder (layer-wise decay).

    Args:
        network: all its parameters are in the groups.
        encoder: names of the encoder's parameters, in the order in which they act.
        learning_rate: of everything behind the encoder.
        layer_decay: learning rate of the first encoder layer as a share of ``learning_rate``, in
            (0, 1]; those between rise geometrically (Howard and Ruder, 2018, arXiv:1801.06146).
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(
            f"layer_decay must be in (0, 1], got {layer_decay}; 1 trains all layers alike, "
            "freeze_epochs keeps the encoder fixed"
        )
    parameters = dict(network.named_parameters())
    if layer_decay == 1:
        return [{"params": list(parameters.values()), "lr": learning_rate}]
    layers: dict[str, list[nn.Parameter]] = {}
    for name in encoder:
        layers.setdefault(name.rpartition(".")[0], []).append(parameters.pop(name))
    groups = [
        {"params": layer, "lr": learning_rate * layer_decay ** (1 - i / len(layers))}
        for i, layer in enumerate(layers.values())
    ]
    rest = list(parameters.values())
    return [*groups, *([{"params": rest, "lr": learning_rate}] if rest else [])]


def transfer_report(weights: str, network: str, **overrides: Any) -> None:
    """Print what would arrive, without training.

    Args:
        weights: file with the weights at hand.
        network: config of a fine-tuning bundle, or several with commas (train.json and a backbone
            overlay), whose ``backbone`` is to be filled; or a second weights file.
        overrides: of the config, as in ``monai.bundle run``.
    """
    if network.endswith((".json", ".yaml", ".yml")):
        first, *overlays = network.split(",")
        parser = ConfigParser(ConfigParser.load_config_files([*with_shared(first), *overlays]))
        parser.update({"bundle_root": ".", **overrides})
        ours = parser.get_parsed_content("transfer")
        least = torch.finfo().tiny  # anything that arrives is worth a report
        given = ours.rename, least, ours.encoder, ours.add_channels
        print(load_pretrained(ours.network, weights, *given))
        return
    source, target = read_weights(weights), read_weights(network)
    report = TransferReport(weights, network)
    match(source, target, report, target)
    print(report)
