"""Losses between slice tokens and teacher embeddings, reconstruction and deep supervision."""

from med3dinsight_ext.losses.alignment import AlignmentLoss, LossParts
from med3dinsight_ext.losses.cosine import cosine_loss
from med3dinsight_ext.losses.deep_supervision import DeepSupervision
from med3dinsight_ext.losses.info_nce import info_nce_loss
from med3dinsight_ext.losses.partial_transport import mahalanobis, partial_transport_loss
from med3dinsight_ext.losses.reconstruction import masked_mse
from med3dinsight_ext.losses.regression import Residual, regression_loss
from med3dinsight_ext.losses.siglip import siglip_loss
from med3dinsight_ext.losses.transport import Plan, solve

__all__ = [
    "AlignmentLoss",
    "DeepSupervision",
    "LossParts",
    "Plan",
    "Residual",
    "cosine_loss",
    "info_nce_loss",
    "mahalanobis",
    "masked_mse",
    "partial_transport_loss",
    "regression_loss",
    "siglip_loss",
    "solve",
]
