"""Command line: quickstart, doctor, captions, transfer-report, label."""

from __future__ import annotations

import fire

from .caption_page import captions
from .doctor import doctor
from .label import install, label
from .label_bundle import label_bundle
from .quickstart import quickstart
from .weights import transfer_report

if __name__ == "__main__":
    fire.Fire(
        {
            "quickstart": quickstart,
            "doctor": doctor,
            "captions": captions,
            "transfer-report": transfer_report,
            "label": label,
            "label-install": install,
            "label-bundle": label_bundle,
        }
    )
