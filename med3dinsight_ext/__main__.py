"""Command line: quickstart, doctor, captions, transfer-report, label, publish."""

from __future__ import annotations

import fire

from .caption_page import captions
from .doctor import doctor
from .exports import export
from .label import install, label
from .label_bundle import label_bundle
from .publish import publish, push
from .quickstart import quickstart
from .verify import verify
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
            "publish": publish,
            "verify": verify,
            "export": export,
            "push": push,
        }
    )
