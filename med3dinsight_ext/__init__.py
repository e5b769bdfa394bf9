"""Pre-train any 3D medical network from a frozen 2D multi-modal model.

The names in ``__all__`` are the public API; each is imported from its module at first use.

Examples:
    >>> import med3dinsight_ext
    >>> med3dinsight_ext.depth(plane=2, position=0.9)
    'uppermost'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a copy in a published bundle holds few of these modules
    from med3dinsight_ext.captions.sources import FileCaptions as FileCaptions
    from med3dinsight_ext.captions.sources import TemplateCaptions as TemplateCaptions
    from med3dinsight_ext.data.datalists import datalist as datalist
    from med3dinsight_ext.data.slicing import choose as choose
    from med3dinsight_ext.data.slicing import cut as cut
    from med3dinsight_ext.data.slicing import depth as depth
    from med3dinsight_ext.data.slicing import plane_number as plane_number
    from med3dinsight_ext.data.slicing import usable as usable
    from med3dinsight_ext.data.slicing import window as window
    from med3dinsight_ext.embeddings.store import Store as Store
    from med3dinsight_ext.embeddings.targets import PrepareSlices as PrepareSlices
    from med3dinsight_ext.embeddings.targets import SampleTargetsd as SampleTargetsd
    from med3dinsight_ext.embeddings.targets import SliceTargets as SliceTargets
    from med3dinsight_ext.losses.alignment import AlignmentLoss as AlignmentLoss
    from med3dinsight_ext.losses.alignment import LossParts as LossParts
    from med3dinsight_ext.losses.cosine import cosine_loss as cosine_loss
    from med3dinsight_ext.losses.info_nce import info_nce_loss as info_nce_loss
    from med3dinsight_ext.losses.partial_transport import (
        partial_transport_loss as partial_transport_loss,
    )
    from med3dinsight_ext.losses.reconstruction import masked_mse as masked_mse
    from med3dinsight_ext.losses.regression import regression_loss as regression_loss
    from med3dinsight_ext.losses.siglip import siglip_loss as siglip_loss
    from med3dinsight_ext.metrics.retrieval import Retrieval as Retrieval
    from med3dinsight_ext.models.classifier import Classifier as Classifier
    from med3dinsight_ext.models.features import encoder_parameters as encoder_parameters
    from med3dinsight_ext.models.features import extract_features as extract_features
    from med3dinsight_ext.models.features import find_features as find_features
    from med3dinsight_ext.models.psat import PSAT as PSAT
    from med3dinsight_ext.models.student import Student as Student
    from med3dinsight_ext.models.student import StudentOutput as StudentOutput
    from med3dinsight_ext.slice_tokens import ask as ask
    from med3dinsight_ext.slice_tokens import embed as embed
    from med3dinsight_ext.teachers.teacher import Teacher as Teacher
    from med3dinsight_ext.teachers.teacher import bundled as bundled
    from med3dinsight_ext.teachers.teacher import hugging_face as hugging_face
    from med3dinsight_ext.teachers.teacher import open_clip as open_clip
    from med3dinsight_ext.teachers.teacher import pair as pair
    from med3dinsight_ext.training.encoder import load_encoder as load_encoder
    from med3dinsight_ext.training.transfer import load_pretrained as load_pretrained
    from med3dinsight_ext.workflows import evaluate as evaluate
    from med3dinsight_ext.workflows import finetune as finetune
    from med3dinsight_ext.workflows import plan as plan
    from med3dinsight_ext.workflows import predict as predict
    from med3dinsight_ext.workflows import pretrain as pretrain

__version__ = "0.1.0"
_MODULES = {
    "data.slicing": ("choose", "cut", "depth", "plane_number", "usable", "window"),
    "data.datalists": ("datalist",),
    "teachers.teacher": ("Teacher", "bundled", "hugging_face", "open_clip", "pair"),
    "captions.sources": ("FileCaptions", "TemplateCaptions"),
    "embeddings.store": ("Store",),
    "embeddings.targets": ("PrepareSlices", "SampleTargetsd", "SliceTargets"),
    "models.psat": ("PSAT",),
    "models.student": ("Student", "StudentOutput"),
    "models.classifier": ("Classifier",),
    "models.features": ("encoder_parameters", "extract_features", "find_features"),
    "losses.alignment": ("AlignmentLoss", "LossParts"),
    "losses.cosine": ("cosine_loss",),
    "losses.info_nce": ("info_nce_loss",),
    "losses.partial_transport": ("partial_transport_loss",),
    "losses.reconstruction": ("masked_mse",),
    "losses.regression": ("regression_loss",),
    "losses.siglip": ("siglip_loss",),
    "metrics.retrieval": ("Retrieval",),
    "training.encoder": ("load_encoder",),
    "training.transfer": ("load_pretrained",),
    "slice_tokens": ("ask", "embed"),
    "workflows": ("evaluate", "finetune", "plan", "predict", "pretrain"),
}
__all__ = sorted(name for names in _MODULES.values() for name in names)


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted({*globals(), *__all__})
