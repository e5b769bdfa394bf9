"""Modalities by the names that datasets give them."""

from __future__ import annotations

from med3dinsight_ext.data.slicing import MODALITIES
from med3dinsight_ext.io.errors import told

MODALITY_PREFIXES = {"CT": "CT", "PT": "PET", "PET": "PET", "AUTO": "auto"} | dict.fromkeys(
    ("MR", "T1", "T2", "FLAIR", "PD", "ADC", "DWI"), "MR"
)


def modality_name(name: object) -> str:
    """CT, MR, PET or auto for the modality names of datasets.

    Examples:
        >>> [modality_name(name) for name in ("MRI", "FLAIR", "PT", None)]
        ['MR', 'MR', 'PET', 'auto']
    """
    text = str(name or "auto").upper()
    for prefix, modality in MODALITY_PREFIXES.items():
        if text.startswith(prefix):
            return modality
    raise ValueError(
        f"modality must be {', '.join(MODALITIES)} or auto, got {told(name)}; "
        "set modality to the closest one"
    )
